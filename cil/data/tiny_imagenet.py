"""Tiny ImageNet (Le and Yang, Stanford CS 231N, 2015): 200 classes of ImageNet, 3 x 64 x 64."""

from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field

from cil.data.base import DataSet, DataSource, MissingData, data_sets
from cil.data.files import FileImages
from cil.data.folder_index import class_folders, image_files
from cil.data.framing import Framing
from cil.data.image_folder import IMAGENET_MEAN, IMAGENET_STD, labelled_files

FOLDER = "tiny-imagenet-200"
ADDRESS = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"

_WHOLE = Framing(image_size=64, resize=64, scale=(1.0, 1.0), ratio=(1.0, 1.0), interpolation="bicubic")  # as they are


@data_sets.register("tiny_imagenet")
class TinyImageNet(DataSource):
    """100 000 training images and the 10 000 validation images, which serve for testing (test labels are secret).

    The classes are those of `train`, sorted by wnid (200 in the release); their names are those of `words.txt`. Images
    are shown whole in training, too: `data.augment.crop` moves them.

    Args:
        root: Folder of all data sets, with the unpacked `tiny-imagenet-200` in it.
        num_workers: Processes that decode, 0 for none; by default one for each core, at most 8. Results do not depend
            on it.
        prefetch: Batches that every worker makes ahead.
        download: It is not fetched.

    Raises:
        ValueError: If `download` is asked for.
    """

    def __init__(
        self,
        root: Path,
        *,
        num_workers: Annotated[int, Field(ge=0)] | None = None,
        prefetch: Annotated[int, Field(gt=0)] = 2,
        download: bool = False,
    ) -> None:
        super().__init__(root, download=download)
        if download:
            raise ValueError(f"data.download=true has no effect on tiny_imagenet: unpack {ADDRESS} in data.root")
        self.folder, self.num_workers, self.prefetch = root / FOLDER, num_workers, prefetch

    def check(self) -> None:
        """The parts that are read must be there.

        Raises:
            MissingData: If one is not.
        """
        parts = [self.folder / part for part in ("train", "val/images", "val/val_annotations.txt", "words.txt")]
        if missing := [str(part.absolute()) for part in parts if not part.exists()]:
            raise MissingData(
                f"tiny_imagenet is not there: looked for {', '.join(missing)}. Unpack {ADDRESS} in the folder of data "
                "sets, or set data.root to where it is unpacked"
            )

    def load(self) -> DataSet:
        """Find the files; images are read when they are needed.

        Raises:
            MissingData: If something is missing.
            ValueError: If files and annotations do not agree.
        """
        self.check()
        wnids = class_folders(self.folder / "train")
        train = labelled_files(self.folder / "train", wnids, _WHOLE, self.num_workers, self.prefetch)
        words = dict(_table(self.folder / "words.txt"))
        names = tuple(words.get(wnid, wnid) for wnid in wnids)
        return DataSet("tiny_imagenet", train, self._test(wnids), names, IMAGENET_MEAN, IMAGENET_STD)

    def _test(self, wnids: list[str]) -> FileImages:
        annotations = self.folder / "val" / "val_annotations.txt"
        label = {wnid: number for number, wnid in enumerate(wnids)}
        wanted = {f"images/{file}": wnid for file, wnid in _table(annotations)}
        found = image_files(self.folder / "val", ["images"])["images"]
        if differ := sorted(wanted.keys() ^ {name for name, _ in found}):
            raise ValueError(
                f"{annotations} and the files in {self.folder / 'val'} must agree; {len(differ)} are in only one of "
                f"them, such as {differ[0]}"
            )
        if strange := sorted(set(wanted.values()) ^ set(wnids)):
            raise ValueError(f"{annotations} must name the classes of train; {strange[0]} is in only one of them")
        return FileImages(
            self.folder / "val",
            [name for name, _ in found],
            torch.tensor([size for _, size in found]),
            torch.tensor([label[wanted[name]] for name, _ in found]),
            framing=_WHOLE,
            num_workers=self.num_workers,
            prefetch=self.prefetch,
        )


def _table(path: Path) -> list[tuple[str, str]]:
    """The first two columns, parted by tabs."""
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if short := [row for row in rows if len(row) < 2]:
        raise ValueError(f"{path} must have columns parted by tabs, found the line {short[0][0]!r}")
    return [(row[0], row[1]) for row in rows]
