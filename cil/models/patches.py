"""What a transformer says inside: its patch tokens as maps, so that methods made for convolutional networks read them.

These taps are a variant of this project; no paper distils maps of DKT or DyTox.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from cil.models.heads import Classifier
from cil.models.network import Network
from kd.cam import class_maps

Tokens = Float[Tensor, "batch patches width"]
Grid = tuple[int, int]


def folded_weight(classifiers: Sequence[Classifier]) -> Float[Tensor, "classes width"]:
    """$W' = W\\,\\mathrm{diag}(\\gamma)$ of classifiers, one under the other: heads with the scale of their norms."""
    return torch.cat([classifier.head.weight * classifier.norm.weight for classifier in classifiers])


def block_taps(depth: int) -> list[str]:
    """Names of the maps behind so many encoder blocks; see `PatchNetwork`."""
    return [*(f"stage{block}.{side}" for side in ("post", "pre") for block in range(depth)), "last"]


class PatchMaps:
    """The exposed maps of one forward pass, on the way to whatever is computed from them.

    Args:
        exposed: Names of taps of a `PatchNetwork`.
        depth: Number of encoder blocks.
    """

    def __init__(self, exposed: Sequence[str], depth: int) -> None:
        self.exposed = exposed
        self.depth = depth
        self._found: dict[str, Tensor] = {}

    def pass_on(self, block: int, tokens: Tokens, grid: Grid) -> Tokens:
        """The tokens behind a block, as they are; if they are exposed, computed from what is said of them.

        Args:
            block: Counts from 0.
            tokens: Row by row.
            grid: Rows and columns.
        """
        names = [f"stage{block}.post", f"stage{block}.pre"]
        if block == self.depth - 1:
            names += ["last", "class_maps"]
        wanted = [name for name in names if name in self.exposed]
        if not wanted:
            return tokens
        rows, columns = grid
        maps = rearrange(tokens, "b (h w) d -> b d h w", h=rows, w=columns)
        self._found |= dict.fromkeys(wanted, maps)
        return rearrange(maps, "b d h w -> b (h w) d")

    def taps(self, classifiers: Sequence[Classifier]) -> dict[str, Tensor]:
        """What is exposed, by name.

        Args:
            classifiers: Of all classes, in the order in which they were learned.
        """
        if "class_maps" in self._found:
            self._found["class_maps"] = class_maps(self._found["class_maps"], folded_weight(classifiers))
        return {name: self._found[name] for name in self.exposed}


class PatchNetwork(Network):
    """A network with encoder blocks over patches, which can be exposed as maps.

    The taps, a variant of this project:

    - `stage{i}.post` and `stage{i}.pre`: the patch tokens behind encoder block i as maps `[batch, width, rows,
      columns]`. Both are one tensor: a block ends in a sum, and there is no activation to be before or behind.
    - `last`: those behind the last block, which the decoder reads.
    - `class_maps`: $M_k(x, y) = \\sum_c W'_{kc} f_c(x, y)$ of `last` with `folded_weight`, for all classes in the order
      in which they were learned. The mean of such a map is not the score of the class: classifiers read what a decoder
      makes of the patches. So there are no paths for `kd.taps.Tapped` (`tap_paths`), and `cil.cam` draws none of them.

    Tokens beside the patches (general, task) are in no map.
    """

    @property
    def depth(self) -> int:
        """Number of encoder blocks."""
        raise NotImplementedError(f"{type(self).__name__} does not say how many encoder blocks it has")

    def classifiers(self) -> list[Classifier]:
        """The classifiers of all classes, in the order in which they were learned."""
        raise NotImplementedError(f"{type(self).__name__} does not say which classifiers it has")

    def tokens_of_tasks(self) -> Float[Tensor, "tasks width"]:
        """The task tokens, the oldest first."""
        raise NotImplementedError(f"{type(self).__name__} does not say which task tokens it has")

    def attention(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch rows columns"]:
        """How much the newest task token looks at each patch in the decoder, mean over the heads."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its decoder looks at")

    def taps(self) -> list[str]:
        """Names of what `expose` can add."""
        return [*block_taps(self.depth), "class_maps"]

    def listen(self) -> PatchMaps | None:
        """What collects the maps of a forward pass; None if nothing is exposed."""
        return PatchMaps(self.exposed, self.depth) if self.exposed else None
