"""What a frozen encoder makes of samples, kept for phases that show the same views again and again."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kd import Batch


@dataclass(frozen=True)
class Encoded:
    """Feature maps of the samples of a phase, in the place of their images.

    Attributes:
        views: One map of every sample, for each view, by the key that its augmentation comes from.
        ids: The samples, in the order of the maps.
        labels: Of all samples of the run, in learned order, on the device where the maps are.
    """

    views: dict[int, Float[Tensor, "samples width rows columns"]]
    ids: Int[Tensor, " samples"]
    labels: Int[Tensor, " all"]

    def shown(self, shares: list[tuple[Tensor, Tensor]], view_key: int) -> Iterator[Batch]:
        """One batch after another: those ids of `shares`, in the view of an epoch."""
        maps = self.views[view_key]
        places = torch.empty_like(self.labels, device="cpu")
        places[self.ids] = torch.arange(len(self.ids))
        for ids, _ in shares:
            own = ids.to(maps.device)
            yield Batch(maps[places[ids].to(maps.device)], self.labels[own], own)
