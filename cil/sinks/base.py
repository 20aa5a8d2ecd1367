"""Where the events of a run go beside `events.jsonl`, while it is going on (`log=[tensorboard,wandb]`)."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

from cil.events import read_events
from kd.registry import Registry

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Place:
    """Where in a run an event stands. Interrupted or not, an event has the same place.

    Attributes:
        number: Events of the run before it, starts of processes not counted.
        epochs: Epochs that are finished with it, of all phases and stages: the horizontal axis of every curve.
    """

    number: int
    epochs: int


class Sink(ABC):
    """One more reader of the events of a run.

    It is made when the run starts, also when it goes on, and is then given every event from the first on: those that a
    resume kept, then every new one, `run_started` left out. Events that the resume cut off were given to the sink of
    the process before; they come again, the same and at the same place, so a sink that keeps what it was given must
    write what it is given anew over it, or leave out what it has.

    Args:
        folder: The run folder.
        config: The config of the run, in plain values.

    Attributes:
        package: What must be installed for it; the extra of its name installs it.
    """

    package: ClassVar[str]

    @abstractmethod
    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None: ...

    @abstractmethod
    def write(self, event: Event, place: Place) -> None:
        """Take one event."""

    @abstractmethod
    def close(self) -> None:
        """Write what is not written yet; the run has ended, or is interrupted."""


sinks: Registry[type[Sink]] = Registry("sink", "cil.sinks")


class Sinks:
    """Passes the events of a run on to its sinks; what `EventLog` calls with every event that it has written.

    A sink is no part of the run: one that raises is named once on standard error and then left out, and
    `events.jsonl` has everything. Rank 0 alone has any.

    Args:
        names: Which.
        folder: The run folder.
        config: The config of the run, in plain values.
    """

    def __init__(self, names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> None:
        self._names = list(dict.fromkeys(names))
        self._folder = folder
        self._config = config
        self._open: dict[str, Sink] = {}
        self._number = self._epochs = 0

    def __call__(self, event: Event) -> None:
        """Pass on one event; the first, `run_started`, opens the sinks and gives them what the log has kept."""
        if event["event"] != "run_started":
            self._give(event)
            return
        for name in self._names:
            self._try(name, partial(self._start, name))
        for kept in read_events(self._folder / "events.jsonl") if self._names else ():
            if kept["event"] != "run_started":
                self._give(kept)

    def _start(self, name: str) -> None:
        self._open[name] = sinks[name](self._folder, self._config)

    def _give(self, event: Event) -> None:
        self._epochs += event["event"] == "epoch"
        place = Place(self._number, self._epochs)
        self._number += 1
        for name, sink in list(self._open.items()):
            self._try(name, partial(sink.write, event, place))

    def _try(self, name: str, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # whatever a package raises, the run is worth more than its picture
            self._open.pop(name, None)
            reason = " ".join(str(error).split()) or repr(error)
            print(f"log={name} failed and is left out from here on, the run goes on: {reason}", file=sys.stderr)

    def __enter__(self) -> "Sinks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for name, sink in list(self._open.items()):
            self._try(name, sink.close)
        self._open.clear()


def missing(names: Iterable[str]) -> list[str]:
    """Which sinks cannot work here, one sentence each that says what to install."""
    return [
        f"log={name}: the package {sinks[name].package} is not installed: pip install dkt-incremental[{name}]"
        for name in names
        if find_spec(sinks[name].package) is None
    ]


def scalars(event: Event) -> dict[str, float]:
    """The numbers of an event that make curves, by name; what is null (not finite) or no curve is left out.

    Losses stand under the name of their phase, which has a scale of its own; accuracies under the time of the reading.
    """
    found: dict[str, Any] = {}
    match event["event"]:
        case "epoch":
            phase = event["phase"]
            found = {f"{phase}/{name}": value for name, value in event["losses"].items()}
            found |= {f"{phase}/{name}": event[name] for name in ("learning_rate", "images_per_second")}
        case "evaluated":
            when = {"after": "accuracy", "before_finetuning": "accuracy_before_finetuning"}.get(
                event["when"], "accuracy_during"
            )
            found = {f"{when}/all": event["accuracy"], f"{when}/top5": event["top5"]}
            found |= {f"{when}/{part}": event[f"accuracy_{part}"] for part in ("old", "new")}
            found |= {f"{when}/by_{name}": value for name, value in event["accuracy_by"].items()}
            found |= {f"{when}_of_task/{task:03}": value for task, value in enumerate(event["per_task"])}
        case "stage_started":
            found = {f"network/{name}": event[name] for name in ("num_parameters", "num_trainable")}
        case "memory_updated":
            found = {f"memory/{name}": event[name] for name in ("num_exemplars", "per_class")}
        case "stage_finished":
            found = {f"seconds/{name}": value for name, value in event["seconds"].items()}
            found["memory/peak_resident_bytes"] = event["peak_resident_bytes"]
    return {name: float(value) for name, value in found.items() if value is not None}
