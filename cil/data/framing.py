"""Which part of a picture is shown, and how it becomes a square of RGB pixels."""

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps

Interpolation = Literal["bilinear", "bicubic"]
Size = tuple[int, int]  # width, height, as Pillow has it
Box = tuple[int, int, int, int]  # left, top, right, bottom

ATTEMPTS = 10  # at a window of the size and shape drawn (torchvision)
NUM_DRAWS = 2 * ATTEMPTS + 2  # size and shape of each attempt, then the place

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_ORIENTATION = 0x0112  # the EXIF tag that says how a camera was held
_SIDEWAYS = 5  # from this value on, width and height are exchanged
_REDUCTIONS = (8, 4, 2)  # what a JPEG can be decoded at cheaply
_SPARE = 2  # a reduced JPEG keeps at least so many pixels a side for each one shown (Pillow's usual `reducing_gap`)


@dataclass(frozen=True)
class Framing:
    """Training shows a random window of a picture, testing its middle.

    The random window is that of GoogLeNet (Szegedy et al., CVPR 2015, arXiv:1409.4842) as torchvision draws it; the
    middle is what is left when the shorter side is brought to `resize` and a square is cut out of the centre.

    Attributes:
        image_size: Side of the square, in pixels.
        resize: The shorter side before the centre is cut out, in pixels.
        scale: Least and greatest share of the picture's area in a random window.
        ratio: Least and greatest width of a random window divided by its height.
        interpolation: How pixels are computed; both average over all pixels when an image shrinks.

    Raises:
        ValueError: If a number is out of range.
    """

    image_size: int
    resize: int
    scale: tuple[float, float]
    ratio: tuple[float, float]
    interpolation: Interpolation

    def __post_init__(self) -> None:
        if self.image_size < 1 or self.resize < self.image_size:
            raise ValueError(
                "data.resize must be at least data.image_size, and that at least 1; "
                f"found {self.resize} and {self.image_size}"
            )
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"data.scale must be two shares of the area, 0 < low <= high <= 1, found {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"data.ratio must be two ratios, 0 < low <= high, found {self.ratio}")

    def window(self, size: Size, draws: Sequence[float]) -> Box:
        """A random window.

        Args:
            size: Width and height of the picture.
            draws: `NUM_DRAWS` random numbers in [0, 1).
        """
        width, height = size
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        *attempts, across, down = draws
        for share, shape in zip(attempts[::2], attempts[1::2], strict=True):
            area = width * height * (self.scale[0] + share * (self.scale[1] - self.scale[0]))
            ratio = math.exp(low + shape * (high - low))
            columns, rows = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < columns <= width and 0 < rows <= height:
                break
        else:  # no attempt fits: the largest part of the picture that has an allowed shape, from its middle
            columns = min(width, max(1, round(height * self.ratio[1])))
            rows = min(height, max(1, round(width / self.ratio[0])))
            across = down = 0.5
        left = min(int(across * (width - columns + 1)), width - columns)
        top = min(int(down * (height - rows + 1)), height - rows)
        return left, top, left + columns, top + rows

    def read(self, path: Path, draws: Sequence[float] | None) -> UInt8[np.ndarray, "height width 3"]:
        """The pixels of an image file.

        Any kind that Pillow reads becomes RGB: grey, palette, CMYK; of 16 bits the upper 8 stay, transparency is left
        out, and a photograph stands as its camera was held (EXIF). A JPEG much larger than needed is decoded at a
        half, a quarter or an eighth.

        Args:
            path: The file.
            draws: `NUM_DRAWS` random numbers in [0, 1) for a random window; None shows the middle.

        Raises:
            ValueError: If the file is no image, or a damaged one.
        """
        try:
            # the warnings are of damaged EXIF, and of palettes with alpha
            with warnings.catch_warnings(action="ignore", category=UserWarning), Image.open(path) as image:
                shown = self._shown(image, draws)
        except Exception as error:  # Pillow raises nearly every kind for one damaged file or another
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{os.fspath(path)} cannot be read as an image: {reason}") from error
        return np.asarray(shown)

    def _shown(self, image: Image.Image, draws: Sequence[float] | None) -> Image.Image:
        sideways = image.getexif().get(_ORIENTATION, 1) >= _SIDEWAYS
        width, height = image.size[::-1] if sideways else image.size
        if draws is None:
            shorter = min(width, height)
            box: Box = (0, 0, width, height)
            size = self.resize * width // shorter, self.resize * height // shorter
        else:
            box, size = self.window((width, height), draws), (self.image_size, self.image_size)
        spare = min((box[2] - box[0]) / size[0], (box[3] - box[1]) / size[1]) / _SPARE
        for reduction in _REDUCTIONS:
            if reduction <= spare:
                image.draft(None, (image.width // reduction, image.height // reduction))  # JPEG alone heeds this
                break
        ImageOps.exif_transpose(image, in_place=True)
        # where the box lies in what was decoded; the product may be a hair too large
        left, right = (min(place * image.width / width, image.width) for place in box[::2])
        top, bottom = (min(place * image.height / height, image.height) for place in box[1::2])
        resized = to_rgb(image).resize(size, _RESAMPLING[self.interpolation], box=(left, top, right, bottom))
        x, y = (round((side - self.image_size) / 2) for side in size)
        return resized.crop((x, y, x + self.image_size, y + self.image_size))


def to_rgb(image: Image.Image) -> Image.Image:
    """Pixels of any kind as RGB of 8 bits; of 16 bits the upper 8 stay, transparency is left out.

    Raises:
        ValueError: If they are floating-point numbers, or of more than 16 bits.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose range nobody knows: save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        levels = np.asarray(image)
        if levels.min() < 0 or levels.max() >= 1 << 16:
            raise ValueError("its pixels have more than 16 bits: save it with 8 or 16 bits")
        return Image.fromarray((levels >> 8).astype(np.uint8)).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
