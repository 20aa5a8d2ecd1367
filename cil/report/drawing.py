"""How figures of the report are drawn: once, for the page, which they follow in light and in dark, and for papers.

matplotlib is given the colours of the light page. In the page each stands for a variable of the style sheet, so that
a figure changes with the theme; in files they are what they are. Nothing depends on the date or on the order of
drawing: the same run gives the same bytes.
"""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

#: Variable of the style sheet to its colour in light and in dark. The palette differs in lightness as well as in hue,
#: and lines in marker or dash too, so that nothing hangs on colour alone.
THEME: dict[str, tuple[str, str]] = {
    "ink": ("#1b2026", "#e7ebee"),
    "soft": ("#566069", "#a3adb6"),
    "line": ("#d3d9df", "#38414a"),
    "paper": ("#ffffff", "#13171a"),
    "c0": ("#0a4f91", "#7cbcf5"),
    "c1": ("#c2490f", "#ff9a62"),
    "c2": ("#00785f", "#4fd0ad"),
    "c3": ("#8e4585", "#e09ad6"),
    "c4": ("#9a6b00", "#e3b84b"),
    "c5": ("#2d86bd", "#9ad7ff"),
    "c6": ("#6a7078", "#aeb6be"),
    "c7": ("#ad1f38", "#ff8494"),
}
INK, SOFT, LINE, PAPER = (THEME[name][0] for name in ("ink", "soft", "line", "paper"))
PALETTE = [THEME[f"c{index}"][0] for index in range(8)]
RIGHT_RGB, WRONG_RGB = (0x3B, 0x8B, 0xC9), (0xDB, 0x6A, 0x28)  # of pixels, which have one colour in both themes

WIDTH, HEIGHT = 5.0, 3.2  # inches of 72 units: readable at the width of a phone and of half a screen
MOST_LABELLED_TASKS = 12
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "pdf.fonttype": 42,  # text stays text in a paper
    "text.parse_math": False,
    "svg.hashsalt": "cil.report",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
}


@dataclass(frozen=True)
class Drawing:
    """A figure that has been painted.

    Attributes:
        name: Of its files; makes the ids of this figure differ from those of the others on a page.
        figure: The figure.
        title: Says what is to be seen, for readers who cannot see it.
        facts: What the page's script may say of a place in the figure; empty for nothing.
    """

    name: str
    figure: Figure
    title: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    def inline(self) -> str:
        """SVG text to stand in a page, with its fonts and colours."""
        svg = self._saved("svg").decode()
        svg = svg[svg.index("<svg") :]
        svg = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
        head = rf'<svg viewBox="\1" role="img" aria-label="{self.title}">'
        svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', head, svg)
        svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
        svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{self.name}-", svg).replace("xlink:href", "href")
        for variable, (light, _) in THEME.items():
            svg = svg.replace(light, f"var(--{variable})")
        return svg.strip()

    def save(self, folder: Path) -> list[Path]:
        """Write it as SVG and as PDF, in the colours of the light page on no ground."""
        paths = [folder / f"{self.name}.{kind}" for kind in ("svg", "pdf")]
        for path in paths:
            path.write_bytes(self._saved(path.suffix[1:]))
        return paths

    def _saved(self, kind: str) -> bytes:
        out = io.BytesIO()
        dates = {"svg": {"Date": None, "Creator": None}, "pdf": {"CreationDate": None, "Creator": None}}
        with matplotlib.rc_context(_STYLE):
            self.figure.savefig(out, format=kind, transparent=True, metadata=dates[kind])
        return out.getvalue()


def draw(
    name: str,
    paint: Callable[[Axes], None],
    height: float = HEIGHT,
    title: str = "",
    facts: Mapping[str, Any] | None = None,
) -> Drawing:
    """Paint a figure.

    Args:
        name: See `Drawing`.
        paint: Draws on the axes.
        height: In inches, at a width of 5.
        title: See `Drawing`.
        facts: See `Drawing`; the place of the axes in the figure is added to them.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        paint(axes)
        if facts:
            canvas: Any = FigureCanvasAgg(figure)  # whose methods have no types
            canvas.draw()
            box = axes.get_position()
            facts = {**facts, "box": [round(float(side), 4) for side in (box.x0, 1 - box.y1, box.x1, 1 - box.y0)]}
    return Drawing(name, figure, title, facts or {})


def cells(axes: Axes, values: np.ndarray, text: Callable[[float], str], colour: str = PALETTE[0]) -> None:
    """A heat map of numbers from 0 to 1, each written into its cell; the larger, the deeper. NaN leaves a cell out."""
    rows, columns = values.shape
    size = min(9.5, 120 / max(rows, columns))  # a number has to fit into a cell
    for (row, column), value in np.ndenumerate(values):
        if math.isnan(value):
            continue
        shade = 0.06 + 0.94 * float(np.clip(value, 0, 1))
        corner = (column - 0.48, row - 0.47)
        axes.add_patch(Rectangle(corner, 0.96, 0.94, facecolor=colour, alpha=shade, linewidth=0))
        ink = PAPER if value > 0.68 else INK  # where both read equally well on the cell, in light and in dark
        axes.text(column, row, text(value), color=ink, ha="center", va="center_baseline", fontsize=size)
    axes.set(xlim=(-0.55, columns - 0.45), ylim=(rows - 0.45, -0.55))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.grid(visible=False)


def number_tasks(*axes: Any) -> None:
    """Ticks of axes whose place 0 is task 1."""
    for axis in axes:
        axis.set_major_locator(MaxNLocator(nbins=MOST_LABELLED_TASKS, integer=True, min_n_ticks=1))
        axis.set_major_formatter(lambda position, _: f"{position + 1:.0f}")


def legend_below(axes: Axes, columns: int) -> None:
    """A legend under the label of the x-axis."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns)


def height_for(rows: int, per_row: float = 0.32, most: float = 5.5) -> float:
    """Inches for a figure with a row for each of something."""
    return min(max(HEIGHT, 0.9 + per_row * rows), most)


def numbers(values: Sequence[object]) -> "np.ndarray":
    """Numbers, NaN for None."""
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def percent(values: Sequence[object]) -> "np.ndarray":
    """Fractions in per cent, NaN for None."""
    return 100 * numbers(values)


def signed(points: float) -> str:
    """A difference in points with its sign, none if it rounds to 0."""
    text = f"{points:+.1f}".replace("-", "\N{MINUS SIGN}")
    return text if text[1:] != "0.0" else "0.0"
