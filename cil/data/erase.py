"""Augmentations that blank out rectangles."""

from typing import Annotated, ClassVar

import torch
from jaxtyping import Bool, Float32, Int
from pydantic import Field
from torch import Tensor

from cil.data.augment import Augmentation, Probability, Stage, augmentations
from cil.seeding import SampleNoise

_ATTEMPTS = 10  # as torchvision's RandomErasing: this many rectangles are drawn, and the first that fits is taken


@augmentations.register("cutout")
class Cutout(Augmentation):
    """Zeros square holes before normalisation (DeVries and Taylor, 2017, arXiv:1708.04552; as the DKT release does).

    The centre of a hole is uniform over the image, so that a hole at the border is cut off there.

    Args:
        size: Side of a hole in pixels.
        holes: Number of holes.
    """

    stage: ClassVar[Stage] = "unit"

    def __init__(self, *, size: Annotated[int, Field(gt=0)] = 16, holes: Annotated[int, Field(gt=0)] = 1) -> None:
        self.size = size
        self.holes = holes

    def __call__(
        self, images: Float32[Tensor, "batch channels height width"], noise: SampleNoise
    ) -> Float32[Tensor, "batch channels height width"]:
        """Blank out the holes of each image."""
        height, width = images.shape[2:]
        tops = noise.integers("cutout row", height, self.holes).to(images.device) - self.size // 2
        lefts = noise.integers("cutout column", width, self.holes).to(images.device) - self.size // 2
        blank = torch.zeros(len(images), height, width, dtype=torch.bool, device=images.device)
        for top, left in zip(tops.unbind(1), lefts.unbind(1), strict=True):
            size = torch.full_like(top, self.size)
            blank |= _rectangles(top, left, size, size, height, width)
        return images.masked_fill(blank[:, None], 0)


@augmentations.register("random_erasing")
class RandomErasing(Augmentation):
    """Zeros a rectangle after normalisation, which is the mean colour (Zhong et al., AAAI 2020, arXiv:1708.04896).

    Args:
        probability: Of erasing anything.
        scale: Smallest and largest area, as a share of the image.
        ratio: Smallest and largest height divided by width; uniform in its logarithm.

    Raises:
        ValueError: If a range is empty or not positive.
    """

    stage: ClassVar[Stage] = "normalised"

    def __init__(
        self,
        *,
        probability: Probability = 0.5,
        scale: tuple[float, float] = (0.02, 0.33),
        ratio: tuple[float, float] = (0.3, 3.3),
    ) -> None:
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(
                f"scale of random_erasing must be two ascending shares above 0 and at most 1, found {scale}"
            )
        if not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"ratio of random_erasing must be two ascending numbers above 0, found {ratio}")
        self.probability = probability
        self.scale = scale
        self.ratio = torch.tensor(ratio)

    def __call__(
        self, images: Float32[Tensor, "batch channels height width"], noise: SampleNoise
    ) -> Float32[Tensor, "batch channels height width"]:
        """Blank out the rectangle of each image; none if no attempt fits into it."""
        height, width = images.shape[2:]
        share, shape = noise.uniform("erasing size", 2 * _ATTEMPTS).to(images.device).chunk(2, dim=1)
        area = height * width * (self.scale[0] + share * (self.scale[1] - self.scale[0]))
        low, high = self.ratio.log().tolist()
        ratio = torch.exp(low + shape * (high - low))
        tall, wide = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
        fits = (tall < height) & (wide < width)
        first = fits.int().argmax(dim=1, keepdim=True)  # the first that fits, since max takes the first of equals
        tall, wide = tall.gather(1, first)[:, 0], wide.gather(1, first)[:, 0]
        chance, down, right = noise.uniform("erasing", 3).to(images.device).unbind(1)
        top, left = (down * (height - tall + 1)).long(), (right * (width - wide + 1)).long()
        erased = (fits.any(dim=1) & (chance < self.probability))[:, None, None]
        return images.masked_fill((erased & _rectangles(top, left, tall, wide, height, width))[:, None], 0)


def _rectangles(
    top: Int[Tensor, " batch"],
    left: Int[Tensor, " batch"],
    tall: Int[Tensor, " batch"],
    wide: Int[Tensor, " batch"],
    height: int,
    width: int,
) -> Bool[Tensor, "batch height width"]:
    """Which pixels of an image lie in a rectangle; what sticks out of the image is cut off."""
    rows = torch.arange(height, device=top.device)
    columns = torch.arange(width, device=top.device)
    in_rows = (rows >= top[:, None]) & (rows < (top + tall)[:, None])
    in_columns = (columns >= left[:, None]) & (columns < (left + wide)[:, None])
    return in_rows[:, :, None] & in_columns[:, None, :]
