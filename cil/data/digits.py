"""Handwritten digits, 1 x 8 x 8 (Alpaydin and Kaynak, UCI 1998), which come with scikit-learn: no file, no network."""

from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits

from cil.data.base import DataSet, DataSource, ImageSet, data_sets

_DARKEST = 16  # ink is counted in 0 .. 16
# Of the 1433 training images below, as `cil.data.base.colour_statistics` gives them.
_MEAN, _STD = (0.3053766,), (0.3753256,)


@data_sets.register("digits")
class Digits(DataSource):
    """1797 digits: of each class the first 80 % in file order (rounded down) are for training, the rest for testing.

    Args:
        root: Not read; the images come with scikit-learn.
        download: There is nothing to fetch.

    Raises:
        ValueError: If `download` is asked for.
    """

    def __init__(self, root: Path, *, download: bool = False) -> None:
        super().__init__(root, download=download)
        if download:
            raise ValueError("data.download=true has no effect on digits, which come with scikit-learn: leave it out")

    def check(self) -> None:
        """Nothing can be missing."""

    def load(self) -> DataSet:
        """Ink 0 .. 16 becomes 0 .. 255, rounded."""
        bunch = load_digits()
        images = torch.from_numpy(np.rint(bunch.images * 255 / _DARKEST).astype(np.uint8)[:, None])
        labels = torch.from_numpy(bunch.target.astype(np.int64))
        for_training = torch.zeros(len(labels), dtype=torch.bool)
        for label in range(10):
            ids = torch.nonzero(labels == label).flatten()
            for_training[ids[: len(ids) * 4 // 5]] = True
        return DataSet(
            name="digits",
            train=ImageSet(images[for_training], labels[for_training]),
            test=ImageSet(images[~for_training], labels[~for_training]),
            class_names=tuple("0123456789"),
            mean=_MEAN,
            std=_STD,
        )
