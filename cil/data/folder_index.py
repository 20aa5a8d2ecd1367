"""Which image files lie in the class folders of a data set, remembered from one start to the next.

Listing a million files takes minutes on a slow disk. What was found is therefore kept in a file: `.cil_index.json` in
the folder itself or, where that cannot be written, one in `~/.cache/cil` (`$XDG_CACHE_HOME/cil`). A folder is listed
again when its time of change is another; a new, renamed or removed file changes it, a file rewritten in place does not.
"""

import hashlib
import json
import os
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

INDEX_NAME = ".cil_index.json"
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")

_SETTLED_NS = 2 * 10**9  # a folder changed later than this may change again within the same tick of the disk's clock


class Folder(NamedTuple):
    """What lies in one folder: its time of change, the folders in it, and the lengths of its image files by name."""

    changed_ns: int
    folders: list[str]
    files: dict[str, int]


def class_folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted; hidden ones are left out."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def find_images(paths: Iterable[Path], wanted: str) -> list[Path]:
    """Files as given, whatever they are, and image files in folders at any depth, sorted by name.

    Args:
        paths: Files and folders.
        wanted: What may be given, for the message.

    Raises:
        ValueError: If there is no such path, or a folder holds no image.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ValueError(f"there is no file or folder {path}: give {wanted}")
        inside = [path]
        if path.is_dir():
            inside = sorted(file for file in path.rglob("[!.]*") if file.suffix.lower() in SUFFIXES and file.is_file())
        if not inside:
            raise ValueError(f"{path} holds no image files ({' '.join(SUFFIXES)})")
        found += inside
    return found


def image_files(folder: Path, classes: Iterable[str]) -> dict[str, list[tuple[str, int]]]:
    """The image files of some class folders, at any depth, as name relative to `folder` and length; sorted by name.

    Every process of a run may write the index: they write the same, and each in one step.

    Args:
        folder: Where the class folders are.
        classes: Their names.

    Raises:
        ValueError: If a folder contains itself through a link.
    """
    known = _read(folder)
    seen: dict[str, Folder] = {}
    start = time.time_ns()
    found = {name: sorted(_walk(folder, name, known, seen, ())) for name in classes}
    kept = known | {name: entry for name, entry in seen.items() if start - entry.changed_ns > _SETTLED_NS}
    if kept != known:
        _write(folder, kept)
    return found


def _walk(
    folder: Path, name: str, known: dict[str, Folder], seen: dict[str, Folder], parents: tuple[tuple[int, int], ...]
) -> Iterator[tuple[str, int]]:
    place = folder / name
    status = place.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in parents:
        raise ValueError(f"{place} is a link to a folder that it lies in: remove it")
    entry = known.get(name)
    if entry is None or entry.changed_ns != status.st_mtime_ns:
        entry = _list(place, status.st_mtime_ns)
    seen[name] = entry
    for file, size in entry.files.items():
        yield f"{name}/{file}", size
    for inner in entry.folders:
        yield from _walk(folder, f"{name}/{inner}", known, seen, (*parents, identity))


def _list(place: Path, changed_ns: int) -> Folder:
    folders, files = [], {}
    with os.scandir(place) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.append(entry.name)
            elif entry.name.lower().endswith(SUFFIXES):
                files[entry.name] = entry.stat().st_size
    return Folder(changed_ns, sorted(folders), files)


def _places(folder: Path) -> list[Path]:
    """Where an index of a folder may be."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cil"
    absolute = folder.absolute()
    digest = hashlib.sha256(os.fsencode(absolute)).hexdigest()[:16]
    return [absolute / INDEX_NAME, cache / f"{digest}.json"]


def _read(folder: Path) -> dict[str, Folder]:
    for place in _places(folder):
        try:
            digest, _, text = place.read_bytes().partition(b"\n")
        except OSError:  # not there
            continue
        if hashlib.sha256(text).hexdigest().encode() == digest:
            return {name: Folder(*entry) for name, entry in json.loads(text).items()}
        warnings.warn(f"{place} is damaged: the folders are listed again", stacklevel=3)
    return {}


def _write(folder: Path, entries: dict[str, Folder]) -> None:
    text = json.dumps(entries).encode()
    content = hashlib.sha256(text).hexdigest().encode() + b"\n" + text
    for place in _places(folder):
        beside = place.with_name(f"{place.name}.{os.getpid()}")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            beside.write_bytes(content)
            beside.replace(place)
        except OSError:  # not writable, or full
            continue
        return
    warnings.warn(f"no list of the files in {folder} can be kept: every start lists them again", stacklevel=3)
