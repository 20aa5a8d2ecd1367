"""From pixels to what the network sees."""

from collections.abc import Sequence

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from cil.data.augment import Augmentation
from cil.seeding import SampleNoise


class Transform:
    """Augments and normalises batches of images on the device where they are.

    The order is fixed by the stages of the augmentations: those of pixels, scaling to [0, 1], those of "unit" floats
    (cutout), normalising, those of "normalised" floats (random erasing). Within a stage they come as listed.

    Args:
        augmentations: For training.
        mean: Per channel, of pixels scaled to [0, 1].
        std: Per channel, likewise.
    """

    def __init__(self, augmentations: Sequence[Augmentation], mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        assert len(mean) == len(std), (mean, std)
        prepared = [augmentation.prepared(mean) for augmentation in augmentations]
        self.of_pixels = [augmentation for augmentation in prepared if augmentation.stage == "uint8"]
        self.of_unit = [augmentation for augmentation in prepared if augmentation.stage == "unit"]
        self.of_normalised = [augmentation for augmentation in prepared if augmentation.stage == "normalised"]
        self.mean, self.std = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]

    def train(
        self, images: UInt8[Tensor, "batch channels height width"], noise: SampleNoise
    ) -> Float32[Tensor, "batch channels height width"]:
        """Augmented and normalised images: a function of the images and the noise."""
        for augmentation in self.of_pixels:
            images = augmentation(images, noise)
        unit = _to_unit(images)
        for augmentation in self.of_unit:
            unit = augmentation(unit, noise)
        normalised = self._normalised(unit)
        for augmentation in self.of_normalised:
            normalised = augmentation(normalised, noise)
        return normalised

    def test(
        self, images: UInt8[Tensor, "batch channels height width"]
    ) -> Float32[Tensor, "batch channels height width"]:
        """Normalised images."""
        return self._normalised(_to_unit(images))

    def _normalised(
        self, unit: Float32[Tensor, "batch channels height width"]
    ) -> Float32[Tensor, "batch channels height width"]:
        # in place: `unit` is a copy of the images, and new memory for every batch costs more than the arithmetic
        self.mean, self.std = self.mean.to(unit.device), self.std.to(unit.device)
        return unit.sub_(self.mean).div_(self.std)


def _to_unit(
    images: UInt8[Tensor, "batch channels height width"],
) -> Float32[Tensor, "batch channels height width"]:
    return images.to(torch.float32).div_(255)
