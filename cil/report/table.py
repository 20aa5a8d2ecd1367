"""Runs beside each other as a Markdown table: one line a group of repeats, one table a protocol."""

from collections.abc import Sequence

from cil.report.comparison import Group, paired

_NONE = "–"


def as_table(groups: Sequence[Group], base: Group | None = None) -> str:
    """Mean and sample deviation over the finished seeds, in per cent; forgetting in points.

    Runs of another protocol (data, classes, order, task sizes, held-out images, memory rule, evaluation set) are not
    comparable. Without a base each protocol has a table of its own; with one, the lines of others are marked.

    Args:
        groups: Repeats of a run, with other seeds.
        base: What the others are compared with, seed by seed; None leaves the differences out.
    """
    if base is not None:
        known = base.protocols
        lines = [*_header(differences=True)]
        others = False
        for group in groups:
            differs = bool(known and group.protocols and group.protocols != known)
            others |= differs
            difference = None if group is base else _difference(base, group)
            lines.append(_line(group, mark="*" if differs else "", difference=difference or [_NONE]))
        if others:
            lines += [
                "",
                "\\* another protocol than the first line: what it measures differs too, not the method alone",
            ]
        return "\n".join(lines)
    protocols: dict[tuple[str, ...], list[Group]] = {}
    for group in groups:
        protocols.setdefault(group.protocols, []).append(group)
    known_protocols = [protocol for protocol in protocols if protocol]
    tables = []
    for protocol, members in protocols.items():
        lines = [*_header(differences=False), *(_line(group) for group in members)]
        if len(known_protocols) > 1:
            title = f"Protocol {', '.join(protocol)}" if protocol else "Not known yet which protocol"
            lines = [f"{title}: not comparable with the other tables", "", *lines]
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def _header(*, differences: bool) -> list[str]:
    columns = ["run", "seeds", "average incremental", "last", "forgetting"]
    columns += ["average, difference to the base (paired t-test)"] if differences else []
    columns += ["images/s"]
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def _line(group: Group, mark: str = "", difference: Sequence[str] = ()) -> str:
    unfinished = len(group.runs) - len(group.finished)
    seeds = f"{len(group.finished)}" + (f", {unfinished} unfinished" if unfinished else "")
    cells = [group.label + mark, seeds]
    cells += [_spread(group, number) for number in ("average_incremental_accuracy", "last_accuracy", "forgetting")]
    cells += difference
    speed = group.median("images_per_second")
    return f"| {' | '.join([*cells, _NONE if speed is None else f'{speed:.0f}'])} |"


def _spread(group: Group, number: str) -> str:
    mean, std = group.mean(number), group.std(number)
    if mean is None:
        return _NONE
    return f"{100 * mean:.1f}" + (f" ± {100 * std:.1f}" if std is not None else "")


def _difference(base: Group, group: Group) -> list[str]:
    found = paired(base, group, "average_incremental_accuracy")
    if found is None:
        found = paired(base, group, "last_accuracy")  # of static runs
    if found is None:
        return [_NONE]
    text = f"{100 * found.mean:+.1f}"
    if found.std is not None:
        text += f" ± {100 * found.std:.1f}"
    return [text + (f" (p = {found.p_value:.3f})" if found.p_value is not None else "")]
