"""From run folders to pages: what is told, in which order; how it looks is in the templates beside this file."""

import json
import re
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import yaml
from markupsafe import Markup

from cil.progress import duration
from cil.report import figures, inside, pictures
from cil.report.comparison import Difference, Group, differences, grouped, paired
from cil.report.drawing import THEME, Drawing, signed
from cil.report.folders import RunFolder, fitting, is_run, read_run
from cil.report.snapshots import Snapshot
from cil.report.table import as_csv, as_latex

NOTHING = "–"
_MOST_BASES = 12  # groups that differences can be taken to; the page grows with the square of them
_MOST_SETTINGS = 4000  # cells of the table of settings that differ
Words = tuple[str, str, Drawing | None]  # title, explanation, figure
Section = tuple[str, list[Words]]
_MOVED_ASIDE = re.compile(r"\.old-\d+$")  # what overwrite=true leaves behind


class Shown(NamedTuple):
    """A figure with its words."""

    title: str
    explanation: str
    svg: Markup
    facts: Mapping[str, Any]


class ClassRow(NamedTuple):
    """A class in the table of them; `taken` is what it is most often taken for, and how often."""

    name: str
    task: int
    when_new: float | None
    now: float | None
    taken: tuple[str, float] | None

    @property
    def change(self) -> float | None:
        """What it has gained since."""
        return None if self.now is None or self.when_new is None else self.now - self.when_new


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


def write_report(run_folder: Path, output: Path | None = None, figures_folder: Path | None = None) -> Path:
    """Write the page about one run, finished or not.

    Args:
        run_folder: The run folder.
        output: The page; `report.html` in the run folder if None.
        figures_folder: Where every figure is also written as SVG and PDF; None for nowhere.

    Returns:
        The page.

    Raises:
        ValueError: If this is no run folder, or its files are damaged.
    """
    run = read_run(run_folder)
    with fitting(run_folder):
        snapshot = run.snapshots[-1] if run.snapshots else None
        sections = _sections(run, snapshot)
        _save(sections, figures_folder)
        groups = grouped([run])
        return _write(
            "run.html",
            output or run_folder / "report.html",
            run=run,
            snapshot=snapshot,
            unit="network" if run.is_static else "task",
            headline=_headline(run),
            sections=[(section, _shown(figures)) for section, figures in sections],
            classes=_classes(run.snapshots),
            examples=pictures.examples(snapshot) if snapshot else [],
            exemplars=pictures.exemplars(snapshot) if snapshot else [],
            circumstances=_circumstances(run),
            config=yaml.safe_dump(run.record, sort_keys=False, allow_unicode=True) if run.record else None,
            downloads=_downloads(groups),
        )


def _sections(run: RunFolder, snapshot: Snapshot | None) -> list[Section]:
    """The figures of one run under their headings; None where there is nothing to draw."""
    learning: list[Words] = [
        (
            "Accuracy after each task",
            "Over the test images of all classes seen so far, and of the old and the new ones among them.",
            figures.accuracy_curve(run),
        ),
        ("Accuracy matrix", "Row: after a task. Column: on the test images of a task.", figures.heat_map(run)),
        (
            "Forgetting per task",
            "Best accuracy before the last task minus accuracy after it; negative where a task has gained.",
            figures.forgetting(run),
        ),
        (
            "Before and after fine-tuning",
            "Over all classes seen so far; beside each task what fine-tuning adds, in points.",
            figures.finetuning(run),
        ),
    ]
    training: list[Words] = [
        (
            "Losses",
            "Mean of each term, as weighted, in each epoch. A full line begins a task, a dotted line a phase.",
            figures.losses(run),
        ),
        ("Learning rate", "At the end of each epoch.", figures.learning_rate(run)),
        ("Time per part", "Training by phase, and everything around it.", figures.time_per_part(run)),
        (
            "Parameters and memory",
            "What is kept after each task: parameters at 4 bytes, exemplars at a byte for each value of a pixel.",
            figures.growth(run),
        ),
    ]
    found: list[Section] = [("Learning", learning)]
    if snapshot is not None:
        confusion = "Row: images of a class. " + (
            "Column: the share that is answered with a class, rounded."
            if len(snapshot.class_names) <= inside.MOST_NAMED_CLASSES
            else "Column: answers. Blue is right, orange wrong; opacity is the square root of the share."
        )
        answers: list[Words] = [
            (
                "Confusion between tasks",
                "Of the images of a task, the share that is answered with a class of each task.",
                inside.task_confusion(snapshot),
            ),
            ("Confusion between classes", confusion, inside.class_confusion(snapshot)),
            (
                "Accuracy of each class",
                "Now, and when its task had just been learned. Lines part the tasks."
                if snapshot.task_of_class[-1]
                else "In the order of learning.",
                inside.class_accuracies(run.snapshots),
            ),
        ]
        features: list[Words] = [
            (
                "Map of the embeddings",
                "Some evaluation images by what the head reads of them (t-SNE): near is alike, axes mean nothing.",
                inside.embedding_map(snapshot),
            ),
            (
                "Distances between task tokens",
                "Cosine distance: 0 is the same direction, 1 a right angle.",
                inside.token_distances(snapshot),
            ),
        ]
        found += [("Answers", answers), ("Features", features)]
    return [*found, ("Training and cost", training)]


def write_comparison(run_folders: Sequence[Path], output: Path, figures_folder: Path | None = None) -> Path:
    """Write the page that compares several runs: groups over seeds, curves, differing settings.

    Args:
        run_folders: The runs.
        output: The page.
        figures_folder: Where the curves are also written as SVG and PDF; None for nowhere.

    Returns:
        The page.

    Raises:
        ValueError: If there is no run, one is no run folder, or its files are damaged.
    """
    if not run_folders:
        raise ValueError("there is nothing to compare: give at least one run folder")
    runs = [read_run(folder, diary=False) for folder in run_folders]
    with fitting(*run_folders):
        groups = grouped(runs)
        band = "Mean over the seeds of a group; the band is one standard deviation to each side."
        if len(groups) > figures.MOST_LINES:
            band += f" The {figures.MOST_LINES} groups with the best average incremental accuracy."
        drawn: list[Words] = [
            ("Accuracy over the classes seen so far", band, figures.accuracy_curves(groups)),
            ("Forgetting", band, figures.forgetting_curves(groups)),
        ]
        _save([("", drawn)], figures_folder)
        protocols: dict[str, list[str]] = {}
        for run in runs:
            if protocol := run.metrics.get("protocol"):  # not known before the first task has been evaluated
                protocols.setdefault(protocol, []).append(run.name)
        differing = differences(groups)
        most_keys = max(1, _MOST_SETTINGS // len(groups))
        return _write(
            "comparison.html",
            output,
            runs=runs,
            groups=groups,
            figures=_shown(drawn),
            protocols=protocols,
            pairs=_pairs(groups),
            differences=dict(list(differing.items())[:most_keys]),
            num_left_out=max(0, len(differing) - most_keys),
            downloads=_downloads(groups),
        )


def write_tables(run_folders: Sequence[Path], csv: Path | None, latex: Path | None) -> None:
    """Write the table of the groups of runs as CSV and as LaTeX, where a place is given.

    Raises:
        ValueError: If one is no run folder, or its files are damaged.
    """
    groups = grouped([read_run(folder, diary=False) for folder in run_folders])
    for path, form in ((csv, as_csv), (latex, as_latex)):
        if path is not None:
            path.write_text(form(groups), encoding="utf-8")


def _pairs(groups: Sequence[Group]) -> list[tuple[int, list[tuple[Group, Difference | None, bool]]]]:
    """For each base, every other group with its difference and whether it follows the same protocol.

    All groups are bases while there are few of them, otherwise the first alone.
    """
    bases = range(len(groups) if len(groups) <= _MOST_BASES else 1)
    return [
        (
            index,
            [
                (group, _difference(groups[index], group), _same_protocol(groups[index], group))
                for group in groups
                if group is not groups[index]
            ],
        )
        for index in bases
    ]


def _same_protocol(base: Group, group: Group) -> bool:
    return len({*base.protocols, *group.protocols}) <= 1


def _difference(base: Group, group: Group) -> Difference | None:
    if not _same_protocol(base, group):
        return None
    found = paired(base, group, "average_incremental_accuracy")
    return found or paired(base, group, "last_accuracy")  # of static runs


def _downloads(groups: Sequence[Group]) -> list[tuple[str, str, Markup]]:
    """Files that the page holds itself: label, name, address."""
    files = [("CSV", "table.csv", "text/csv", as_csv), ("LaTeX", "table.tex", "application/x-tex", as_latex)]
    return [
        (label, name, Markup(f"data:{kind};base64,{b64encode(form(groups).encode()).decode()}"))
        for label, name, kind, form in files
    ]


def _save(sections: Sequence[Section], folder: Path | None) -> None:
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for _, drawn in sections:
        for _, _, drawing in drawn:
            if drawing is not None:
                drawing.save(folder)


def _shown(drawn: Iterable[Words]) -> list[Shown]:
    """The figures that there are; their SVG was made here, all text in it escaped by matplotlib."""
    return [
        Shown(title, explanation, Markup(drawing.inline()), drawing.facts)
        for title, explanation, drawing in drawn
        if drawing
    ]


def _classes(snapshots: Sequence[Snapshot]) -> list[ClassRow]:
    """Class by class: how it is doing, and what it is most often taken for."""
    if not snapshots:
        return []
    last = snapshots[-1]
    confusion, names, then = last.confusion, last.class_names, inside.when_new(snapshots)
    rows = []
    for label, (name, task, now) in enumerate(zip(names, last.task_of_class, last.class_accuracy, strict=True)):
        total, wrong = int(confusion[label].sum()), confusion[label].copy()
        wrong[label] = 0
        other = int(wrong.argmax())
        taken = (names[other], wrong[other] / total) if wrong[other] else None
        was = None if np.isnan(then[label]) else float(then[label])
        rows.append(ClassRow(name, int(task) + 1, was, float(now) if total else None, taken))
    return rows


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
    environment.filters |= {
        "percent": _percent,
        "points": _points,
        "signed": _signed,
        "count": _count,
        "time": _time,
        "bytes": _bytes,
        "facts": _facts,
    }
    files = Path(__file__).parent
    style, script = (Markup((files / f"page.{kind}").read_text(encoding="utf-8")) for kind in ("css", "js"))
    page = environment.get_template(template).render(facts, style=style, script=script, theme=THEME)
    output.write_text(page, encoding="utf-8")
    return output


def _facts(facts: Mapping[str, Any]) -> Markup:
    """JSON that can stand in a script element: nothing in it ends one."""
    text = json.dumps(facts, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace("&", "\\u0026"))


def _signed(fraction: int | float | None) -> str:
    """A difference of accuracies with its sign."""
    return NOTHING if fraction is None else signed(100 * fraction)


def _bytes(size: int | float | None) -> str:
    return NOTHING if size is None else f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


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
