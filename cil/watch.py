"""`python -m cil.watch RUN`: where a run is, from another terminal; it reads files and touches nothing.

Exit code 0 if the run is finished (with --once: or goes on), 1 if its process has ended before that, 2 if there is no
run, 130 after Ctrl-C.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import yaml
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cil.events import read_events
from cil.lock import holder
from cil.progress import duration

EVERY_SECONDS = 1.0
BAR_WIDTH = 30
LEVELS = "▁▂▃▄▅▆▇█"

Status = Literal["running", "stopped", "finished", "unknown"]


@dataclass(frozen=True)
class State:
    """What the files of a run say at one moment.

    Attributes:
        name: Of the run.
        status: Whether its process is there; unknown on a disk without locks.
        process: Its number; None or 0 if that is not known.
        events: All events.
        saved: Newest saved state as stage and age in seconds; None if there is none.
        now: The moment.
    """

    name: str
    status: Status
    process: int | None
    events: list[dict[str, Any]]
    saved: tuple[int, float] | None
    now: datetime

    def last(self, kind: str) -> dict[str, Any]:
        """The newest event of a kind; empty if there is none."""
        return next((event for event in reversed(self.events) if event["event"] == kind), {})

    @property
    def num_stages(self) -> int | None:
        """Stages of the whole run; None in a run whose log does not say it."""
        found: int | None = self.last("run_started").get("num_stages")
        return found

    @property
    def stage(self) -> int:
        """The stage in work, or the last one."""
        return max((int(event["stage"]) for event in self.events if "stage" in event), default=0)

    @property
    def done_images(self) -> int:
        """Training images shown, of whole epochs."""
        return sum(int(event["num_images"]) for event in self.events if event["event"] == "epoch")

    @property
    def share(self) -> float | None:
        """Share of the training images of the whole run that has been shown."""
        total = self.last("run_started").get("total_images")
        return min(self.done_images / total, 1.0) if total else None

    @property
    def seconds_left(self) -> float | None:
        """At the mean pace of the process that runs, pauses included; None before its first epoch has ended."""
        start = self.last("run_started")
        total = int(start.get("total_images", 0))
        if self.status == "finished" or not total:
            return None
        own = self.events[self.events.index(start) :]
        done = sum(int(event["num_images"]) for event in own if event["event"] == "epoch")
        if not done:
            return None
        pace = (float(own[-1]["elapsed_seconds"]) - float(start["elapsed_seconds"])) / done
        waited = (self.now - datetime.fromisoformat(own[-1]["time"])).total_seconds() if self.status == "running" else 0
        return max(pace * (total - self.done_images) - waited, 0.0)

    @property
    def accuracies(self) -> list[float]:
        """After every finished stage."""
        found = [event for event in self.events if event["event"] == "evaluated" and event["when"] == "after"]
        return [float(event["accuracy"]) for event in found]


def look(folder: Path) -> State:
    """The state of a run folder.

    Raises:
        ValueError: If there is no run, or a file of it is damaged.
    """
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} is not a run folder: it has no config.yaml. A run makes it when it starts")
    try:
        process, known = holder(folder), True  # before the events: what a process wrote before it ended is then read
    except OSError:
        process, known = None, False
    path = folder / "events.jsonl"
    events = read_events(path) if path.is_file() else []
    finished = any(event["event"] == "run_finished" for event in events)
    status: Status = "running" if process is not None else "stopped" if known else "unknown"
    states = [(file.stat().st_mtime, file) for file in folder.glob("stage_*/state.pt")]
    now, saved = datetime.now(UTC), None
    if states:
        when, newest = max(states)
        saved = int(newest.parent.name.removeprefix("stage_")), max(now.timestamp() - when, 0.0)
    config = yaml.safe_load((folder / "config.yaml").read_text())["config"]
    return State(str(config["name"]), "finished" if finished else status, process, events, saved, now)


def shown(state: State, width: int = 80) -> RenderableType:
    """The state for a person."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, value in _rows(state):
        table.add_row(name, value)
    parts: list[RenderableType] = [Text(state.name, style="bold"), table]
    if (share := state.share) is not None and state.status != "finished":
        bar = Table.grid(padding=(0, 2))
        bar.add_row(ProgressBar(total=1.0, completed=share, width=min(BAR_WIDTH, width // 2)), f"{share:4.0%}")
        parts.append(bar)
    return Group(*parts)


def _rows(state: State) -> list[tuple[str, str]]:
    who = f", process {state.process}" if state.process else ""
    rows = [
        ("status", {"running": f"running{who}", "stopped": _STOPPED, "unknown": _UNKNOWN}.get(state.status, "finished"))
    ]
    if not state.events:
        return [*rows, ("", "it has not begun to train")]
    of = "" if state.num_stages is None else f" of {state.num_stages}"
    rows.append(("task", f"{state.stage + 1}{of}"))
    phase, epoch = state.last("phase_started"), state.last("epoch")
    if phase and state.status != "finished":
        begun = _same_phase(phase, epoch)
        rows.append(
            ("phase", f"{phase['phase']}, {epoch['epoch'] + 1 if begun else 0} of {phase['epochs']} epochs done")
        )
    if epoch:
        losses = [f"{name} {_number(value)}" for name, value in epoch["losses"].items()]
        rows.append(("losses", "  ".join(losses)))
        pace = f"{epoch['images_per_second']:.0f} images/s"
        rows.append(("rate", f"{_number(epoch['learning_rate'])} learning rate, {pace}"))
    if accuracies := state.accuracies:
        curve = "".join(LEVELS[min(int(value * len(LEVELS)), len(LEVELS) - 1)] for value in accuracies)
        rows.append(("accuracy", f"{curve}  {'  '.join(f'{100 * value:.1f}' for value in accuracies)} %"))
        rows.append(("average", f"{100 * sum(accuracies) / len(accuracies):.1f} %"))
    if state.saved is not None:
        rows.append(("saved", f"in stage {state.saved[0]}, {duration(state.saved[1])} ago"))
    rows.append(("time", _time(state)))
    return rows


_STOPPED = "stopped: no process runs in the folder; the command that started it goes on from what is saved"
_UNKNOWN = "not finished; this disk has no locks, so whether its process is there is not known"


def _same_phase(phase: Mapping[str, Any], epoch: Mapping[str, Any]) -> bool:
    return all(phase.get(key) == epoch.get(key) for key in ("stage", "phase_index"))


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _time(state: State) -> str:
    spent = f"{duration(state.events[-1]['elapsed_seconds'])} so far"
    left = state.seconds_left
    return spent if left is None else f"{spent}, about {duration(left)} left"


def follow(folder: Path, console: Console, every_seconds: float, sleep: Callable[[float], None] = time.sleep) -> State:
    """Show a run until it is finished or its process ends, and print how it ended; returns the last state.

    Raises:
        ValueError: As `look`.
    """
    state = look(folder)
    with Live(shown(state, console.width), console=console, auto_refresh=False, transient=True) as live:
        while state.status in ("running", "unknown"):
            sleep(every_seconds)
            state = look(folder)
            live.update(shown(state, console.width), refresh=True)
    console.print(shown(state, console.width))
    return state


def main(arguments: Sequence[str] | None = None) -> int:
    """Show the run; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m cil.watch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--once", action="store_true", help="print the state and end")
    parser.add_argument("--every", type=float, default=EVERY_SECONDS, metavar="SECONDS", help="between two looks (1)")
    chosen = parser.parse_args(arguments)
    if not chosen.every > 0:
        parser.error(f"--every must be above 0, found {chosen.every}")
    console = Console()
    try:
        if chosen.once:
            state = look(chosen.run)
            console.print(shown(state, console.width))
        else:
            state = follow(chosen.run, console, chosen.every)
    except (ValueError, OSError) as error:
        print(f"cil.watch: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return int(state.status == "stopped")


if __name__ == "__main__":
    sys.exit(main())
