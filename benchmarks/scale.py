"""What a published protocol will take: `python -m benchmarks.scale [EXPERIMENT ...]` prints two tables.

Every preset is planned (`cil.plan`) on synthetic images of its real number and size, made one by one, so that no data
set is needed. Steps, images, multiply-adds and bytes are those of the run itself; the time of this machine is carried
over from a few steps. Nothing is trained.

The second table is about GPUs. It divides the arithmetic by what one reaches, `--tflops`, lets no step take less than
its operations need to be started, and says how many files a second must then be decoded. A single GPU is given all
operations of a step by one call and needs `--recorded-us` for each; several start them one by one, `--launch-us` each.
The default rates were seen on an H200 (docs/speed.md); the rest is arithmetic.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cil.checking import check
from cil.cli import compose
from cil.config import Config
from cil.optim import make_optimizer
from cil.plan import PhasePlan, Plan, Rehearsal, plan
from cil.progress import duration
from cil.static import build
from cil.text_table import as_text

_CIFAR = ("data.num_classes=100", "data.images_per_class=500", "data.test_images_per_class=100", "data.image_size=32")
#: ImageNet: 1 281 167 training images of 1000 classes, 50 validation images of each.
_IMAGENET = ("~data.path", "data.images_per_class=1281", "data.test_images_per_class=50", "data.image_size=224")
#: By experiment: the data set that stands in for its own.
PRESETS = {
    "cifar100_b0_inc10": _CIFAR,
    "imagenet100_seed1993_b0_inc10": (*_IMAGENET, "data.num_classes=100"),
    "imagenet1000_b0_inc100": (*_IMAGENET, "data.num_classes=1000"),
}
#: What stands for the real data set in each: same number and size, no file.
SYNTHETIC = ("data=synthetic", "data.in_memory=false", "num_threads=1", "device=cpu")


@dataclass(frozen=True)
class Need:
    """What a run will take on any machine.

    Attributes:
        experiment: The preset.
        plan: Its plan on this one.
        launches: Operations that a training step beside a teacher starts.
    """

    experiment: str
    plan: Plan
    launches: int

    @property
    def phases(self) -> list[PhasePlan]:
        """Of all tasks."""
        return [phase for task in self.plan.tasks for phase in task.phases]

    @property
    def operations(self) -> float:
        """Floating-point operations of training: two for a multiply-add."""
        return 2.0 * sum(phase.multiply_adds * phase.num_images for phase in self.phases)

    @property
    def reading_operations(self) -> float:
        """Those of evaluation and of the choice of exemplars."""
        return 2.0 * sum(task.multiply_adds * (task.num_evaluated + task.num_embedded) for task in self.plan.tasks)

    @property
    def exemplar_bytes(self) -> int:
        """Pixels of the full memory."""
        return max(task.exemplar_bytes for task in self.plan.tasks)

    @property
    def checkpoint_bytes(self) -> int:
        """On disk in the end: weights of every task, and two states of the last with teacher and optimiser."""
        last = self.plan.tasks[-1]
        state = last.model_bytes + last.teacher_bytes + max(phase.optimizer_bytes for phase in last.phases)
        return sum(task.model_bytes for task in self.plan.tasks) + 2 * state

    def peak_bytes(self, processes: int) -> int:
        """Tensors of one of some processes in the largest phase: activations are divided, nothing else is."""
        return max(
            task.model_bytes
            + task.teacher_bytes
            + phase.num_bytes
            - (phase.activation_bytes - phase.activation_bytes // processes)
            for task in self.plan.tasks
            for phase in task.phases
        )

    def seconds(self, tflops: float, launch_us: float, processes: int) -> float:
        """Time of all arithmetic at a rate per process, and of no step less than its operations take to start."""
        rate, start = tflops * 1e12 * processes, self.launches * launch_us * 1e-6
        training = sum(
            phase.num_steps * max(2 * phase.multiply_adds * phase.num_images / phase.num_steps / rate, start)
            for phase in self.phases
        )
        return training + self.reading_operations / rate


def need(experiment: str, *overrides: str) -> Need:
    """Plan a preset on synthetic images of its real number and size."""
    config = check(compose([f"experiment={experiment}", *SYNTHETIC, *PRESETS[experiment], *overrides]))
    assert isinstance(config, Config)
    return Need(experiment, plan(config), launches(config))


class _Counted(TorchDispatchMode):
    """Counts operations that compute something; views do not."""

    count: int = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def launches(config: Config) -> int:
    """Operations of a step of the second task: forward, teacher, losses, backward, one fused optimiser."""
    rehearsal = Rehearsal(build(config))
    rehearsal.engine.begin(rehearsal.run.stage(0))
    rehearsal.fill_memory(rehearsal.run.stage(0))
    learner, stage = rehearsal.run.learner, rehearsal.run.stage(1)
    rehearsal.engine.begin(stage)
    learner.phase = phase = learner.phases(stage)[0]
    rehearsal.engine.set_trainable(phase)
    optimizer = make_optimizer(learner, phase.recipe)
    batch = rehearsal.batch(rehearsal.engine.batches.of_phase(phase, stage), 4, torch.float32)
    unscaled = torch.amp.GradScaler("cpu", enabled=False)
    with _Counted() as counted, rehearsal.run.precision.autocast():
        learner.update(learner(batch), optimizer, unscaled, None)
    return counted.count


def measured(needs: Sequence[Need]) -> str:
    """The first table."""
    columns = ["experiment", "steps", "images shown", "arithmetic", "operations of a step"]
    columns += ["exemplars (pixels)", "checkpoints", "here"]
    rows = [
        [
            one.experiment,
            f"{one.plan.num_steps:,}".replace(",", " "),
            f"{one.plan.num_images / 1e6:.1f} million",
            f"{(one.operations + one.reading_operations) / 1e18:.2f} x 10^18",
            str(one.launches),
            _size(one.exemplar_bytes),
            _size(one.checkpoint_bytes),
            duration(one.plan.training_seconds + one.plan.reading_seconds),
        ]
        for one in needs
    ]
    return as_text(columns, rows, left=columns[:1])


def extrapolated(
    needs: Sequence[Need],
    tflops: float,
    launch_us: float,
    recorded_us: float,
    processes: Sequence[int],
    per_core: float,
) -> str:
    """The second table."""
    columns = ["experiment", "GPUs", "time", "a step", "memory of each", "images/s in all", "cores to decode them"]
    rows = []
    for one in needs:
        for count in processes:
            seconds = one.seconds(tflops, launch_us if count > 1 else recorded_us, count)
            images = one.plan.num_images / seconds
            in_files = one.experiment.startswith("imagenet")
            rows.append(
                [
                    one.experiment,
                    str(count),
                    f"{seconds / 3600:.1f} h",
                    f"{1000 * seconds / one.plan.num_steps:.0f} ms",
                    _size(one.peak_bytes(count)),
                    f"{images:,.0f}".replace(",", " "),
                    f"{images / per_core:.0f}" if in_files else "-",
                ]
            )
    return as_text(columns, rows, left=columns[:1])


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def main(argv: Sequence[str] | None = None) -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__.split("\n\n")[0])
    parser.add_argument("experiments", nargs="*", choices=[[], *PRESETS], default=[], help="presets; default: all")
    parser.add_argument("--tflops", type=float, default=48.0, help="what a GPU reaches, 10^12 operations a second")
    parser.add_argument("--launch-us", type=float, default=40.0, help="what starting an operation takes, microseconds")
    parser.add_argument("--recorded-us", type=float, default=7.0, help="the same in a recorded step of a single GPU")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 8], help="numbers of GPUs")
    parser.add_argument("--per-core", type=float, default=392.0, help="files decoded a second and core (make bench)")
    given = parser.parse_args(argv)
    needs = [need(experiment) for experiment in given.experiments or PRESETS]
    print(f"planned here, {needs[0].plan.place}:\n{measured(needs)}")
    print(f"at {given.tflops:g} x 10^12 operations a second and GPU:")
    print(extrapolated(needs, given.tflops, given.launch_us, given.recorded_us, given.gpus, given.per_core))


if __name__ == "__main__":
    main()
