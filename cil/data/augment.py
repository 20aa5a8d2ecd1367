"""Augmentations of whole batches, random only through `SampleNoise`; here those that move pixels.

What happens to a sample therefore depends on the noise's key, the sample's id and its view, not on the batch it is in.
"""

from abc import ABC, abstractmethod
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Shaped, UInt8
from pydantic import Field
from torch import Tensor

from cil.seeding import SampleNoise
from kd.registry import Registry

Stage = Literal["uint8", "unit", "normalised"]


class Augmentation(ABC):
    """A random change of a batch of images.

    `stage` says what it works on: "uint8" pixels, "unit" floats in [0, 1], or "normalised" floats.
    """

    stage: ClassVar[Stage] = "uint8"

    def prepared(self, mean: tuple[float, ...]) -> "Augmentation":
        """The same augmentation for a data set of this mean colour (in [0, 1]); most do not care."""
        return self

    @abstractmethod
    def __call__(
        self, images: Shaped[Tensor, "batch channels height width"], noise: SampleNoise
    ) -> Shaped[Tensor, "batch channels height width"]:
        """The images changed, with shape and dtype kept; the given tensor is not written to."""


augmentations: Registry[type[Augmentation]] = Registry("augmentation", "cil.data")


Probability = Annotated[float, Field(ge=0, le=1)]


@augmentations.register("crop")
class RandomCrop(Augmentation):
    """Pads with zeros on every side and cuts out a window of the old size, each place equally likely.

    Args:
        padding: Pixels on each side.
    """

    def __init__(self, *, padding: Annotated[int, Field(gt=0)] = 4) -> None:
        self.padding = padding

    def __call__(
        self, images: UInt8[Tensor, "batch channels height width"], noise: SampleNoise
    ) -> UInt8[Tensor, "batch channels height width"]:
        """Cut a window out of each padded image."""
        height, width = images.shape[2:]
        top, left = noise.integers("crop", 2 * self.padding + 1, count=2).to(images.device).unbind(1)
        # A view with every window: batch, channels, tops, lefts, height, width. Indexing copies the chosen ones.
        windows = F.pad(images, (self.padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
        return windows[torch.arange(len(images), device=images.device), :, top, left]


@augmentations.register("flip")
class HorizontalFlip(Augmentation):
    """Mirrors left and right.

    Args:
        probability: Of a flip.
    """

    def __init__(self, *, probability: Probability = 0.5) -> None:
        self.probability = probability

    def __call__(
        self, images: UInt8[Tensor, "batch channels height width"], noise: SampleNoise
    ) -> UInt8[Tensor, "batch channels height width"]:
        """Flip some of the images."""
        flipped = noise.uniform("flip").to(images.device)[:, :, None, None] < self.probability
        return torch.where(flipped, images.flip(3), images)
