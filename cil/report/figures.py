"""Figures of the report as inline SVG that follows the page: its fonts, and its colours in light and in dark.

The colours given to matplotlib are marks that are replaced by the variables of the page's style sheet. Nothing depends
on the date or on the order of drawing: the same run gives the same bytes.
"""

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from cil.metrics import AccuracyMatrix
from cil.report.comparison import Group
from cil.report.folders import RunFolder

INK, SOFT, LINE, PAPER = "#010203", "#010204", "#010205", "#010206"
PALETTE = [f"#0102f{index}" for index in range(8)]
_VARIABLES = {INK: "ink", SOFT: "soft", LINE: "line", PAPER: "paper"} | {
    colour: f"c{index}" for index, colour in enumerate(PALETTE)
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
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
_WIDTH, _HEIGHT = 5.0, 3.2  # inches of 72 units: readable at the width of a phone and of half a screen
_LOG_ABOVE_RATIO = 30.0  # losses further apart than this need a logarithmic axis
_MARK_EPOCHS_UP_TO = 60  # so few epochs are drawn as points too; a phase of one epoch is no line
_MOST_LABELLED_TASKS = 12


def draw(name: str, paint: Callable[[Axes], None], height: float = _HEIGHT, title: str = "") -> str:
    """One figure as SVG text to stand in a page.

    Args:
        name: Makes the ids of this figure differ from those of the others.
        paint: Draws on the axes.
        height: In inches, at a width of 5.
        title: Says what is to be seen, for readers who cannot see it.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        paint(figure.add_subplot())
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{title}">', svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg).replace("xlink:href", "href")
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg.strip()


def accuracy_curve(run: RunFolder) -> str | None:
    """Accuracy after each stage: all classes, before fine-tuning, old and new classes apart."""
    stages = [stage for stage in run.stages if stage.after]
    if run.matrix is None or not stages:
        return None
    lines = {
        "all classes": ([stage.after and stage.after["accuracy"] for stage in stages], PALETTE[0], "o-"),
        "before fine-tuning": ([stage.before and stage.before["accuracy"] for stage in stages], PALETTE[0], "o:"),
        "old classes": ([stage.after and stage.after["accuracy_old"] for stage in stages], PALETTE[1], "v--"),
        "new classes": ([stage.after and stage.after["accuracy_new"] for stage in stages], PALETTE[2], "^--"),
    }

    def paint(axes: Axes) -> None:
        seen = run.num_classes_seen[: len(stages)]
        for label, (values, colour, style) in lines.items():
            if any(value is not None for value in values):
                axes.plot(seen, _percent(values), style, color=colour, label=label, **_weight(label == "all classes"))
        _accuracy_axis(axes, seen)
        _legend_below(axes, columns=2)

    return draw("accuracy", paint, title="Accuracy over the classes seen so far, after each task")


def accuracy_curves(groups: Sequence[Group]) -> str | None:
    """Accuracy over all classes seen so far of each group of runs."""
    return _curves("curves", groups, AccuracyMatrix.accuracy_after, _accuracy_axis)


def forgetting_curves(groups: Sequence[Group]) -> str | None:
    """Forgetting after each task of each group of runs."""

    def scale(axes: Axes, seen: Sequence[int]) -> None:
        axes.set(xlabel="classes seen", ylabel="forgetting (points)")
        if len(seen) <= _MOST_LABELLED_TASKS:
            axes.set_xticks(list(seen))

    return _curves("forgetting_curves", groups, AccuracyMatrix.forgetting_after, scale)


def _curves(
    name: str,
    groups: Sequence[Group],
    measure: Callable[[AccuracyMatrix], np.ndarray],
    scale: Callable[[Axes, Sequence[int]], None],
) -> str | None:
    """A line a group: the mean of its runs, in a band of one standard deviation; dashed if none of them is finished."""
    shown = [(group, [run for run in group.finished or group.runs if run.matrix is not None]) for group in groups]
    if not any(runs for _, runs in shown):
        return None

    def paint(axes: Axes) -> None:
        ticks: set[int] = set()
        for number, (group, runs) in enumerate(shown):
            if not runs:
                continue
            curves = [100 * measure(run.matrix) for run in runs if run.matrix is not None]
            length = min(map(len, curves))
            values = np.array([curve[:length] for curve in curves])
            mean = values.mean(axis=0)
            seen = runs[0].num_classes_seen[:length]
            colour, style = PALETTE[number % len(PALETTE)], f"{'os^vDPX*'[number % 8]}{'-' if group.finished else '--'}"
            label = group.label if group.finished else f"{group.label} (not finished)"
            axes.plot(seen, mean, style, color=colour, label=label)
            if len(curves) > 1:
                spread = values.std(axis=0, ddof=1)
                axes.fill_between(seen, mean - spread, mean + spread, color=colour, alpha=0.18, linewidth=0)
            ticks.update(seen)
        scale(axes, sorted(ticks))
        _legend_below(axes, columns=1)

    return draw(name, paint, height=_HEIGHT + 0.2 * len(groups), title=f"{name} of all runs".replace("_", " "))


def heat_map(run: RunFolder) -> str | None:
    """The accuracy matrix with its values; the deeper the colour, the more accurate."""
    if run.matrix is None:
        return None
    values = run.matrix.values
    num_tasks = len(values)

    def paint(axes: Axes) -> None:
        size = min(9.5, 120 / num_tasks)  # a number has to fit into a cell
        for (stage, task), value in np.ndenumerate(values):
            if math.isnan(value):
                continue
            corner = (task - 0.5, stage - 0.5)
            axes.add_patch(Rectangle(corner, 0.96, 0.94, facecolor=PALETTE[0], alpha=0.06 + 0.94 * value, linewidth=0))
            text = f"{100 * value:.1f}" if num_tasks <= _MOST_LABELLED_TASKS else f"{100 * value:.0f}"
            colour = PAPER if value > 0.68 else INK  # where both read equally well on the cell, in light and in dark
            axes.text(task, stage, text, color=colour, ha="center", va="center_baseline", fontsize=size)
        axes.set(xlim=(-0.55, num_tasks - 0.45), ylim=(num_tasks - 0.45, -0.55))
        axes.set(xlabel="accuracy (%) on task", ylabel="after task")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(nbins=_MOST_LABELLED_TASKS, integer=True, min_n_ticks=1))
            axis.set_major_formatter(lambda position, _: f"{position + 1:.0f}")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.grid(visible=False)

    return draw("matrix", paint, _height_for(num_tasks), title="Accuracy matrix")


def losses(run: RunFolder) -> str | None:
    """Mean of each loss term in each epoch."""
    epochs = run.of_kind("epoch")
    names = list(dict.fromkeys(name for epoch in epochs for name in epoch["losses"]))
    if not names:
        return None
    terms = {name: _numbers([epoch["losses"].get(name) for epoch in epochs]) for name in names}
    return draw("losses", lambda axes: _over_epochs(axes, epochs, terms, "loss"), title="Losses over the epochs")


def learning_rate(run: RunFolder) -> str | None:
    """Learning rate at the end of each epoch."""
    epochs = run.of_kind("epoch")
    if not epochs:
        return None
    rates = {"learning rate": _numbers([epoch["learning_rate"] for epoch in epochs])}
    return draw("rate", lambda axes: _over_epochs(axes, epochs, rates, "learning rate"), title="Learning rate")


def forgetting(run: RunFolder) -> str | None:
    """What each old task has lost since its best, at the end of the run so far."""
    if run.matrix is None or run.num_finished < 2:
        return None
    lost = 100 * run.matrix.forgetting_per_task()
    mean = 100 * run.matrix.forgetting()

    def paint(axes: Axes) -> None:
        bars = axes.bar(np.arange(1, len(lost) + 1), lost, color=PALETTE[1], width=0.62)
        if len(lost) <= _MOST_LABELLED_TASKS:
            behind = {"facecolor": PAPER, "edgecolor": "none", "pad": 1}  # keeps the mean from crossing the numbers
            axes.bar_label(bars, fmt="%.1f", color=INK, fontsize=9, padding=3, bbox=behind)
        axes.axhline(mean, color=INK, linewidth=1.2, linestyle="--", label=f"mean {mean:.1f}", zorder=1.5)
        axes.axhline(0, color=LINE, linewidth=1)
        axes.set(xlabel="task", ylabel="forgetting (points)", xlim=(0.4, len(lost) + 0.6))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=_MOST_LABELLED_TASKS, integer=True, min_n_ticks=1))
        axes.margins(y=0.12)
        axes.legend(loc="upper right", bbox_to_anchor=(1, 1.14))

    return draw("forgetting", paint, title="Forgetting per task")


def time_per_part(run: RunFolder) -> str | None:
    """Seconds of each part, stage by stage."""
    stages = [stage for stage in run.stages if stage.seconds]
    phases = [event["phase"] for event in run.of_kind("phase_started")]
    measured = [part for stage in stages for part in stage.seconds]
    parts = list(dict.fromkeys([phase for phase in phases if phase in measured] + measured))  # training first
    if not parts:
        return None

    def paint(axes: Axes) -> None:
        left = np.zeros(len(stages))
        where = [stage.index + 1 for stage in stages]
        for number, part in enumerate(parts):
            seconds = np.array([stage.seconds.get(part, 0.0) for stage in stages])
            colour = PALETTE[number % len(PALETTE)]
            axes.barh(where, seconds, left=left, color=colour, height=0.66, label=part.replace("_", " "))
            left += seconds
        axes.set(xlabel="seconds", ylabel="task", ylim=(where[-1] + 0.5, where[0] - 0.5))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=_MOST_LABELLED_TASKS, integer=True, min_n_ticks=1))
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)

    height = _height_for(len(stages))
    return draw("time", paint, height, title="Time per part of each task")


def _over_epochs(axes: Axes, epochs: Sequence[dict[str, object]], lines: dict[str, "np.ndarray"], ylabel: str) -> None:
    """Lines over all epochs of a run, broken and marked where a phase (dotted) or a stage (with its task) begins."""
    places = [(epoch["stage"], epoch["phase_index"]) for epoch in epochs]
    starts = [0, *[index for index in range(1, len(places)) if places[index] != places[index - 1]]]
    labelled = len({stage for stage, _ in places}) <= _MOST_LABELLED_TASKS
    marker = "." if len(epochs) <= _MARK_EPOCHS_UP_TO else ""
    number = np.arange(1, len(epochs) + 1, dtype=float)
    for line, (label, values) in enumerate(lines.items()):
        # A NaN before each start breaks the line there: what comes next is another optimiser on other data.
        x, y = np.insert(number, starts[1:], np.nan), np.insert(values, starts[1:], np.nan)
        style = ("-", "--", "-.", ":")[line % 4]
        axes.plot(x, y, linestyle=style, marker=marker, color=PALETTE[line % len(PALETTE)], label=label)
    for start in starts:
        new_stage = start == 0 or places[start][0] != places[start - 1][0]
        if start:
            axes.axvline(start + 0.5, color=SOFT, linewidth=0.8, linestyle="-" if new_stage else ":", alpha=0.7)
        if new_stage and labelled:
            axes.text(
                start + 0.5,
                1.01,
                f" {int(str(places[start][0])) + 1}",
                transform=axes.get_xaxis_transform(),
                color=SOFT,
                fontsize=9,
            )
    finite = np.concatenate([values[np.isfinite(values)] for values in lines.values()])
    if finite.size and finite.min() > 0 and finite.max() / finite.min() > _LOG_ABOVE_RATIO:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set(
        xlabel="epoch of the run (top: task)" if labelled else "epoch of the run",
        ylabel=ylabel,
        xlim=(0.5, len(epochs) + 0.5),
    )
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    if list(lines) != [ylabel]:
        _legend_below(axes, columns=min(3, len(lines)))


def _accuracy_axis(axes: Axes, seen: Sequence[int]) -> None:
    step = 10
    lowest = step * math.floor(axes.dataLim.y0 / step) if math.isfinite(axes.dataLim.y0) else 0
    axes.set(xlabel="classes seen", ylabel="accuracy (%)", ylim=(max(0, lowest), 102))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=[1, 2, 5, 10]))
    if len(seen) <= _MOST_LABELLED_TASKS:
        axes.set_xticks(list(seen))


def _legend_below(axes: Axes, columns: int) -> None:
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=columns)


def _height_for(rows: int) -> float:
    """Inches for a figure with a row for each stage."""
    per_row, most = 0.32, 5.5
    return min(max(_HEIGHT, 0.9 + per_row * rows), most)


def _weight(main: bool) -> dict[str, Any]:
    return {"linewidth": 2.4, "zorder": 3} if main else {"linewidth": 1.4}


def _numbers(values: Sequence[object]) -> "np.ndarray":
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def _percent(values: Sequence[object]) -> "np.ndarray":
    return 100 * _numbers(values)
