"""Runs beside each other as a table, one line a group of repeats: Markdown (one table a protocol), CSV, LaTeX."""

import csv
import io
import re
from collections.abc import Sequence

from cil.report.comparison import Group, paired

_NONE = "–"
_NUMBERS = ("average_incremental_accuracy", "last_accuracy", "forgetting", "backward_transfer")
_COSTS = ("images_per_second", "wall_seconds")
_LATEX = {
    **{mark: f"\\{mark}" for mark in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "…": r"\dots{}",
    "–": "--",
}


def as_table(groups: Sequence[Group]) -> str:
    """Mean and sample deviation over the finished seeds, in per cent; forgetting in points.

    Runs of another protocol (data, classes, order, task sizes, held-out images, memory rule, evaluation set) are not
    comparable: each has a table of its own.
    """
    protocols: dict[tuple[str, ...], list[Group]] = {}
    for group in groups:
        protocols.setdefault(group.protocols, []).append(group)
    are_several = sum(bool(protocol) for protocol in protocols) > 1
    tables = []
    for protocol, members in protocols.items():
        lines = [*_header(), *(_line(group) for group in members)]
        if are_several:
            title = f"Protocol {', '.join(protocol)}" if protocol else "Not known yet which protocol"
            lines = [f"{title}: not comparable with the other tables", "", *lines]
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def against_base(base: Group, others: Sequence[Group]) -> str:
    """As `as_table`, with the difference to the base, seed by seed; lines of another protocol are marked.

    Args:
        base: What the others are compared with; the first line.
        others: One line each.
    """
    lines = [*_header("average, difference to the base (paired t-test)"), _line(base, "", _NONE)]
    marked = False
    for group in others:
        differs = bool(base.protocols and group.protocols and group.protocols != base.protocols)
        marked |= differs
        lines.append(_line(group, "*" if differs else "", _difference(base, group)))
    if marked:
        lines += ["", "\\* another protocol than the first line: what it measures differs too, not the method alone"]
    return "\n".join(lines)


def as_csv(groups: Sequence[Group]) -> str:
    """One line a group, under the names of `metrics.json`: mean and sample deviation over the finished seeds.

    Accuracies, forgetting and transfer are fractions; what is not known is empty.
    """
    out = io.StringIO()
    spreads = [f"{number}_{kind}" for number in _NUMBERS for kind in ("mean", "std")]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["runs", "protocol", "num_finished", "num_unfinished", *spreads, *(f"{cost}_mean" for cost in _COSTS)]
    )
    for group in groups:
        numbers = [value for number in _NUMBERS for value in (group.mean(number), group.std(number))]
        numbers += [group.mean(cost) for cost in _COSTS]
        finished = len(group.finished)
        facts = [group.label, " ".join(group.protocols), finished, len(group.runs) - finished]
        writer.writerow([*facts, *("" if number is None else f"{number:.6g}" for number in numbers)])
    return out.getvalue()


def as_latex(groups: Sequence[Group]) -> str:
    """A `tabular` for the package booktabs: per cent, forgetting and transfer in points; a rule between protocols."""
    lines = [
        r"\begin{tabular}{lrrrrr}",
        r"\toprule",
        r"Runs & Seeds & Average incremental & Last & Forgetting & Backward transfer \\",
    ]
    protocol: tuple[str, ...] | None = None
    for group in sorted(groups, key=lambda group: group.protocols):
        if group.protocols != protocol:
            lines.append(r"\midrule")
            protocol = group.protocols
        cells = [_in_latex(group.label), str(len(group.finished)), *(_latex_spread(group, name) for name in _NUMBERS)]
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _latex_spread(group: Group, number: str) -> str:
    mean, std = group.mean(number), group.std(number)
    if mean is None:
        return "--"
    return f"${100 * mean:.1f}" + (rf" \pm {100 * std:.1f}$" if std is not None else "$")


def _in_latex(text: str) -> str:
    return re.sub("|".join(map(re.escape, _LATEX)), lambda mark: _LATEX[mark[0]], text)


def _header(*more: str) -> list[str]:
    columns = ["run", "seeds", "average incremental", "last", "forgetting", *more, "images/s"]
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def _line(group: Group, mark: str = "", *more: str) -> str:
    unfinished = len(group.runs) - len(group.finished)
    seeds = f"{len(group.finished)}" + (f", {unfinished} unfinished" if unfinished else "")
    numbers = (_spread(group, name) for name in ("average_incremental_accuracy", "last_accuracy", "forgetting"))
    speed = group.median("images_per_second")
    cells = [group.label + mark, seeds, *numbers, *more, _NONE if speed is None else f"{speed:.0f}"]
    return f"| {' | '.join(cells)} |"


def _spread(group: Group, number: str) -> str:
    mean, std = group.mean(number), group.std(number)
    if mean is None:
        return _NONE
    return f"{100 * mean:.1f}" + (f" ± {100 * std:.1f}" if std is not None else "")


def _difference(base: Group, group: Group) -> str:
    found = paired(base, group, "average_incremental_accuracy")
    if found is None:
        found = paired(base, group, "last_accuracy")  # of static runs
    if found is None:
        return _NONE
    spread = f" ± {100 * found.std:.1f}" if found.std is not None else ""
    p_value = f" (p = {found.p_value:.3f})" if found.p_value is not None else ""
    return f"{100 * found.mean:+.1f}{spread}{p_value}"
