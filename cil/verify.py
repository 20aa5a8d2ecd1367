"""`python -m cil.verify RUN...`: what a run was expected to reach, what it reached, and whether the two agree.

A published figure belongs to a command (`cil/published.yaml`). A run is compared with it if its whole config is the one
of that command, but for where and on what it runs and how it is read: classes and their order, epochs, memory, network,
learner, augmentation. Runs that differ in their seed alone are averaged. Exit code 0 if everything agrees, 1 if not, 2
if a run cannot be read.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cil.checking import check
from cil.cli import compose
from cil.config import Config
from cil.folder import read_metrics, read_yaml
from cil.place import PLACE
from cil.report.folders import flattened
from cil.tasks import task_sequence

PUBLISHED = Path(__file__).with_name("published.yaml")
SHOWN = 5  # differences of a run and a figure

#: Keys that say where, on what and from which seed a run is done, and how it is read and saved.
_CIRCUMSTANCES = PLACE | {"seed", "data_seed", "device", "num_threads", "precision", "data.path"}
_READING = (
    "checkpoint.",
    "evaluation.",
    "fast.",
    "scenario.",
)  # of the scenario the tasks are compared, not how they are written

Verdict = Literal["agrees", "below", "above", "not comparable"]


class Section(BaseModel):
    """A part of `published.yaml`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Accuracies(Section):
    """Numbers in per cent, or in points; None where there is none.

    Attributes:
        average: Average incremental accuracy.
        last: Accuracy after the last task.
    """

    average: float | None = None
    last: float | None = None


class Figure(Section):
    """A figure and the command that it belongs to; what the keys mean is said in `published.yaml`."""

    experiment: str
    words: list[str] = []
    classes: Annotated[int, Field(gt=0)]
    orders: Annotated[list[str], Field(min_length=1)]
    average: float
    last: float | None = None
    after: list[float] = []
    before_finetuning: Accuracies = Accuracies()
    tolerance: Accuracies
    source: str
    run: bool
    unstated: str | None = None
    unknown: str | None = None

    @property
    def command(self) -> str:
        """What asks for such a run."""
        return " ".join([f"experiment={self.experiment}", *self.words])

    def expected(self) -> dict[str, tuple[float, float]]:
        """Name of a number to what is expected and the tolerance."""
        found = {}
        for prefix, numbers in (("", self), ("before fine-tuning, ", self.before_finetuning)):
            for name in ("average", "last"):
                number, tolerance = getattr(numbers, name), getattr(self.tolerance, name)
                if number is not None and tolerance is not None:
                    found[prefix + name] = (float(number), float(tolerance))
        return found


@dataclass(frozen=True)
class Measured:
    """A run to be compared.

    Attributes:
        folder: Its folder.
        config: Its config.
        metrics: Content of `metrics.json`; empty if there is none yet.
    """

    folder: Path
    config: Config
    metrics: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of the run."""
        return self.config.name

    @property
    def order(self) -> tuple[int, ...]:
        """Its class order; empty before the first stage has ended."""
        return tuple(self.metrics.get("class_order", ()))

    def numbers(self) -> dict[str, float]:
        """In per cent, under the names of `Figure.expected`."""
        after = 100 * np.array(self.metrics["accuracy_after"], dtype=float)
        earlier = [before if before is None else 100 * before for before in self.metrics["accuracy_before_finetuning"]]
        before = np.array([now if then is None else then for now, then in zip(after, earlier, strict=True)])
        found = {"average": after.mean(), "last": after[-1]}
        if any(then is not None for then in earlier):
            found |= {"before fine-tuning, average": before.mean(), "before fine-tuning, last": before[-1]}
        return {name: float(value) for name, value in found.items()}


@dataclass(frozen=True)
class Line:
    """One number of a comparison: in per cent, points and words; None where there is nothing to compare."""

    name: str
    expected: float
    measured: float | None
    difference: float | None
    tolerance: float
    verdict: Verdict


@dataclass(frozen=True)
class Comparison:
    """Runs that are repeats of each other, and their figure.

    Attributes:
        runs: Their folders.
        figure: The figure of their experiment that is nearest to them; None if there is none.
        reasons: Why they are not comparable with it; empty if they are.
        lines: Every number of the figure.
    """

    runs: list[str]
    figure: Figure | None
    reasons: list[str]
    lines: list[Line]

    @property
    def verdict(self) -> Verdict:
        """Of all numbers together; below counts before above."""
        if self.reasons:
            return "not comparable"
        verdicts = {line.verdict for line in self.lines}
        return next((verdict for verdict in ("below", "above") if verdict in verdicts), "agrees")

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        figure = self.figure
        return {
            "runs": self.runs,
            "verdict": self.verdict,
            "reasons": self.reasons,
            "command": figure and figure.command,
            "source": figure and figure.source,
            "run_with_this_project": figure and figure.run,
            "unstated": figure and figure.unstated,
            "numbers": [vars(line) for line in self.lines],
        }


@cache
def figures() -> tuple[Figure, ...]:
    """All of `published.yaml`."""
    listed = yaml.safe_load(PUBLISHED.read_text())["figures"]
    return tuple(Figure.model_validate(figure) for figure in listed)


def read(folder: Path) -> Measured:
    """A run folder.

    Raises:
        ValueError: If there is no run, it cannot be read, or it is one of static distillation.
    """
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} is not a run folder: it has no config.yaml")
    config = check(read_yaml(folder / "config.yaml").get("config", {}))
    if not isinstance(config, Config):
        raise ValueError(f"{folder}: figures are kept for class-incremental runs; this is one of static distillation")
    return Measured(folder, config, read_metrics(folder) if (folder / "metrics.json").is_file() else {})


def verify(runs: Iterable[Measured]) -> list[Comparison]:
    """Compare runs with the figures of their experiments, repeats of the same together."""
    groups: dict[tuple[Any, ...], list[Measured]] = {}
    for run in runs:
        figure = _nearest(run)
        order = run.order if figure is None or len(figure.orders) == 1 else ()
        key = (figure and figures().index(figure), json.dumps(_settings(run.config), sort_keys=True), order)
        groups.setdefault((*key, *(run.metrics.get("task_sizes", ()))), []).append(run)
    return [_compare(group, _nearest(group[0])) for group in groups.values()]


def _nearest(run: Measured) -> Figure | None:
    """The figure of the run's experiment and learner from which it differs least; None if there is none."""
    candidates = [figure for figure in figures() if figure.experiment == run.config.experiment]
    same = [figure for figure in candidates if _config(figure).learner.name == run.config.learner.name]
    return min(same or candidates, key=lambda figure: len(_differences(run, figure)), default=None)


def _compare(runs: Sequence[Measured], figure: Figure | None) -> Comparison:
    folders = [str(run.folder) for run in runs]
    if figure is None:
        known = ", ".join(sorted({figure.experiment for figure in figures()}))
        experiment = runs[0].config.experiment
        what = "a run without experiment=" if experiment is None else f"experiment={experiment}"
        return Comparison(folders, None, [f"no figure is known for {what}; there are some for {known}"], [])
    reasons = [f"{run.name} is not finished: {_progress(run)}" for run in runs if not run.metrics.get("finished")]
    reasons += [] if figure.unknown is None else [figure.unknown]
    reasons += _differences(runs[0], figure)
    if not reasons:
        reasons += _other_tasks(runs, figure)
    numbers = [run.numbers() for run in runs if run.metrics.get("finished")]
    lines = []
    for name, (expected, tolerance) in figure.expected().items():
        measured = (
            float(np.mean([found[name] for found in numbers])) if all(name in n for n in numbers) and numbers else None
        )
        difference = None if measured is None else measured - expected
        verdict: Verdict = "not comparable"
        if not reasons and difference is not None:
            verdict = "agrees" if abs(difference) <= tolerance else "above" if difference > 0 else "below"
        lines.append(Line(name, expected, measured, difference, tolerance, verdict))
    return Comparison(folders, figure, reasons, lines)


@cache
def _composed(command: tuple[str, ...]) -> Config:
    config = check(compose(list(command)))
    assert isinstance(config, Config)
    return config


def _config(figure: Figure) -> Config:
    """The config of the figure's command."""
    return _composed((f"experiment={figure.experiment}", *figure.words))


def _settings(config: Config) -> dict[str, Any]:
    """What makes a run the run it is, but for its tasks, in dotted keys."""
    flat = flattened(config.model_dump(mode="json"))
    return {key: value for key, value in flat.items() if key not in _CIRCUMSTANCES and not key.startswith(_READING)}


def _differences(run: Measured, figure: Figure) -> list[str]:
    """The settings in which a run is not the one of the figure, one sentence each."""
    here, there = _settings(run.config), _settings(_config(figure))
    keys = [key for key in here.keys() | there.keys() if here.get(key) != there.get(key)]
    keys.sort(key=lambda key: (key != "learner.name", key))  # what explains most of the others first
    return [f"{key} is {here.get(key)!r}, and {there.get(key)!r} for the figure" for key in keys]


def _other_tasks(runs: Sequence[Measured], figure: Figure) -> list[str]:
    """In which tasks or class orders the runs are not those of the figure."""
    scenario = _config(figure).scenario.model_dump(exclude={"order_seed", "class_order"})
    seed = _config(figure).scenario.order_seed
    wanted = {name: task_sequence(figure.classes, **scenario, class_order=name, seed=seed) for name in figure.orders}
    sizes = list(next(iter(wanted.values())).task_sizes)
    if (found := list(runs[0].metrics["task_sizes"])) != sizes:
        return [f"the tasks have {_short(found)} classes, and {_short(sizes)} for the figure"]
    names = {tasks.class_order: name for name, tasks in wanted.items()}
    if others := [run.name for run in runs if run.order not in names]:
        return [f"{others[0]} learns the classes in another order than {' or '.join(names.values())}"]
    if lacking := [name for order, name in names.items() if order not in {run.order for run in runs}]:
        all_of = ", ".join(names.values())
        return [f"the figure is a mean over the orders {all_of}: give runs in {' and '.join(lacking)} too"]
    return []


def _progress(run: Measured) -> str:
    done, tasks = len(run.metrics.get("accuracy_after", ())), len(run.metrics.get("task_sizes", ()))
    return f"{done} of {tasks} tasks" if tasks else "its first task goes on"


def _short(sizes: Sequence[int]) -> str:
    return f"{len(sizes)} x {sizes[0]}" if len(set(sizes)) == 1 else ", ".join(map(str, sizes))


def show(comparison: Comparison, console: Console) -> None:
    """Print a comparison for a person."""
    figure = comparison.figure
    mean = f" (mean of {len(comparison.runs)} runs)" if len(comparison.runs) > 1 else ""
    console.print(Text(f"{', '.join(comparison.runs)}{mean}: {comparison.verdict}", style="bold"), soft_wrap=True)
    if figure is not None:
        console.print(Text(f"  python train_incremental.py {figure.command}"), soft_wrap=True)
        console.print(
            Text(f"  {figure.source}{'' if figure.run else '; no one has run it with this project'}"), soft_wrap=True
        )
        if figure.unstated:
            console.print(Text(f"  the source does not state {figure.unstated}"), soft_wrap=True)
    for reason in comparison.reasons[:SHOWN]:
        console.print(Text(f"  not comparable: {reason}"), soft_wrap=True)
    if len(comparison.reasons) > SHOWN:
        console.print(f"  and {len(comparison.reasons) - SHOWN} more differences")
    if not comparison.lines:
        return
    table = Table(box=None, padding=(0, 2))
    for name in ("", "expected", "measured", "difference", "tolerance", "verdict"):
        table.add_column(name, justify="left" if name in ("", "verdict") else "right")
    for line in comparison.lines:
        measured = "-" if line.measured is None else f"{line.measured:.2f}"
        difference = "-" if line.difference is None else f"{line.difference:+.2f}"
        table.add_row(line.name, f"{line.expected:.2f}", measured, difference, f"{line.tolerance:.2f}", line.verdict)
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare runs; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m cil.verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--json", action="store_true", help="print JSON")
    chosen = parser.parse_args(arguments)
    try:
        comparisons = verify([read(folder) for folder in chosen.runs])
    except (ValueError, OSError) as error:
        print(f"cil.verify: {error}", file=sys.stderr)
        return 2
    if chosen.json:
        print(json.dumps([comparison.to_json() for comparison in comparisons], indent=1))
    else:
        console = Console()
        for comparison in comparisons:
            show(comparison, console)
    return int(any(comparison.verdict != "agrees" for comparison in comparisons))


if __name__ == "__main__":
    sys.exit(main())
