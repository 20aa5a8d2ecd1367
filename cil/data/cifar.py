"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009), 3 x 32 x 32."""

from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from einops import rearrange
from torchvision.datasets import CIFAR10, CIFAR100

from cil.data.base import DataSet, DataSource, ImageSet, MissingData, data_sets
from cil.data.fetch import open_or_fetch
from cil.data.npz import read_npz


class Cifar(DataSource):
    """A CIFAR data set from `<name>.npz` in the root (laid out as `Npz` says), else from torchvision's files there.

    Args:
        root: Folder of all data sets.
        download: Fetch torchvision's files into `root` if neither is there, or they are damaged.
    """

    name: ClassVar[str]
    files: ClassVar[type[CIFAR10]]
    sha256: ClassVar[str]  # of the archive at `files.url`
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
        parts = open_or_fetch(
            self.name,
            lambda train: self.files(self.root, train=train),  # compares the files with their MD5 before it reads them
            {self.files.url: self.sha256},
            self.root,
            self.files.base_folder,
            download=self.download,
        )
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
    sha256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
    num_classes = 10
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)


@data_sets.register("cifar100")
class Cifar100(Cifar):
    """50 000 training and 10 000 test images of 100 classes. Mean and std: those of the DKT release and of PyCIL."""

    name = "cifar100"
    files = CIFAR100
    sha256 = "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7"
    num_classes = 100
    mean = (0.5071, 0.4867, 0.4408)
    std = (0.2675, 0.2565, 0.2761)
