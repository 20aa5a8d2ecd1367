"""Names to classes: a mapping that fills itself from the modules of a package."""

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """A mapping of registered names to classes, so that adding a part is adding a file.

    Args:
        kind: What the entries are, in words, for messages ("distiller").
        packages: Packages whose modules register entries; imported on the first read, not before.

    Raises:
        ValueError: On reading an unknown name (with the nearest known one), or on registering a name twice.
    """

    def __init__(self, kind: str, *packages: str) -> None:
        self.kind = kind
        self._packages = packages
        self._entries: dict[str, T] = {}
        self._filled = False

    def register(self, name: str) -> Callable[[T], T]:
        """Class decorator that enters the class under `name`."""

        def enter(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice: {self._entries[name]} and {entry}")
            self._entries[name] = entry
            return entry

        return enter

    def _fill(self) -> dict[str, T]:
        if not self._filled:
            self._filled = True  # first, since the modules below may read the registry while they are imported
            try:
                for package in self._packages:
                    module = importlib.import_module(package)
                    for info in pkgutil.walk_packages(module.__path__, prefix=f"{package}."):
                        importlib.import_module(info.name)
            except BaseException:
                self._filled = False  # half a list would hide what failed
                raise
            self._entries = dict(sorted(self._entries.items()))
        return self._entries

    def __getitem__(self, name: str) -> T:
        entries = self._fill()
        if name not in entries:
            raise ValueError(unknown(self.kind, name, entries))
        return entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._fill()

    def __iter__(self) -> Iterator[str]:
        return iter(self._fill())

    def __len__(self) -> int:
        return len(self._fill())


def unknown(kind: str, name: str, known: Mapping[str, object] | list[str]) -> str:
    """One sentence for an unknown name: what was given, the nearest known name, all known names."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"unknown {kind} {name!r}{hint} Known: {', '.join(sorted(known))}"
