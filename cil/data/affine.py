"""Shearing, moving and turning of image batches, bicubic, each image by its own amount.

As Pillow's `Image.transform`: an output pixel's centre is mapped into the input, read with the cubic convolution kernel
of a = -1 (pixels beyond the border repeat the border's), rounded down, and filled with one colour where it falls
outside the input.
"""

import math

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Float32, Int, UInt8
from torch import Tensor

Images = UInt8[Tensor, "batch channels height width"]
Fill = UInt8[Tensor, " channels"]


def shear_x(images: Images, factor: Float[Tensor, " batch"], fill: Fill) -> Images:
    """Row y (its centre) reads `factor * y` pixels further right."""
    middles = torch.arange(images.shape[2], device=images.device) + 0.5
    return _shift_rows(images, factor[:, None] * middles, fill)


def shear_y(images: Images, factor: Float[Tensor, " batch"], fill: Fill) -> Images:
    """Column x reads `factor * x` pixels further down."""
    return shear_x(images.mT, factor, fill).mT


def translate_x(images: Images, share: Float[Tensor, " batch"], fill: Fill) -> Images:
    """Every pixel reads `share` of the width further right."""
    pixels = share[:, None] * images.shape[3]
    return _shift_rows(images, pixels.expand(-1, images.shape[2]), fill)


def translate_y(images: Images, share: Float[Tensor, " batch"], fill: Fill) -> Images:
    """Every pixel reads `share` of the height further down."""
    return translate_x(images.mT, share, fill).mT


def rotate(images: Images, degrees: Float[Tensor, " batch"], fill: Fill) -> Images:
    """Turn counter-clockwise about the image's centre."""
    height, width = images.shape[2:]
    angle = -degrees.double()[:, None, None] * (math.pi / 180)
    cosine, sine = angle.cos(), angle.sin()
    y = torch.arange(height, dtype=torch.float64, device=images.device)[:, None] + (0.5 - height / 2)
    x = torch.arange(width, dtype=torch.float64, device=images.device) + (0.5 - width / 2)
    columns, across, in_width = _taps(cosine * x + sine * y + width / 2, width)
    rows, down, in_height = _taps(cosine * y - sine * x + height / 2, height)
    flat = rearrange(images, "b c h w -> b c (h w)").float()
    lines = []
    for row in rows:
        taps = [rearrange(row * width + column, "b h w -> b 1 (h w)") for column in columns]
        values = [flat.gather(2, tap.expand(-1, images.shape[1], -1)) for tap in taps]
        lines.append(_cubic(values, rearrange(across, "b h w -> b 1 (h w)")))
    turned = _cubic(lines, rearrange(down, "b h w -> b 1 (h w)"))
    return _finished(rearrange(turned, "b c (h w) -> b c h w", h=height), in_width & in_height, fill)


def _shift_rows(images: Images, pixels: Float[Tensor, "batch height"], fill: Fill) -> Images:
    """Each row reads so many pixels further right; only the four neighbours in the row count."""
    width = images.shape[3]
    centres = torch.arange(width, dtype=torch.float64, device=images.device) + 0.5
    columns, across, inside = _taps(centres + pixels.double()[:, :, None], width)
    floats = images.float()
    values = [floats.gather(3, column[:, None].expand(-1, images.shape[1], -1, -1)) for column in columns]
    return _finished(_cubic(values, across[:, None]), inside, fill)


def _taps(
    position: Float[Tensor, "batch height width"], size: int
) -> tuple[list[Int[Tensor, "batch height width"]], Float32[Tensor, "batch height width"], Bool[Tensor, "..."]]:
    """The four pixels around a place on one axis, how far it is from the second to the third, whether it is inside."""
    first = (position - 0.5).floor()
    distance = (position - 0.5 - first).float()
    nearest = first.long()
    taps = [(nearest + step).clamp_(0, size - 1) for step in (-1, 0, 1, 2)]
    return taps, distance, (position >= 0) & (position < size)


def _cubic(values: list[Tensor], distance: Tensor) -> Tensor:
    """Cubic convolution, a = -1, between the second and the third of four values, as a polynomial of the distance.

    The polynomial gives back a constant exactly, which a sum of weights does not; rounding down would show it.
    """
    before, start, end, after = values
    slope = end - before
    bend = 2 * (before - start) + end - after
    twist = start - before + after - end
    return start + distance * (slope + distance * (bend + distance * twist))


def _finished(
    values: Float32[Tensor, "batch channels height width"], inside: Bool[Tensor, "batch height width"], fill: Fill
) -> Images:
    pixels = values.clamp_(0, 255).to(torch.uint8)
    return torch.where(inside[:, None], pixels, fill[:, None, None])
