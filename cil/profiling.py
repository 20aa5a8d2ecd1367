"""Where the time of a training step goes: `profile=true`."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from cil.stages import Phase, Stage
from cil.text_table import as_text

T = TypeVar("T")

_WAIT, _WARMUP, _STEPS = 2, 1, 5
#: Parts of a step, as `record_function` names them; a teacher is asked within the forward pass.
PARTS = ("data", "forward", "teacher", "backward", "optimiser")
#: What stands for forward and backward of a recorded step (`cil.recorded`).
RECORDED = "recorded"
_NUM_OPERATIONS = 15


def profiled(name: str, items: Iterable[T]) -> Iterator[T]:
    """The items, with the time it takes to get each under a name."""
    iterator = iter(items)
    while True:
        with record_function(name):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


class NoProfile:
    """Looks at nothing."""

    def begin(self, stage: Stage, number: int, phase: Phase) -> None:
        """A phase begins."""

    def step(self) -> None:
        """A step has ended."""

    def end(self) -> str | None:
        """A phase has ended."""
        return None


class Profile(NoProfile):
    """Looks at a few steps of the first phase of the second stage, where there is a teacher, or of the only one.

    Writes a trace, to be opened at https://ui.perfetto.dev or in chrome://tracing, and a table.

    Args:
        folder: Where.
        num_stages: Of the run.
    """

    def __init__(self, folder: Path, num_stages: int) -> None:
        self.folder = folder
        self.stage = min(1, num_stages - 1)
        self._profile: profile | None = None
        self._name = ""
        self._said: str | None = None
        self._num_steps = 0

    def begin(self, stage: Stage, number: int, phase: Phase) -> None:
        """Start, if this is the phase."""
        if stage.index != self.stage or number != 0:
            return
        self._name = f"stage_{stage.index:03d}-{phase.name}"
        self._said = f"profile: {phase.name} of stage {stage.index} had fewer than {_WAIT + _WARMUP + _STEPS} steps"
        os.environ.setdefault("KINETO_LOG_LEVEL", "4")  # nothing of its own between the lines of a run
        self._profile = profile(
            activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()],
            schedule=schedule(wait=_WAIT, warmup=_WARMUP, active=_STEPS, repeat=1),
            on_trace_ready=self._write,
        )
        self._profile.start()

    def step(self) -> None:
        """Count a step."""
        if self._profile is not None:
            self._num_steps += 1
            self._profile.step()

    def end(self) -> str | None:
        """Stop; returns what to tell a person."""
        if self._profile is not None:
            self._profile.stop()
        said, self._profile, self._said = self._said, None, None
        return said

    def _write(self, found: profile) -> None:
        if self._num_steps < _WAIT + _WARMUP + _STEPS:  # stopped before its time
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(self.folder / f"{self._name}.json.gz"))
        table = self.folder / f"{self._name}.txt"
        table.write_text(time_table(found.key_averages(), _STEPS))
        self._said = f"profile: {table}"


def time_table(events: EventList, num_steps: int) -> str:
    """Milliseconds of a step by part, and the operations that take most of them."""
    # an accelerator reports every part once more, as what it was busy with meanwhile
    by_name = {event.key: event for event in events if event.device_type.name == "CPU"}
    cuda = any(event.self_device_time_total for event in events)

    def milliseconds(of: str) -> float:
        return by_name[of].cpu_time_total / 1000 / num_steps if of in by_name else 0.0

    parts = [*PARTS, RECORDED] if RECORDED in by_name else PARTS
    whole = sum(milliseconds(part) for part in parts if part != "teacher")
    rows = [[part, f"{milliseconds(part):.1f}", f"{milliseconds(part) / whole:.0%}"] for part in parts]
    operations = {
        event.key: event.self_device_time_total if cuda else event.self_cpu_time_total
        for event in events
        if event.key not in parts and not event.is_user_annotation and not event.key.startswith("ProfilerStep")
    }
    most = [
        [name[:50], f"{time / 1000 / num_steps:.1f}", f"{time / 1000 / num_steps / whole:.0%}"]
        for name, time in sorted(operations.items(), key=lambda item: -item[1])[:_NUM_OPERATIONS]
    ]
    table = as_text(["part of a step", "ms", "share"], rows, left=["part of a step"])
    own = f"operation, by its own time on the {'accelerator' if cuda else 'processor'}"
    operations_table = as_text([own, "ms", "share"], most, left=[own])
    note = " Parts are timed where they are launched." if cuda else ""
    return (
        f"Mean of {num_steps} steps; the teacher is asked within the forward pass.{note}\n\n{table}\n{operations_table}"
    )
