"""What a run folder says, finished or not: read from `config.yaml`, `events.jsonl` and `metrics.json` alone."""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cil.events import read_events
from cil.metrics import AccuracyMatrix
from cil.place import PLACE
from cil.report.snapshots import Snapshot, read_snapshots

_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where libyaml is there
FILES = ("config.yaml", "events.jsonl", "metrics.json")
_CIRCUMSTANCES = PLACE | {"num_threads"}


@dataclass
class StageFacts:
    """What is known of one stage; None where it has not come to it.

    Attributes:
        index: Counts from 0.
        started: Classes, samples and parameters, as the event says it.
        before: The evaluation before fine-tuning, if there was one.
        after: The evaluation at the end.
        exemplars: Kept after the stage.
        seconds: By part; empty while the stage is going on.
        peak_bytes: Largest resident memory so far.
    """

    index: int
    started: Mapping[str, Any] = field(default_factory=dict)
    before: Mapping[str, Any] | None = None
    after: Mapping[str, Any] | None = None
    exemplars: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None

    @property
    def class_names(self) -> list[str]:
        """Names of its classes in the order of learning."""
        return [str(name) for name in self.started.get("class_names", [])]


@dataclass(frozen=True)
class RunFolder:
    """One run folder.

    Attributes:
        folder: Where it is.
        record: Content of `config.yaml`: the resolved config, versions, git state; empty if the file is missing.
        events: All events in order; empty if the file is missing.
        metrics: Content of `metrics.json`; empty while there is none.
    """

    folder: Path
    record: dict[str, Any]
    events: list[dict[str, Any]]
    metrics: dict[str, Any]

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """The events of one kind."""
        return [event for event in self.events if event["event"] == kind]

    @property
    def config(self) -> dict[str, Any]:
        """The resolved config."""
        config: dict[str, Any] = self.record.get("config", {})
        return config

    @property
    def name(self) -> str:
        """Name of the run."""
        return str(self.fact("name", self.folder.resolve().name))

    def fact(self, key: str, default: Any = None) -> Any:
        """A value of `metrics.json`, or of the config while there is no such file."""
        return self.metrics.get(key, self.config.get(key, default))

    @property
    def is_static(self) -> bool:
        """Whether it trained networks on all classes, one beside the other, and not a network task after task."""
        return "student" in self.config

    def part_name(self, part: str) -> str | None:
        """Name of the learner or data set."""
        section = self.config.get({"data_set": "data"}.get(part, part))
        configured = section.get("name") if isinstance(section, Mapping) else section
        name = self.metrics.get(part, configured)
        return None if name is None else str(name)

    @cached_property
    def stages(self) -> list[StageFacts]:
        """The stages begun so far."""
        stages: dict[int, StageFacts] = {}
        for event in self.events:
            if "stage" not in event:
                continue
            stage = stages.setdefault(event["stage"], StageFacts(event["stage"]))
            match event["event"]:
                case "stage_started":
                    stage.started = event
                case "evaluated" if event["when"] == "before_finetuning":
                    stage.before = event
                case "evaluated" if event["when"] == "after":
                    stage.after = event
                case "memory_updated":
                    stage.exemplars = event["num_exemplars"]
                case "stage_finished":
                    stage.seconds = event["seconds"]
                    stage.peak_bytes = event.get("peak_resident_bytes")
        return [stages[index] for index in sorted(stages)]

    @cached_property
    def matrix(self) -> AccuracyMatrix | None:
        """Accuracies of the finished stages; None before the first has been evaluated, and in a static run."""
        if self.is_static:
            return None
        rows = [stage.after["per_task"] for stage in self.stages if stage.after]
        read = {event["stage"]: event["num_images"] for event in self.of_kind("test_read") if event["when"] == "after"}
        seen_images = [read[stage] for stage in sorted(read)]
        num_images = [now - before for now, before in zip(seen_images, [0, *seen_images], strict=False)]
        recorded = self.metrics.get("accuracy_matrix", [])
        if len(recorded) >= len(rows):  # events may lag behind or be gone; they are the diary, not the result
            rows = [[value for value in row if value is not None] for row in recorded]
            rows = [row for row in rows if row]
            num_images = self.metrics.get("num_test_images", num_images)
        if not rows:
            return None
        num_images = num_images[: len(rows)]
        square = [[*row, *[math.nan] * (len(rows) - len(row))] for row in rows]
        return AccuracyMatrix.from_fractions(square, num_images)

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The numbers derived from the matrix, under their names in `metrics.json`; empty before the first stage.

        A static run has its last accuracy alone.
        """
        if self.is_static and self.num_finished:
            nothing = dict.fromkeys(("average_incremental_accuracy", "forgetting", "backward_transfer"))
            return nothing | {"last_accuracy": self.accuracies[-1]}
        return self.matrix.summary() if self.matrix else {}

    @property
    def accuracies(self) -> list[float]:
        """Accuracy at the end of each finished stage."""
        told = [float(stage.after["accuracy"]) for stage in self.stages if stage.after]
        return told or [float(accuracy) for accuracy in self.metrics.get("accuracy_after", [])]

    @cached_property
    def snapshots(self) -> list[Snapshot]:
        """What was kept for the report, stage by stage; none in runs of older versions.

        Raises:
            ValueError: If a file is damaged.
        """
        return read_snapshots(self.folder)

    @property
    def bytes_per_image(self) -> float | None:
        """What an exemplar takes up as pixels; None where that was not written down."""
        kept, size = self.metrics.get("exemplars"), self.metrics.get("exemplar_bytes")
        return size / kept[-1] if kept and kept[-1] and size else None

    @property
    def num_finished(self) -> int:
        """Stages that were evaluated at their end."""
        if self.is_static:
            return len(self.accuracies)
        return self.matrix.num_finished if self.matrix else 0

    @property
    def num_tasks(self) -> int | None:
        """Tasks of the whole run, or networks of a static one; None while that was not written down."""
        sizes = self.metrics.get("networks" if self.is_static else "task_sizes")
        return None if sizes is None else len(sizes)

    @property
    def num_classes_seen(self) -> list[int]:
        """Classes known after each task of which something is known."""
        sizes = self.metrics.get("task_sizes") or [len(stage.class_names) for stage in self.stages]
        return [int(seen) for seen in np.cumsum(sizes)]

    @property
    def finished(self) -> bool:
        """Whether every task was learned."""
        return self.num_tasks is not None and self.num_finished == self.num_tasks

    @property
    def wall_seconds(self) -> int | float | None:
        """Time of the run so far, resumes included."""
        last = self.events[-1]["elapsed_seconds"] if self.events else None
        return self.metrics.get("wall_seconds", last) if self.finished else last

    @property
    def images_per_second(self) -> int | float | None:
        """Training images a second, over all epochs."""
        epochs = self.of_kind("epoch")
        seconds = sum(epoch["seconds"] for epoch in epochs)
        measured = sum(epoch["num_images"] for epoch in epochs) / seconds if seconds else None
        return self.metrics.get("images_per_second") or measured

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The config in dotted keys, without the seed and without the circumstances: equal for repeats of a run."""
        flat = flattened(self.config)
        return {key: value for key, value in flat.items() if key not in _CIRCUMSTANCES | {"seed"}}


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping with dotted keys; lists are leaves."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def is_run(folder: Path) -> bool:
    """Whether this is a run folder: it has at least one of the files that a run writes."""
    return any((folder / name).is_file() for name in FILES)


def read_run(folder: Path, *, diary: bool = True) -> RunFolder:
    """Read a run folder.

    Args:
        folder: The run folder.
        diary: False passes over the events of a finished run, whose results say enough for a comparison; they are what
            takes time in a folder of hundreds of runs.

    Raises:
        ValueError: If it is none, or a file of it is damaged.
    """
    if not is_run(folder):
        raise ValueError(f"{folder} is not a run folder: it has none of {', '.join(FILES)}")
    config, events, metrics = (folder / name for name in FILES)
    results = _mapping(metrics, json.loads) if metrics.is_file() else {}
    wanted = diary or not results.get("finished")
    run = RunFolder(
        folder,
        record=_mapping(config, lambda text: yaml.load(text, _YAML)) if config.is_file() else {},
        events=read_events(events) if wanted and events.is_file() else [],
        metrics=results,
    )
    with fitting(folder):
        _ = run.stages, run.matrix, run.images_per_second, run.settings
    return run


@contextmanager
def fitting(*folders: Path) -> Iterator[None]:
    """A block that derives everything it tells from run folders, so that a damaged file is one message and no page.

    Raises:
        ValueError: If what their files say does not fit together.
    """
    try:
        yield
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, ArithmeticError, RecursionError) as error:
        names = ", ".join(map(str, folders))
        raise ValueError(f"{names}: the files of this run do not fit together ({error!r:.200})") from error


def _mapping(path: Path, parse: Any) -> dict[str, Any]:
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping, found {type(content).__name__}")
    return content
