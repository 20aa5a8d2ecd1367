"""Tables as plain text, as wide as what they hold: for files and pipes as well as for a terminal."""

import io
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

_WIDEST = 1000  # characters; nothing is cut before that


def as_text(names: Sequence[str], rows: Iterable[Sequence[str]], left: Iterable[str]) -> str:
    """A table with a line under its head.

    Args:
        names: Of the columns.
        rows: The cells, a text for each column.
        left: Names of the columns of words; the others are of numbers, which stand to the right.
    """
    words = set(left)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for name in names:
        table.add_column(name, no_wrap=True, justify="left" if name in words else "right")
    for row in rows:
        table.add_row(*map(printable, row))
    console = Console(file=io.StringIO(), width=_WIDEST, color_system=None, markup=False, emoji=False)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def printable(text: str) -> str:
    """A text without what would break a line or speak to the terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
