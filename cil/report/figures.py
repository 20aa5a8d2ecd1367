"""The figures of a run that its events and results give, and those of several runs."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from cil.metrics import AccuracyMatrix
from cil.report.comparison import Group
from cil.report.drawing import (
    HEIGHT,
    INK,
    LINE,
    MOST_LABELLED_TASKS,
    PALETTE,
    PAPER,
    SOFT,
    Drawing,
    cells,
    draw,
    height_for,
    legend_below,
    number_tasks,
    numbers,
    percent,
    signed,
)
from cil.report.folders import RunFolder

MOST_LINES = 8  # curves in a figure, one for each colour
_LOG_ABOVE_RATIO = 30.0  # losses further apart than this need a logarithmic axis
_MARK_EPOCHS_UP_TO = 60  # so few epochs are drawn as points too; a phase of one epoch is no line
_MEGABYTE = 1e6
_BYTES_PER_PARAMETER = 4  # float32, as checkpoints keep them


def accuracy_curve(run: RunFolder) -> Drawing | None:
    """Accuracy after each stage: all classes, and old and new classes apart."""
    stages = [stage for stage in run.stages if stage.after]
    if run.matrix is None or not stages:
        return None
    lines = {
        "all classes": ([stage.after and stage.after["accuracy"] for stage in stages], PALETTE[0], "o-"),
        "old classes": ([stage.after and stage.after["accuracy_old"] for stage in stages], PALETTE[1], "v--"),
        "new classes": ([stage.after and stage.after["accuracy_new"] for stage in stages], PALETTE[2], "^--"),
    }

    def paint(axes: Axes) -> None:
        seen = run.num_classes_seen[: len(stages)]
        for label, (values, colour, style) in lines.items():
            if any(value is not None for value in values):
                axes.plot(seen, percent(values), style, color=colour, label=label, **_weight(label == "all classes"))
        _accuracy_axis(axes, seen)
        legend_below(axes, columns=3)

    return draw("accuracy", paint, title="Accuracy over the classes seen so far, after each task")


def finetuning(run: RunFolder) -> Drawing | None:
    """Accuracy over all classes before and after the fine-tuning of each task that has one."""
    stages = [stage for stage in run.stages if stage.before and stage.after]
    if not stages or run.is_static:
        return None
    where = [stage.index + 1 for stage in stages]
    before = percent([stage.before and stage.before["accuracy"] for stage in stages])
    after = percent([stage.after and stage.after["accuracy"] for stage in stages])

    def paint(axes: Axes) -> None:
        axes.vlines(where, before, after, color=SOFT, linewidth=1.4)
        axes.plot(where, before, "o", color=PALETTE[0], markerfacecolor=PAPER, markersize=6.5, label="before")
        axes.plot(where, after, "o", color=PALETTE[0], markersize=6.5, label="after")
        if len(where) <= MOST_LABELLED_TASKS:
            for x, low, high in zip(where, before, after, strict=True):
                text = signed(high - low)
                axes.annotate(
                    text, (x, (low + high) / 2), (8, 0), textcoords="offset points", va="center", fontsize=9, color=SOFT
                )
        axes.set(xlabel="task", ylabel="accuracy (%)", xlim=(where[0] - 0.5, where[-1] + 0.7))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=MOST_LABELLED_TASKS, integer=True, min_n_ticks=1))
        axes.margins(y=0.12)
        legend_below(axes, columns=2)

    return draw("finetuning", paint, title="Accuracy before and after fine-tuning")


def accuracy_curves(groups: Sequence[Group]) -> Drawing | None:
    """Accuracy over all classes seen so far of each group of runs."""
    return _curves("curves", groups, AccuracyMatrix.accuracy_after, _accuracy_axis)


def forgetting_curves(groups: Sequence[Group]) -> Drawing | None:
    """Forgetting after each task of each group of runs."""

    def scale(axes: Axes, seen: Sequence[int]) -> None:
        axes.set(xlabel="classes seen", ylabel="forgetting (points)")
        if len(seen) <= MOST_LABELLED_TASKS:
            axes.set_xticks(list(seen))

    return _curves("forgetting_curves", groups, AccuracyMatrix.forgetting_after, scale)


def _curves(
    name: str,
    groups: Sequence[Group],
    measure: Callable[[AccuracyMatrix], np.ndarray],
    scale: Callable[[Axes, Sequence[int]], None],
) -> Drawing | None:
    """A line a group: the mean of its runs, in a band of one standard deviation; dashed if none of them is finished.

    No more lines than can be told apart: those of the best groups.
    """
    lines = [(group, [run for run in group.finished or group.runs if run.matrix is not None]) for group in groups]
    drawable = [(group, runs) for group, runs in lines if runs]
    if not drawable:
        return None
    best = sorted(drawable, key=lambda line: -(line[0].mean("average_incremental_accuracy") or -1))[:MOST_LINES]
    shown = [line for line in drawable if any(line is one for one in best)]

    def paint(axes: Axes) -> None:
        ticks: set[int] = set()
        for number, (group, runs) in enumerate(shown):
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
        legend_below(axes, columns=1)

    return draw(name, paint, height=HEIGHT + 0.2 * len(shown), title=f"{name} of all runs".replace("_", " "))


def heat_map(run: RunFolder) -> Drawing | None:
    """The accuracy matrix with its values; the deeper the colour, the more accurate."""
    if run.matrix is None:
        return None
    values = run.matrix.values
    digits = 1 if len(values) <= MOST_LABELLED_TASKS else 0

    def paint(axes: Axes) -> None:
        cells(axes, values, lambda value: f"{100 * value:.{digits}f}")
        axes.set(xlabel="accuracy (%) on task", ylabel="after task")
        number_tasks(axes.xaxis, axes.yaxis)

    return draw("matrix", paint, height_for(len(values)), title="Accuracy matrix")


def losses(run: RunFolder) -> Drawing | None:
    """Mean of each loss term in each epoch."""
    epochs = run.of_kind("epoch")
    names = list(dict.fromkeys(name for epoch in epochs for name in epoch["losses"]))
    if not names:
        return None
    terms = {name: numbers([epoch["losses"].get(name) for epoch in epochs]) for name in names}
    return draw("losses", lambda axes: _over_epochs(axes, epochs, terms, "loss"), title="Losses over the epochs")


def learning_rate(run: RunFolder) -> Drawing | None:
    """Learning rate at the end of each epoch."""
    epochs = run.of_kind("epoch")
    if not epochs:
        return None
    rates = {"learning rate": numbers([epoch["learning_rate"] for epoch in epochs])}
    return draw("rate", lambda axes: _over_epochs(axes, epochs, rates, "learning rate"), title="Learning rate")


def forgetting(run: RunFolder) -> Drawing | None:
    """What each old task has lost since its best, at the end of the run so far."""
    if run.matrix is None or run.num_finished < 2:
        return None
    lost = 100 * run.matrix.forgetting_per_task()
    mean = 100 * run.matrix.forgetting()

    def paint(axes: Axes) -> None:
        bars = axes.bar(np.arange(1, len(lost) + 1), lost, color=PALETTE[1], width=0.62)
        if len(lost) <= MOST_LABELLED_TASKS:
            behind = {"facecolor": PAPER, "edgecolor": "none", "pad": 1}  # keeps the mean from crossing the numbers
            axes.bar_label(bars, fmt="%.1f", color=INK, fontsize=9, padding=3, bbox=behind)
        axes.axhline(mean, color=INK, linewidth=1.2, linestyle="--", label=f"mean {mean:.1f}", zorder=1.5)
        axes.axhline(0, color=LINE, linewidth=1)
        axes.set(xlabel="task", ylabel="forgetting (points)", xlim=(0.4, len(lost) + 0.6))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=MOST_LABELLED_TASKS, integer=True, min_n_ticks=1))
        axes.margins(y=0.12)
        axes.legend(loc="upper right", bbox_to_anchor=(1, 1.14))

    return draw("forgetting", paint, title="Forgetting per task")


def time_per_part(run: RunFolder) -> Drawing | None:
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
        axes.yaxis.set_major_locator(MaxNLocator(nbins=MOST_LABELLED_TASKS, integer=True, min_n_ticks=1))
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)

    height = height_for(len(stages))
    return draw("time", paint, height, title="Time per part of each task")


def growth(run: RunFolder) -> Drawing | None:
    """What is kept after each task: the network's parameters as float32, and the exemplars' pixels as bytes."""
    stages = [stage for stage in run.stages if stage.started.get("num_parameters")]
    if not stages:
        return None
    parameters = numbers([stage.started["num_parameters"] for stage in stages])
    weights = parameters * _BYTES_PER_PARAMETER / _MEGABYTE
    per_image = run.bytes_per_image or 0
    pixels = numbers([(stage.exemplars or 0) * per_image for stage in stages]) / _MEGABYTE
    where = np.array([stage.index + 1 for stage in stages])

    def paint(axes: Axes) -> None:
        axes.bar(where, weights, width=0.62, color=PALETTE[0], label="network")
        if pixels.any():
            axes.bar(where, pixels, bottom=weights, width=0.62, color=PALETTE[1], label="exemplars")
        if len(where) <= MOST_LABELLED_TASKS:
            for x, top, count in zip(where, weights + pixels, parameters, strict=True):
                axes.text(x, top, f"{_short_count(count)}\n", ha="center", va="center", fontsize=9, linespacing=1.6)
        axes.set(xlabel="task (above: parameters)" if len(where) <= MOST_LABELLED_TASKS else "task", ylabel="MB")
        axes.set_xlim(where[0] - 0.6, where[-1] + 0.6)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=MOST_LABELLED_TASKS, integer=True, min_n_ticks=1))
        axes.margins(y=0.14)
        legend_below(axes, columns=2)

    return draw("growth", paint, title="Parameters and memory after each task")


def _short_count(count: float) -> str:
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


def _over_epochs(axes: Axes, epochs: Sequence[dict[str, object]], lines: dict[str, "np.ndarray"], ylabel: str) -> None:
    """Lines over all epochs of a run, broken and marked where a phase (dotted) or a stage (with its task) begins."""
    places = [(epoch["stage"], epoch["phase_index"]) for epoch in epochs]
    starts = [0, *[index for index in range(1, len(places)) if places[index] != places[index - 1]]]
    labelled = len({stage for stage, _ in places}) <= MOST_LABELLED_TASKS
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
        axes.yaxis.set_major_formatter(lambda value, _: np.format_float_positional(value, precision=10, trim="-"))
    axes.set(
        xlabel="epoch of the run (top: task)" if labelled else "epoch of the run",
        ylabel=ylabel,
        xlim=(0.5, len(epochs) + 0.5),
    )
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    if list(lines) != [ylabel]:
        legend_below(axes, columns=min(3, len(lines)))


def _accuracy_axis(axes: Axes, seen: Sequence[int]) -> None:
    step = 10
    lowest = step * math.floor(axes.dataLim.y0 / step) if math.isfinite(axes.dataLim.y0) else 0
    lowest = min(max(0, lowest), 100 - step)  # all at 100 % is a curve too
    ticks = MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]).tick_values(lowest, 100)
    axes.set_yticks([tick for tick in ticks if lowest <= tick <= 100])  # room above them, where a line runs along 100
    axes.set(xlabel="classes seen", ylabel="accuracy (%)", ylim=(lowest, 100 + (100 - lowest) / 40))
    if len(seen) <= MOST_LABELLED_TASKS:
        axes.set_xticks(list(seen))


def _weight(main: bool) -> dict[str, Any]:
    return {"linewidth": 2.4, "zorder": 3} if main else {"linewidth": 1.4}
