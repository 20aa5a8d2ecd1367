"""RandAugment (Cubuk et al., NeurIPS 2020, arXiv:1909.13719) as timm's `rand-m9-mstd0.5-inc1` understands it."""

from collections.abc import Callable
from copy import copy
from typing import Annotated

import torch
from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor

from cil.data import affine, pixels
from cil.data.augment import Augmentation, Probability, augmentations
from cil.seeding import SampleNoise

Images = UInt8[Tensor, "batch channels height width"]
Level = Float[Tensor, " batch"]  # strength in [0, 1], or [-1, 1] where an operation has two directions
Fill = UInt8[Tensor, " channels"]

_TOP_MAGNITUDE = 10.0  # magnitudes are counted on a scale of 0 to 10

# What an operation does at its greatest strength (timm/data/auto_augment.py, the "increasing" set).
_MAX_DEGREES = 30.0
_MAX_SHEAR = 0.3
_MAX_TRANSLATION = 0.45  # of the side
_MAX_ENHANCEMENT = 0.9  # away from 1, which changes nothing
_MIN_FACTOR = 0.1  # an enhancement never goes below, lest nothing of the image be left
_POSTERIZE_BITS = 4
_SOLARIZE_LEVELS = 256
_SOLARIZE_ADD = 110


def _factor(level: Level) -> Level:
    return (1 + _MAX_ENHANCEMENT * level).clamp(min=_MIN_FACTOR)


#: The fifteen operations by name, each on images, signed level and fill colour.
OPERATIONS: dict[str, Callable[[Images, Level, Fill], Images]] = {
    "auto_contrast": lambda images, level, fill: pixels.auto_contrast(images),
    "equalize": lambda images, level, fill: pixels.equalize(images),
    "invert": lambda images, level, fill: pixels.invert(images),
    "rotate": lambda images, level, fill: affine.rotate(images, _MAX_DEGREES * level, fill),
    "posterize": lambda images, level, fill: pixels.posterize(
        images, _POSTERIZE_BITS - (_POSTERIZE_BITS * level.abs()).long()
    ),
    "solarize": lambda images, level, fill: pixels.solarize(
        images, _SOLARIZE_LEVELS - (_SOLARIZE_LEVELS * level.abs()).long()
    ),
    "solarize_add": lambda images, level, fill: pixels.solarize_add(images, (_SOLARIZE_ADD * level.abs()).long()),
    "color": lambda images, level, fill: pixels.saturation(images, _factor(level)),
    "contrast": lambda images, level, fill: pixels.contrast(images, _factor(level)),
    "brightness": lambda images, level, fill: pixels.brightness(images, _factor(level)),
    "sharpness": lambda images, level, fill: pixels.sharpness(images, _factor(level)),
    "shear_x": lambda images, level, fill: affine.shear_x(images, _MAX_SHEAR * level, fill),
    "shear_y": lambda images, level, fill: affine.shear_y(images, _MAX_SHEAR * level, fill),
    "translate_x": lambda images, level, fill: affine.translate_x(images, _MAX_TRANSLATION * level, fill),
    "translate_y": lambda images, level, fill: affine.translate_y(images, _MAX_TRANSLATION * level, fill),
}


@augmentations.register("randaugment")
class RandAugment(Augmentation):
    """Applies a few operations drawn with replacement, each with a probability and a noisy magnitude.

    Per image and turn: one of the fifteen operations, applied with `probability` at the magnitude
    `normal(magnitude, magnitude_std)` cut to 0 .. 10; operations with two directions take either. Geometry is bicubic.
    Images of one channel are grey: "color" leaves them as they are.

    Differs from timm in one corner: at magnitude 10, reached now and then, posterize keeps no bit, which gives a black
    image as in timm's days and an error from today's Pillow.

    Args:
        num_ops: Turns.
        magnitude: Mean strength, 0 to 10.
        magnitude_std: Standard deviation of the strength.
        probability: Of applying the operation of a turn.
        fill: Colour 0 .. 255 per channel of what geometry leaves empty; the data set's mean colour when not given.
    """

    def __init__(
        self,
        *,
        num_ops: Annotated[int, Field(gt=0)] = 2,
        magnitude: Annotated[float, Field(ge=0, le=10)] = 9.0,
        magnitude_std: Annotated[float, Field(ge=0)] = 0.5,
        probability: Probability = 0.5,
        fill: tuple[Annotated[int, Field(ge=0, le=255)], ...] | None = None,
    ) -> None:
        self.num_ops = num_ops
        self.magnitude = magnitude
        self.magnitude_std = magnitude_std
        self.probability = probability
        self.fill = fill

    def prepared(self, mean: tuple[float, ...]) -> "RandAugment":
        """With the mean colour to fill with, unless a colour was given.

        Raises:
            ValueError: If the colour given has another number of channels.
        """
        if self.fill is not None and len(self.fill) != len(mean):
            raise ValueError(f"fill of randaugment must have {len(mean)} channels, found {self.fill}")
        other = copy(self)
        other.fill = self.fill or tuple(round(255 * channel) for channel in mean)
        return other

    def __call__(self, images: Images, noise: SampleNoise) -> Images:
        """Change each image by its own operations."""
        assert self.fill is not None, "prepared() comes first: it sets the fill colour"
        device = images.device
        fill = torch.tensor(self.fill, dtype=torch.uint8).to(device, non_blocking=True)
        choices = noise.integers("randaugment operation", len(OPERATIONS), self.num_ops).to(device)
        chances = noise.uniform("randaugment applied", self.num_ops).to(device)
        signs = noise.uniform("randaugment direction", self.num_ops).to(device)
        normals = noise.normal("randaugment magnitude", self.num_ops).to(device)
        strengths = (self.magnitude + self.magnitude_std * normals).clamp(0, _TOP_MAGNITUDE) / _TOP_MAGNITUDE
        levels = torch.where(signs < 0.5, strengths, -strengths)
        choices = torch.where(chances < self.probability, choices, len(OPERATIONS))
        # the images of each operation stand together; how many they are is asked once, since a GPU is waited for then
        by_operation = choices.argsort(dim=0, stable=True)
        numbers = [torch.bincount(chosen, minlength=len(OPERATIONS) + 1).tolist() for chosen in choices.cpu().unbind(1)]
        for turn, counts in enumerate(numbers):
            order = by_operation[:, turn]
            grouped, own_levels = torch.split(images[order], counts), torch.split(levels[order, turn], counts)
            changed = [
                operation(some, level, fill)
                for operation, some, level in zip(OPERATIONS.values(), grouped[:-1], own_levels[:-1], strict=True)
                if len(some)
            ]
            images = torch.cat([*changed, grouped[-1]])[order.argsort()]
        return images
