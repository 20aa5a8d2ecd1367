"""Between two networks: what both say of a probe batch, and trainable adapters between widths and sizes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kd.base import Outputs

Maps = Float[Tensor, "batch channels height width"]
Start = Literal["random", "identity"]
Size = tuple[int, int]


@contextmanager
def held_still(network: nn.Module) -> Iterator[None]:
    """A block in which every module evaluates; after it every mode and every buffer is as it was.

    The modes are set one by one, since a network may do more than that in a `train` or `eval` of its own.
    """
    modes = {module: module.training for module in network.modules()}
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in modes
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for module, name, buffer, before in buffers:
                setattr(module, name, buffer)  # a module may put another tensor in its place
                if not torch.equal(buffer, before):
                    buffer.copy_(before)


def probe(network: nn.Module, images: Float[Tensor, "batch ..."]) -> Outputs:
    """What a network says of some images, to read the shapes off: no gradient, and no trace left in the network.

    Args:
        network: Returns `Outputs` (`kd.taps.Tapped` makes it so).
        images: A few images of the size of the training images.

    Raises:
        ValueError: If the network returns something else.
    """
    with held_still(network), torch.no_grad():
        outputs = network(images)
    if not isinstance(outputs, Outputs):
        raise ValueError(
            f"a {type(network).__name__} returns {type(outputs).__name__}, but connecting networks needs Outputs: wrap "
            "it in kd.taps.Tapped"
        )
    return outputs


class Regressor(nn.Module):
    """Turns the student's map into one of the teacher's width and size: ReLU(BatchNorm(convolution(x))).

    By the heights of the two maps: half as high, a 3x3 convolution of stride 2; twice as high, a transposed 4x4
    convolution of stride 2; any other map that is not higher, a convolution without padding of kernel 1 + difference.
    That last one too where the widths do not follow the heights.

    Args:
        in_shape: Channels, height and width of the student's map.
        out_shape: Channels, height and width of the teacher's.
        init: "identity" is a 1x1 convolution that starts as the identity, without BatchNorm and ReLU, which would not
            be one; for maps of one shape.

    Raises:
        ValueError: If the maps are of another relation, or "identity" of two shapes.
    """

    def __init__(
        self, in_shape: tuple[int, int, int], out_shape: tuple[int, int, int], *, init: Start = "random"
    ) -> None:
        super().__init__()
        if init not in get_args(Start):
            raise ValueError(f"init must be one of {', '.join(get_args(Start))}, found {init!r}")
        self.conv = _resizing_convolution(in_shape, out_shape)
        self.bn = nn.BatchNorm2d(out_shape[0]) if init == "random" else nn.Identity()
        self.act = nn.ReLU() if init == "random" else nn.Identity()
        if init == "identity":
            if in_shape != out_shape:
                raise ValueError(
                    f"only maps of one shape can start as the identity, found {in_shape} of the student and "
                    f"{out_shape} of the teacher; use init='random'"
                )
            nn.init.dirac_(self.conv.weight)
            assert self.conv.bias is not None
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Maps) -> Float[Tensor, "batch out_channels out_height out_width"]:
        """A map of the teacher's shape."""
        maps: Tensor = self.act(self.bn(self.conv(x)))
        return maps


def _resizing_convolution(
    in_shape: tuple[int, int, int], out_shape: tuple[int, int, int]
) -> nn.Conv2d | nn.ConvTranspose2d:
    (in_width, *in_size), (out_width, *out_size) = in_shape, out_shape
    if in_size[0] == 2 * out_size[0] and (in_size[1] + 1) // 2 == out_size[1]:
        return nn.Conv2d(in_width, out_width, 3, stride=2, padding=1)
    if [2 * side for side in in_size] == out_size:
        return nn.ConvTranspose2d(in_width, out_width, 4, stride=2, padding=1)
    if in_size[0] >= out_size[0] and in_size[1] >= out_size[1]:
        return nn.Conv2d(in_width, out_width, (1 + in_size[0] - out_size[0], 1 + in_size[1] - out_size[1]))
    raise ValueError(
        f"a map of {in_size[0]}x{in_size[1]} can be turned into one half or twice as large or into any smaller one, "
        f"not into {out_size[0]}x{out_size[1]}; choose stages that are nearer in size"
    )


def _projection(in_channels: int, out_channels: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


class ABF(nn.Module):
    """Attention-based fusion of a map with that of the next deeper level (Chen et al., CVPR 2021, arXiv:2104.09044).

    x and y go to one width and size; two 1-channel attention maps, from both of them, say where each counts.

    Args:
        in_channels: Of x.
        mid_channels: Of the fused map.
        out_channels: Of the map to compare.
        fuse: Whether there is a deeper level; the deepest has none.
    """

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int, *, fuse: bool) -> None:
        super().__init__()
        self.conv1 = _projection(in_channels, mid_channels, kernel=1)
        self.conv2 = _projection(mid_channels, out_channels, kernel=3)
        self.att_conv = nn.Sequential(nn.Conv2d(2 * mid_channels, 2, 1), nn.Sigmoid()) if fuse else None

    def forward(
        self, x: Maps, y: Float[Tensor, "batch mid y_height y_width"] | None, out_size: Size
    ) -> tuple[Float[Tensor, "batch out_channels h w"], Float[Tensor, "batch mid h w"]]:
        """The map to compare, of `out_size` (height, width), and the fused map for the next shallower level."""
        x = self.conv1(x)
        if self.att_conv is not None:
            assert y is not None, "a level that fuses is given the fused map of the next deeper one"
            y = F.interpolate(y, x.shape[2:], mode="nearest")
            attention = self.att_conv(torch.cat([x, y], dim=1))
            x = x * attention[:, :1] + y * attention[:, 1:]
        if x.shape[2:] != out_size:
            x = F.interpolate(x, out_size, mode="nearest")
        return self.conv2(x), x
