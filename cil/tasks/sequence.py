"""Task sequences: in which order the classes are learned, and how many at a time.

The k-th class of the class order is learned as label k, so every task is a contiguous range of labels and the labels
seen so far are always 0 .. seen-1. The map back to the data set's own labels is kept.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from kd.registry import unknown

Remainder = Literal["last_small", "error", "merge_last"]

_FOLDER = Path(__file__).parent
_SHORT_NAMES = {f"order{i}": f"cifar100_dytox_order{i}" for i in (1, 2, 3)}
_ICARL_SEED = 1993  # Rebuffi et al., CVPR 2017 (arXiv:1611.07725): the seed of the class order, kept by its successors


@dataclass(frozen=True)
class TaskSequence:
    """Which classes are learned in which task.

    Attributes:
        class_order: The data set's own labels in the order in which they are learned, only those that are used.
        task_sizes: Number of classes of each task; they sum to the length of `class_order`.
        notes: What was decided on the way (origin of the order, unused classes, the remainder), for people.
    """

    class_order: tuple[int, ...]
    task_sizes: tuple[int, ...]
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        assert sum(self.task_sizes) == len(self.class_order), (self.task_sizes, len(self.class_order))
        assert len(set(self.class_order)) == len(self.class_order), "a class is learned twice"

    @property
    def num_tasks(self) -> int:
        """Number of tasks."""
        return len(self.task_sizes)

    @property
    def num_classes(self) -> int:
        """Number of classes learned in the end."""
        return len(self.class_order)

    def seen(self, task: int) -> int:
        """Number of classes seen once `task` is learned (tasks count from 0); `seen(-1)` is 0."""
        assert -1 <= task < self.num_tasks, f"there is no task {task} of {self.num_tasks}"
        return sum(self.task_sizes[: task + 1])

    def labels(self, task: int) -> range:
        """The learned labels of `task`."""
        return range(self.seen(task - 1), self.seen(task))

    def learned(self, original: Int[Tensor, " samples"]) -> Int[Tensor, " samples"]:
        """Learned labels of the data set's own labels; -1 where a class is not used."""
        table = torch.full((max([*self.class_order, int(original.max()) if len(original) else 0]) + 1,), -1)
        table[torch.tensor(self.class_order)] = torch.arange(self.num_classes)
        return table.to(original.device)[original.long()]

    def original(self, label: int) -> int:
        """The data set's own label of a learned label."""
        assert 0 <= label < self.num_classes, f"there is no label {label} of {self.num_classes}"
        return self.class_order[label]

    def describe(self) -> str:
        """One sentence for the log: tasks, order, and what became of the remainder."""
        runs: list[list[int]] = []
        for size in self.task_sizes:
            if runs and runs[-1][1] == size:
                runs[-1][0] += 1
            else:
                runs.append([1, size])
        sizes = " + ".join(str(size) if count == 1 else f"{count} x {size}" for count, size in runs)
        tasks = "1 task" if self.num_tasks == 1 else f"{self.num_tasks} tasks"
        return "; ".join([f"{tasks}, {sizes} = {self.num_classes} classes", *self.notes])


def task_sequence(
    num_classes: int,
    *,
    task_sizes: Sequence[int] | None = None,
    initial_increment: int | None = None,
    increment: int | None = None,
    classes: int | None = None,
    class_order: str | int | Sequence[int] = "natural",
    remainder: Remainder = "last_small",
    seed: int = _ICARL_SEED,
) -> TaskSequence:
    """The task sequence of a scenario over a data set with `num_classes` classes.

    Task sizes are given in one of two ways: `task_sizes=[50, 10, 7]`, or `increment` with or without
    `initial_increment`. "B0-inc10" is `increment=10`; "B50-inc10" is `initial_increment=50, increment=10` (the base
    task is a task: CIFAR-100 makes 6).

    Args:
        num_classes: Classes of the data set.
        task_sizes: Sizes one by one. Fewer classes than there are means that only those are used.
        initial_increment: Classes of the first task; as `increment` when not given.
        increment: Classes of every further task.
        classes: Use only the first so many classes of the order; all when not given.
        class_order: "natural"; "seeded", the iCaRL convention `numpy.random.seed(seed); permutation(num_classes)` over
            the data set's classes; a whole number, "seeded" with that seed; a name of `named_orders()`; the labels one
            by one; or the path of a file with the labels (a JSON list, or numbers parted by white space or commas).
        remainder: What becomes of classes that do not fill a last task: "last_small" makes them a smaller last task,
            "merge_last" adds them to the last full task, "error" refuses.
        seed: The seed of `class_order="seeded"`.

    Raises:
        ValueError: If a number is out of range, settings contradict each other, or the order is no permutation.
    """
    order, origin = _class_order(class_order, num_classes, seed)
    if classes is not None and not 1 <= classes <= num_classes:
        raise ValueError(f"classes must be between 1 and the {num_classes} classes of the data set, found {classes}")
    available = num_classes if classes is None else classes
    if task_sizes is not None:
        if increment is not None or initial_increment is not None or remainder != "last_small":
            raise ValueError(
                f"task_sizes={list(task_sizes)} fixes every task: leave out increment, initial_increment and remainder "
                f"(found {increment}, {initial_increment}, {remainder!r}), or leave out task_sizes"
            )
        sizes = _explicit(task_sizes, available, exact=classes is not None)
        notes = [] if sum(sizes) == available else [f"{available - sum(sizes)} classes are not used"]
    else:
        sizes, note = _stepped(available, initial_increment, increment, remainder)
        notes = [note]
    used = sum(sizes)
    if used < num_classes:
        origin += f", the first {used} of {num_classes}"
    return TaskSequence(tuple(order[:used]), tuple(sizes), (origin, *notes))


def _explicit(task_sizes: Sequence[int], available: int, *, exact: bool) -> list[int]:
    sizes = [int(size) for size in task_sizes]
    if not sizes or min(sizes) < 1:
        raise ValueError(f"task_sizes must be one or more numbers of at least 1, found {sizes}")
    if sum(sizes) > available or (exact and sum(sizes) < available):
        raise ValueError(
            f"task_sizes={sizes} sum to {sum(sizes)}; they must sum to "
            f"{'' if exact else 'at most '}{available}, the number of classes"
        )
    return sizes


def _stepped(available: int, initial: int | None, increment: int | None, remainder: Remainder) -> tuple[list[int], str]:
    """Task sizes of B0-inc and B50-inc forms, and a note on the remainder."""
    if increment is None:
        raise ValueError(
            "the scenario has no task sizes: give increment (with or without initial_increment) or task_sizes"
        )
    first = increment if initial is None else initial
    if increment < 1 or first < 1:
        raise ValueError(f"increment and initial_increment must be at least 1, found {increment} and {initial}")
    if initial is not None and initial > available:
        raise ValueError(f"initial_increment must be at most {available}, the number of classes, found {initial}")
    if initial == available:
        return [available], f"one task holds every class, so increment={increment} has no effect"
    full = [first] if first <= available else []
    full += [increment] * ((available - sum(full)) // increment)
    rest = available - sum(full)
    if rest == 0:
        return full, "no remainder"
    if remainder == "error":
        raise ValueError(
            f"{available} classes do not divide into tasks of increment={increment}"
            f"{'' if initial is None else f' after initial_increment={initial}'}: {rest} remain. "
            "Choose other numbers, or remainder=last_small or remainder=merge_last"
        )
    if not full:
        return [rest], f"one task of {rest} classes, fewer than increment={increment}"
    if remainder == "last_small":
        return [*full, rest], f"the remainder of {rest} classes is a smaller last task (remainder=last_small)"
    return [*full[:-1], full[-1] + rest], f"the remainder of {rest} classes joins the last task (remainder=merge_last)"


@cache
def named_orders() -> dict[str, tuple[int, ...]]:
    """Published class orders by name, with the short names order1, order2, order3.

    The three CIFAR-100 orders are those of DyTox, taken from DER; order 1 is the one of the DKT release.
    """
    orders = {k: tuple(v) for k, v in json.loads((_FOLDER / "class_orders.json").read_text()).items()}
    return orders | {short: orders[name] for short, name in _SHORT_NAMES.items()}


def imagenet100_classes(which: Literal["first100", "seed1993"]) -> tuple[str, ...]:
    """The wnids of one of the two ImageNet-100 data sets; position = label.

    They share 9 of their 100 classes, so results on one say nothing about the other and there is no default:
    "first100" (DyTox, PODNet, DER) or "seed1993" (the DKT release, FOSTER, PyCIL).
    """
    return tuple((_FOLDER / f"imagenet100_{which}.txt").read_text().split())


def _class_order(given: str | int | Sequence[int], num_classes: int, seed: int) -> tuple[list[int], str]:
    """All classes of the data set in the order asked for, and where it comes from."""
    if isinstance(given, int):
        if seed not in (_ICARL_SEED, given):
            raise ValueError(f"class_order={given} is a seed and contradicts seed={seed}: give one of them")
        return _class_order("seeded", num_classes, given)
    if not isinstance(given, str):
        return _permutation([int(label) for label in given], num_classes, "class_order"), "class order as listed"
    if given == "natural":
        return list(range(num_classes)), "natural class order"
    if given == "seeded":
        if not 0 <= seed < 2**32:
            raise ValueError(f"the seed of a class order must be between 0 and 2^32 - 1, found {seed}")
        legacy = np.random.RandomState(seed)  # what numpy.random.seed(seed) seeds; the newer Generator draws others
        return legacy.permutation(num_classes).tolist(), f"class order of seed {seed}"
    if given in named_orders():
        return _permutation(list(named_orders()[given]), num_classes, f"class_order={given}"), f"class order {given!r}"
    path = Path(given)
    if path.is_file():
        return _permutation(_read_labels(path), num_classes, str(path)), f"class order of {path.name}"
    known = ["natural", "seeded", *named_orders()]
    raise ValueError(f"class_order={given}: there is no such file, and it is an {unknown('class order', given, known)}")


def _read_labels(path: Path) -> list[int]:
    try:
        text = path.read_text()
        labels = json.loads(text) if text.lstrip().startswith("[") else text.replace(",", " ").split()
        if not all(isinstance(label, int | str) for label in labels):
            raise TypeError("something else than whole numbers")
        return [int(label) for label in labels]
    except (UnicodeDecodeError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is no class order ({error}): it must hold whole numbers parted by white space or commas, "
            "or one JSON list of them"
        ) from error


def _permutation(order: list[int], num_classes: int, source: str) -> list[int]:
    if sorted(order) == list(range(num_classes)):
        return order
    problems = []
    if len(order) != num_classes:
        problems.append(f"it has {len(order)} entries")
    counts = Counter(order)
    twice = sorted(label for label, count in counts.items() if count > 1)
    if twice:
        problems.append(f"{_few(twice)} more than once")
    outside = sorted(set(counts) - set(range(num_classes)))
    if outside:
        problems.append(f"{_few(outside)} is no label of the data set")
    missing = sorted(set(range(num_classes)) - set(counts))
    if missing and len(order) >= num_classes:
        problems.append(f"{_few(missing)} is missing")
    raise ValueError(
        f"{source} must name each of the {num_classes} classes 0 to {num_classes - 1} once; found: "
        + ", ".join(problems)
    )


def _few(labels: list[int]) -> str:
    return ", ".join(map(str, labels[:5])) + (f" and {len(labels) - 5} others" if len(labels) > 5 else "")
