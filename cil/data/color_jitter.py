"""Colour jitter (Howard, 2013, arXiv:1312.5402), with the meaning of torchvision's `ColorJitter`."""

from collections.abc import Callable
from typing import Annotated

import torch
from jaxtyping import Float, UInt8
from pydantic import Field
from torch import Tensor

from cil.data import pixels
from cil.data.augment import Augmentation, augmentations
from cil.seeding import SampleNoise

Images = UInt8[Tensor, "batch channels height width"]
Strength = Annotated[float, Field(ge=0)]


@augmentations.register("color_jitter")
class ColorJitter(Augmentation):
    """Changes brightness, contrast, saturation and hue, each by its own random amount, in a random order.

    A factor is uniform in [max(0, 1 - strength), 1 + strength], the turn of the hue in [-hue, hue] of the circle.
    Images of one channel are grey: saturation and hue leave them as they are. The default is PyCIL's for CIFAR.

    Args:
        brightness: Strength.
        contrast: Strength.
        saturation: Strength.
        hue: Largest turn, at most half the circle.

    Raises:
        ValueError: If every strength is 0, so that nothing would happen.
    """

    def __init__(
        self,
        *,
        brightness: Strength = 63 / 255,
        contrast: Strength = 0.0,
        saturation: Strength = 0.0,
        hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0,
    ) -> None:
        factors = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
        self.ranges = {name: (max(0.0, 1 - by), 1 + by) for name, by in factors.items() if by} | (
            {"hue": (-hue, hue)} if hue else {}
        )
        if not self.ranges:
            raise ValueError("color_jitter with every strength 0 changes nothing: set one above 0, or leave it out")

    def __call__(self, images: Images, noise: SampleNoise) -> Images:
        """Change the colours of each image."""
        operations: dict[str, Callable[[Images, Float[Tensor, " batch"]], Images]] = {
            "brightness": pixels.brightness,
            "contrast": pixels.contrast,
            "saturation": pixels.saturation,
            "hue": pixels.hue,
        }
        order = noise.uniform("color_jitter order", len(self.ranges)).to(images.device).argsort(dim=1, stable=True)
        images = images.clone()
        for turn in range(len(self.ranges)):
            for number, (name, (low, high)) in enumerate(self.ranges.items()):
                rows = torch.nonzero(order[:, turn] == number).flatten()
                if len(rows):
                    amount = noise.uniform(f"color_jitter {name}").to(images.device)[rows, 0]
                    images[rows] = operations[name](images[rows], low + (high - low) * amount)
        return images
