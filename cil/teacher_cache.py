"""What a frozen teacher says of the training samples, kept on disk for the runs that will ask again.

A training image is a function of a view key and its sample id, and so is what a frozen teacher says of it. A run with
the same teacher, data and view keys (another student, method or seed of the student) reads it instead:

    <folder>/<hash of the facts>/facts.json                               what fixes the outputs, for people
                                /pass_<view key>/<name>/data.bin          one row a sample, in the order of the ids
                                                       /index.json        shape, number format, rows, checksum
                                /.part-<process>-<random>/                one that is being written

A folder gets its name when every row is in it: a reader finds it whole or not at all. Damage (of a disk, or of a
machine that lost power, since nothing waits for the disk here) shows in the checksum, which `b2sum data.bin` prints.
"""

import errno
import fcntl
import hashlib
import json
import math
import os
import secrets
import shutil
import sys
import weakref
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

FORMAT = 1
GIB = 2**30
RESERVE_BYTES = GIB  # of the disk; left to checkpoints and to others
_FIRST = ("logits", "embedding")  # small, and read by most methods: they get the room before the taps
_DATA, _INDEX, _FACTS, _PART = "data.bin", "index.json", "facts.json", ".part-"


class TeacherCache:
    """What a frozen teacher said of every training sample, pass by pass, on disk.

    One process fills a pass; any number may read it, or fill the same one: the first to end keeps its own. A pass that
    was not written whole by this process is not kept. Whatever keeps a name from being kept is said in a line, and the
    teacher is asked instead.

    Args:
        folder: Of all caches; made when something is kept.
        facts: What fixes the outputs, as plain JSON values: checksum of the weights, fingerprint of the data,
            augmentation, number format. Other facts have another cache.
        ids: The training samples that every pass shows, in any order.
        max_gib: Most that is kept for these facts, in GiB.

    Raises:
        ValueError: If `max_gib` is not above 0, an id is there twice, or the folder holds other facts.
    """

    def __init__(
        self, folder: Path, facts: Mapping[str, Any], ids: Int[Tensor, " samples"], *, max_gib: float = 16.0
    ) -> None:
        if not max_gib > 0:
            raise ValueError(f"max_gib must be above 0, found {max_gib}")
        self._ids = torch.unique(ids.cpu().long())  # sorted: the row of an id is its rank
        if len(self._ids) < len(ids):
            raise ValueError(f"the ids of a pass must differ, found {len(ids)} with {len(self._ids)} different ones")
        samples = {"num_samples": len(ids), "ids": hashlib.blake2b(self._ids.numpy().tobytes()).hexdigest()}
        self._facts = json.dumps({"format": FORMAT, **samples, "facts": dict(facts)}, sort_keys=True, allow_nan=False)
        self.folder = folder / hashlib.blake2b(self._facts.encode(), digest_size=8).hexdigest()
        self.max_gib = max_gib
        self._pass: tuple[int, frozenset[str]] | None = None
        self._order: list[str] = []  # the names of the pass, those that get the room first in front
        self._entries: dict[str, _Rows] = {}  # of this pass, by name: complete and checked
        self._parts: dict[str, _Part] = {}  # of this pass, by name: being written
        self._refused: set[str] = set()  # names that are not kept
        self._checked: set[Path] = set()
        self._check_facts()
        for part in self.folder.glob(f"{_PART}*"):
            if _is_left_over(part):
                _remove(part)

    def describe(self, values: Mapping[str, Shaped[Tensor, "batch ..."]], num_passes: int) -> str:
        """Settle which names have room in all passes, and say so in a line; writes nothing.

        Without it a name is kept as long as there is room for one more pass of it.

        Args:
            values: Name to what the teacher says of an example batch.
            num_passes: Passes of this run; those that are there already take no new room.
        """
        there = _bytes_by_name(self.folder)
        room, free = self._room(), self._free()
        sizes, kept, left = [], [], []
        self._refused = set()
        for name in _by_priority(values):
            row_bytes = values[name][0].nbytes
            whole = row_bytes * len(self._ids) * num_passes
            missing = max(whole - there.get(_safe(name), 0), 0)
            sizes.append(f"{name} {row_bytes} B")
            if missing <= min(room, free):
                room, free = room - missing, free - missing
                kept.append(f"{name} ({_gib(whole)})")
            else:
                self._refused.add(name)
                why = f"max_gib={self.max_gib:g}" if missing > room else "the disk"
                left.append(f"{name} ({_gib(whole)} is too much for {why})")
        lines = [
            f"{self.folder}: {', '.join(sizes)} a sample, {len(self._ids)} samples, {num_passes} passes",
            f"kept: {', '.join(kept) or 'nothing'}",
            *([f"asked of the teacher every time: {', '.join(left)}"] if left else []),
            f"there already {_gib(sum(there.values()))}, free on the disk {_gib(self._free() + RESERVE_BYTES)}",
        ]
        return "teacher cache " + "; ".join(lines)

    def begin_pass(self, view_key: int, names: Collection[str]) -> None:
        """Begin a pass, or go on with it where it is parted into several epochs; what is damaged is removed.

        Args:
            view_key: Where the augmentation of the pass comes from.
            names: Of all that will be read and written in it.

        Raises:
            ValueError: If a name is empty.
        """
        if (view_key, frozenset(names)) == self._pass:
            return
        self.close()
        self._pass, self._order = (view_key, frozenset(names)), _by_priority(names)
        for name in self._order:
            rows = self._find(self._place(name))
            if rows is not None:
                self._entries[name] = rows

    def read(self, ids: Int[Tensor, " batch"]) -> dict[str, Tensor] | None:
        """What the teacher said of some samples, in the processor's memory; None unless all names are complete.

        Args:
            ids: Of the samples, in any order.

        Raises:
            ValueError: If a sample is none of the cache.
            OSError: If a file cannot be read.
        """
        assert self._pass is not None, "begin_pass comes first"
        if len(self._entries) < len(self._order):
            return None
        ranks = self._ranks(ids)
        return {name: self._entries[name].read(ranks) for name in self._order}

    def write(self, ids: Int[Tensor, " batch"], values: Mapping[str, Shaped[Tensor, "batch ..."]]) -> None:
        """Keep what is missing of the pass.

        Args:
            ids: Of the samples.
            values: Every name of the pass to what the teacher says of them.

        Raises:
            ValueError: If a sample is none of the cache, or rows of a name differ in shape or number format.
        """
        assert self._pass is not None, "begin_pass comes first"
        ranks = self._ranks(ids)
        for name in self._order:
            if name in self._entries or name in self._refused:
                continue
            try:
                self._write(name, ranks, values[name])
            except OSError as error:  # a cache that cannot be written is no reason to end a run
                self._refuse(name, error.strerror or str(error))

    def close(self) -> None:
        """End the pass; what is not complete is removed. A new pass may begin."""
        for part in self._parts.values():
            part.drop()
        for rows in self._entries.values():
            rows.close()
        self._pass, self._order, self._parts, self._entries = None, [], {}, {}

    def _write(self, name: str, ranks: Int[Tensor, " batch"], values: Shaped[Tensor, "batch ..."]) -> None:
        part = self._parts.get(name)
        if part is None:
            num_bytes = values[0].nbytes * len(self._ids)
            if num_bytes > min(self._room(), self._free()):
                self._refuse(name, f"no room for {_gib(num_bytes)} in max_gib={self.max_gib:g} or on the disk")
                return
            self._make_folder()
            part = self._parts[name] = _Part(self.folder, len(self._ids), values)
        part.write(ranks, values)
        if part.is_full:
            place = self._place(name)
            if part.publish(place):
                self._checked.add(place)
            del self._parts[name]
            rows = self._find(place)
            if rows is not None:
                self._entries[name] = rows

    def _find(self, place: Path) -> "_Rows | None":
        """The rows of a name if they are there, complete and undamaged."""
        if not place.is_dir():
            return None
        try:
            index = json.loads((place / _INDEX).read_text())
            dtype = getattr(torch, index["dtype"])
            rows = _Rows(place / _DATA, tuple(index["shape"]), dtype, tuple(index["memory_order"]), is_new=False)
            expected = len(self._ids) * rows.row_bytes
            if sorted(rows.memory_order) != list(range(len(rows.shape))):
                raise ValueError(f"memory order {rows.memory_order} of rows {rows.shape}")
            if index["num_rows"] != len(self._ids) or (place / _DATA).stat().st_size != expected:
                raise ValueError(f"not {len(self._ids)} rows")
            if place not in self._checked and _checksum(place / _DATA) != index["blake2b"]:
                raise ValueError("wrong checksum")
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # whatever is wrong in the index
            _say(f"{place} is damaged ({error}): removed, the teacher is asked again")
            _remove(place)
            return None
        self._checked.add(place)
        return rows

    def _refuse(self, name: str, why: str) -> None:
        self._refused.add(name)
        if name in self._parts:
            self._parts.pop(name).drop()
        _say(f"{name} is not kept from now on ({why})")

    def _place(self, name: str) -> Path:
        assert self._pass is not None, "begin_pass comes first"
        return self.folder / f"pass_{self._pass[0]:016x}" / _safe(name)

    def _ranks(self, ids: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        ids = ids.cpu().long()
        ranks = torch.searchsorted(self._ids, ids).clamp(max=len(self._ids) - 1)
        strangers = ids[self._ids[ranks] != ids]
        if len(strangers):
            raise ValueError(f"sample {int(strangers[0])} is none of the {len(self._ids)} that the cache was made for")
        return ranks

    def _room(self) -> int:
        """Bytes left of the limit; a part counts whole from its beginning, whoever writes it."""
        return int(self.max_gib * GIB) - sum(_bytes_by_name(self.folder).values())

    def _free(self) -> int:
        """Bytes left on the disk beside the reserve, and beside what this process goes on to write."""
        existing = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        begun = sum(part.num_bytes for part in self._parts.values())
        return shutil.disk_usage(existing).free - RESERVE_BYTES - begun

    def _check_facts(self) -> None:
        path = self.folder / _FACTS
        try:
            same = json.loads(path.read_text()) == json.loads(self._facts)
        except FileNotFoundError:  # nothing is kept yet
            return
        except ValueError:
            same = False
        if not same:
            raise ValueError(f"{path}: damaged or edited, the name of its folder says other facts; remove the folder")

    def _make_folder(self) -> None:
        path = self.folder / _FACTS
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            private = path.with_name(f".{_FACTS}-{os.getpid()}-{secrets.token_hex(4)}")
            private.write_text(json.dumps(json.loads(self._facts), indent=1) + "\n")
            os.replace(private, path)  # two processes that both do so write the same


class _Rows:
    """A file of rows, one a sample, all of one shape and number format.

    Read and written by calls and not mapped into memory: so a full disk or a file cut short is an error and no SIGBUS,
    and the file does not count as memory of the process.

    Args:
        path: The file.
        shape: Of a row.
        dtype: Its number format.
        memory_order: The dimensions of a row as they lie in memory, the outermost first. Rows come back so: a loss that
            sums them in another order would differ in its last bits.
        is_new: Make the file, which must not exist, to write; otherwise it is read.
    """

    def __init__(
        self, path: Path, shape: tuple[int, ...], dtype: torch.dtype, memory_order: tuple[int, ...], *, is_new: bool
    ) -> None:
        self.path, self.shape, self.dtype, self.memory_order = path, shape, dtype, memory_order
        self.row_bytes = math.prod(shape) * dtype.itemsize
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL if is_new else os.O_RDONLY, 0o666)
        self.close = weakref.finalize(self, os.close, self.descriptor)

    def read(self, ranks: Int[Tensor, " batch"]) -> Shaped[Tensor, "batch ..."]:
        """Some rows."""
        values = torch.empty(len(ranks), *(self.shape[k] for k in self.memory_order), dtype=self.dtype)
        for row, rank in zip(_bytes_of(values), ranks.tolist(), strict=True):
            if os.preadv(self.descriptor, [row], rank * self.row_bytes) != self.row_bytes:
                raise OSError(errno.EIO, "became shorter while it was in use", str(self.path))
        return values.permute(0, *(1 + self.memory_order.index(k) for k in range(len(self.shape))))

    def write(self, ranks: Int[Tensor, " batch"], values: Shaped[Tensor, "batch ..."]) -> None:
        """Some rows, as read."""
        values = values.detach().cpu().permute(0, *(1 + k for k in self.memory_order)).contiguous()
        for row, rank in zip(_bytes_of(values), ranks.tolist(), strict=True):
            if os.pwrite(self.descriptor, row, rank * self.row_bytes) != self.row_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))


class _Part:
    """The rows of a name while they are written, in a private folder that vanishes with this object.

    Args:
        folder: Where the private folder is made.
        num_rows: Rows when it is full.
        values: Example of the rows.
    """

    def __init__(self, folder: Path, num_rows: int, values: Shaped[Tensor, "batch ..."]) -> None:
        self._folder = folder / f"{_PART}{os.getpid()}-{secrets.token_hex(4)}"
        self._folder.mkdir()
        self.drop = weakref.finalize(self, _remove, self._folder)
        shape, strides = tuple(values.shape[1:]), values.stride()[1:]
        memory_order = tuple(sorted(range(len(shape)), key=lambda k: -strides[k]))
        self._rows = _Rows(self._folder / _DATA, shape, values.dtype, memory_order, is_new=True)
        fcntl.flock(self._rows.descriptor, fcntl.LOCK_EX)  # says that its writer lives
        self.num_bytes = num_rows * self._rows.row_bytes
        os.ftruncate(self._rows.descriptor, self.num_bytes)
        self._written = torch.zeros(num_rows, dtype=torch.bool)

    def write(self, ranks: Int[Tensor, " batch"], values: Shaped[Tensor, "batch ..."]) -> None:
        """Some rows."""
        rows = self._rows
        if (tuple(values.shape[1:]), values.dtype) != (rows.shape, rows.dtype):
            raise ValueError(
                f"the rows of a name must be alike: they were {list(rows.shape)} of {rows.dtype}, "
                f"found {list(values.shape[1:])} of {values.dtype}"
            )
        rows.write(ranks, values)
        self._written[ranks] = True

    @property
    def is_full(self) -> bool:
        """Whether every row has been written."""
        return bool(self._written.all())

    def publish(self, place: Path) -> bool:
        """Give it its name; tells whether it was the first of that name. The others are dropped."""
        rows = self._rows
        index = {
            "shape": list(rows.shape),
            "dtype": str(rows.dtype).removeprefix("torch."),
            "memory_order": list(rows.memory_order),
            "num_rows": len(self._written),
            "blake2b": _checksum(rows.path),
        }
        (self._folder / _INDEX).write_text(json.dumps(index, indent=1) + "\n")
        place.parent.mkdir(exist_ok=True)
        try:
            os.rename(self._folder, place)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return False
        finally:
            self.drop()
            rows.close()
        return True


def _bytes_of(values: Shaped[Tensor, "batch ..."]) -> Any:
    """Each row of contiguous values as bytes, without a copy."""
    return values.view(len(values), math.prod(values.shape[1:])).view(torch.uint8).numpy()


def _checksum(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _by_priority(names: Iterable[str]) -> list[str]:
    """Logits and embedding first, the rest in the order given."""
    return sorted(dict.fromkeys(names), key=lambda name: name not in _FIRST)


def _safe(name: str) -> str:
    """A folder name of its own for every name.

    Raises:
        ValueError: If the name is empty.
    """
    if not name:
        raise ValueError("a name of what a teacher says must not be empty")
    return quote(name, safe="").replace(".", "%2E")


def _bytes_by_name(folder: Path) -> dict[str, int]:
    """Bytes of the rows below a folder, by the folder they are in; several passes have the same names."""
    found: dict[str, int] = {}
    for place, _, files in os.walk(folder):  # which passes over what vanishes meanwhile
        if _DATA in files:
            with suppress(FileNotFoundError):
                found[Path(place).name] = found.get(Path(place).name, 0) + (Path(place) / _DATA).stat().st_size
    return found


def _is_left_over(part: Path) -> bool:
    """Whether nobody writes a part any more: the system takes the locks of the dead away."""
    try:
        with (part / _DATA).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, FileNotFoundError):  # being written, or about to be
        return False
    return True


def _remove(folder: Path) -> None:
    with suppress(FileNotFoundError):  # it has been renamed, or another process removed it as well
        shutil.rmtree(folder)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.3g} GiB"


def _say(line: str) -> None:
    print(f"teacher cache: {line}", file=sys.stderr)
