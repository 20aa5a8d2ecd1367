"""Changes of pixel values, each with its own strength for every image of a batch.

They give the integers that Pillow gives (the tests compare), so that recipes tuned on Pillow's operations carry over.
Images of one channel are taken as grey: what has to do with colour leaves them as they are.
"""

import torch
from einops import rearrange
from jaxtyping import Float, Float32, Int, UInt8
from torch import Tensor

Images = UInt8[Tensor, "batch channels height width"]

# ITU-R 601 luma in 16-bit fixed point, as Pillow's conversion from RGB to L.
_LUMA_WEIGHTS = (19595, 38470, 7471)
_LUMA_HALF, _LUMA_SHIFT = 1 << 15, 16
# Pillow's SMOOTH: a 3 x 3 kernel of ones with 5 in the middle, divided by their sum.
_SMOOTH_CENTRE, _SMOOTH_SUM = 5, 13


def luminance(images: Images) -> UInt8[Tensor, "batch 1 height width"]:
    """Brightness of each pixel.

    Raises:
        ValueError: If the images have neither 1 nor 3 channels.
    """
    if images.shape[1] == 1:
        return images
    if images.shape[1] != 3:
        raise ValueError(f"changing colours needs images of 1 (grey) or 3 (RGB) channels, found {images.shape[1]}")
    red, green, blue = images.int().unbind(1)
    weighted = red * _LUMA_WEIGHTS[0] + green * _LUMA_WEIGHTS[1] + blue * _LUMA_WEIGHTS[2] + _LUMA_HALF
    return (weighted >> _LUMA_SHIFT).to(torch.uint8)[:, None]


def _blend(
    start: Float32[Tensor, "batch #channels #height #width"], images: Images, factor: Float[Tensor, " batch"]
) -> Images:
    """`start` at factor 0, `images` at factor 1, beyond at others; cut to 0 .. 255 and rounded down."""
    blended = start + factor.float()[:, None, None, None] * (images.float() - start)
    return blended.clamp_(0, 255).to(torch.uint8)


def brightness(images: Images, factor: Float[Tensor, " batch"]) -> Images:
    """Away from black (0: black, 1: unchanged)."""
    return _blend(torch.zeros_like(images, dtype=torch.float32), images, factor)


def contrast(images: Images, factor: Float[Tensor, " batch"]) -> Images:
    """Away from the image's mean grey (0: uniform grey, 1: unchanged)."""
    mean = luminance(images).double().mean(dim=(1, 2, 3), keepdim=True)
    return _blend((mean + 0.5).floor().float(), images, factor)


def saturation(images: Images, factor: Float[Tensor, " batch"]) -> Images:
    """Away from grey (0: grey, 1: unchanged); grey images stay as they are."""
    return images if images.shape[1] == 1 else _blend(luminance(images).float(), images, factor)


def sharpness(images: Images, factor: Float[Tensor, " batch"]) -> Images:
    """Away from a smoothed image (0: smooth, 1: unchanged); the outermost pixels stay as they are."""
    smooth = images.float()
    if min(images.shape[2:]) > 2:
        pixels = images.int()
        rows = pixels[:, :, :-2] + pixels[:, :, 1:-1] + pixels[:, :, 2:]
        total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + (_SMOOTH_CENTRE - 1) * pixels[:, :, 1:-1, 1:-1]
        smooth[:, :, 1:-1, 1:-1] = ((2 * total + _SMOOTH_SUM) // (2 * _SMOOTH_SUM)).float()  # rounded, in integers
    return _blend(smooth, images, factor)


def hue(images: Images, turn: Float[Tensor, " batch"]) -> Images:
    """Turn the hue by a share of the colour circle, -0.5 to 0.5; grey images stay as they are."""
    if images.shape[1] == 1:
        return images
    luminance(images[:0])  # for its check of the channels
    red, green, blue = (images.float() / 255).unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    divisor = torch.where(chroma == 0, 1, chroma)
    sixth = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    turned = sixth + 6 * turn.float()[:, None, None]
    # Red, green and blue of a hue are one curve, a third of the circle apart (Wikipedia, "HSL and HSV", HSV to RGB).
    place = torch.stack([(offset + turned) % 6 for offset in (5, 3, 1)], dim=1)
    curve = torch.minimum(place, 4 - place).clamp(0, 1)
    return ((value[:, None] - chroma[:, None] * curve) * 255).round().clamp_(0, 255).to(torch.uint8)


def invert(images: Images) -> Images:
    """The negative."""
    return 255 - images


def solarize(images: Images, threshold: Int[Tensor, " batch"]) -> Images:
    """Invert the pixels at or above a threshold, 0 to 256."""
    return torch.where(images.int() < threshold[:, None, None, None], images, 255 - images)


def solarize_add(images: Images, amount: Int[Tensor, " batch"], threshold: int = 128) -> Images:
    """Brighten the pixels below a threshold by an amount, up to 255."""
    brighter = (images.int() + amount.int()[:, None, None, None]).clamp_(max=255).to(torch.uint8)
    return torch.where(images < threshold, brighter, images)


def posterize(images: Images, bits: Int[Tensor, " batch"]) -> Images:
    """Keep the highest bits, 0 to 8, of each pixel (0 leaves black)."""
    mask = (255 << (8 - bits.int())) & 255
    return images & mask.to(torch.uint8)[:, None, None, None]


def auto_contrast(images: Images) -> Images:
    """Stretch each channel to 0 .. 255; a channel of one value stays as it is."""
    low, high = images.amin(dim=(2, 3)).double(), images.amax(dim=(2, 3)).double()
    scale = torch.full_like(low, 255) / (high - low).clamp(min=1)  # 255 / tensor would multiply by the reciprocal
    levels = torch.arange(256, dtype=torch.float64, device=images.device)
    stretched = (levels * scale[..., None] - (low * scale)[..., None]).clamp_(0, 255)
    return _look_up(images, torch.where((high > low)[..., None], stretched, levels))


def equalize(images: Images) -> Images:
    """Spread each channel's histogram evenly; a channel of one value, or of too few pixels, stays as it is."""
    values = rearrange(images, "b c h w -> b c (h w)").long()
    histogram = torch.zeros(*values.shape[:2], 256, dtype=torch.int64, device=images.device)
    histogram.scatter_add_(2, values, torch.ones_like(values))
    levels = torch.arange(256, device=images.device)
    last = histogram.gather(2, values.amax(dim=2, keepdim=True))
    step = (values.shape[2] - last) // 255
    below = histogram.cumsum(dim=2) - histogram
    spread = (step // 2 + below) // step.clamp(min=1)
    return _look_up(images, torch.where(step > 0, spread, levels).clamp_(max=255))


def _look_up(images: Images, table: Float[Tensor, "batch channels 256"] | Int[Tensor, "batch channels 256"]) -> Images:
    """Each pixel's entry, rounded down, in a table of its image and channel."""
    flat = rearrange(images, "b c h w -> b c (h w)").long()
    return rearrange(table.to(torch.uint8).gather(2, flat), "b c (h w) -> b c h w", h=images.shape[2])
