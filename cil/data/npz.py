"""Anyone's images in one NumPy archive."""

import zipfile
import zlib
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray

from cil.data.base import DataSet, DataSource, ImageSet, MissingData, colour_statistics, data_sets

_LAYOUT = "(images, height, width) or (images, height, width, channels)"
_KEYS = ("x_train", "y_train", "x_test", "y_test")
_PICKLED = (
    "it holds Python objects, which could run code when they are read: store numbers, and names as an array of strings"
)
#: What NumPy raises for a damaged file; the last two for one that says its arrays are larger than they can be.
DAMAGED = (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error, MemoryError, OverflowError)
_SHOWN = 5  # labels in a message
_MAX_COLOURS = 4  # to tell the place of the channels in a message: grey, RGB, RGB with alpha


@data_sets.register("npz")
class Npz(DataSource):
    """A `.npz` file with `x_train`, `y_train`, `x_test`, `y_test` and, if there are names, `classes`.

    Images are uint8 of shape (images, height, width) or (images, height, width, channels); labels are whole numbers
    0 .. classes-1, each in both parts. Mean and standard deviation are those of the training images.

    Args:
        root: Not read.
        path: The file, from the current folder.
        download: There is nowhere to fetch it from.

    Raises:
        ValueError: If `download` is asked for.
    """

    def __init__(self, root: Path, *, path: str, download: bool = False) -> None:
        super().__init__(root, download=download)
        self.path = Path(path)
        if download:
            raise ValueError("data.download=true has no effect on npz, which reads your own file: leave it out")

    def check(self) -> None:
        """The file must be there.

        Raises:
            MissingData: If it is not.
        """
        if not self.path.is_file():
            raise MissingData(
                f"there is no file {self.path.absolute()}. Give your own with data.path=FILE.npz, written by "
                "numpy.savez(FILE, x_train=..., y_train=..., x_test=..., y_test=...)"
            )

    def load(self) -> DataSet:
        """Read and check the whole file.

        Raises:
            MissingData: If there is no such file.
            ValueError: If it is damaged, or an array is missing, of the wrong type or shape, or labels have gaps.
        """
        self.check()
        train, test, class_names = read_npz(self.path)
        mean, std = colour_statistics(train.images)
        return DataSet("npz", train, test, class_names, mean, std)


def read_npz(path: Path) -> tuple[ImageSet, ImageSet, tuple[str, ...]]:
    """Training images, test images and class names of an archive as `Npz` describes it.

    Raises:
        ValueError: If something is wrong with the file; says what was found and what would be right.
    """
    train, test, names = load_parts(path)
    return train, test, class_names(path, train, test, names)


def load_parts(path: Path) -> tuple[ImageSet, ImageSet, NDArray | None]:
    """Training images, test images and, if there are names, those of an archive; labels may have gaps.

    Raises:
        ValueError: If the file is damaged, or an array is missing or of the wrong type or shape.
    """
    try:
        # The file is opened here, since NumPy leaves its own open when the archive in it is damaged.
        with path.open("rb") as file, _archive(file) as archive:
            missing = [key for key in _KEYS if key not in archive.files]
            if missing:
                raise ValueError(f"it has no {', '.join(missing)}; found {', '.join(archive.files) or 'nothing'}")
            arrays = {key: archive[key] for key in (*_KEYS, "classes") if key in archive.files}
        train = _image_set(arrays["x_train"], arrays["y_train"], "train")
        test = _image_set(arrays["x_test"], arrays["y_test"], "test")
        if train.input_shape != test.input_shape:
            raise ValueError(
                f"x_train and x_test must agree in channels, height and width; found {train.input_shape} "
                f"and {test.input_shape}"
            )
        return train, test, arrays.get("classes")
    except DAMAGED as error:
        reason = _PICKLED if "pickle" in str(error) else error
        raise ValueError(f"{path} is not usable as a data set: {reason}") from error


def _archive(file: BinaryIO) -> np.lib.npyio.NpzFile:
    archive = np.load(file, allow_pickle=False)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError("it is a single array and no archive of several: write it with numpy.savez")
    return archive


def class_names(path: Path, train: ImageSet, test: ImageSet, names: NDArray | None) -> tuple[str, ...]:
    """Names of the classes of what `load_parts` read: those of the archive, or the labels.

    Raises:
        ValueError: If labels have gaps, lie outside, or do not go with the names.
    """
    try:
        return _class_names(train, test, names)
    except ValueError as error:
        raise ValueError(f"{path} is not usable as a data set: {error}") from error


def _image_set(images: NDArray, labels: NDArray, part: str) -> ImageSet:
    if images.dtype != np.uint8:
        raise ValueError(f"x_{part} must be uint8 with values 0 to 255, found {images.dtype}")
    if images.ndim not in (3, 4) or 0 in images.shape:
        raise ValueError(f"x_{part} must have shape {_LAYOUT}, none of them 0; found {images.shape}")
    if images.ndim == 4 and images.shape[1] <= _MAX_COLOURS < images.shape[3]:
        raise ValueError(
            f"x_{part} must have shape {_LAYOUT}; found {images.shape}, which looks like channels first: "
            f"store x_{part}.transpose(0, 2, 3, 1)"
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1:
        raise ValueError(f"y_{part} must be whole numbers of shape (images,), found {labels.dtype} of {labels.shape}")
    if len(labels) != len(images):
        raise ValueError(f"x_{part} and y_{part} must be equally long, found {len(images)} and {len(labels)}")
    if images.ndim == 3:
        images = images[..., None]
    pixels = np.ascontiguousarray(rearrange(images, "n h w c -> n c h w"))
    return ImageSet(torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int64)))


def _class_names(train: ImageSet, test: ImageSet, names: NDArray | None) -> tuple[str, ...]:
    """Names by label, after a look at the labels: 0 .. classes-1, each in both parts."""
    for part, labels in (("train", train.labels), ("test", test.labels)):
        if int(labels.min()) < 0:
            raise ValueError(f"y_{part} must count from 0, found {int(labels.min())}")
    in_train, in_test = set(train.labels.tolist()), set(test.labels.tolist())
    known = in_train | in_test
    num_classes = max(known) + 1 if names is None else len(names)
    for problem, wrong in (
        (
            f"labels must lie in 0 to {num_classes - 1} (there are {num_classes} classes)",
            sorted(label for label in known if label >= num_classes),
        ),
        ("classes with test images must have training images", sorted(in_test - in_train)),
        ("classes with training images must have test images", sorted(in_train - in_test)),
        (
            "labels must have no gaps and every class must have images",
            # a mistaken label may be huge, so the gaps below it are not all made
            list(islice((label for label in range(num_classes) if label not in known), _SHOWN + 1)),
        ),
    ):
        if wrong:
            more = " ..." if len(wrong) > _SHOWN else ""
            raise ValueError(f"{problem}; found otherwise: {wrong[:_SHOWN]}{more}")
    if names is None:
        return tuple(map(str, range(num_classes)))
    if names.ndim != 1 or len(set(names.tolist())) != num_classes:
        raise ValueError(f"classes must be a list of different names, found {names.tolist()}")
    return tuple(map(str, names.tolist()))
