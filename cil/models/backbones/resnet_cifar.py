"""Residual networks for small images (He et al., CVPR 2016, arXiv:1512.03385, section 4.2)."""

from typing import Annotated, Literal

import torch.nn.functional as F
from einops import reduce
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from cil.models.network import BackboneNetwork, InputShape, models

Maps = Float[Tensor, "batch channels height width"]

_CONVOLUTIONS_PER_BLOCK = 2
_NUM_STAGES = 3
_NUM_OTHER_LAYERS = 2  # the first convolution and the classifier count towards the depth


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A: every `stride`-th pixel, zeros for channels).

    Args:
        in_channels, out_channels: Channels before and after.
        stride: Of the first convolution and of the shortcut.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.act2 = nn.ReLU()
        self.stride = stride
        self.num_added = out_channels - in_channels

    def forward(self, x: Maps) -> Float[Tensor, "batch ..."]:
        """Maps in, maps out."""
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.num_added:
            before = self.num_added // 2
            shortcut = F.pad(shortcut, (0, 0, 0, 0, before, self.num_added - before))
        x = self.act1(self.bn1(self.conv1(x)))
        maps: Tensor = self.act2(self.bn2(self.conv2(x)) + shortcut)
        return maps


class ResNetCifarBackbone(nn.Module):
    """A convolution, three stages of blocks of 1, 2 and 4 times `width` channels, and the mean over places.

    Args:
        channels: Channels of an image.
        width: Channels of the first stage.
        num_blocks: Blocks in each stage.
    """

    def __init__(self, channels: int, width: int, num_blocks: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.act = nn.ReLU()
        self.stages = nn.ModuleList()
        before = width
        for after, stride in zip((width, 2 * width, 4 * width), (1, 2, 2), strict=True):
            rest = [BasicBlock(after, after, stride=1) for _ in range(num_blocks - 1)]
            self.stages.append(nn.Sequential(BasicBlock(before, after, stride), *rest))
            before = after
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Maps) -> Float[Tensor, "batch embedding"]:
        """The embedding of each image."""
        maps = self.act(self.bn(self.conv(images)))
        for stage in self.stages:
            maps = stage(maps)
        embedding: Tensor = reduce(maps, "b c h w -> b c", "mean")
        return embedding


@models.register("resnet_cifar")
class ResNetCifar(BackboneNetwork):
    """ResNet-20 to ResNet-110 for CIFAR, with one linear head; works for any image size and number of channels.

    Args:
        input_shape: Channels, height and width of an image.
        depth: Layers, as the paper counts them.
        width: Channels of the first stage; the embedding is 4 times as wide.
        keep_bias: See `GrowingLinear`.
    """

    def __init__(
        self,
        input_shape: InputShape,
        *,
        depth: Literal[20, 32, 44, 56, 110] = 32,
        width: Annotated[int, Field(gt=0)] = 16,
        keep_bias: bool = True,
    ) -> None:
        num_blocks = (depth - _NUM_OTHER_LAYERS) // (_NUM_STAGES * _CONVOLUTIONS_PER_BLOCK)
        backbone = ResNetCifarBackbone(input_shape[0], width, num_blocks)
        super().__init__(input_shape, backbone, 4 * width, keep_bias)
