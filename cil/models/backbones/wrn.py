"""Wide residual networks (Zagoruyko and Komodakis, BMVC 2016, arXiv:1605.07146)."""

from typing import Annotated, Literal

from einops import reduce
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from cil.models.network import BackboneNetwork, InputShape, TapPaths, models

Maps = Float[Tensor, "batch channels height width"]

_STEM_WIDTH = 16
_NUM_STAGES = 3
_CONVOLUTIONS_PER_BLOCK = 2
_NUM_OTHER_LAYERS = 4  # the first convolution and the three of the shortcuts count towards the depth


class PreActivationBlock(nn.Module):
    """BatchNorm and ReLU before each of two 3x3 convolutions; the sum with the shortcut is left as it is.

    Args:
        in_channels, out_channels: Channels before and after; where they differ, the shortcut is a 1x1 convolution of
            the activated maps.
        stride: Of the first convolution and of the shortcut.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.act1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.act2 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        changes = in_channels != out_channels
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False) if changes else None

    def forward(self, x: Maps) -> Float[Tensor, "batch ..."]:
        """Maps in, maps out."""
        activated = self.act1(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        maps: Tensor = self.conv2(self.act2(self.bn2(self.conv1(activated)))) + shortcut
        return maps


class WideResNetBackbone(nn.Module):
    """A convolution, three stages of blocks of 16, 32 and 64 times `widening` channels, BatchNorm, ReLU and the mean.

    Args:
        channels: Channels of an image.
        widening: Factor of the widths of the stages.
        num_blocks: Blocks in each stage.
    """

    def __init__(self, channels: int, widening: int, num_blocks: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, _STEM_WIDTH, 3, padding=1, bias=False)
        self.stages = nn.ModuleList()
        before = _STEM_WIDTH
        for scale, stride in ((1, 1), (2, 2), (4, 2)):
            after = scale * widening * _STEM_WIDTH
            rest = [PreActivationBlock(after, after, stride=1) for _ in range(num_blocks - 1)]
            self.stages.append(nn.Sequential(PreActivationBlock(before, after, stride), *rest))
            before = after
        self.bn = nn.BatchNorm2d(before)
        self.act = nn.ReLU()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Maps) -> Float[Tensor, "batch embedding"]:
        """The embedding of each image."""
        maps = self.conv(images)
        for stage in self.stages:
            maps = stage(maps)
        embedding: Tensor = reduce(self.act(self.bn(maps)), "b c h w -> b c", "mean")
        return embedding


@models.register("wrn")
class WideResNet(BackboneNetwork):
    """WRN-`depth`-`widening` without dropout, with one linear head.

    A stage ends in a sum, not in an activation. Its tap `post` is that sum, with negative values; `pre` is what the
    next ReLU reads: the sum behind the BatchNorm of the next stage. `stem` is a convolution without activation.

    Args:
        input_shape: Channels, height and width of an image.
        depth: Layers, as the paper counts them.
        widening: Factor of the widths 16, 32 and 64; the embedding has the last of them.
        keep_bias: See `GrowingLinear`.
    """

    def __init__(
        self,
        input_shape: InputShape,
        *,
        depth: Literal[10, 16, 22, 28, 34, 40] = 40,
        widening: Annotated[int, Field(gt=0)] = 2,
        keep_bias: bool = True,
    ) -> None:
        num_blocks = (depth - _NUM_OTHER_LAYERS) // (_NUM_STAGES * _CONVOLUTIONS_PER_BLOCK)
        stages = [f"stages.{i}" for i in range(_NUM_STAGES)]
        pre = [*(f"{stage}.0.act1" for stage in stages[1:]), "act"]
        taps = TapPaths.of_backbone(stem="conv", post=stages, pre=pre, last="act")
        backbone = WideResNetBackbone(input_shape[0], widening, num_blocks)
        super().__init__(input_shape, backbone, 4 * widening * _STEM_WIDTH, keep_bias, taps)
        self.last_activation = pre[-1]
