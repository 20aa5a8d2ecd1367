"""Images made from a seed, of any number and size: for measuring speed and memory, and for trying things out."""

from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Int64
from pydantic import Field
from torch import Tensor

from cil.data.base import DataSet, DataSource, ImageSet, colour_statistics, data_sets
from cil.seeding import SampleNoise, derive

_PATTERN = 4  # a prototype has so many spots a side, each of one colour
_GREY, _SPREAD = 0.5, 0.15  # of the spots: mean and standard deviation, on a scale where white is 1
_UNIT_WIDTH = 12**0.5  # of the uniform distribution with standard deviation 1
_LARGEST_BYTES = 8 * 2**30  # beyond, memory is rather used up by mistake

Count = Annotated[int, Field(gt=0)]


@data_sets.register("synthetic")
class Synthetic(DataSource):
    """Every class is a blurred pattern of coloured spots, every image its pattern and noise of its own.

    Patterns are functions of (seed, class), and the noise, which is uniform, of (seed, part, class, number in the
    class): more classes or more images leave those that were there as they are. With noise of 0.2 the classes are easy
    to tell apart.

    Args:
        root: Not read; the images are made.
        num_classes: Classes.
        images_per_class: Training images of a class.
        test_images_per_class: Test images of a class.
        image_size: Side of an image, in pixels.
        channels: 3 for RGB, 1 for grey.
        noise: Standard deviation of a pixel from its pattern, on a scale where white is 1.
        seed: Makes another data set of the same kind.
        download: There is nothing to fetch.

    Raises:
        ValueError: If `download` is asked for, or the images would take more than 8 GiB.
    """

    def __init__(
        self,
        root: Path,
        *,
        num_classes: Count = 10,
        images_per_class: Count = 100,
        test_images_per_class: Count = 20,
        image_size: Count = 32,
        channels: Count = 3,
        noise: Annotated[float, Field(ge=0)] = 0.2,
        seed: Annotated[int, Field(ge=0)] = 0,
        download: bool = False,
    ) -> None:
        super().__init__(root, download=download)
        if download:
            raise ValueError("data.download=true has no effect on synthetic, which is made: leave it out")
        size = num_classes * (images_per_class + test_images_per_class) * channels * image_size**2
        if size > _LARGEST_BYTES:
            raise ValueError(
                f"data=synthetic is held in memory and would take {size / 2**30:.1f} GiB, more than "
                f"{_LARGEST_BYTES >> 30}: lower num_classes, images_per_class, test_images_per_class or image_size"
            )
        self.num_classes, self.seed, self.noise = num_classes, seed, noise
        self.num_images = {"train": images_per_class, "test": test_images_per_class}
        self.shape = (channels, image_size, image_size)

    def check(self) -> None:
        """Nothing can be missing."""

    def load(self) -> DataSet:
        """Make the images."""
        train, test = (self._part(part) for part in ("train", "test"))
        mean, std = colour_statistics(train.images)
        return DataSet("synthetic", train, test, tuple(map(str, range(self.num_classes))), mean, std)

    def _part(self, part: str) -> ImageSet:
        per_class = self.num_images[part]
        labels = torch.arange(self.num_classes).repeat_interleave(per_class)
        images = torch.empty(len(labels), *self.shape, dtype=torch.uint8)
        generator = torch.Generator()
        prototypes = self._prototypes()
        for index, label in enumerate(labels.tolist()):
            generator.manual_seed(derive(self.seed, "synthetic", part, label, index % per_class))
            noise = _UNIT_WIDTH * (torch.rand(self.shape, generator=generator) - 0.5)
            images[index] = (255 * (prototypes[label] + self.noise * noise)).round().clamp(0, 255)
        return ImageSet(images, labels)

    def _prototypes(self) -> Tensor:
        channels, height, width = self.shape
        classes: Int64[Tensor, " classes"] = torch.arange(self.num_classes)
        drawn = SampleNoise(derive(self.seed, "synthetic", "class"), classes, torch.zeros_like(classes))
        spots = _GREY + _SPREAD * drawn.normal("spots", channels * _PATTERN**2)
        patterns = rearrange(spots, "n (c h w) -> n c h w", c=channels, h=_PATTERN)
        return F.interpolate(patterns, size=(height, width), mode="bilinear", align_corners=False)
