"""Golden cases as they stand in a file, and the comparison of what this project computes with them."""

import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, np.dtype[Any]]

TOLERANCE = 1e-8  # absolute and relative, of goldens/dkt.md
NOISE = 1e-8  # arrays that are zero but for rounding have no relative error


@dataclass
class Case:
    """The arrays of one case by what follows the case in their names. Remembers which were asked for."""

    name: str
    arrays: dict[str, Array]
    read: set[str] = field(default_factory=set)

    def __getitem__(self, key: str) -> Array:
        if key not in self.arrays:
            raise LookupError(f"the case has no array {key!r}")
        self.read.add(key)
        return self.arrays[key]

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def tensor(self, key: str) -> Tensor:
        return torch.from_numpy(self[key].copy())

    def names(self, prefix: str) -> list[str]:
        return [key.removeprefix(prefix) for key in self.arrays if key.startswith(prefix)]

    def group(self, prefix: str) -> dict[str, Tensor]:
        return {name: self.tensor(prefix + name) for name in self.names(prefix)}

    def ignore(self, *keys: str) -> None:
        self.read.update(keys)


@dataclass
class Comparison:
    """Everything compared in one case: the largest differences, what missed, and what was excused from comparing."""

    max_abs: float = 0.0
    max_rel: float = 0.0
    num_compared: int = 0
    misses: list[str] = field(default_factory=list)
    excused: list[str] = field(default_factory=list)

    def close(
        self, name: str, found: Any, golden: Any, *, absolute: float = TOLERANCE, relative: float = TOLERANCE
    ) -> None:
        """Element by element: |found - golden| <= absolute + relative |golden|, NaN where the golden is NaN."""
        a, b = _array(found), _array(golden)
        self.num_compared += 1
        if a.shape != b.shape:
            self.misses.append(f"{name}: found shape {a.shape}, expected {b.shape}")
            return
        a, b = a.astype(np.float64), b.astype(np.float64)
        if not np.array_equal(np.isfinite(a), np.isfinite(b)):
            self.misses.append(f"{name}: NaN or infinite at other places than expected")
            return
        finite = np.isfinite(b)
        difference = np.abs(a[finite] - b[finite])
        if not difference.size:
            return
        size = float(np.abs(b[finite]).max())
        self.max_abs = max(self.max_abs, float(difference.max()))
        if size > NOISE:
            self.max_rel = max(self.max_rel, float(difference.max()) / size)
        if not (difference <= absolute + relative * np.abs(b[finite])).all():
            self.misses.append(f"{name}: off by {difference.max():.3g}, largest expected value {size:.3g}")

    def scaled(self, name: str, found: Any, golden: Any, tolerance: float) -> None:
        """max |found - golden| <= tolerance * max(1, max |golden|)."""
        size = float(np.abs(_array(golden)).max(initial=1))
        self.close(name, found, golden, absolute=tolerance * max(1.0, size), relative=0.0)

    def exact(self, name: str, found: Any, golden: Any) -> None:
        self.num_compared += 1
        if not np.array_equal(_array(found), _array(golden)):
            self.misses.append(f"{name}: found {_array(found).tolist()}, expected {_array(golden).tolist()}")

    def same_names(self, name: str, found: Iterable[str], golden: Iterable[str]) -> None:
        self.num_compared += 1
        found, golden = set(found), {str(entry) for entry in golden}
        if found != golden:
            self.misses.append(f"{name}: too many {sorted(found - golden)}, missing {sorted(golden - found)}")

    def true(self, name: str, holds: bool) -> None:
        self.num_compared += 1
        if not holds:
            self.misses.append(f"{name}: does not hold")


Check = Callable[[Case, Comparison], None]


def _array(value: Any) -> Array:
    return value.detach().numpy() if isinstance(value, Tensor) else np.asarray(value)


def read_cases(path: Path) -> list[Case]:
    """All cases of a file, in its order.

    Raises:
        ValueError: If the file is missing, unreadable or empty.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: not an .npz file (it is no zip archive)")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a readable .npz file ({str(error).splitlines()[0]})") from None
    if not arrays:
        raise ValueError(f"{path}: holds no arrays")
    cases: dict[str, Case] = {}
    for name, array in arrays.items():
        parts = name.split("/", 2)
        case = "/".join(parts[:2])
        cases.setdefault(case, Case(case, {})).arrays[parts[2] if len(parts) > 2 else ""] = array
    return list(cases.values())
