"""The figures that need a snapshot: who is taken for whom, class by class, embeddings, task tokens."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from cil.report.drawing import (
    HEIGHT,
    INK,
    LINE,
    MOST_LABELLED_TASKS,
    PALETTE,
    PAPER,
    RIGHT_RGB,
    SOFT,
    WRONG_RGB,
    Drawing,
    cells,
    draw,
    legend_below,
    number_tasks,
)
from cil.report.snapshots import Snapshot

MOST_NAMED_CLASSES = 20  # with their names at the axes
MOST_TOLD_CELLS = 20_000  # of a confusion matrix, which the page says in words
_LONGEST_NAME = 14
_SQUARE = 4.4  # inches: room for a square beside its labels
_SHARPEST_PIXELS = 480  # along a matrix of pixels, which papers must not blur
_FEWEST_FOR_TSNE, _PERPLEXITY = 30, 30.0


def task_confusion(snapshot: Snapshot) -> Drawing | None:
    """Of the images of each task, the share that is answered with a class of each task."""
    tasks = snapshot.task_of_class
    num_tasks = int(tasks[-1]) + 1
    if num_tasks < 2:
        return None
    member = np.eye(num_tasks)[tasks]
    counts = member.T @ snapshot.confusion @ member
    with np.errstate(invalid="ignore"):
        shares = counts / counts.sum(axis=1, keepdims=True)
    digits = 1 if num_tasks <= MOST_LABELLED_TASKS else 0

    def paint(axes: Axes) -> None:
        cells(axes, shares, lambda value: f"{100 * value:.{digits}f}")
        axes.set(xlabel="answer is a class of task (%)", ylabel="image of task")
        number_tasks(axes.xaxis, axes.yaxis)

        axes.set_aspect("equal")

    return draw("task_confusion", paint, _SQUARE, title="Confusion between tasks")


def class_confusion(snapshot: Snapshot) -> Drawing:
    """Of the images of each class, the share that is answered with each class: numbers, or pixels if there are many."""
    confusion, names = snapshot.confusion, snapshot.class_names
    with np.errstate(invalid="ignore"):
        shares = confusion / confusion.sum(axis=1, keepdims=True)
    is_small = len(names) <= MOST_NAMED_CLASSES
    borders = np.flatnonzero(np.diff(snapshot.task_of_class)) + 0.5

    def paint(axes: Axes) -> None:
        if is_small:
            cells(axes, shares, lambda value: f"{100 * value:.0f}" if value >= 0.005 else "")
            short = [shortened(name) for name in names]
            turned = 60 if max(map(len, short)) > 3 else 0
            axes.set_xticks(range(len(names)), short, rotation=turned, ha="right" if turned else "center")
            axes.set_yticks(range(len(names)), short)
            if turned:
                for label in axes.get_xticklabels():
                    label.set_rotation_mode("anchor")
        else:
            axes.imshow(_pixels(shares), extent=(-0.5, len(names) - 0.5, len(names) - 0.5, -0.5), interpolation="none")
            axes.grid(visible=False)
        for border in borders if len(borders) <= MOST_NAMED_CLASSES else ():
            axes.axvline(border, color=SOFT, linewidth=0.5)
            axes.axhline(border, color=SOFT, linewidth=0.5)
        axes.set(xlabel="answer (%)" if is_small else "answer (class, in learned order)", ylabel="class of the image")
        axes.set_aspect("equal")

    rows, columns = np.nonzero(confusion)
    told = np.argsort(-confusion[rows, columns], kind="stable")[:MOST_TOLD_CELLS]
    entries = [[int(rows[i]), int(columns[i]), int(confusion[rows[i], columns[i]])] for i in told]
    facts = {"names": names, "entries": entries, "totals": confusion.sum(axis=1).tolist()}
    return draw("class_confusion", paint, _SQUARE, "Confusion between classes", facts)


def _pixels(shares: np.ndarray) -> np.ndarray:
    """A matrix as pixels: the opacity is the square root of the share, so that rare confusions are seen too."""
    opacity = 255 * np.sqrt(np.nan_to_num(shares))
    colours = np.empty((*shares.shape, 4), dtype=np.uint8)
    colours[..., :3] = np.where(np.eye(len(shares), dtype=bool)[..., None], RIGHT_RGB, WRONG_RGB)
    colours[..., 3] = np.rint(opacity)
    factor = math.ceil(_SHARPEST_PIXELS / len(shares))
    return colours.repeat(factor, axis=0).repeat(factor, axis=1)


def class_accuracies(snapshots: Sequence[Snapshot]) -> Drawing:
    """Accuracy on each class now, and when its task had just been learned."""
    last = snapshots[-1]
    now, then, names, tasks = last.class_accuracy, when_new(snapshots), last.class_names, last.task_of_class
    place = np.arange(len(names))
    is_small = len(names) <= MOST_NAMED_CLASSES
    side = "x" if is_small else "y"

    def paint(axes: Axes) -> None:
        size = {True: 6.5, False: 4.0}[is_small] if len(names) <= 120 else 2.2
        lines = axes.hlines if is_small else axes.vlines
        lines(place, 100 * then, 100 * now, color=SOFT, linewidth=1.4 if is_small else 0.8)
        series = [(then, PAPER, "when its task was new")] if np.isfinite(then).any() else []
        for values, face, label in [*series, (now, PALETTE[0], "now")]:
            across = (100 * values, place) if is_small else (place, 100 * values)
            axes.plot(*across, "o", color=PALETTE[0], markerfacecolor=face, markersize=size, label=label, linestyle="")
        for border in np.flatnonzero(np.diff(tasks)) + 0.5:
            (axes.axhline if is_small else axes.axvline)(border, color=LINE, linewidth=0.8, zorder=0.5)
        axes.set(**{f"{side}label": "accuracy (%)", f"{side}lim": (-3, 103)})
        if is_small:
            axes.set_yticks(place, [shortened(name) for name in names])
            axes.set_ylim(len(names) - 0.4, -0.6)
            axes.grid(visible=False, axis="y")
            axes.grid(visible=True, axis="x")
        else:
            axes.set(xlabel="class, in learned order", xlim=(-1, len(names)))
        if series:
            legend_below(axes, columns=2)

    return draw("class_accuracy", paint, _SQUARE if is_small else HEIGHT + 0.6, title="Accuracy of each class")


def when_new(snapshots: Sequence[Snapshot]) -> np.ndarray:
    """Accuracy on each class after its own task; NaN where that stage has no snapshot, or all classes are one task."""
    tasks = snapshots[-1].task_of_class
    then = np.full(len(tasks), np.nan)
    for snapshot in snapshots if tasks[-1] else ():
        own = np.flatnonzero(tasks == snapshot.stage)
        then[own] = snapshot.class_accuracy[own]
    return then


def embedding_map(snapshot: Snapshot) -> Drawing | None:
    """Evaluation images by their features in two dimensions: t-SNE, always the same for the same features."""
    points, labels = snapshot.array("embedding"), snapshot.array("embedding_labels")
    answers = snapshot.array("embedding_answers")
    if points is None or labels is None or answers is None or len(points) < 3 or points.shape[1] < 2:
        return None
    flat = _flattened(points.astype(np.float64))
    tasks = snapshot.task_of_class[labels]
    newest, right = tasks == tasks.max(), answers == labels
    kinds: list[tuple[str, np.ndarray, dict[str, Any]]] = [
        ("old classes", ~newest & right, {"color": PALETTE[0], "marker": "o"}),
        ("new classes", newest & right, {"color": PALETTE[1], "marker": "^"}),
        ("old, wrong", ~newest & ~right, {"color": PALETTE[0], "marker": "x"}),
        ("new, wrong", newest & ~right, {"color": PALETTE[1], "marker": "x"}),
    ]
    if newest.all():
        kinds = [
            ("right", right, {"color": PALETTE[0], "marker": "o"}),
            ("wrong", ~right, {"color": PALETTE[1], "marker": "x"}),
        ]

    def paint(axes: Axes) -> None:
        for label, chosen, look in kinds:
            if chosen.any():
                axes.plot(*flat[chosen].T, linestyle="", markersize=4.2, alpha=0.75, label=label, **look)
        if len(snapshot.class_names) <= MOST_NAMED_CLASSES:
            look = {"ha": "center", "va": "bottom", "fontsize": 9, "weight": "bold", "color": INK}
            look["bbox"] = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.6, "pad": 0.8}
            for label in np.unique(labels):
                own = flat[labels == label]
                middle = np.median(own, axis=0)
                near = own[np.abs(own - middle).max(axis=1) <= 3 * np.median(np.abs(own - middle))]
                top = near[:, 1].max() if len(near) else middle[1]
                name = shortened(snapshot.class_names[label])
                axes.annotate(name, (middle[0], top), (0, 4), textcoords="offset points", **look)
        axes.set(xticks=[], yticks=[])
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.margins(0.04)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.01), ncols=4, handletextpad=0.1, columnspacing=1)

    return draw("embedding", paint, _SQUARE, title="Map of the embeddings of evaluation images")


def _flattened(points: np.ndarray) -> np.ndarray:
    """Two dimensions: t-SNE (van der Maaten and Hinton, JMLR 2008) from the principal axes, or those if it is too few.

    One thread, so that sums have one order.
    """
    if len(points) < _FEWEST_FOR_TSNE or not points.std():
        return points[:, :2]
    from sklearn.manifold import TSNE  # takes a second to import
    from threadpoolctl import threadpool_limits  # scikit-learn's own

    start = points[:, :2] / points[:, 0].std() * 1e-4  # as scikit-learn scales its own start
    perplexity = min(_PERPLEXITY, (len(points) - 1) / 3)
    with threadpool_limits(1):
        placed: np.ndarray = TSNE(init=start.astype(np.float32), perplexity=perplexity, random_state=0).fit_transform(
            points.astype(np.float32)
        )
    return placed


def token_distances(snapshot: Snapshot) -> Drawing | None:
    """Cosine distance of each task token to each."""
    distances = snapshot.array("token_distances")
    if distances is None:
        return None
    largest = max(1.0, float(distances.max()))
    digits = 2 if len(distances) <= MOST_LABELLED_TASKS else 1

    def paint(axes: Axes) -> None:
        own = np.eye(len(distances), dtype=bool)
        shown = np.where(own, np.nan, distances) / largest
        cells(axes, shown, lambda value: f"{value * largest:.{digits}f}", colour=PALETTE[2])
        axes.set(xlabel="token of task", ylabel="token of task")
        number_tasks(axes.xaxis, axes.yaxis)

        axes.set_aspect("equal")

    return draw("tokens", paint, _SQUARE, title="Cosine distances between task tokens")


def shortened(name: str) -> str:
    """A name that fits beside an axis."""
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
