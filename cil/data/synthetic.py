"""Images made from a seed, of any number and size: for measuring speed and memory, and for trying things out."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int, Int64, UInt8
from pydantic import Field
from torch import Tensor

from cil.data.base import DataSet, DataSource, Images, ImageSet, Plan, colour_statistics, data_sets
from cil.seeding import SampleNoise, derive

_PATTERN = 4  # a prototype has so many spots a side, each of one colour
_GREY, _SPREAD = 0.5, 0.15  # of the spots: mean and standard deviation, on a scale where white is 1
_UNIT_WIDTH = 12**0.5  # of the uniform distribution with standard deviation 1
_LARGEST_BYTES = 8 * 2**30  # beyond, memory is rather used up by mistake
_STATISTICS = 200  # images that are looked at for colour statistics, where not all of them are in memory

Count = Annotated[int, Field(gt=0)]


@dataclass(frozen=True)
class MadeImages(Images):
    """Images that are made when they are asked for.

    Attributes:
        labels: As many of each class, class after class.
        spots: The colours of every class.
        side: Of an image, in pixels.
        part: `train` or `test`.
        noise: See `Synthetic`.
        seed: See `Synthetic`.
    """

    labels: Int64[Tensor, " samples"]
    spots: Float[Tensor, "classes channels rows columns"]
    side: int
    part: str
    noise: float
    seed: int

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return self.spots.shape[1], self.side, self.side

    def fetch(self, indices: Int[Tensor, " batch"]) -> UInt8[Tensor, "batch channels height width"]:
        """The images of some sample ids."""
        images = torch.empty(len(indices), *self.input_shape, dtype=torch.uint8)
        labels, inverse = torch.unique(self.labels[indices], return_inverse=True)
        patterns = F.interpolate(self.spots[labels], size=(self.side,) * 2, mode="bilinear", align_corners=False)
        generator = torch.Generator()
        per_class = len(self.labels) // len(self.spots)
        for place, index in enumerate(indices.tolist()):
            label, number = divmod(index, per_class)
            generator.manual_seed(derive(self.seed, "synthetic", self.part, label, number))
            noise = _UNIT_WIDTH * (torch.rand(self.input_shape, generator=generator) - 0.5)
            images[place] = (255 * (patterns[inverse[place]] + self.noise * noise)).round().clamp(0, 255)
        return images

    def stream(self, plan: Plan, key: int | None) -> Iterator[UInt8[Tensor, "_ channels height width"]]:
        """The images of one batch after another, the same whatever the key."""
        return (self.fetch(ids) for ids, _ in plan)

    def content(self) -> Iterator[bytes]:
        """What the images are made from."""
        yield repr((self.part, self.seed, self.noise, len(self.labels), self.input_shape)).encode()


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
        in_memory: Make all images at the beginning. False makes each when it is asked for, a few milliseconds for one
            of 224 pixels, and takes colour statistics from 200 of them: for the size of ImageNet.
        download: There is nothing to fetch.

    Raises:
        ValueError: If `download` is asked for, or the images would take more than 8 GiB of memory.
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
        in_memory: bool = True,
        download: bool = False,
    ) -> None:
        super().__init__(root, download=download)
        if download:
            raise ValueError("data.download=true has no effect on synthetic, which is made: leave it out")
        size = num_classes * (images_per_class + test_images_per_class) * channels * image_size**2
        if in_memory and size > _LARGEST_BYTES:
            raise ValueError(
                f"data=synthetic is held in memory and would take {size / 2**30:.1f} GiB, more than "
                f"{_LARGEST_BYTES >> 30}: lower num_classes, images_per_class, test_images_per_class or image_size, or "
                "set data.in_memory=false"
            )
        self.num_classes, self.seed, self.noise, self.in_memory = num_classes, seed, noise, in_memory
        self.num_images = {"train": images_per_class, "test": test_images_per_class}
        self.channels, self.image_size = channels, image_size

    def check(self) -> None:
        """Nothing can be missing."""

    def load(self) -> DataSet:
        """Make the images, or what makes them."""
        train, test = (self._part(part) for part in ("train", "test"))
        some = torch.arange(len(train))
        if not self.in_memory:
            some = some[:: max(len(train) // _STATISTICS, 1)]
        looked_at, names = train.fetch(some), tuple(map(str, range(self.num_classes)))
        mean, std = colour_statistics(looked_at)
        if not self.in_memory:
            return DataSet("synthetic", train, test, names, mean, std)
        kept = ImageSet(looked_at, train.labels), ImageSet(test.fetch(torch.arange(len(test))), test.labels)
        return DataSet("synthetic", *kept, names, mean, std)

    def _part(self, part: str) -> MadeImages:
        classes: Int64[Tensor, " classes"] = torch.arange(self.num_classes)
        drawn = SampleNoise(derive(self.seed, "synthetic", "class"), classes, torch.zeros_like(classes))
        colours = _GREY + _SPREAD * drawn.normal("spots", self.channels * _PATTERN**2)
        spots = rearrange(colours, "n (c h w) -> n c h w", c=self.channels, h=_PATTERN)
        labels = classes.repeat_interleave(self.num_images[part])
        return MadeImages(labels, spots, self.image_size, part, self.noise, self.seed)
