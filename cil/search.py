"""Finding a student for a teacher before anything is trained: DisWOT's score, maximised by evolution (`kd.search`)."""

import math
from collections.abc import Callable
from functools import cache
from random import Random
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from cil.models.network import InputShape, Network, models
from cil.seeding import derive
from kd import Tapped
from kd.search.diswot import DisWOT, Initialisation, Match, Score, Terms
from kd.search.evolution import evolve, num_parameters

if TYPE_CHECKING:  # cil.config has `Search` as a section
    from cil.config import Part

Blocks = tuple[int, int, int]

#: The space S1: residual networks of 16, 32 and 64 channels with so many blocks in each of their three stages.
S1_CHOICES = (1, 3, 5, 7)
S1_WIDTH = 64  # of the embedding
_FAMILY = {"name": "resnet_cifar", "shortcut": "conv"}


class Search(BaseModel):
    """How a student is found before it is trained.

    Attributes:
        method: What predicts how well a student will do.
        space: Where it is looked for: `s1` are the 64 networks of DisWOT's table, written as a code such as 557.
        num_evaluations: Candidates looked at, of which those that come again are not scored again.
        population: Newest candidates that may become parents; the first so many are drawn.
        tournament: Candidates that compete to become a parent.
        max_parameters: Budget of the student with its head; null for none.
        num_seeds: Repeats that a score is the mean of, each with new weights and other images.
        batch_size: Images of each.
        init: How weights are drawn: each network's own way, or its convolutions anew. In front of a BatchNorm the size
            of weights has no effect, only their direction.
        terms: What the score is the sum of.
        match: What is done where the embedding of the teacher is not as wide as that of the students.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    method: Literal["diswot"] = "diswot"
    space: Literal["s1"] = "s1"
    num_evaluations: int = Field(100, gt=0)
    population: int = Field(36, gt=0)
    tournament: int = Field(8, gt=0)
    max_parameters: int | None = Field(None, gt=0)
    num_seeds: int = Field(5, ge=3)
    batch_size: int = Field(128, gt=1)
    init: Initialisation = "default"
    terms: Terms = "both"
    match: Match = "refuse"

    @model_validator(mode="after")
    def _fits(self) -> "Search":
        if self.tournament > self.population:
            raise ValueError(f"search.tournament={self.tournament} must be at most search.population={self.population}")
        return self

    def sample(self, labels: Int[Tensor, " samples"], seed: int) -> Int[Tensor, " drawn"]:
        """The ids of the images that candidates are shown, all repeats one behind the other.

        Args:
            labels: Labels of the training images; negative where an image is not used for training.
            seed: The run's.

        Raises:
            ValueError: If there are too few images.
        """
        usable, needed = torch.nonzero(labels >= 0).flatten(), self.num_seeds * self.batch_size
        if len(usable) < needed:
            raise ValueError(
                f"search.num_seeds={self.num_seeds} times search.batch_size={self.batch_size} need {needed} training "
                f"images, found {len(usable)}"
            )
        generator = torch.Generator().manual_seed(derive(seed, "search", "images"))
        return usable[torch.randperm(len(usable), generator=generator)[:needed]]


class Candidate(BaseModel):
    """A network of the space that was looked at.

    Attributes:
        code: Blocks of its stages, such as "557".
        num_parameters: With its head.
        score: Higher is better; null where it is no finite number.
        relation, semantic: The terms of the score; null where one was not asked for.
        spread: Standard deviation of the score between the repeats.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    code: str
    num_parameters: int
    score: float | None
    relation: float | None
    semantic: float | None
    spread: float | None


class SearchResult(BaseModel):
    """What a search found. `model_dump_json` writes it and `model_validate_json` reads it back.

    Attributes:
        settings: Of the search.
        seed: Of the run.
        student: The network of the highest score, `name` and hyper-parameters as in the section `model`.
        winner: The same as a candidate.
        candidates: Everything that was looked at, in order; one that came again stands there again.
        ties: Codes of equal scores, the best first: the order among them means nothing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    settings: Search
    seed: int
    student: dict[str, Any]
    winner: Candidate
    candidates: list[Candidate]
    ties: list[list[str]]


def code_of(blocks: Blocks) -> str:
    """The code of a network of S1."""
    return "".join(map(str, blocks))


def student_part(blocks: Blocks) -> "Part":
    """A network of S1 as a part, whole with its defaults."""
    from cil.checking import schema
    from cil.config import Part

    values = {key: value for key, value in _FAMILY.items() if key != "name"} | {"blocks": list(blocks)}
    name = _FAMILY["name"]
    return Part(name=name, **schema(models[name])(**values).model_dump())


def draw(random: Random) -> Blocks:
    """A network of S1."""
    return (random.choice(S1_CHOICES), random.choice(S1_CHOICES), random.choice(S1_CHOICES))


def mutate(blocks: Blocks, random: Random) -> Blocks:
    """The same network with another number of blocks in one stage."""
    stage = random.randrange(len(blocks))
    other = random.choice([choice for choice in S1_CHOICES if choice != blocks[stage]])
    changed = [other if i == stage else count for i, count in enumerate(blocks)]
    return (changed[0], changed[1], changed[2])


class StudentScore:
    """Scores networks of the space for one teacher, which is drawn at random too, as published.

    Args:
        settings: Of the search.
        input_shape: Channels, height and width of an image.
        num_classes: Classes that student and teacher tell apart.
        images: Normalised images (`Search.sample`), on the device that scores.
        labels: Their labels.
        seed: The run's.
        teacher: The architecture of the teacher.

    Raises:
        ValueError: If there are not as many images as the settings need, or the teacher cannot be compared with the
            students.
    """

    def __init__(
        self,
        settings: Search,
        input_shape: InputShape,
        num_classes: int,
        images: Float[Tensor, "images channels height width"],
        labels: Int[Tensor, " images"],
        seed: int,
        teacher: "Part",
    ) -> None:
        if len(images) != settings.num_seeds * settings.batch_size:
            raise ValueError(
                f"the search needs {settings.num_seeds} batches of {settings.batch_size} images, found {len(images)}"
            )
        self.input_shape, self.num_classes = input_shape, num_classes
        with torch.random.fork_rng(devices=[]):  # a look at a network must not change what the run draws next
            _comparable(teacher, self._network(teacher), settings)
        batches = [*zip(*(torch.split(part, settings.batch_size) for part in (images, labels)), strict=True)]
        self.diswot = DisWOT(
            self._factory(teacher),
            batches,
            terms=settings.terms,
            initialisation=settings.init,
            match=settings.match,
            seed=derive(seed, "search", "weights") % 2**32,
        )

    def __call__(self, blocks: Blocks) -> Score:
        """The score of a network."""
        return self.diswot(self._factory(student_part(blocks)))

    def num_parameters(self, blocks: Blocks) -> int:
        """The size of a network with its head."""
        with torch.device("meta"):
            return num_parameters(self._network(student_part(blocks)))

    def _network(self, part: "Part") -> Network:
        network: Network = models[part.name](self.input_shape, **part.parameters)
        network.grow(self.num_classes)
        return network

    def _factory(self, part: "Part") -> Callable[[], Tapped]:
        def make() -> Tapped:  # from the global generator, which DisWOT seeds: new weights in every repeat
            network = self._network(part)
            return Tapped(network, {"last": network.tap_paths().outputs["last"]})

        return make


def find_student(
    settings: Search,
    input_shape: InputShape,
    num_classes: int,
    images: Float[Tensor, "images channels height width"],
    labels: Int[Tensor, " images"],
    seed: int,
    teacher: "Part",
) -> SearchResult:
    """The student that DisWOT expects most of, beside this teacher; the same from the same seed, to the bit.

    Nothing is trained, and no test image is looked at.

    Args:
        settings: Of the search.
        input_shape: Channels, height and width of an image.
        num_classes: Classes that student and teacher tell apart.
        images: Normalised images (`Search.sample`), on the device that scores.
        labels: Their labels.
        seed: The run's.
        teacher: The architecture of the teacher.

    Raises:
        ValueError: If the images are not as many as needed, the teacher cannot be compared with the students, or no
            student is within the budget or has a finite score.
    """
    score = StudentScore(settings, input_shape, num_classes, images, labels, seed, teacher)
    return search(settings, score, score.num_parameters, seed)


def search(
    settings: Search, score: Callable[[Blocks], Score], num_parameters: Callable[[Blocks], int], seed: int
) -> SearchResult:
    """The evolution of `find_student`, by any score; no network is scored twice.

    Args:
        settings: Of the search.
        score: Higher is better.
        num_parameters: The size of a network.
        seed: The run's.

    Raises:
        ValueError: If no student is within the budget or has a finite score.
    """
    score, size = cache(score), cache(num_parameters)
    budget = settings.max_parameters
    smallest: Blocks = (S1_CHOICES[0], S1_CHOICES[0], S1_CHOICES[0])
    if budget is not None and size(smallest) > budget:
        raise ValueError(
            f"search.max_parameters={budget} leaves no network: the smallest of {settings.space} has {size(smallest)}"
        )

    def candidate(blocks: Blocks) -> Candidate:
        found = score(blocks)
        finite = [v if math.isfinite(v) else None for v in (found.value, found.relation, found.semantic, found.spread)]
        value, relation, semantic, spread = finite
        return Candidate(
            code=code_of(blocks),
            num_parameters=size(blocks),
            score=value,
            relation=relation,
            semantic=semantic,
            spread=spread,
        )

    found = evolve(
        lambda blocks: score(blocks).value,
        draw,
        mutate,
        evaluations=settings.num_evaluations,
        population=settings.population,
        tournament=settings.tournament,
        allowed=None if budget is None else lambda blocks: size(blocks) <= budget,
        seed=derive(seed, "search", "evolution"),
    )
    best = found.best.genotype
    part = student_part(best)
    return SearchResult(
        settings=settings,
        seed=seed,
        student={"name": part.name, **part.parameters},
        winner=candidate(best),
        candidates=[candidate(seen.genotype) for seen in found.history],
        ties=[[code_of(blocks) for blocks in group] for group in found.ties],
    )


def _comparable(part: "Part", teacher: Network, settings: Search) -> None:
    if settings.terms != "semantic" and "last" not in teacher.tap_paths().outputs:
        raise ValueError(
            f"search: teacher {part.name} has no map that is pooled (tap 'last'), which the relation of DisWOT "
            "compares with that of the students: take a convolutional teacher"
        )
    if settings.terms != "relation" and settings.match == "refuse" and teacher.embedding_width != S1_WIDTH:
        raise ValueError(
            f"search: the semantic term compares equal widths only, and the students of {settings.space} have an "
            f"embedding of width {S1_WIDTH}, teacher {part.name} one of {teacher.embedding_width}. Take a teacher of "
            f"width {S1_WIDTH} (resnet8 to resnet110, wrn_16_1, wrn_40_1), or search.terms=relation, or "
            "search.match=pool or project, which are not in the paper"
        )
