"""What is in a data set of one's own, and what is wrong with it: `python -m cil.data PATH`."""

import hashlib
import json
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from cil.data.base import ImageSet, MissingData
from cil.data.files import default_num_workers
from cil.data.folder_index import class_folders, image_files
from cil.data.framing import to_rgb
from cil.data.npz import class_names, load_parts
from cil.text_table import as_text, printable

TRAIN, FOLDER_PARTS, ARRAY_PARTS = "train", ("train", "val"), ("train", "test")

_MOST = 5  # of what is wrong, shown in a sentence
_MOST_CLASSES = 50  # shown in the table


@dataclass
class Part:
    """One part of a data set.

    Attributes:
        counts: Images of every class.
        widths: Of the images that can be read, in pixels.
        heights: Likewise.
        formats: Number of images in each file format.
        modes: Number of images with each kind of pixels.
        places: Digest of the pixels to the images that have them, as class and name.
    """

    counts: dict[str, int] = field(default_factory=dict)
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    places: defaultdict[str, list[tuple[str, str]]] = field(default_factory=lambda: defaultdict(list))

    def summary(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "num_images": sum(self.counts.values()),
            "num_classes": sum(count > 0 for count in self.counts.values()),
            "counts": self.counts,
            "width": _range(self.widths),
            "height": _range(self.heights),
            "formats": dict(self.formats.most_common()),
            "modes": dict(self.modes.most_common()),
        }


@dataclass
class Audit:
    """What was found.

    Attributes:
        path: The data set.
        kind: `image_folder` or `npz`, as in `data=`.
        parts: By name; the training part first.
        unreadable: Images that cannot be read, with the reason.
        unusable: What keeps the data set from being loaded at all; None for nothing.
    """

    path: Path
    kind: str
    parts: dict[str, Part]
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    unusable: str | None = None

    def only_in(self) -> dict[str, list[str]]:
        """Classes that have images in one part alone."""
        having = {name: {label for label, count in part.counts.items() if count} for name, part in self.parts.items()}
        return {
            name: sorted(own - set(chain.from_iterable(others for other, others in having.items() if other != name)))
            for name, own in having.items()
        }

    def empty(self) -> list[str]:
        """Classes without an image anywhere."""
        labels = dict.fromkeys(label for part in self.parts.values() for label in part.counts)
        return [label for label in labels if not any(part.counts.get(label) for part in self.parts.values())]

    def duplicates_inside(self) -> dict[str, list[list[str]]]:
        """Groups of images of equal pixels in one part."""
        return {
            name: [[image for _, image in group] for group in part.places.values() if len(group) > 1]
            for name, part in self.parts.items()
        }

    def duplicates_between(self) -> list[dict[str, list[str]]]:
        """Groups of images of equal pixels that are in more than one part."""
        first, *others = self.parts.values()
        shared = [digest for digest in first.places if any(digest in other.places for other in others)]
        return [
            {name: [image for _, image in part.places.get(digest, [])] for name, part in self.parts.items()}
            for digest in shared
        ]

    def of_two_classes(self) -> list[list[str]]:
        """Groups of images of equal pixels that are in more than one class."""
        found: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
        for part in self.parts.values():
            for digest, group in part.places.items():
                found[digest] += group
        return [[image for _, image in group] for group in found.values() if len({label for label, _ in group}) > 1]

    def problems(self) -> list[str]:
        """Everything that is wrong, a sentence each."""
        found = [] if self.unusable is None else [self.unusable]
        if self.unreadable:
            found.append(
                f"{_many(self.unreadable, 'image')} cannot be read: {_some(f'{a} ({b})' for a, b in self.unreadable)}"
            )
        for name, labels in self.only_in().items():
            if labels and len(self.parts) > 1:
                found.append(f"{_many(labels, 'class')} in {name} alone: {_some(labels)}")
        if empty := self.empty():
            found.append(f"{_many(empty, 'class')} without any image: {_some(empty)}")
        if between := self.duplicates_between():
            shown = _some(" = ".join(chain.from_iterable(group.values())) for group in between)
            found.append(f"{_many(between, 'picture')} in both {' and '.join(self.parts)}: {shown}")
        for name, groups in self.duplicates_inside().items():
            if groups:
                found.append(f"{_many(groups, 'picture')} more than once in {name}: {_some(map(' = '.join, groups))}")
        if conflicting := self.of_two_classes():
            found.append(f"{_many(conflicting, 'picture')} in two classes: {_some(map(' = '.join, conflicting))}")
        return found

    def as_json(self) -> str:
        """All of it."""
        found = {
            "path": str(self.path),
            "kind": self.kind,
            "parts": {name: part.summary() for name, part in self.parts.items()},
            "unreadable": [{"image": image, "reason": reason} for image, reason in self.unreadable],
            "only_in": self.only_in() if len(self.parts) > 1 else {},
            "empty": self.empty(),
            "duplicates": {
                "between": self.duplicates_between(),
                "inside": self.duplicates_inside(),
                "of_two_classes": self.of_two_classes(),
            },
            "problems": self.problems(),
        }
        return json.dumps(found, indent=1, ensure_ascii=False) + "\n"

    def as_table(self) -> str:
        """For a person: a line for each part, a line for each class, then what is wrong."""
        parts = []
        for name, part in self.parts.items():
            counts = [count for count in part.counts.values() if count] or [0]
            kinds = ", ".join(f"{kind} {count}" for kind, count in chain(part.formats.items(), part.modes.items()))
            sizes = [_shown(_range(sides)) for sides in (part.widths, part.heights)]
            numbers = (sum(part.counts.values()), sum(map(bool, part.counts.values())), min(counts), max(counts))
            parts.append((name, *map(str, numbers), *sizes, kinds))
        names = ("part", "images", "classes", "fewest", "most", "width", "height", "kinds")
        labels = list(dict.fromkeys(label for part in self.parts.values() for label in part.counts))
        shown, parts_in_order = labels[:_MOST_CLASSES], list(self.parts.values())
        classes = [(label, *(str(part.counts.get(label, 0)) for part in parts_in_order)) for label in shown]
        rest = len(labels) - _MOST_CLASSES
        problems = [printable(problem) for problem in self.problems()]
        return "\n".join(
            [
                f"{self.path} (data={self.kind})",
                as_text(names, parts, left=("part", "kinds")),
                as_text(("class", *self.parts), classes, left=("class",))
                + (f"\nand {rest} more classes; --json lists all\n" if rest > 0 else ""),
                *(f"wrong: {problem}" for problem in problems),
                "" if problems else "nothing wrong was found\n",
            ]
        )


def audit(path: Path) -> Audit:
    """Look at a data set of one's own: an image folder with `train` and `val`, or an .npz file.

    Duplicates are images of equal pixels: SHA-256 of size and pixels, of files after they are decoded, turned as the
    camera was held and made RGB. So a copy, another name or another lossless format is found; a picture that was made
    smaller or saved anew as JPEG is not.

    Raises:
        ValueError: If there is no such data set.
    """
    if path.is_dir():
        return _of_folder(path)
    if path.is_file() and path.suffix == ".npz":
        return _of_npz(path)
    if path.exists():
        raise ValueError(f"{path} is neither a folder nor a .npz file")
    raise MissingData(f"there is no file or folder {path.absolute()}")


def _of_folder(path: Path) -> Audit:
    missing = [name for name in FOLDER_PARTS if not (path / name).is_dir()]
    if missing:
        raise MissingData(
            f"there is no folder {' and no '.join(str(path / name) for name in missing)}: images are in train/CLASS/ "
            "and val/CLASS/"
        )
    found = Audit(path, "image_folder", {name: Part() for name in FOLDER_PARTS})
    for name, part in found.parts.items():
        files = image_files(path / name, class_folders(path / name))
        part.counts = {label: len(own) for label, own in files.items()}
        listed = [(label, file) for label, own in files.items() for file, _ in own]
        with ThreadPoolExecutor(default_num_workers()) as threads:
            looked = threads.map(_look_at, [path / name / file for _, file in listed])
            for (label, file), seen in zip(listed, looked, strict=True):
                if isinstance(seen, str):
                    found.unreadable.append((f"{name}/{file}", seen))
                    continue
                width, height, form, mode, digest = seen
                part.widths.append(width)
                part.heights.append(height)
                part.formats[form] += 1
                part.modes[mode] += 1
                part.places[digest].append((label, f"{name}/{file}"))
    if not any(part.counts for part in found.parts.values()):
        found.unusable = "there are no class folders: put the images of each class in one"
    return found


def _look_at(path: Path) -> tuple[int, int, str, str, str] | str:
    """Width, height, format, kind and digest of the pixels of a file; or what is wrong with it."""
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning), Image.open(path) as image:
            form, mode = str(image.format), image.mode
            shown = to_rgb(ImageOps.exif_transpose(image))
            pixels = np.asarray(shown)
    except Exception as error:  # Pillow raises nearly every kind for one damaged file or another
        return " ".join(str(error).split()) or type(error).__name__
    return shown.width, shown.height, form, mode, _digest(pixels)


def _digest(pixels: np.ndarray) -> str:
    return hashlib.sha256(repr(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def _of_npz(path: Path) -> Audit:
    found = Audit(path, "npz", {name: Part() for name in ARRAY_PARTS})
    try:
        train, test, names = load_parts(path)
    except ValueError as error:
        found.unusable = str(error)
        return found
    sets = (train, test)
    top = max(int(images.labels.max()) for images in sets) + 1
    labels = [str(name) for name in names] if names is not None and names.ndim == 1 else []
    labels += [str(label) for label in range(len(labels), top)]
    for (name, part), images in zip(found.parts.items(), sets, strict=True):
        _fill(part, images, labels, name)
    try:
        class_names(path, train, test, names)
    except ValueError as error:
        found.unusable = str(error)
    return found


def _fill(part: Part, images: ImageSet, labels: Sequence[str], name: str) -> None:
    channels, height, width = images.input_shape
    part.counts = {label: int((images.labels == index).sum()) for index, label in enumerate(labels)}
    part.widths, part.heights = [width] * len(images), [height] * len(images)
    part.modes[f"{channels} channel{'s' if channels > 1 else ''}"] = len(images)
    for index, (pixels, label) in enumerate(zip(images.images.numpy(), images.labels.tolist(), strict=True)):
        own = labels[label] if 0 <= label < len(labels) else str(label)
        part.places[_digest(pixels)].append((own, f"x_{name}[{index}]"))


def _range(sides: Sequence[int]) -> dict[str, int | float] | None:
    if not sides:
        return None
    return {"min": min(sides), "median": float(np.median(sides)), "max": max(sides)}


def _shown(sides: dict[str, int | float] | None) -> str:
    if sides is None:
        return "-"
    return (
        f"{sides['min']}" if sides["min"] == sides["max"] else f"{sides['min']} / {sides['median']:g} / {sides['max']}"
    )


def _many(items: Sequence[object], noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{len(items)} {noun if len(items) == 1 else plural}"


def _some(items: Iterable[str]) -> str:
    shown = list(items)
    more = f" and {len(shown) - _MOST} more" if len(shown) > _MOST else ""
    return ", ".join(shown[:_MOST]) + more
