"""Residual networks for small images (He et al., CVPR 2016, arXiv:1512.03385, section 4.2)."""

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import torch.nn.functional as F
from einops import reduce
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from cil.models.heads import HeadInit
from cil.models.network import BackboneNetwork, InputShape, TapPaths, models

Maps = Float[Tensor, "batch channels height width"]

_CONVOLUTIONS_PER_BLOCK = 2
_NUM_STAGES = 3
_DEFAULT_DEPTH = 32
_NUM_OTHER_LAYERS = 2  # the first convolution and the classifier count towards the depth


class PaddedShortcut(nn.Module):
    """A shortcut without parameters: every `stride`-th pixel, zeros for the channels that are added (option A)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.num_added = out_channels - in_channels

    def forward(self, x: Maps) -> Float[Tensor, "batch ..."]:
        """Maps in, maps out."""
        x = x[:, :, :: self.stride, :: self.stride]
        if self.num_added:
            before = self.num_added // 2
            x = F.pad(x, (0, 0, 0, 0, before, self.num_added - before))
        return x


def convolved_shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """A 1x1 convolution and BatchNorm where the shape of the maps changes (option B), the identity elsewhere."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut.

    Args:
        in_channels, out_channels: Channels before and after.
        stride: Of the first convolution and of the shortcut.
        shortcut: `PaddedShortcut` or `convolved_shortcut`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        shortcut: Callable[[int, int, int], nn.Module] = PaddedShortcut,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.act2 = nn.ReLU()
        self.shortcut = shortcut(in_channels, out_channels, stride)

    def forward(self, x: Maps) -> Float[Tensor, "batch ..."]:
        """Maps in, maps out."""
        shortcut = self.shortcut(x)
        x = self.act1(self.bn1(self.conv1(x)))
        maps: Tensor = self.act2(self.bn2(self.conv2(x)) + shortcut)
        return maps


class StagedBackbone(nn.Module):
    """A convolution with BatchNorm and ReLU, stages one behind the other, and the mean over places.

    Args:
        channels: Channels of an image.
        stem_width: Channels of the convolution.
        kernel: Its kernel; the maps keep their size.
    """

    def __init__(self, channels: int, stem_width: int, kernel: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, stem_width, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(stem_width)
        self.act = nn.ReLU()
        self.stages = nn.ModuleList()

    def forward(self, images: Maps) -> Float[Tensor, "batch embedding"]:
        """The embedding of each image."""
        maps = self.act(self.bn(self.conv(images)))
        for stage in self.stages:
            maps = stage(maps)
        embedding: Tensor = reduce(maps, "b c h w -> b c", "mean")
        return embedding


class ResNetCifarBackbone(StagedBackbone):
    """A convolution, three stages of blocks of 1, 2 and 4 times `width` channels, and the mean over places.

    Args:
        channels: Channels of an image.
        width: Channels of the first stage.
        num_blocks: Blocks of each stage.
        stem_width: Channels of the convolution before the stages.
        shortcut: See `BasicBlock`.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        num_blocks: Sequence[int],
        stem_width: int,
        shortcut: Callable[[int, int, int], nn.Module],
    ) -> None:
        super().__init__(channels, stem_width)
        before = stem_width
        for count, after, stride in zip(num_blocks, (width, 2 * width, 4 * width), (1, 2, 2), strict=True):
            rest = [BasicBlock(after, after, 1, shortcut) for _ in range(count - 1)]
            self.stages.append(nn.Sequential(BasicBlock(before, after, stride, shortcut), *rest))
            before = after
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


@models.register("resnet_cifar")
class ResNetCifar(BackboneNetwork):
    """ResNet-8 to ResNet-110 for CIFAR, with one linear head; works for any image size and number of channels.

    The networks of class-incremental learning have `shortcut="pad"`, those of the distillation literature "conv"; its
    "x4" networks have `width=64, stem_width=32` on top.

    Args:
        input_shape: Channels, height and width of an image.
        depth: Layers, as the paper counts them, equally many in each stage; null takes 32, or what `blocks` says.
        blocks: Residual blocks of each of the three stages, such as [5, 5, 7], instead of a depth.
        width: Channels of the first stage; the embedding is 4 times as wide.
        stem_width: Channels before the first stage; null takes `width`.
        shortcut: Where the shape of the maps changes: `pad` is the paper's option A, without parameters, `conv` its
            option B, a 1x1 convolution and BatchNorm.
        keep_bias: See `GrowingLinear`.
        head_init: How new outputs begin: `torch`, or `kaiming` (weights uniform in $\\pm\\sqrt{3/in}$, biases 0) as in
            class-incremental learning.

    Raises:
        ValueError: If `shortcut="pad"` would have to remove channels, or both `depth` and `blocks` are given.
    """

    def __init__(
        self,
        input_shape: InputShape,
        *,
        depth: Literal[8, 14, 20, 32, 44, 56, 110] | None = None,
        blocks: Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=3, max_length=3)] | None = None,
        width: Annotated[int, Field(gt=0)] = 16,
        stem_width: Annotated[int, Field(gt=0)] | None = None,
        shortcut: Literal["pad", "conv"] = "pad",
        keep_bias: bool = True,
        head_init: HeadInit = "torch",
    ) -> None:
        if blocks is not None and depth is not None:
            raise ValueError(f"depth={depth} and blocks={blocks} both say how deep the network is: set one to null")
        if blocks is None:
            layers = (depth or _DEFAULT_DEPTH) - _NUM_OTHER_LAYERS
            blocks = [layers // (_NUM_STAGES * _CONVOLUTIONS_PER_BLOCK)] * _NUM_STAGES
        stem_width = width if stem_width is None else stem_width
        if shortcut == "pad" and stem_width > width:
            raise ValueError(
                f"shortcut=pad adds channels and removes none: stem_width must be at most width={width}, found "
                f"{stem_width}; shortcut=conv can do both"
            )
        kind = PaddedShortcut if shortcut == "pad" else convolved_shortcut
        backbone = ResNetCifarBackbone(input_shape[0], width, blocks, stem_width, kind)
        stages = [f"stages.{i}" for i in range(_NUM_STAGES)]
        pre = [f"{stage}.{count - 1}.act2" for stage, count in zip(stages, blocks, strict=True)]
        taps = TapPaths.of_backbone(stem="act", post=stages, pre=pre, last=stages[-1])
        super().__init__(input_shape, backbone, 4 * width, keep_bias, taps, head_init)
        self.last_activation = pre[-1]
