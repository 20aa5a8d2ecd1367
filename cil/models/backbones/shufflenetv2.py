"""ShuffleNetV2 (Ma et al., ECCV 2018, arXiv:1807.11164) for small images."""

from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn

from cil.models.network import BackboneNetwork, InputShape, TapPaths, models

Maps = Float[Tensor, "batch channels height width"]

_STEM_WIDTH = 24
_WIDTHS = (116, 232, 464)
_NUM_BLOCKS = (4, 8, 4)  # the first of a stage halves the maps
_LAST_WIDTH = 1024
_LAST_ACTIVATION = "last.2"  # behind a convolution and BatchNorm


def _pointwise(before: int, after: int) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 1, bias=False), nn.BatchNorm2d(after)]


def _depthwise(channels: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False), nn.BatchNorm2d(channels)]


class _Shuffled(nn.Module):
    """Two halves beside each other, shuffled and activated.

    The release activates the halves before it shuffles them. That is the same, as the half that a block hands on is
    the output of a ReLU, and here the maps before the activation are those behind it but for the negative values.
    """

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, left: Maps, right: Maps) -> Float[Tensor, "batch both height width"]:
        """Maps of both, their channels in turn."""
        both = rearrange([left, right], "half b c h w -> b (c half) h w")
        maps: Tensor = self.act(both)
        return maps


class SplitBlock(nn.Module):
    """One half of the channels is handed on, the other goes through 1x1, 3x3 of each channel and 1x1.

    Args:
        channels: Channels before and after.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.right = nn.Sequential(*_pointwise(half, half), nn.ReLU(), *_depthwise(half, 1), *_pointwise(half, half))
        self.join = _Shuffled()

    def forward(self, x: Maps) -> Maps:
        """Maps in, maps out."""
        left, right = x.chunk(2, dim=1)
        maps: Tensor = self.join(left, self.right(right))
        return maps


class DownBlock(nn.Module):
    """Both halves are made of all channels, and halve the maps.

    Args:
        in_channels, out_channels: Channels before and after.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.left = nn.Sequential(*_depthwise(in_channels, 2), *_pointwise(in_channels, half))
        self.right = nn.Sequential(
            *_pointwise(in_channels, half), nn.ReLU(), *_depthwise(half, 2), *_pointwise(half, half)
        )
        self.join = _Shuffled()

    def forward(self, x: Maps) -> Float[Tensor, "batch ..."]:
        """Maps in, maps out."""
        maps: Tensor = self.join(self.left(x), self.right(x))
        return maps


class ShuffleNetV2Backbone(nn.Module):
    """A 1x1 convolution, three stages, a 1x1 convolution, and the mean over places; torch's default initial values.

    Args:
        channels: Channels of an image.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_pointwise(channels, _STEM_WIDTH), nn.ReLU())
        self.stages = nn.ModuleList()
        before = _STEM_WIDTH
        for after, num_blocks in zip(_WIDTHS, _NUM_BLOCKS, strict=True):
            rest = [SplitBlock(after) for _ in range(num_blocks - 1)]
            self.stages.append(nn.Sequential(DownBlock(before, after), *rest))
            before = after
        self.last = nn.Sequential(*_pointwise(before, _LAST_WIDTH), nn.ReLU())

    def forward(self, images: Maps) -> Float[Tensor, "batch embedding"]:
        """The embedding of each image."""
        maps = self.stem(images)
        for stage in self.stages:
            maps = stage(maps)
        embedding: Tensor = reduce(self.last(maps), "b c h w -> b c", "mean")
        return embedding


@models.register("shufflenetv2")
class ShuffleNetV2(BackboneNetwork):
    """ShuffleNetV2 of full width as the distillation literature uses it for CIFAR.

    The tap `pre` of a stage has its channels in the order of `post`; in the release they are not shuffled yet.

    Args:
        input_shape: Channels, height and width of an image.
        keep_bias: See `GrowingLinear`.
    """

    def __init__(self, input_shape: InputShape, *, keep_bias: bool = True) -> None:
        stages = [f"stages.{i}" for i in range(len(_WIDTHS))]
        pre = [f"{stage}.{num_blocks - 1}.join.act" for stage, num_blocks in zip(stages, _NUM_BLOCKS, strict=True)]
        taps = TapPaths.of_backbone(stem="stem", post=stages, pre=pre, last="last")
        super().__init__(input_shape, ShuffleNetV2Backbone(input_shape[0]), _LAST_WIDTH, keep_bias, taps)
        self.last_activation = _LAST_ACTIVATION
