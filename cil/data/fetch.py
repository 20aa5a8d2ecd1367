"""Fetching published data sets: into a folder apart, compared with their checksums, and only then kept and opened."""

import gzip
import hashlib
import os
import shutil
import sys
import tarfile
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cil.data.base import MissingData

_PATIENCE_SECONDS = 60.0  # without a byte


def fetch(published: Mapping[str, str], root: Path, folder: str) -> None:
    """Fetch archives and unpack their files into one folder; of a wrong or interrupted download nothing stays.

    Args:
        published: SHA-256 by address; each is a `.tar.gz`, or one file as `.gz`. Folders in them are left out.
        root: Folder of all data sets.
        folder: Below `root`, where the files go: one by one, each complete.

    Raises:
        ValueError: If something else is at an address than was published.
        OSError: If an address cannot be reached, or nothing can be written.
    """
    root.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".fetching-", dir=root) as name:
        archive, unpacked = Path(name) / "archive", Path(name) / "files"
        unpacked.mkdir()
        for address, sha256 in published.items():
            print(f"fetching {address}", file=sys.stderr)
            with urllib.request.urlopen(address, timeout=_PATIENCE_SECONDS) as response, archive.open("wb") as file:
                shutil.copyfileobj(response, file)
            with archive.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != sha256:
                raise ValueError(
                    f"{address} is not what was published and was not kept: its SHA-256 is {found}, {sha256} is right"
                )
            _unpack(archive, address.rpartition("/")[2], unpacked)
        (root / folder).mkdir(parents=True, exist_ok=True)
        for path in unpacked.iterdir():
            os.replace(path, root / folder / path.name)


def open_or_fetch(
    name: str,
    open_part: Callable[[bool], Any],
    published: Mapping[str, str],
    root: Path,
    folder: str,
    *,
    download: bool,
) -> list[Any]:
    """Training and test part of a data set that torchvision reads; missing or damaged files are fetched if allowed.

    Args:
        name: Of the data set, for messages.
        open_part: Reads the training part (True) or the test part; torchvision raises what it finds wrong.
        published: As for `fetch`, likewise `root` and `folder`.
        root: Folder of all data sets.
        folder: Where the files are in it.
        download: Whether they may be fetched.

    Raises:
        MissingData: If they are not there, damaged, or cannot be fetched.
    """
    wrong = (RuntimeError, OSError, ValueError, AssertionError)  # what torchvision says of missing and damaged files
    try:
        try:
            return [open_part(train) for train in (True, False)]
        except wrong:
            if not download:
                raise
            fetch(published, root, folder)
        return [open_part(train) for train in (True, False)]
    except wrong as error:
        raise MissingData(
            f"the files of {name} in {(root / folder).absolute()} cannot be "
            f"{'fetched' if download else 'used; add data.download=true to fetch them anew'}: {error}"
        ) from error


def _unpack(archive: Path, name: str, folder: Path) -> None:
    if not name.endswith(".tar.gz"):
        with gzip.open(archive) as content, (folder / name.removesuffix(".gz")).open("wb") as file:
            shutil.copyfileobj(content, file)
        return
    with tarfile.open(archive) as tar:
        for member in tar:
            if (inside := tar.extractfile(member)) is not None:
                with (folder / Path(member.name).name).open("wb") as file:
                    shutil.copyfileobj(inside, file)
