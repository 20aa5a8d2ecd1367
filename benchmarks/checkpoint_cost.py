"""What saving costs: `python -m benchmarks.checkpoint_cost [RUN ...]` prints a table.

Each run is trained with the default settings of `checkpoint`, whole or until its time is up, and every save is timed
where it happens: the states in between as well as those at the end of a stage, with flushing to the disk and checksums.
The largest gap is what a kill at the worst moment costs: the longest time between the ends of two saves.
"""

import argparse
import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from cil import checkpoint
from cil.build import Run
from cil.checking import check
from cil.cli import compose
from cil.engine import Engine
from cil.events import EventLog
from cil.folder import open_folder

_SYNTHETIC = (
    *("data=synthetic", "data.num_classes=20", "data.images_per_class=100", "data.test_images_per_class=10"),
    *("data.augment={crop: {padding: 4}, flip: {}}", "scenario=b0_inc10", "memory.size=200", "num_threads=1"),
    *("optim.batch_size=32", "device=cpu", "precision=fp32"),
)
#: By name: what tells the command line of it.
RUNS = {
    "digits": ("experiment=demo", "optim.epochs=10", "learner.finetune_epochs=5"),
    "dkt_192": (
        *(*_SYNTHETIC, "learner=dkt", "model=dkt", "model.width=192", "model.num_heads=6", "optim.epochs=4"),
        "learner.finetune_epochs=1",
    ),
    "resnet32": (*_SYNTHETIC, "learner=icarl", "model=resnet32", "optim.epochs=10"),
}


@dataclass
class Cost:
    """What saving came to.

    Attributes:
        run_seconds: Of the whole run.
        num_steps: Steps trained.
        save_seconds: Of every save.
        state_bytes: Of the largest state in the middle of a stage, or of a stage's files if there was none.
        gap_seconds: The longest time from one save to the end of the next.
    """

    run_seconds: float = 0.0
    num_steps: int = 0
    save_seconds: list[float] = field(default_factory=list)
    state_bytes: int = 0
    gap_seconds: float = 0.0

    @property
    def share(self) -> float:
        """Of the time of the run, spent in saving."""
        return sum(self.save_seconds) / self.run_seconds


def measure(name: str, runs_dir: Path, *overrides: str) -> Cost:
    """Train a run and time its saves.

    Args:
        name: Of `RUNS`.
        runs_dir: Folder of runs; the disk that it lies on is part of the measurement.
        overrides: As on the command line.
    """
    config = check(compose([*RUNS[name], *overrides, f"runs_dir={runs_dir}", f"name={name}"]))
    run = Run.build(config)
    cost, saved_at, depth = Cost(), 0.0, 0

    def timed(save: Callable[..., None]) -> Callable[..., None]:
        def saving(*arguments: Any) -> None:
            nonlocal saved_at, depth
            start, depth = time.perf_counter(), depth + 1
            save(*arguments)
            depth -= 1
            if depth:  # the state of a stage is saved within the stage
                return
            now = time.perf_counter()
            cost.save_seconds.append(now - start)
            cost.gap_seconds, saved_at = max(cost.gap_seconds, now - saved_at), now
            folder = checkpoint.stage_folder(config.folder, arguments[1])
            size = sum((folder / part).stat().st_size for part in os.listdir(folder) if "previous" not in part)
            cost.state_bytes = max(cost.state_bytes, size)

        return saving

    def counted(self: Engine, *arguments: Any) -> Any:
        cost.num_steps += 1
        return step(self, *arguments)

    step = Engine.step
    with (
        open_folder(config),
        EventLog(config.folder / "events.jsonl") as log,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        mock.patch.object(checkpoint, "save_state", timed(checkpoint.save_state)),
        mock.patch.object(checkpoint, "save_stage", timed(checkpoint.save_stage)),
        mock.patch.object(Engine, "step", counted),
    ):
        start = saved_at = time.perf_counter()
        Engine(run, log).run()
        cost.run_seconds = time.perf_counter() - start
    return cost


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the runs and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint_cost", description=__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"of {', '.join(RUNS)}; all without any")
    chosen = parser.parse_args(arguments).runs or list(RUNS)
    if strangers := [name for name in chosen if name not in RUNS]:
        parser.error(f"unknown runs {', '.join(strangers)}; known: {', '.join(RUNS)}")
    print("| run | steps | seconds | saves | ms per save | MB on disk | share of time | largest gap |")
    print("|---|---|---|---|---|---|---|---|")
    for name in chosen:
        with tempfile.TemporaryDirectory(dir=".") as folder:
            cost = measure(name, Path(folder))
        milliseconds = 1000 * sum(cost.save_seconds) / len(cost.save_seconds)
        print(
            f"| {name} | {cost.num_steps} | {cost.run_seconds:.0f} | {len(cost.save_seconds)} | {milliseconds:.0f} | "
            f"{cost.state_bytes / 1e6:.1f} | {100 * cost.share:.2f} % | {cost.gap_seconds:.0f} s |",
            flush=True,
        )


if __name__ == "__main__":
    main()
