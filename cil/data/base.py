"""What a data set is: two sets of images held in memory as bytes, with labels, class names and colour statistics."""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from jaxtyping import Int, Int64, UInt8
from torch import Tensor

from kd.registry import Registry


class MissingData(ValueError):
    """The files of a data set are not there; says where it looked and how to get them."""


@dataclass(frozen=True)
class ImageSet:
    """Images in memory; a sample's id is its index here.

    Attributes:
        images: Pixels 0 to 255; a quarter of the memory that floats would take.
        labels: The data set's own labels, not those in the order of learning.
    """

    images: UInt8[Tensor, "samples channels height width"]
    labels: Int64[Tensor, " samples"]

    def __post_init__(self) -> None:
        assert len(self.images) == len(self.labels), (len(self.images), len(self.labels))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def fetch(self, indices: Int[Tensor, " batch"]) -> UInt8[Tensor, "batch channels height width"]:
        """The images of some sample ids, on the device where the images are."""
        return self.images[indices.to(self.images.device)]


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
    train: ImageSet
    test: ImageSet
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
        """SHA-256 over name, class names, shapes, labels and every pixel: equal only for the same data."""
        digest = hashlib.sha256(repr((self.name, self.class_names)).encode())
        for part in (self.train, self.test):
            digest.update(repr(tuple(part.images.shape)).encode())
            digest.update(part.labels.cpu().numpy().tobytes())
            digest.update(part.images.cpu().numpy().tobytes())
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
        """Read the data set into memory.

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
