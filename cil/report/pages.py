"""From run folders to pages: what is told, in which order; how it looks is in the templates beside this file."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import yaml
from markupsafe import Markup

from cil.progress import duration
from cil.report import figures
from cil.report.comparison import differences, grouped
from cil.report.folders import RunFolder, is_run, read_run

NOTHING = "–"
_MOVED_ASIDE = re.compile(r"\.old-\d+$")  # what overwrite=true leaves behind


class Shown(NamedTuple):
    """A figure with its words."""

    title: str
    explanation: str
    svg: Markup


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """The run folders among `paths` and directly below them, each once; runs that were moved aside are passed over.

    Raises:
        ValueError: If a path neither is a run folder nor has one below it.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.is_dir():
            raise ValueError(f"{path} is not a folder: give run folders, or folders of run folders")
        below = [] if is_run(path) else [child for child in sorted(path.iterdir()) if child.is_dir() and is_run(child)]
        runs = [path] if is_run(path) else [child for child in below if not _MOVED_ASIDE.search(child.name)]
        if not runs:
            raise ValueError(f"{path} is no run folder and has none below it (one has events.jsonl and metrics.json)")
        found |= {run.resolve(): run for run in runs}
    return list(found.values())


def write_report(run_folder: Path, output: Path | None = None) -> Path:
    """Write the page about one run, finished or not.

    Args:
        run_folder: The run folder.
        output: The page; `report.html` in the run folder if None.

    Returns:
        The page.

    Raises:
        ValueError: If this is no run folder, or its files are damaged.
    """
    run = read_run(run_folder)
    drawn = [
        (
            "Accuracy after each task",
            "Over the test images of all classes seen so far, and of the old and the new ones among them.",
            figures.accuracy_curve(run),
        ),
        (
            "Forgetting per task",
            "Best accuracy before the last task minus accuracy after it; negative where a task has gained.",
            figures.forgetting(run),
        ),
        ("Accuracy matrix", "Row: after a task. Column: on the test images of a task.", figures.heat_map(run)),
        ("Time per part", "Training by phase, and everything around it.", figures.time_per_part(run)),
        (
            "Losses",
            "Mean of each term, as weighted, in each epoch. A full line begins a task, a dotted line a phase.",
            figures.losses(run),
        ),
        ("Learning rate", "At the end of each epoch.", figures.learning_rate(run)),
    ]
    return _write(
        "run.html",
        output or run_folder / "report.html",
        run=run,
        unit="network" if run.is_static else "task",
        headline=_headline(run),
        figures=_shown(drawn),
        circumstances=_circumstances(run),
        config=yaml.safe_dump(run.record, sort_keys=False, allow_unicode=True) if run.record else None,
    )


def write_comparison(run_folders: Sequence[Path], output: Path) -> Path:
    """Write the page that compares several runs: groups over seeds, curves, differing settings.

    Returns:
        The page.

    Raises:
        ValueError: If there is no run, one is no run folder, or its files are damaged.
    """
    if not run_folders:
        raise ValueError("there is nothing to compare: give at least one run folder")
    runs = [read_run(folder) for folder in run_folders]
    groups = grouped(runs)
    band = "Mean over the seeds of a group; the band is one standard deviation to each side."
    drawn = [
        ("Accuracy over the classes seen so far", band, figures.accuracy_curves(groups)),
        ("Forgetting", band, figures.forgetting_curves(groups)),
    ]
    protocols: dict[str, list[str]] = {}
    for run in runs:
        if protocol := run.metrics.get("protocol"):  # not known before the first task has been evaluated
            protocols.setdefault(protocol, []).append(run.name)
    return _write(
        "comparison.html",
        output,
        runs=runs,
        groups=groups,
        figures=_shown(drawn),
        protocols=protocols,
        differences=differences(groups),
    )


def _shown(drawn: Iterable[tuple[str, str, str | None]]) -> list[Shown]:
    """The figures that there are; their SVG was made here, all text in it escaped by matplotlib."""
    return [Shown(title, explanation, Markup(svg)) for title, explanation, svg in drawn if svg]


def _headline(run: RunFolder) -> list[tuple[str, str]]:
    """The numbers that stand at the top."""
    summary = run.summary
    exemplars = next((stage.exemplars for stage in reversed(run.stages) if stage.exemplars is not None), None)
    parameters = next((p for stage in reversed(run.stages) if (p := stage.started.get("num_parameters"))), None)
    peak = max((stage.peak_bytes for stage in run.stages if stage.peak_bytes), default=None)
    costs = [
        ("training images per second", _count(run.images_per_second)),
        ("wall time", _time(run.wall_seconds)),
        ("peak memory", NOTHING if peak is None else f"{peak / 1e9:.2f} GB"),
        ("training images shown", _count(run.metrics.get("views_trained"))),
    ]
    if run.is_static:
        ensembles = run.metrics.get("ensemble_accuracy") or {}
        return [
            ("accuracy", _percent(summary.get("last_accuracy"))),
            ("accuracy of the teacher", _percent((run.metrics.get("teacher") or {}).get("accuracy"))),
            *((f"ensemble of {count}", _percent(accuracy)) for count, accuracy in ensembles.items()),
            ("parameters", _count(run.metrics.get("num_parameters", parameters))),
            *costs,
        ]
    return [
        ("average incremental accuracy", _percent(summary.get("average_incremental_accuracy"))),
        ("last accuracy", _percent(summary.get("last_accuracy"))),
        ("forgetting", _points(summary.get("forgetting"))),
        ("backward transfer", _points(summary.get("backward_transfer"))),
        ("parameters", _count(run.metrics.get("num_parameters", parameters))),
        ("exemplars", _count(exemplars)),
        *costs,
    ]


def _circumstances(run: RunFolder) -> list[tuple[str, str]]:
    """What has to be known to repeat the run or to compare it."""
    starts = run.of_kind("run_started")
    facts: list[tuple[str, Any]] = [
        ("learner", None if run.is_static else run.part_name("learner")),
        ("student", run.fact("student")),
        ("teacher", (run.metrics.get("teacher") or {}).get("name", run.config.get("teacher"))),
        ("distillation", ", ".join(run.config.get("kd") or {}) or None if run.is_static else None),
        ("data set", run.part_name("data_set")),
        ("evaluated on", run.fact("evaluate_on")),
        ("seed", run.fact("seed")),
        ("protocol", run.metrics.get("protocol")),
    ]
    if starts:
        last = starts[-1]
        versions = ", ".join(f"{package} {version}" for package, version in last.get("versions", {}).items())
        facts += [
            ("started", starts[0]["time"]),
            ("resumed", sum(start.get("resumed_at") is not None for start in starts) or None),
            ("machine", ", ".join(str(last[key]) for key in ("host", "device", "precision") if last.get(key))),
            ("processor cores", last.get("num_cores")),
            ("versions", versions),
        ]
    return [(name, str(value)) for name, value in facts if value not in (None, "")]


def _write(template: str, output: Path, **facts: Any) -> Path:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "points": _points, "count": _count, "time": _time}
    page = environment.get_template(template).render(facts)
    output.write_text(page, encoding="utf-8")
    return output


def _percent(fraction: int | float | None) -> str:
    return NOTHING if fraction is None else f"{100 * fraction:.1f} %"


def _points(fraction: int | float | None) -> str:
    """A difference of accuracies."""
    return NOTHING if fraction is None else f"{100 * fraction:.1f}".replace("-", "\N{MINUS SIGN}")


def _count(number: int | float | None) -> str:
    """A whole number with thin spaces between thousands."""
    return NOTHING if number is None else f"{number:,.0f}".replace(",", "\u202f")


def _time(seconds: int | float | None) -> str:
    return NOTHING if seconds is None else duration(seconds)
