"""Arrays that another program holds, part by part: what `cil.IncrementalClassifier` learns from."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int, Int64, UInt8
from torch import Tensor

from cil.data.base import DataSet, DataSource, Images, MissingData, Plan, data_sets


@data_sets.register("arrays")
class Arrays(DataSource):
    """Images that are in no file: the name of the data set of models that `cil.IncrementalClassifier` trained."""

    def check(self) -> None:
        """There is nothing to look for.

        Raises:
            MissingData: Always.
        """
        raise MissingData(
            "data.name=arrays stands for arrays that a program held while cil.IncrementalClassifier learned from them; "
            "for arrays in a file use data=npz data.path=FILE.npz"
        )

    def load(self) -> DataSet:
        """There is nothing to load.

        Raises:
            MissingData: Always.
        """
        self.check()
        raise AssertionError


@dataclass(frozen=True)
class KeptImages(Images):
    """Images of which only some are still there. Sample ids go on counting those that are gone.

    Attributes:
        images: Pixels 0 to 255 of the images that are there.
        ids: Their sample ids, ascending.
        labels: Of all samples there ever were.
    """

    images: UInt8[Tensor, "kept channels height width"]
    ids: Int64[Tensor, " kept"]
    labels: Int64[Tensor, " samples"]

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def is_there(self) -> Bool[Tensor, " samples"]:
        """Whether the image of a sample is there."""
        found = torch.zeros(len(self.labels), dtype=torch.bool)
        found[self.ids] = True
        return found

    def fetch(self, indices: Int[Tensor, " batch"]) -> UInt8[Tensor, "batch channels height width"]:
        """The images of some sample ids, which must be there."""
        places = torch.searchsorted(self.ids, indices)
        assert torch.equal(self.ids[places.clamp(max=len(self.ids) - 1)], indices), "an image that is gone is asked for"
        return self.images[places]

    def stream(self, plan: Plan, key: int | None) -> Iterator[UInt8[Tensor, "_ channels height width"]]:
        """The images of one batch after another, the same whatever the key."""
        return (self.fetch(ids) for ids, _ in plan)

    def content(self) -> Iterator[bytes]:
        """Shape, labels, and ids and pixels of what is there."""
        yield repr(tuple(self.images.shape)).encode()
        for part in (self.labels, self.ids, self.images):
            yield part.numpy().tobytes()

    def with_new(
        self, images: UInt8[Tensor, "new channels height width"], labels: Int64[Tensor, " new"]
    ) -> "KeptImages":
        """With some more, whose ids follow the last."""
        ids = len(self.labels) + torch.arange(len(labels))
        return KeptImages(
            torch.cat([self.images, images]), torch.cat([self.ids, ids]), torch.cat([self.labels, labels])
        )

    def only(self, ids: Int[Tensor, " kept"]) -> "KeptImages":
        """With the images of some ids alone."""
        ids = ids.sort().values
        return KeptImages(self.fetch(ids), ids, self.labels)
