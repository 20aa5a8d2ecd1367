"""ShuffleNet (Zhang et al., CVPR 2018, arXiv:1707.01083) for small images."""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from cil.models.backbones.resnet_cifar import StagedBackbone
from cil.models.network import BackboneNetwork, InputShape, TapPaths, models

Maps = Float[Tensor, "batch channels height width"]

_NUM_GROUPS = 3
_STEM_WIDTH = 24
_WIDTHS = (240, 480, 960)
_NUM_BLOCKS = (4, 8, 4)
_BOTTLENECK = 4  # the convolved channels are a fourth of those that come out


class ShuffleBlock(nn.Module):
    """Grouped 1x1, shuffle, 3x3 of each channel, grouped 1x1; added to the input, or put beside its halved maps.

    Args:
        in_channels, out_channels: Channels before and after.
        stride: 1 adds, 2 halves the maps.
        num_first_groups: Groups of the first convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, num_first_groups: int) -> None:
        super().__init__()
        made = out_channels if stride == 1 else out_channels - in_channels
        hidden = made // _BOTTLENECK
        self.num_first_groups = num_first_groups
        self.conv1 = nn.Conv2d(in_channels, hidden, 1, groups=num_first_groups, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride, padding=1, groups=hidden, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.act2 = nn.ReLU()  # the paper has none here, the networks of the distillation literature do
        self.conv3 = nn.Conv2d(hidden, made, 1, groups=_NUM_GROUPS, bias=False)
        self.bn3 = nn.BatchNorm2d(made)
        self.shortcut = None if stride == 1 else nn.AvgPool2d(3, stride, padding=1)
        self.act3 = nn.ReLU()

    def forward(self, x: Maps) -> Float[Tensor, "batch ..."]:
        """Maps in, maps out."""
        made = self.act1(self.bn1(self.conv1(x)))
        made = rearrange(made, "b (groups c) h w -> b (c groups) h w", groups=self.num_first_groups)
        made = self.act2(self.bn2(self.conv2(made)))
        made = self.bn3(self.conv3(made))
        maps: Tensor = self.act3(made + x if self.shortcut is None else torch.cat([made, self.shortcut(x)], dim=1))
        return maps


class ShuffleNetV1Backbone(StagedBackbone):
    """A 1x1 convolution, three stages, and the mean over places; torch's default initial values.

    Args:
        channels: Channels of an image.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, _STEM_WIDTH, kernel=1)
        before, num_first_groups = _STEM_WIDTH, 1  # so few channels as those of the stem are not grouped
        for after, num_blocks in zip(_WIDTHS, _NUM_BLOCKS, strict=True):
            first = ShuffleBlock(before, after, 2, num_first_groups)
            rest = [ShuffleBlock(after, after, 1, _NUM_GROUPS) for _ in range(num_blocks - 1)]
            self.stages.append(nn.Sequential(first, *rest))
            before, num_first_groups = after, _NUM_GROUPS


@models.register("shufflenetv1")
class ShuffleNetV1(BackboneNetwork):
    """ShuffleNet with 3 groups as the distillation literature uses it for CIFAR.

    Args:
        input_shape: Channels, height and width of an image.
        keep_bias: See `GrowingLinear`.
    """

    def __init__(self, input_shape: InputShape, *, keep_bias: bool = True) -> None:
        stages = [f"stages.{i}" for i in range(len(_WIDTHS))]
        pre = [f"{stage}.{num_blocks - 1}.act3" for stage, num_blocks in zip(stages, _NUM_BLOCKS, strict=True)]
        taps = TapPaths.of_backbone(stem="act", post=stages, pre=pre, last=stages[-1])
        super().__init__(input_shape, ShuffleNetV1Backbone(input_shape[0]), _WIDTHS[-1], keep_bias, taps)
        self.last_activation = pre[-1]
