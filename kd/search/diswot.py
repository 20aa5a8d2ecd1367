"""DisWOT: which student learns best from a teacher, without training (Dong et al., CVPR 2023, arXiv:2303.15678)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from kd.base import Outputs
from kd.feature.sp import similarity
from kd.precision import full_precision, no_autocast

Factory = Callable[[], nn.Module]
Terms = Literal["both", "relation", "semantic"]
Initialisation = Literal["default", "kaiming", "normal"]
Match = Literal["refuse", "pool", "project"]

_FEWEST_REPEATS = 3
_PROJECTION_SEED = 0  # the projection is part of the score, the same for every candidate


def relation_score(student: Float[Tensor, "batch ..."], teacher: Float[Tensor, "batch ..."]) -> Float[Tensor, ""]:
    """Minus the SP loss (`kd.feature.sp`) of the maps that are pooled; at most 0, higher is better."""
    return -F.mse_loss(similarity(student), similarity(teacher), reduction="mean")


def head_gradient(
    logits: Float[Tensor, "batch classes"], embedding: Float[Tensor, "batch width"], labels: Int[Tensor, " batch"]
) -> Float[Tensor, "classes width"]:
    """The gradient of the mean cross-entropy by the weight of a linear head: $\\frac{1}{B} (p - y)^T e$.

    Args:
        logits: Scores of the head.
        embedding: What the head reads.
        labels: Class labels.

    Raises:
        ValueError: If a label is no class of the head.
    """
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        raise ValueError(
            f"the head scores {logits.shape[1]} classes, but there are labels from {int(labels.min())} to "
            f"{int(labels.max())}: give batches of classes that both networks know"
        )
    with no_autocast(logits.device):
        error = F.softmax(full_precision(logits), dim=1) - F.one_hot(labels, logits.shape[1])
        return einsum(error, full_precision(embedding).to(error), "b k, b c -> k c") / len(labels)


def semantic_score(student: Float[Tensor, "classes width"], teacher: Float[Tensor, "others wide"]) -> Float[Tensor, ""]:
    """How alike the gradients of both heads are, class by class; at most 0, higher is better.

    $-\\frac{1}{CK} \\sum_k \\|\\hat G_k(s) - \\hat G_k(t)\\|_F^2$, where $\\hat G_k$ is $g_k g_k^T$ with rows of length
    1, so its row i is $\\mathrm{sign}(g_{ki})\\, g_k / \\|g_k\\|$. It is computed in this form, without the C x C
    matrices: $\\|\\hat G_k(s) - \\hat G_k(t)\\|^2 = n_s + n_t - 2 \\langle \\mathrm{sign}\\, g_k(s), \\mathrm{sign}\\,
    g_k(t) \\rangle \\langle \\hat g_k(s), \\hat g_k(t) \\rangle$ with n the number of entries that are not 0.

    Args:
        student, teacher: Gradients g of the heads (`head_gradient`).

    Raises:
        ValueError: If the shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            "the semantic score needs equal classes and widths, found gradients [classes, width] of "
            f"{tuple(student.shape)} of the student and {tuple(teacher.shape)} of the teacher: use match='pool' or "
            "match='project', or the relation alone"
        )
    s, t = student.double(), teacher.double()  # the squares of small gradients would be 0 in float32
    with no_autocast(student.device):
        same_sign = einsum(s.sign(), t.sign(), "k c, k c -> k")
        cosine = einsum(_directions(s), _directions(t), "k c, k c -> k")
    distance: Tensor = s.sign().abs().sum() + t.sign().abs().sum() - 2 * (same_sign * cosine).sum()
    return -distance / student.numel()


def _directions(gradient: Tensor) -> Tensor:
    lengths = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
    directions: Tensor = gradient / lengths.where(lengths != 0, 1)  # a gradient of zeros has none
    return directions


def matched(
    student: Float[Tensor, "classes width"], teacher: Float[Tensor, "others wide"], match: Match
) -> tuple[Float[Tensor, "_ _"], Float[Tensor, "_ _"]]:
    """Both gradients at the smaller number of classes and the smaller width; not in the paper.

    Args:
        student, teacher: Gradients of the heads.
        match: `refuse` leaves them as they are, `pool` averages neighbouring classes and channels, `project` turns them
            into fewer by a fixed random projection with orthonormal columns.
    """
    if match == "refuse" or student.shape == teacher.shape:
        return student, teacher
    shape = (min(student.shape[0], teacher.shape[0]), min(student.shape[1], teacher.shape[1]))
    if match == "pool":
        pooled = [rearrange(F.adaptive_avg_pool2d(g[None], shape), "1 k c -> k c") for g in (student, teacher)]
        return pooled[0], pooled[1]
    return _projected(student, shape), _projected(teacher, shape)


def _projected(gradient: Tensor, shape: tuple[int, int]) -> Tensor:
    for dim, size in enumerate(shape):
        if gradient.shape[dim] != size:
            generator = torch.Generator().manual_seed(_PROJECTION_SEED)
            drawn = torch.randn(gradient.shape[dim], size, dtype=gradient.dtype, generator=generator)
            basis = torch.linalg.qr(drawn).Q.to(gradient.device)
            gradient = torch.tensordot(gradient.movedim(dim, -1), basis, 1).movedim(-1, dim)
    return gradient


@dataclass(frozen=True)
class Score:
    """What is expected of a student, averaged over repeats.

    Attributes:
        value: The score: the sum of the terms that were asked for; higher is better. NaN if it cannot be computed.
        relation, semantic: The two terms; NaN where it was not asked for.
        spread: Standard deviation of the score between the repeats.
    """

    value: float
    relation: float
    semantic: float
    spread: float


class DisWOT:
    """Scores students for one teacher, both randomly initialised, by what they make of a few batches.

    Repeat i draws both networks anew and looks at batch i. The teacher's networks are the same for every student, and
    student and teacher are drawn independently of each other. Networks run in training mode: the running statistics of
    BatchNorm say nothing yet.

    Args:
        teacher: Makes a new teacher on the CPU; the network returns `Outputs` with logits and, by the terms, the tap
            "last" (relation) and the embedding (semantic). `kd.taps` makes such networks of others.
        batches: Images and labels, at least 3 batches.
        terms: What is summed. The release has `relation` in its search of the Zen space and `semantic` in that of
            NAS-Bench-201.
        initialisation: `default` is the network's own; `kaiming` and `normal` (standard deviation 1) draw the weights
            of convolutions and linear layers again and set their biases to 0.
        match: What the semantic score does where classes or widths differ (`matched`).
        seed: Of the repeats.

    Raises:
        ValueError: If there are less than 3 batches or a choice is unknown; on use, if an output is missing.
    """

    def __init__(
        self,
        teacher: Factory,
        batches: Sequence[tuple[Tensor, Tensor]],
        *,
        terms: Terms = "both",
        initialisation: Initialisation = "default",
        match: Match = "refuse",
        seed: int = 0,
    ) -> None:
        if len(batches) < _FEWEST_REPEATS:
            raise ValueError(
                f"scores of random networks vary: at least {_FEWEST_REPEATS} batches are needed, found {len(batches)}"
            )
        choices = {"terms": (terms, Terms), "initialisation": (initialisation, Initialisation), "match": (match, Match)}
        for name, (value, known) in choices.items():
            if value not in get_args(known):
                raise ValueError(f"{name} must be one of {', '.join(get_args(known))}, found {value!r}")
        self.batches = batches
        self.terms = terms
        self.initialisation = initialisation
        self.match = match
        self.seed = seed
        self._teachers = [self._look(teacher, repeat, student=False) for repeat in range(len(batches))]

    def __call__(self, student: Factory) -> Score:
        """The score of the students that a factory makes."""
        relations, semantics = [], []
        for repeat, theirs in enumerate(self._teachers):
            ours = self._look(student, repeat, student=True)
            relations.append(math.nan if self.terms == "semantic" else self._relation(ours, theirs))
            semantics.append(math.nan if self.terms == "relation" else self._semantic(ours, theirs, repeat))
        relation, semantic = torch.tensor(relations).double(), torch.tensor(semantics).double()
        values = {"both": relation + semantic, "relation": relation, "semantic": semantic}[self.terms]
        return Score(values.mean().item(), relation.mean().item(), semantic.mean().item(), values.std().item())

    def _relation(self, student: Outputs, teacher: Outputs) -> float:
        return relation_score(student.taps["last"], teacher.taps["last"]).item()

    def _semantic(self, student: Outputs, teacher: Outputs, repeat: int) -> float:
        labels = self.batches[repeat][1]
        gradients = []
        for outputs in (student, teacher):
            assert outputs.embedding is not None
            gradients.append(head_gradient(outputs.logits, outputs.embedding, labels))
        return semantic_score(*matched(gradients[0], gradients[1], self.match)).item()

    @torch.no_grad()
    def _look(self, factory: Factory, repeat: int, student: bool) -> Outputs:
        images = self.batches[repeat][0]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(2 * (self.seed * len(self.batches) + repeat) + student)
            network = factory()
            initialise(network, self.initialisation)
            outputs = network.to(images.device).train()(images)
        found = {"Outputs.taps['last']": outputs.taps.get("last"), "Outputs.embedding": outputs.embedding}
        needed = {"both": list(found), "relation": list(found)[:1], "semantic": list(found)[1:]}[self.terms]
        for name in needed:
            if found[name] is None:
                whose = "student" if student else "teacher"
                raise ValueError(f"the {self.terms} score reads {name}, which the {whose} does not give")
        return Outputs(outputs.logits, outputs.embedding, {k: v for k, v in outputs.taps.items() if k == "last"})


@torch.no_grad()
def initialise(network: nn.Module, initialisation: Initialisation) -> None:
    """Draw the weights of all convolutions and linear layers again, unless by `default`."""
    if initialisation == "default":
        return
    for module in network.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear):
            if initialisation == "kaiming":
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            else:
                nn.init.normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
