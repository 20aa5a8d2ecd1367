"""Class activation maps (Zhou et al., CVPR 2016, arXiv:1512.04150)."""

import torch
import torch.nn.functional as F
from einops import einsum, reduce
from jaxtyping import Float
from torch import Tensor, nn

from kd.precision import full_precision, no_autocast
from kd.taps import Taps

_TOLERANCE = 0.05  # of the largest value: above the rounding of bfloat16, below what a norm or a dropout changes

Maps = Float[Tensor, "batch classes height width"]


def class_maps(features: Float[Tensor, "batch channels height width"], weight: Float[Tensor, "classes read"]) -> Maps:
    """Where in the image each class finds its evidence: $M_k(x, y) = \\sum_c w_{kc} f_c(x, y)$, differentiable.

    With a linear head on the mean over places, $z_k = \\overline{M_k} + b_k$: the bias is no part of the maps.

    Args:
        features: The maps that are pooled.
        weight: Of the head.

    Raises:
        ValueError: If the head does not read one number per channel.
    """
    if features.shape[1] != weight.shape[1]:
        raise ValueError(
            f"class maps weight the channels by the head, but the maps have {features.shape[1]} channels and the head "
            f"reads {weight.shape[1]} numbers: name the maps that are pooled for this head"
        )
    with no_autocast(features.device):
        features = full_precision(features)
        return einsum(features, weight.to(features), "b c h w, k c -> b k h w")


def normalised(maps: Maps) -> Maps:
    """Every map from 0 to 1 by its own smallest and largest value; a constant map is zero."""
    maps = full_precision(maps)
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    return (maps - low) / (high - low).where(high > low, 1.0)


def overlay(maps: Maps, size: tuple[int, int]) -> Float[Tensor, "batch classes rows columns"]:
    """Maps to lay over the images: `normalised`, then bilinear to `size`, the height and width of the images."""
    return F.interpolate(normalised(maps), size, mode="bilinear", align_corners=False)


def linear_weight(head: nn.Module) -> Float[Tensor, "classes width"]:
    """The weight of a linear head.

    Raises:
        ValueError: If it has no weight of one row per class.
    """
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        found = f"a weight of shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else "no weight"
        raise ValueError(
            f"a linear head with a weight [classes, channels] is needed, found a {type(head).__name__} with {found}: "
            "class maps are sums over channels, which other heads do not compute"
        )
    return weight


class CAM:
    """Class activation maps of any network with a linear head on its pooled maps, without changing its code.

    ```python
    maps, logits = CAM(network.eval(), maps="layer4", head="fc")(images)
    heat = overlay(maps, images.shape[2:])
    ```

    Hooks are on the network during a call only, and the weight is that of the moment. Gradients pass through.

    Args:
        network: The network; it runs in the mode it is in.
        maps: Path of the module whose output is pooled.
        head: Path of the linear head that reads the mean over places.
        cosine: The head compares directions: maps are made with $w_k / \\|w_k\\|$, and their means are its scores up
            to a positive factor of the image.
        verify: Check at every call that the head reads the mean of the maps and is linear. Without, maps of a head
            behind a dropout or a norm are given too; their means are not its scores.

    Raises:
        ValueError: If there is no such path; on use, if the head is not linear, the channels do not match, or the maps
            are no explanation of the scores (`verify`).
    """

    def __init__(self, network: nn.Module, *, maps: str, head: str, cosine: bool = False, verify: bool = True) -> None:
        self.network = network
        self.maps = maps
        self.head = head
        self.cosine = cosine
        self.verify = verify
        self.outputs, self.inputs = {"maps": maps, "scores": head}, {"embedding": head}
        Taps(network, self.outputs, self.inputs).remove()  # refuses unknown paths now

    def __call__(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> tuple[Float[Tensor, "batch classes rows columns"], Float[Tensor, "batch classes"]]:
        """The maps of all classes and the scores of the head."""
        head = self.network.get_submodule(self.head)
        weight = linear_weight(head)
        with Taps(self.network, self.outputs, self.inputs) as taps:
            self.network(images)
            features, embedding, scores = taps["maps"], taps["embedding"], taps["scores"]
        if features.ndim != 4:
            raise ValueError(f"{self.maps!r} gives no maps [batch, channels, height, width]: {tuple(features.shape)}")
        maps = class_maps(features, F.normalize(weight, dim=1) if self.cosine else weight)
        if self.verify:
            self._verify(features, embedding, scores, head)
        return maps, scores

    def _verify(self, features: Tensor, embedding: Tensor, scores: Tensor, head: nn.Module) -> None:
        pooled = reduce(features, "b c h w -> b c", "mean")
        if embedding.shape != pooled.shape or not _close(embedding, pooled):
            raise ValueError(
                f"the head {self.head!r} does not read the mean of {self.maps!r} over places, so the maps would not "
                "add up to its scores: name the maps that are pooled, or use verify=False for maps all the same"
            )
        if self.cosine:
            return
        with no_autocast(embedding.device):
            weight, bias = linear_weight(head), getattr(head, "bias", None)
            expected = F.linear(embedding.to(weight), weight, bias)
        if not _close(scores, expected):
            raise ValueError(
                f"the head {self.head!r} is a {type(head).__name__} whose scores are not linear in what it reads: a "
                "cosine head needs cosine=True, others have no class maps"
            )


@torch.no_grad()
def _close(found: Tensor, expected: Tensor) -> bool:
    difference = full_precision(found) - expected
    return bool(difference.abs().max() <= _TOLERANCE * expected.abs().max())
