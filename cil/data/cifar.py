"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009), 3 x 32 x 32."""

from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from einops import rearrange
from torchvision.datasets import CIFAR10, CIFAR100

from cil.data.base import DataSet, DataSource, ImageSet, MissingData, data_sets
from cil.data.npz import read_npz


class Cifar(DataSource):
    """A CIFAR data set from `<name>.npz` in the root (laid out as `Npz` says), else from torchvision's files there.

    Args:
        root: Folder of all data sets.
        download: Fetch torchvision's files into `root` if neither is there.
    """

    name: ClassVar[str]
    files: ClassVar[type[CIFAR10]]
    num_classes: ClassVar[int]
    mean: ClassVar[tuple[float, ...]]
    std: ClassVar[tuple[float, ...]]

    def check(self) -> None:
        """One of the two forms must be there, or be allowed to be fetched.

        Raises:
            MissingData: If neither is.
        """
        if not (self.download or self._archive.is_file() or self._folder.is_dir()):
            raise MissingData(
                f"{self.name} is not there: looked for {self._archive.absolute()} and {self._folder.absolute()}. "
                "To fetch it (about 170 MB), add data.download=true to the command; if it is elsewhere, set data.root"
            )

    def load(self) -> DataSet:
        """Read the archive, else torchvision's files, fetching them first if that is allowed.

        Raises:
            MissingData: If the files are not there, or cannot be fetched.
            ValueError: If they are there and wrong.
        """
        self.check()
        train, test, class_names = read_npz(self._archive) if self._archive.is_file() else self._from_torchvision()
        if len(class_names) != self.num_classes or train.input_shape != (3, 32, 32):
            raise ValueError(
                f"{self._archive} must hold {self.num_classes} classes of 3 x 32 x 32 images; found {len(class_names)} "
                f"of {' x '.join(map(str, train.input_shape))}. Use data=npz data.path={self._archive} for other images"
            )
        return DataSet(self.name, train, test, class_names, self.mean, self.std)

    @property
    def _archive(self) -> Path:
        return self.root / f"{self.name}.npz"

    @property
    def _folder(self) -> Path:
        return self.root / str(self.files.base_folder)

    def _from_torchvision(self) -> tuple[ImageSet, ImageSet, tuple[str, ...]]:
        try:
            parts = [self.files(self.root, train=train, download=self.download) for train in (True, False)]
        except (RuntimeError, OSError) as error:  # a missing, damaged or unreachable file
            raise MissingData(
                f"the files of {self.name} in {self._folder.absolute()} cannot be "
                f"{'fetched' if self.download else 'used; add data.download=true to fetch them anew'}: {error}"
            ) from error
        sets = [
            ImageSet(
                torch.from_numpy(np.ascontiguousarray(rearrange(part.data, "n h w c -> n c h w"))),
                torch.tensor(part.targets, dtype=torch.int64),
            )
            for part in parts
        ]
        return sets[0], sets[1], tuple(parts[0].classes)


@data_sets.register("cifar10")
class Cifar10(Cifar):
    """50 000 training and 10 000 test images of 10 classes. Mean and std: the usual ones, of the training images."""

    name = "cifar10"
    files = CIFAR10
    num_classes = 10
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)


@data_sets.register("cifar100")
class Cifar100(Cifar):
    """50 000 training and 10 000 test images of 100 classes. Mean and std: those of the DKT release and of PyCIL."""

    name = "cifar100"
    files = CIFAR100
    num_classes = 100
    mean = (0.5071, 0.4867, 0.4408)
    std = (0.2675, 0.2565, 0.2761)
