"""MobileNetV2 (Sandler et al., CVPR 2018, arXiv:1801.04381) for small images."""

from typing import Annotated

from einops import reduce
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from cil.models.network import BackboneNetwork, InputShape, TapPaths, models

Maps = Float[Tensor, "batch channels height width"]

_STEM_WIDTH = 32
_LAST_WIDTH = 1280
_LAST_ACTIVATION = "last.2"  # behind a convolution and BatchNorm
_FIRST_EXPANSION = 1
#: Channels, blocks and stride of the groups of every stage.
_STAGES = (
    ((16, 1, 1), (24, 2, 1)),
    ((32, 3, 2),),
    ((64, 4, 2), (96, 3, 1)),
    ((160, 3, 2), (320, 1, 1)),
)


def _convolution(before: int, after: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution and BatchNorm."""
    conv = nn.Conv2d(before, after, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(after)]


class InvertedResidual(nn.Module):
    """Expand, convolve each channel, contract without activation; added to the input where the shapes agree.

    Args:
        in_channels, out_channels: Channels before and after.
        stride: Of the convolution of each channel.
        expansion: How many times as many channels are convolved.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = expansion * in_channels
        self.adds = stride == 1 and in_channels == out_channels
        self.layers = nn.Sequential(
            *_convolution(in_channels, hidden, 1),
            nn.ReLU(),
            *_convolution(hidden, hidden, 3, stride, groups=hidden),
            nn.ReLU(),
            *_convolution(hidden, out_channels, 1),
        )

    def forward(self, x: Maps) -> Float[Tensor, "batch ..."]:
        """Maps in, maps out."""
        maps: Tensor = self.layers(x)
        return x + maps if self.adds else maps


class MobileNetV2Backbone(nn.Module):
    """A convolution that halves the image, four stages, a 1x1 convolution, and the mean over places.

    Args:
        channels: Channels of an image.
        width_factor: Factor of the widths.
        expansion: Of the blocks behind the first.
    """

    def __init__(self, channels: int, width_factor: float, expansion: int) -> None:
        super().__init__()
        before = int(_STEM_WIDTH * width_factor)
        self.stem = nn.Sequential(*_convolution(channels, before, 3, stride=2), nn.ReLU())
        self.stages = nn.ModuleList()
        ratio = _FIRST_EXPANSION
        for groups in _STAGES:
            blocks = []
            for width, num_blocks, stride in groups:
                after = int(width * width_factor)
                for block_stride in (stride, *[1] * (num_blocks - 1)):
                    blocks.append(InvertedResidual(before, after, block_stride, ratio))
                    before, ratio = after, expansion
            self.stages.append(nn.Sequential(*blocks))
        self.last = nn.Sequential(*_convolution(before, last_width(width_factor), 1), nn.ReLU())
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Maps) -> Float[Tensor, "batch embedding"]:
        """The embedding of each image."""
        maps = self.stem(images)
        for stage in self.stages:
            maps = stage(maps)
        embedding: Tensor = reduce(self.last(maps), "b c h w -> b c", "mean")
        return embedding


def last_width(width_factor: float) -> int:
    """Channels of the maps that are pooled: those of a narrow network are not fewer."""
    return int(_LAST_WIDTH * max(1.0, width_factor))


@models.register("mobilenetv2")
class MobileNetV2(BackboneNetwork):
    """MobileNetV2 as the distillation literature uses it for CIFAR: half as wide, with ReLU for ReLU6.

    Every stage ends in a linear layer, so that no tap is before an activation.

    Args:
        input_shape: Channels, height and width of an image.
        width_factor: Factor of the widths, rounded down.
        expansion: How many times as many channels a block convolves as it reads.
        keep_bias: See `GrowingLinear`.

    Raises:
        ValueError: If `width_factor` leaves a layer without channels.
    """

    def __init__(
        self,
        input_shape: InputShape,
        *,
        width_factor: Annotated[float, Field(gt=0)] = 0.5,
        expansion: Annotated[int, Field(gt=0)] = 6,
        keep_bias: bool = True,
    ) -> None:
        narrowest = min(width for groups in _STAGES for width, _, _ in groups)
        if narrowest * width_factor < 1:
            raise ValueError(
                f"width_factor must be at least 1/{narrowest}, so that every layer has a channel, found {width_factor}"
            )
        stages = [f"stages.{i}" for i in range(len(_STAGES))]
        taps = TapPaths.of_backbone(stem="stem", post=stages, pre=[], last="last")
        backbone = MobileNetV2Backbone(input_shape[0], width_factor, expansion)
        super().__init__(input_shape, backbone, last_width(width_factor), keep_bias, taps)
        self.last_activation = _LAST_ACTIVATION
