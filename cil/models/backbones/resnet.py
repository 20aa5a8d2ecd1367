"""Residual networks of four stages (He et al., CVPR 2016, arXiv:1512.03385, table 1) with a stem for small images."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from cil.models.backbones.resnet_cifar import BasicBlock, StagedBackbone, convolved_shortcut
from cil.models.heads import HeadInit
from cil.models.network import BackboneNetwork, InputShape, TapPaths, models

Maps = Float[Tensor, "batch channels height width"]

_WIDTHS = (64, 128, 256, 512)
_EXPANSION = 4
_NUM_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
_SHALLOW = (18, 34)  # these have basic blocks


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; four times as many channels come out as are convolved.

    Args:
        in_channels: Channels before.
        width: Channels of the 3x3 convolution.
        stride: Of the 3x3 convolution and of the shortcut.
    """

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        out_channels = _EXPANSION * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.act2 = nn.ReLU()
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.act3 = nn.ReLU()
        self.shortcut = convolved_shortcut(in_channels, out_channels, stride)

    def forward(self, x: Maps) -> Float[Tensor, "batch ..."]:
        """Maps in, maps out."""
        shortcut = self.shortcut(x)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.bn2(self.conv2(x)))
        maps: Tensor = self.act3(self.bn3(self.conv3(x)) + shortcut)
        return maps


class ResNetBackbone(StagedBackbone):
    """A 3x3 convolution, four stages, and the mean over places.

    Args:
        channels: Channels of an image.
        depth: Layers, as the paper counts them.
    """

    def __init__(self, channels: int, depth: int) -> None:
        before = _WIDTHS[0]
        super().__init__(channels, before)
        for width, stride, num_blocks in zip(_WIDTHS, (1, 2, 2, 2), _NUM_BLOCKS[depth], strict=True):
            blocks: list[nn.Module] = []
            for block_stride in (stride, *[1] * (num_blocks - 1)):
                if depth in _SHALLOW:
                    blocks.append(BasicBlock(before, width, block_stride, convolved_shortcut))
                    before = width
                else:
                    blocks.append(Bottleneck(before, width, block_stride))
                    before = _EXPANSION * width
            self.stages.append(nn.Sequential(*blocks))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


@models.register("resnet")
class ResNet(BackboneNetwork):
    """ResNet-18 to ResNet-152 as they are used for CIFAR: the first convolution is 3x3 and nothing is pooled after it.

    Args:
        input_shape: Channels, height and width of an image.
        depth: Layers, as the paper counts them.
        keep_bias: See `GrowingLinear`.
        head_init: How new outputs begin, see `resnet_cifar`.
    """

    def __init__(
        self,
        input_shape: InputShape,
        *,
        depth: Literal[18, 34, 50, 101, 152] = 50,
        keep_bias: bool = True,
        head_init: HeadInit = "torch",
    ) -> None:
        last_act, expansion = ("act2", 1) if depth in _SHALLOW else ("act3", _EXPANSION)
        stages = [f"stages.{i}" for i in range(len(_WIDTHS))]
        pre = [f"{stage}.{n - 1}.{last_act}" for stage, n in zip(stages, _NUM_BLOCKS[depth], strict=True)]
        taps = TapPaths.of_backbone(stem="act", post=stages, pre=pre, last=stages[-1])
        backbone = ResNetBackbone(input_shape[0], depth)
        super().__init__(input_shape, backbone, expansion * _WIDTHS[-1], keep_bias, taps, head_init)
        self.last_activation = pre[-1]
