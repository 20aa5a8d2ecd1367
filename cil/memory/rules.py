"""Which images of a class to remember: rules that order the rows of one class's features, best first.

All but `random` work on rows divided by their L2 norm, in float64 on the processor, whatever the features' type and
device, so that one run keeps the same exemplars everywhere.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from kd.registry import Registry

_NORM_FLOOR = 1e-8  # added to the norm, as in the iCaRL and DKT releases: a row of zeros stays zeros


class SelectionRule(Protocol):
    """Orders the samples of one class.

    Arguments: the features, one row a sample; how many samples are wanted; a key from `cil.seeding.derive` for rules
    that draw. Returns min(count, rows) different row numbers, best first. Raises ValueError if there are no rows.
    """

    def __call__(
        self, features: Float[Tensor, "samples width"], count: int, *, seed_key: int
    ) -> Int[Tensor, " selected"]:
        """Row numbers, best first."""


selection_rules: Registry[SelectionRule] = Registry("selection rule", "cil.memory")


@dataclass(frozen=True)
class HerdingOrder:
    """What `herding_residual` found.

    Attributes:
        order: min(count, samples) different row numbers; the first `picked` are the loop's own.
        picked: How many the loop selected; the rest is filled with rows that never won, lowest number first.
        iterations: Turns of the loop.
    """

    order: Int[Tensor, " selected"]
    picked: int
    iterations: int


@selection_rules.register("herding")
def herding(features: Float[Tensor, "samples width"], count: int, *, seed_key: int = 0) -> Int[Tensor, " selected"]:
    """Herding without replacement (Rebuffi et al., "iCaRL", CVPR 2017, arXiv:1611.07725, algorithm 4).

    The k-th exemplar is `argmin_i || mu - (f_i + sum of those chosen) / k ||` over the rows not chosen yet, with f_i
    normalised and mu their mean; the lowest row on a tie. Every prefix of the order approximates mu, so a memory that
    shrinks drops exemplars from the end.

    Args:
        features: One row a sample.
        count: How many to select; at most all.
        seed_key: Not used.

    Raises:
        ValueError: If there are no rows.
    """
    rows = _unit_rows(features)
    mean = rows.mean(axis=0)
    free = np.ones(len(rows), dtype=bool)
    chosen_sum = np.zeros_like(mean)
    order: list[int] = []
    for k in range(1, min(count, len(rows)) + 1):
        distances = np.linalg.norm(mean - (rows + chosen_sum) / k, axis=1)
        best = int(np.argmin(np.where(free, distances, np.inf)))
        order.append(best)
        free[best] = False
        chosen_sum += rows[best]
    return torch.tensor(order, dtype=torch.int64, device=features.device)


def herding_residual(features: Float[Tensor, "samples width"], count: int, max_iterations: int = 1000) -> HerdingOrder:
    """The iteration of the DyTox and DKT releases, after Welling's herding (ICML 2009).

    With mu the mean of the normalised rows and w_0 = mu, each turn takes `i = argmax w . f_i` (the lowest row on a
    tie) and then w becomes `w + mu - f_i`. A row may win again: it is not recorded twice, but the update happens.

    Args:
        features: One row a sample.
        count: How many to select; at most all.
        max_iterations: The loop stops here even when rows are still wanted, and the order is filled up.

    Raises:
        ValueError: If there are no rows.
    """
    rows = _unit_rows(features)
    mean = rows.mean(axis=0)
    residual = mean.copy()
    wanted = min(count, len(rows))
    picked: dict[int, None] = {}  # a set that keeps the order
    iterations = 0
    while len(picked) < wanted and iterations < max_iterations:
        best = int(np.argmax(rows @ residual))
        picked[best] = None
        residual += mean - rows[best]
        iterations += 1
    fill = [row for row in range(len(rows)) if row not in picked][: wanted - len(picked)]
    order = torch.tensor([*picked, *fill], dtype=torch.int64, device=features.device)
    return HerdingOrder(order, len(picked), iterations)


@selection_rules.register("herding_residual")
def _herding_residual(
    features: Float[Tensor, "samples width"], count: int, *, seed_key: int = 0
) -> Int[Tensor, " selected"]:
    """The order of `herding_residual`."""
    return herding_residual(features, count).order


@selection_rules.register("closest")
def closest(features: Float[Tensor, "samples width"], count: int, *, seed_key: int = 0) -> Int[Tensor, " selected"]:
    """The rows nearest to the mean of the normalised rows, the nearest first; the lower row on a tie.

    Args:
        features: One row a sample.
        count: How many to select; at most all.
        seed_key: Not used.

    Raises:
        ValueError: If there are no rows.
    """
    rows = _unit_rows(features)
    distances = np.linalg.norm(rows - rows.mean(axis=0), axis=1)
    return torch.from_numpy(np.argsort(distances, kind="stable")[:count]).to(features.device)


@selection_rules.register("random")
def random(features: Float[Tensor, "samples width"], count: int, *, seed_key: int) -> Int[Tensor, " selected"]:
    """Different rows drawn at random.

    Args:
        features: One row a sample; only their number is used.
        count: How many to select; at most all.
        seed_key: Seeds the draw.

    Raises:
        ValueError: If there are no rows.
    """
    _require_rows(features)
    generator = torch.Generator().manual_seed(seed_key)
    return torch.randperm(len(features), generator=generator)[:count].to(features.device)


def _require_rows(features: Float[Tensor, "samples width"]) -> None:
    if len(features) == 0:
        raise ValueError("exemplars cannot be selected from a class without images: found 0 rows of features")


def _unit_rows(features: Float[Tensor, "samples width"]) -> NDArray[np.float64]:
    _require_rows(features)
    rows = features.detach().cpu().double().numpy()
    unit: NDArray[np.float64] = rows / (np.linalg.norm(rows, axis=1, keepdims=True) + _NORM_FLOOR)
    return unit
