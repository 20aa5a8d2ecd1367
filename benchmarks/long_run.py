"""What fifty tasks leave behind: `python -m benchmarks.long_run [LEARNER ...]` prints a table for each learner.

The run is tiny, so that what grows is seen beside what does not: 50 tasks of 2 classes, a memory of 200 exemplars,
networks of a few thousand weights. After each task the process is asked for its resident memory (now, not at its
highest), its open files and its threads; a step is measured whole (augmentation, forward, backward, update) in the time
of the processor, so that other jobs of the machine do not count.
"""

import argparse
import contextlib
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cil import checkpoint
from cil.build import Run
from cil.checking import check
from cil.cli import compose
from cil.engine import Engine
from cil.events import EventLog
from cil.folder import open_folder
from cil.stages import Stage

TASKS = (2, 5, 10, 20, 30, 40, 50)
#: From this task on memory and files are flat: by then every buffer has been in use.
FLAT_FROM = 10
#: The limits that `main` reports against. Memory: a kernel is kept for every shape met (oneDNN, at most 1024 of them),
#: and a network that grows has a few new shapes in each task; that slows down, a leak does not.
GROWTH_MIB, SLOWER = 16.0, 1.1

_COMMON = (
    *("data=synthetic", "data.num_classes=100", "data.images_per_class=40", "data.test_images_per_class=4"),
    *("data.image_size=8", "data.channels=1", "data.augment={crop: {padding: 1}}", "scenario=b0_inc2"),
    *("memory.size=200", "optim.epochs=2", "optim.batch_size=32", "optim.sampling.drop_last=true"),
    *("num_threads=1", "precision=fp32", "device=cpu"),
    # Buffers are as large as the largest batch, and after each task there is more to evaluate: batches of one size.
    "evaluation.batch_size=8",
)
#: By name: what tells the command line of it.
LEARNERS = {
    "dkt": (
        *("learner=dkt", "learner.finetune_epochs=1", "learner.finetune_batch_size=32", "model=dkt_tiny"),
        *("model.width=16", "model.num_heads=2", "model.depth=1", "model.mlp_ratio=1", "model.stem_width=8"),
    ),
    "icarl": ("learner=icarl", "model=resnet8", "model.width=4"),
    "replay": ("learner=replay", "model=resnet8", "model.width=4"),
}


@dataclass(frozen=True)
class Task:
    """The process after a task.

    Attributes:
        resident_bytes: Memory in use now.
        num_files: Open file descriptors.
        num_threads: Threads of Python.
        step_milliseconds: Median of the steps of this task, of the processor's time.
        checkpoint_bytes: Of what the task leaves in the run folder.
    """

    resident_bytes: int
    num_files: int
    num_threads: int
    step_milliseconds: float
    checkpoint_bytes: int


class _Watched(Engine):
    """An engine that looks at its process after each task."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.tasks_seen: list[Task] = []
        self._steps: list[float] = []
        self._began = 0.0

    def batch(self, *arguments: Any) -> Any:
        self._began = time.process_time()
        return super().batch(*arguments)

    def step(self, *arguments: Any) -> dict[str, Tensor]:
        losses = super().step(*arguments)
        self._steps.append(time.process_time() - self._began)
        return losses

    def finish(self, stage: Stage) -> None:
        super().finish(stage)
        folder = checkpoint.stage_folder(self.folder, stage.index)
        self.tasks_seen.append(
            Task(
                resident_bytes=_resident_bytes(),
                num_files=len(os.listdir("/proc/self/fd")) - 1,  # one of them lists them
                num_threads=threading.active_count(),
                step_milliseconds=1000 * statistics.median(self._steps),
                checkpoint_bytes=sum(path.stat().st_size for path in folder.iterdir()),
            )
        )
        self._steps.clear()


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def watch(learner: str, runs_dir: Path, *overrides: str) -> list[Task]:
    """Train fifty tasks, unless the overrides say otherwise.

    Args:
        learner: Of `LEARNERS`.
        runs_dir: Folder of runs.
        overrides: As on the command line.
    """
    words = [*_COMMON, *LEARNERS[learner], *overrides, f"runs_dir={runs_dir}", f"name=long_run-{learner}"]
    config = check(compose(words))
    run = Run.build(config)
    with (
        open_folder(config),
        EventLog(config.folder / "events.jsonl") as log,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        engine = _Watched(run, log)
        engine.run()
    return engine.tasks_seen


def growth_mebibytes(tasks: Sequence[Task]) -> float:
    """How much memory the last five tasks have in use above the five from `FLAT_FROM` on, by the median."""
    early, late = (
        statistics.median(task.resident_bytes for task in part)
        for part in (tasks[FLAT_FROM - 1 : FLAT_FROM + 4], tasks[-5:])
    )
    return (late - early) / 2**20


def slowdown(tasks: Sequence[Task]) -> float:
    """A step of the last three tasks in steps of the second to the fourth task, by the median."""
    early, late = (statistics.median(task.step_milliseconds for task in part) for part in (tasks[1:4], tasks[-3:]))
    return late / early


def main(arguments: Sequence[str] | None = None) -> None:
    """Watch the learners and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_run", description=__doc__)
    parser.add_argument("learners", nargs="*", metavar="LEARNER", help=f"of {', '.join(LEARNERS)}; dkt, icarl without")
    chosen = parser.parse_args(arguments).learners or ["dkt", "icarl"]
    if strangers := [name for name in chosen if name not in LEARNERS]:
        parser.error(f"unknown learners {', '.join(strangers)}; known: {', '.join(LEARNERS)}")
    for learner in chosen:
        with tempfile.TemporaryDirectory() as folder:
            tasks = watch(learner, Path(folder))
        print(f"\n{learner}: {len(tasks)} tasks\n")
        print("| after task | resident MiB | open files | threads | step ms | checkpoint KiB |")
        print("|---|---|---|---|---|---|")
        for number in TASKS:
            task = tasks[number - 1]
            print(
                f"| {number} | {task.resident_bytes / 2**20:.1f} | {task.num_files} | {task.num_threads} | "
                f"{task.step_milliseconds:.2f} | {task.checkpoint_bytes / 2**10:.0f} |"
            )
        files = {task.num_files for task in tasks[FLAT_FROM - 1 :]}
        grown, slower = growth_mebibytes(tasks), slowdown(tasks)
        print(
            f"\nafter task {FLAT_FROM}: memory {grown:+.1f} MiB ({'flat' if grown < GROWTH_MIB else 'GROWS'}), "
            f"open files {'flat' if len(files) == 1 else 'CHANGE'}; step of task {len(tasks)} against task 2: "
            f"{slower:.2f} ({'within' if slower <= SLOWER else 'ABOVE'} {SLOWER})",
            flush=True,
        )


if __name__ == "__main__":
    main()
