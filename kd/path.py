"""From a large teacher to a small student over assistants (TAKD: Mirzadeh et al., AAAI 2020, arXiv:1902.03393).

A path is the networks in the order in which they are trained: each but the first is the student of the one before, by
the task loss with weight $1 - \\lambda$ and `kd` with weight $\\lambda$. The released code divides the KL divergence
by the number of classes too, which is `kd` with `reduction=mean`. Both $\\lambda$ and temperature are tuned per hop.

Networks are named by anything that can be a key (a depth, a name), and given from the teacher down to the student.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

Size = TypeVar("Size", bound=Hashable)

Path = tuple[Size, ...]


def direct(sizes: Sequence[Size]) -> Path[Size]:
    """The student learns from the teacher.

    Raises:
        ValueError: If there are not two sizes, or one stands twice.
    """
    _check(sizes)
    return sizes[0], sizes[-1]


def full_chain(sizes: Sequence[Size]) -> Path[Size]:
    """Every size is an assistant.

    Raises:
        ValueError: As for `direct`.
    """
    _check(sizes)
    return tuple(sizes)


def one_assistant(sizes: Sequence[Size], accuracies: Mapping[Size, float]) -> Path[Size]:
    """One assistant: the size whose accuracy is nearest the mean of the teacher's and the student's.

    Args:
        sizes: From the teacher down to the student.
        accuracies: Of every size, trained without a teacher.

    Raises:
        ValueError: If there is no size between the two, or an accuracy is missing.
    """
    _check(sizes)
    if len(sizes) == 2:
        raise ValueError(f"there is no assistant between {sizes[0]!r} and {sizes[1]!r}: give a size between them")
    if missing := [size for size in sizes if size not in accuracies]:
        raise ValueError(f"accuracies must name every size, found none of {', '.join(map(repr, missing))}")
    middle = (accuracies[sizes[0]] + accuracies[sizes[-1]]) / 2
    assistant = min(sizes[1:-1], key=lambda size: abs(accuracies[size] - middle))  # the larger one of two as near
    return sizes[0], assistant, sizes[-1]


def best_path(
    sizes: Sequence[Size], measured: Mapping[tuple[Size, Size], float] | Callable[[Path[Size]], float]
) -> tuple[Path[Size], float]:
    """The path on which the student does best, by dynamic programming from the teacher down.

    The best path to a size is the best path to one of the larger sizes and a hop from there: a hop is taken to be the
    better the better its teacher. So $n(n-1)/2$ hops are measured for n sizes, and not $2^{n-2}$ whole paths. Of paths
    that are as good the one with the fewest networks is taken.

    Args:
        sizes: From the teacher down to the student.
        measured: What every hop brings: (from, to) to the accuracy of `to`, or its gain over training without a
            teacher; hops that are left out cannot be taken. Or a function that trains and measures the last network of
            a path, all before which are trained already; it is called once for every hop.

    Returns:
        The path, and what `measured` says of its last hop.

    Raises:
        ValueError: If a hop is between unknown sizes or goes up, or no path reaches the student.
    """
    _check(sizes)
    if isinstance(measured, Mapping):
        _check_hops(sizes, measured)
    best: dict[Size, tuple[Path[Size], float]] = {sizes[0]: ((sizes[0],), 0.0)}
    for number, size in enumerate(sizes[1:], start=1):
        found: list[tuple[Path[Size], float]] = []
        for larger in sizes[:number]:
            if larger not in best or (isinstance(measured, Mapping) and (larger, size) not in measured):
                continue
            path = (*best[larger][0], size)
            found.append((path, measured[larger, size] if isinstance(measured, Mapping) else measured(path)))
        if found:
            best[size] = max(found, key=lambda entry: (entry[1], -len(entry[0])))
    if sizes[-1] not in best:
        raise ValueError(
            f"no path of measured hops leads from {sizes[0]!r} to {sizes[-1]!r}: measure ({sizes[0]!r}, {sizes[-1]!r})"
        )
    return best[sizes[-1]]


def _check(sizes: Sequence[Size]) -> None:
    if len(sizes) < 2 or len(set(sizes)) != len(sizes):
        raise ValueError(f"a path needs a teacher and a student, and every size once, found {list(sizes)}")


def _check_hops(sizes: Sequence[Size], measured: Mapping[tuple[Size, Size], float]) -> None:
    place = {size: number for number, size in enumerate(sizes)}
    for hop in measured:
        for size in hop:
            if size not in place:
                raise ValueError(f"measured hop {hop} has {size!r}, which is none of the sizes {list(sizes)}")
        if place[hop[0]] >= place[hop[1]]:
            raise ValueError(f"measured hop {hop} does not go down the sizes {list(sizes)}: teacher first")
