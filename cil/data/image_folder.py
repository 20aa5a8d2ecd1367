"""Photographs in folders, one folder a class: ImageNet, parts of it, or anyone's own."""

from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field

from cil.data.base import DataSet, DataSource, MissingData, data_sets
from cil.data.files import FileImages
from cil.data.folder_index import class_folders, image_files
from cil.data.framing import Framing, Interpolation
from cil.tasks import imagenet100_classes
from kd.registry import unknown

# Of the training images of ImageNet-1000 (Krizhevsky et al., NIPS 2012), as torchvision and timm have them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

#: Lists of classes that have a name.
CLASS_LISTS: dict[str, Literal["first100", "seed1993"]] = {
    "imagenet100_first100": "first100",
    "imagenet100_seed1993": "seed1993",
}

_SMALLER = 224 / 256  # what the centre keeps of the shorter side in the usual test of ImageNet
_PARTS = ("train", "val")
_SHOWN = 5  # names in a message

Colour = tuple[float, float, float]


@data_sets.register("image_folder")
class ImageFolder(DataSource):
    """Images in `PATH/train/CLASS/` and `PATH/val/CLASS/`, at any depth below; labels follow the sorted class names.

    Files are found once and remembered (`cil.data.folder_index`), and read when they are needed. Whatever Pillow reads
    becomes RGB, whatever its size a square (`Framing` says how).

    Args:
        root: Not read.
        path: The folder, from the current one.
        class_list: Use these classes only, in this order: a file with one folder name a line, or
            `imagenet100_first100` or `imagenet100_seed1993`, two lists of ImageNet classes that share only 9.
        image_size: Side of the square, in pixels.
        resize: For testing, the shorter side before the centre is cut out, in pixels; by default
            `image_size` x 256 / 224, rounded.
        scale: For training, least and greatest share of the picture's area that a random window has.
        ratio: For training, least and greatest width of a window divided by its height.
        interpolation: How pixels are computed. Bicubic as in the DKT release; PyCIL and torchvision have bilinear.
        mean: Per channel, of pixels scaled to [0, 1]; ImageNet's by default.
        std: Per channel, likewise.
        num_workers: Processes that decode, 0 for none; by default one for each core, at most 8. Results do not depend
            on it.
        prefetch: Batches that every worker makes ahead.
        download: There is nowhere to fetch it from.

    Raises:
        ValueError: If `download` is asked for, or a number is out of range.
    """

    def __init__(
        self,
        root: Path,
        *,
        path: str,
        class_list: str | None = None,
        image_size: Annotated[int, Field(gt=0)] = 224,
        resize: Annotated[int, Field(gt=0)] | None = None,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        interpolation: Interpolation = "bicubic",
        mean: Colour = IMAGENET_MEAN,
        std: Colour = IMAGENET_STD,
        num_workers: Annotated[int, Field(ge=0)] | None = None,
        prefetch: Annotated[int, Field(gt=0)] = 2,
        download: bool = False,
    ) -> None:
        super().__init__(root, download=download)
        if download:
            raise ValueError(
                "data.download=true has no effect on image_folder, which reads your own files: leave it out"
            )
        if min(std) <= 0:
            raise ValueError(f"data.std must be above 0 in every channel, found {std}")
        self.path, self.class_list, self.mean, self.std = Path(path), class_list, mean, std
        shorter = round(image_size / _SMALLER) if resize is None else resize
        self.framing = Framing(image_size, shorter, scale, ratio, interpolation)
        self.num_workers, self.prefetch = num_workers, prefetch

    def check(self) -> None:
        """Both parts must be there.

        Raises:
            MissingData: If one is not.
        """
        missing = [part for part in _PARTS if not (self.path / part).is_dir()]
        if missing:
            found = class_folders(self.path) if self.path.is_dir() else []
            raise MissingData(
                f"there is no folder {' and no '.join(str((self.path / part).absolute()) for part in missing)}"
                f"{f' (found {_some(found)})' if found else ''}. Give your own with data.path=FOLDER, in which images "
                "are in train/CLASS/ and val/CLASS/"
            )

    def load(self) -> DataSet:
        """Find the files; images are read when they are needed.

        Raises:
            MissingData: If a folder is missing.
            ValueError: If class list and folders do not agree, or a class has no images.
        """
        self.check()
        names = self._classes()
        train, test = (
            labelled_files(self.path / part, names, self.framing, self.num_workers, self.prefetch) for part in _PARTS
        )
        return DataSet("image_folder", train, test, tuple(names), self.mean, self.std)

    def _classes(self) -> list[str]:
        """Folder names by label."""
        there = {part: class_folders(self.path / part) for part in _PARTS}
        names = there["train"] if self.class_list is None else _read_class_list(self.class_list)
        if not names:
            raise ValueError(f"{self.path / 'train'} has no class folders: put the images of each class in one")
        for part, folders in there.items():
            absent = [name for name in names if name not in set(folders)]
            if absent and self.class_list is not None:
                raise ValueError(
                    f"data.class_list={self.class_list} names {len(names)} classes; {len(absent)} of them have no "
                    f"folder in {self.path / part}: {_some(absent)}. Point data.path to the whole data set"
                    f"{', ImageNet-1000 with folders named by wnid' if self.class_list in CLASS_LISTS else ''}"
                )
            if absent:
                raise ValueError(f"these classes are in {self.path / 'train'} and not in {part}: {_some(absent)}")
        if self.class_list is None and (more := sorted(set(there["val"]) - set(names))):
            raise ValueError(f"these classes are in {self.path / 'val'} and not in train: {_some(more)}")
        return names


def labelled_files(
    folder: Path, names: list[str], framing: Framing, num_workers: int | None, prefetch: int
) -> FileImages:
    """The images of some class folders, class after class.

    Raises:
        ValueError: If a class has no images.
    """
    found = image_files(folder, names)
    if empty := [name for name in names if not found[name]]:
        raise ValueError(f"these class folders in {folder} hold no images: {_some(empty)}")
    files = [file for name in names for file in found[name]]
    return FileImages(
        folder,
        [name for name, _ in files],
        torch.tensor([size for _, size in files]),
        torch.arange(len(names)).repeat_interleave(torch.tensor([len(found[name]) for name in names])),
        framing=framing,
        num_workers=num_workers,
        prefetch=prefetch,
    )


def _read_class_list(given: str) -> list[str]:
    if given in CLASS_LISTS:
        return list(imagenet100_classes(CLASS_LISTS[given]))
    path = Path(given)
    if not path.is_file():
        known = list(CLASS_LISTS)
        raise ValueError(
            f"data.class_list={given}: there is no such file, and it is an {unknown('class list', given, known)}"
        )
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no class list: it must be text in UTF-8, one folder name a line") from error
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice or not names:
        raise ValueError(f"{path} must name one or more classes, each once; found {_some(twice) or 'none'}")
    return names


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
