"""What a data set is: two sets of images, in memory or in files, with labels, class names and colour statistics."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Int, Int64, UInt8
from torch import Tensor

from kd.registry import Registry


class MissingData(ValueError):
    """The files of a data set are not there; says where it looked and how to get them."""


#: Batches to come, each as sample ids and view numbers (`epoch_plan` makes such).
Plan = Iterable[tuple[Int[Tensor, "_"], Int[Tensor, "_"]]]


class Images(ABC):
    """Labelled images of one size; a sample's id is its index here.

    Attributes:
        labels: The data set's own labels, not those in the order of learning.
    """

    labels: Int64[Tensor, " samples"]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    @abstractmethod
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""

    @abstractmethod
    def fetch(self, indices: Int[Tensor, " batch"]) -> UInt8[Tensor, "batch channels height width"]:
        """The images of some sample ids, as they are for testing."""

    @abstractmethod
    def stream(self, plan: Plan, key: int | None) -> Iterator[UInt8[Tensor, "_ channels height width"]]:
        """The images of one batch after another.

        Args:
            plan: The batches, as many as are wanted: an epoch, or a part of one.
            key: For training, from `cil.seeding.derive`: where images are cut at random, the window is a function of
                (key, sample id, view). None for testing: the same images as from `fetch`.
        """

    @abstractmethod
    def content(self) -> Iterator[bytes]:
        """What makes this set the set it is, for a fingerprint."""


@dataclass(frozen=True)
class ImageSet(Images):
    """Images in memory.

    Attributes:
        images: Pixels 0 to 255; a quarter of the memory that floats would take.
        labels: The data set's own labels, not those in the order of learning.
    """

    images: UInt8[Tensor, "samples channels height width"]
    labels: Int64[Tensor, " samples"]

    def __post_init__(self) -> None:
        assert len(self.images) == len(self.labels), (len(self.images), len(self.labels))

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def fetch(self, indices: Int[Tensor, " batch"]) -> UInt8[Tensor, "batch channels height width"]:
        """The images of some sample ids, on the device where the images are."""
        return self.images[indices.to(self.images.device)]

    def stream(self, plan: Plan, key: int | None) -> Iterator[UInt8[Tensor, "_ channels height width"]]:
        """The images of one batch after another, the same whatever the key."""
        return (self.fetch(ids) for ids, _ in plan)

    def content(self) -> Iterator[bytes]:
        """Shape, labels and every pixel."""
        yield repr(tuple(self.images.shape)).encode()
        yield self.labels.cpu().numpy().tobytes()
        yield self.images.cpu().numpy().tobytes()


@dataclass(frozen=True)
class DataSet:
    """A loaded data set.

    Attributes:
        name: As in the registry.
        train: Training images; sample ids of a run are indices into it.
        test: Test images.
        class_names: By original label.
        mean: Per channel, of pixels scaled to [0, 1].
        std: Per channel, likewise.
    """

    name: str
    train: Images
    test: Images
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        assert self.train.input_shape == self.test.input_shape, (self.train.input_shape, self.test.input_shape)
        assert len(self.mean) == len(self.std) == self.train.input_shape[0], (self.mean, self.std)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return self.train.input_shape

    def fingerprint(self) -> str:
        """SHA-256 over name, class names and the content of both parts: equal only for the same data."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:  # reads everything, and every report and saved state asks for it
        digest = hashlib.sha256(repr((self.name, self.class_names)).encode())
        for part in (self.train, self.test):
            for block in part.content():
                digest.update(block)
        return digest.hexdigest()


class DataSource(ABC):
    """Where a data set comes from. Making one reads nothing; `check` looks for the files; `load` reads them.

    Args:
        root: Folder of all data sets (`data.root`).
        download: Whether missing files may be fetched.
    """

    def __init__(self, root: Path, *, download: bool = False) -> None:
        self.root = root
        self.download = download

    @abstractmethod
    def check(self) -> None:
        """Find out, before anything is built, whether `load` can work.

        Raises:
            MissingData: If files are missing and may not be fetched.
        """

    @abstractmethod
    def load(self) -> DataSet:
        """Read the data set: into memory, or where its files are.

        Raises:
            MissingData: If files are missing.
            ValueError: If files are there and wrong.
        """


def colour_statistics(
    images: UInt8[Tensor, "samples channels height width"],
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, of pixels scaled to [0, 1]; exact, from histograms.

    Raises:
        ValueError: If a channel is constant, so that there is nothing to divide by.
    """
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel, pixels in enumerate(rearrange(images, "n c h w -> c (n h w)")):
        shares = torch.bincount(pixels.int(), minlength=256).double() / pixels.numel()
        mean = float((shares * levels).sum())
        variance = float((shares * (levels - mean) ** 2).sum())
        if variance == 0:
            raise ValueError(f"channel {channel} has the same value in every training image: leave it out")
        means.append(mean)
        deviations.append(variance**0.5)
    return tuple(means), tuple(deviations)


data_sets: Registry[type[DataSource]] = Registry("data set", "cil.data")
