"""Regularised evolution (Real et al., AAAI 2019, arXiv:1802.01548) of networks under a budget."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kd.connect import held_still

Genotype = TypeVar("Genotype", bound=Hashable)

_MAX_TRIES = 1000  # of drawing a genotype within the budget


@dataclass(frozen=True)
class Candidate(Generic[Genotype]):
    """A genotype and its score, which may be NaN."""

    genotype: Genotype
    score: float

    @property
    def rank(self) -> float:
        """The score, where one that is not a finite number is below all others."""
        return self.score if math.isfinite(self.score) else -math.inf


@dataclass(frozen=True)
class Search(Generic[Genotype]):
    """What a search saw, in its order; `history` is all that is needed to go on."""

    history: list[Candidate[Genotype]]

    @property
    def ranking(self) -> list[Candidate[Genotype]]:
        """Every genotype once, the best first; those without a finite score are left out (`failed`)."""
        distinct: dict[Genotype, Candidate[Genotype]] = {}
        for candidate in self.history:
            if math.isfinite(candidate.score):
                distinct.setdefault(candidate.genotype, candidate)
        return sorted(distinct.values(), key=lambda candidate: -candidate.score)

    @property
    def best(self) -> Candidate[Genotype]:
        """The highest score; the first found among equals (`ties`).

        Raises:
            ValueError: If no candidate has a finite score.
        """
        if not self.ranking:
            raise ValueError(f"none of the {len(self.history)} candidates has a finite score")
        return self.ranking[0]

    @property
    def failed(self) -> list[Genotype]:
        """Genotypes whose score is no finite number."""
        return list(dict.fromkeys(found.genotype for found in self.history if not math.isfinite(found.score)))

    @property
    def ties(self) -> list[list[Genotype]]:
        """Different genotypes of one score, the best first: the order among them means nothing."""
        groups: dict[float, list[Genotype]] = {}
        for candidate in self.ranking:
            groups.setdefault(candidate.score, []).append(candidate.genotype)
        return [group for group in groups.values() if len(group) > 1]


def evolve(
    score: Callable[[Genotype], float],
    sample: Callable[[Random], Genotype],
    mutate: Callable[[Genotype, Random], Genotype],
    *,
    evaluations: int,
    population: int = 36,
    tournament: int = 8,
    allowed: Callable[[Genotype], bool] | None = None,
    seed: int = 0,
    history: Sequence[Candidate[Genotype]] = (),
) -> Search[Genotype]:
    """Search for the genotype of the highest score.

    The first `population` candidates are drawn. Then, each time, `tournament` of the newest `population` are drawn, the
    best of them is mutated, and the oldest falls out. (The DisWOT release takes its parents among the worst of a
    tournament, a mistake of its sort order.) The random numbers of a step depend on `seed` and its number only:
    a search that goes on from its history is the same as one that was never interrupted.

    Args:
        score: Higher is better; a genotype that comes again is not scored again. NaN is kept in the history, and such
            candidates become parents only where there is no other.
        sample: Draws a genotype.
        mutate: A changed copy of a genotype.
        evaluations: Length of the history at the end.
        population: Candidates that may become parents.
        tournament: Candidates that compete to become a parent.
        allowed: Whether a genotype is within the budget (`within`); all are by default.
        seed: Of the search.
        history: Of the search to go on with.

    Raises:
        ValueError: If a count is not positive, a tournament is larger than the population, or no genotype within the
            budget is found.
    """
    for name, count in (("evaluations", evaluations), ("population", population), ("tournament", tournament)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, found {count}")
    if tournament > population:
        raise ValueError(f"tournament must be at most population, found {tournament} and {population}")
    seen = list(history)
    known = {candidate.genotype: candidate.score for candidate in seen}
    while len(seen) < evaluations:
        random = Random(f"{seed}/{len(seen)}")
        for _ in range(_MAX_TRIES):
            if len(seen) < population:
                genotype = sample(random)
            else:
                parent = max(random.sample(seen[-population:], tournament), key=lambda candidate: candidate.rank)
                genotype = mutate(parent.genotype, random)
            if allowed is None or allowed(genotype):
                break
        else:
            raise ValueError(f"found no genotype within the budget in {_MAX_TRIES} tries: raise the budget")
        if genotype not in known:
            known[genotype] = score(genotype)
        seen.append(Candidate(genotype, known[genotype]))
    return Search(seen)


def num_parameters(network: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in network.parameters())


@torch.no_grad()
def multiply_adds(network: nn.Module, images: Tensor) -> int:
    """Multiplications with an addition in convolutions and matrix products, for these images together."""
    with held_still(network), FlopCounterMode(display=False) as counter:
        network(images)
    operations: int = counter.get_total_flops()
    return operations // 2


def within(
    build: Callable[[Genotype], nn.Module],
    *,
    max_parameters: int | None = None,
    max_multiply_adds: int | None = None,
    image: Tensor | None = None,
) -> Callable[[Genotype], bool]:
    """A budget for `evolve`.

    Args:
        build: Makes the network of a genotype.
        max_parameters: Most parameters.
        max_multiply_adds: Most multiply-adds for `image`.
        image: A batch of one image.

    Raises:
        ValueError: If there is nothing to keep to, or multiply-adds are limited without an image.
    """
    if max_parameters is None and max_multiply_adds is None:
        raise ValueError("a budget needs max_parameters, max_multiply_adds or both, found neither")
    if (max_multiply_adds is None) != (image is None):
        raise ValueError("max_multiply_adds and image go together: one says how many, the other for what")

    def allowed(genotype: Genotype) -> bool:
        with torch.random.fork_rng(devices=[]):  # whether it fits must not change what is drawn next
            network = build(genotype)
        if max_parameters is not None and num_parameters(network) > max_parameters:
            return False
        return (
            max_multiply_adds is None
            or image is None
            or multiply_adds(network.to(image.device), image) <= max_multiply_adds
        )

    return allowed
