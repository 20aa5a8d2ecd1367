"""VGG (Simonyan and Zisserman, ICLR 2015, arXiv:1409.1556) with BatchNorm and one linear layer, for small images."""

from typing import Literal

from einops import reduce
from jaxtyping import Float
from torch import Tensor, nn

from cil.models.network import BackboneNetwork, InputShape, TapPaths, models

Maps = Float[Tensor, "batch channels height width"]

_WIDTHS = (64, 128, 256, 512, 512)  # of the stem and the four stages
_NUM_CONVOLUTIONS = {
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
_LARGE_SIDE = 64  # from this side on the maps are halved before the last stage too
_LAYERS_PER_CONVOLUTION = 3


def _convolutions(before: int, after: int, count: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for _ in range(count):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        before = after
    return layers


class VGGBackbone(nn.Module):
    """3x3 convolutions in a stem and four stages, each but the last behind a pool of 2x2, and the mean over places.

    Args:
        input_shape: Channels, height and width of an image; of 64 pixels or more, the last stage is behind a pool too.
        num_convolutions: In the stem and each stage.
    """

    def __init__(self, input_shape: InputShape, num_convolutions: tuple[int, ...]) -> None:
        super().__init__()
        channels, height, width = input_shape
        is_pooled = [True, True, True, min(height, width) >= _LARGE_SIDE]
        self.stem = nn.Sequential(*_convolutions(channels, _WIDTHS[0], num_convolutions[0]))
        self.stages = nn.ModuleList()
        for i, pooled in enumerate(is_pooled):
            # rounding up, so that a map of one place stays one; even sides are halved either way
            pool = nn.MaxPool2d(2, ceil_mode=True) if pooled else nn.Identity()
            layers = _convolutions(_WIDTHS[i], _WIDTHS[i + 1], num_convolutions[i + 1])
            self.stages.append(nn.Sequential(pool, *layers))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, images: Maps) -> Float[Tensor, "batch embedding"]:
        """The embedding of each image."""
        maps = self.stem(images)
        for stage in self.stages:
            maps = stage(maps)
        embedding: Tensor = reduce(maps, "b c h w -> b c", "mean")
        return embedding


@models.register("vgg")
class VGG(BackboneNetwork):
    """VGG-8 to VGG-19 as they are used for CIFAR, with one linear head.

    Args:
        input_shape: Channels, height and width of an image.
        depth: Layers; 8 is a form of the distillation literature with one convolution in each stage.
        keep_bias: See `GrowingLinear`.
    """

    def __init__(
        self, input_shape: InputShape, *, depth: Literal[8, 11, 13, 16, 19] = 13, keep_bias: bool = True
    ) -> None:
        counts = _NUM_CONVOLUTIONS[depth]
        stages = [f"stages.{i}" for i in range(len(_WIDTHS) - 1)]
        pre = [f"{stage}.{_LAYERS_PER_CONVOLUTION * count}" for stage, count in zip(stages, counts[1:], strict=True)]
        taps = TapPaths.of_backbone(stem="stem", post=stages, pre=pre, last=stages[-1])
        super().__init__(input_shape, VGGBackbone(input_shape, counts), _WIDTHS[-1], keep_bias, taps)
        self.last_activation = pre[-1]
