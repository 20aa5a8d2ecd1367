"""Rows of `make bench` about training: whole steps, fine-tuning, memory.

The baseline of each is the plain form of the same code: `fast=off precision=fp32`, in the same run.
"""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.measuring import Measured, device, measure_on, rate, row, seconds_of, way
from cil.distillation import StaticDistillation
from cil.fast import Fast
from cil.learners.base import Learner, learners
from cil.models.network import models
from cil.optim import Recipe, make_optimizer
from cil.precision import Precision
from cil.recorded import Recorder
from cil.seeding import SampleNoise, sample_noise
from cil.stages import Phase, Stage
from kd import Batch, WeightedSum, distillers

_BATCH = 128
_CLASSES = 2  # of a task: 50 tasks are 100 classes
_GIGAFLOP = 4.89  # of an image: 2 x multiply-adds of 3 passes of the student and 1 of the teacher, width 384, CIFAR
#: The ImageNet form: images of 224 px, 196 patches.
_IMAGENET = {"stem_kernel": 7, "stem_stride": 2, "stem_padding": 2, "patch_kernel": 4}
_STATIC_BATCH = 64
_STATIC_GIGAFLOP = 3.23  # the same of a ResNet-8x4 beside a ResNet-32x4
_MATRIX = 4096
_RECIPE = Recipe(epochs=1)


def _batch(size: int, classes: int, side: int = 32) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, side, side, generator=generator)
    labels = torch.randint(classes, (size,), generator=generator)
    return Batch(images.to(device()), labels.to(device()), torch.arange(size, device=device()))


def _at_task(name: str, task: int, *, fast: Fast, side: int = 32, **form: int) -> tuple[Learner, list[Phase]]:
    """A learner of that name in the middle of a task, counted from 1, and the phases of the task."""
    torch.manual_seed(0)
    method = "kd" if name == "dkt" else "dytox"
    term = distillers["kd"](temperature=1.0)
    learner = learners[name](models[name]((3, side, side), **form), WeightedSum({method: (1.0, term)}))
    for index in range(task):
        stage = Stage(index, range(_CLASSES * index, _CLASSES * (index + 1)), _RECIPE, has_memory=True)
        if index == task - 1:
            learner.begin_stage(stage)
        else:
            learner.network.grow(_CLASSES)
    learner.to(device())
    fast.apply(learner)
    learner.train()
    phases = learner.phases(stage)
    for item in phases[0].frozen:
        item.requires_grad_(False)
    return learner, phases


def _step(
    learner: Learner, batch: Batch, precision: Precision, fast: Fast, recipe: Recipe = _RECIPE
) -> Callable[[], None]:
    step = _steps(learner, precision, fast, recipe)
    return lambda: step(batch)


def _steps(learner: Learner, precision: Precision, fast: Fast, recipe: Recipe = _RECIPE) -> Callable[[Batch], None]:
    optimizer = make_optimizer(learner, recipe, fused=fast.fused_optimizer)
    scaler = precision.scaler()
    recorder = None
    if fast.cuda_graphs and Recorder.suits(learner, optimizer, precision.device):
        recorder = Recorder(learner, optimizer, scaler, precision)

    def step(batch: Batch) -> None:
        noise = SampleNoise(0, batch.ids, torch.zeros_like(batch.ids))
        with sample_noise(noise):
            if recorder is not None and recorder(batch, noise) is not None:
                learner.advance(optimizer, scaler, None)
                return
            with precision.autocast():
                losses: dict[str, Tensor] = learner(batch)
            learner.update(losses, optimizer, scaler, None)

    return step


def _task_step(
    name: str, task: int, *, plain: bool, precision: Precision | None = None, **switches: bool
) -> Callable[[], None]:
    fast, usual = way(plain=plain)
    fast = fast.model_copy(update=switches)
    learner, _ = _at_task(name, task, fast=fast)
    return _step(learner, _batch(_BATCH, _CLASSES * task), precision or usual, fast)


def _step_row(name: str, task: int) -> Measured:
    ours, plain = (_task_step(name, task, plain=plain) for plain in (False, True))
    return rate(_BATCH, ours, plain, repetitions=3)


@row
def dkt_step_02() -> Measured:
    """A step of DKT at task 2: frozen teacher, forward, losses, backward, AdamW; CIFAR form, batches of 128."""
    return _step_row("dkt", 2)


@row
def dkt_step_10() -> Measured:
    """The same at task 10."""
    return _step_row("dkt", 10)


@row
def dkt_step_20() -> Measured:
    """The same at task 20."""
    return _step_row("dkt", 20)


@row
def dkt_step_50() -> Measured:
    """The same at task 50."""
    return _step_row("dkt", 50)


@row
def imagenet_step() -> Measured:
    """A step of DKT at task 2 in its ImageNet form, images of 224 px, batches of 128; not among the rows of a CPU."""
    sides = []
    for plain in (False, True):
        fast, precision = way(plain=plain)
        learner, _ = _at_task("dkt", 2, fast=fast, side=224, **_IMAGENET)
        sides.append(_step(learner, _batch(_BATCH, 2 * _CLASSES, 224), precision, fast))
    return rate(_BATCH, *sides, repetitions=5)


@row
def dkt_step_fp32() -> Measured:
    """A step of DKT in fp32 on the fast paths, beside the plain ones."""
    ours = _task_step("dkt", 2, plain=False, precision=Precision("fp32", device()))
    return rate(_BATCH, ours, _task_step("dkt", 2, plain=True), repetitions=3)


@row
def dkt_step_fp32_kept() -> Measured:
    """The same with `fast.recompute=false`, which keeps what BatchNorm and GELU made."""
    ours = _task_step("dkt", 2, plain=False, precision=Precision("fp32", device()), recompute=False)
    return rate(_BATCH, ours, _task_step("dkt", 2, plain=True), repetitions=3)


def _utilisation(gigaflop: float, sides: list[Callable[[], None]]) -> Measured:
    """Arithmetic of steps as a share of what large bf16 matrix products reach, in the same turns."""
    a, b = (torch.randn(_MATRIX, _MATRIX, device=device()).bfloat16() for _ in range(2))
    ours, plain, product = seconds_of(*sides, lambda: a @ b, repetitions=3)
    peak = 2 * _MATRIX**3 / product / 1e9
    value, baseline = (gigaflop / seconds / peak for seconds in (ours, plain))
    return Measured(value, "of peak", baseline, value / baseline)


@row
def dkt_step_utilisation() -> Measured:
    """A step of DKT: its arithmetic beside the rate of bf16 matrix products of 4096 x 4096."""
    return _utilisation(_GIGAFLOP * _BATCH, [_task_step("dkt", 2, plain=plain) for plain in (False, True)])


@row
def dkt_step_growth() -> Measured:
    """A step at task 50 beside one at task 2."""
    ours, first = (_task_step("dkt", task, plain=False) for task in (50, 2))
    fifty, two = seconds_of(ours, first, repetitions=5)
    return Measured(1000 * fifty, "ms", 1000 * two, two / fifty)


def _peak(plain: bool, where: torch.device) -> float:
    measure_on(where)
    step = _task_step("dkt", 2, plain=plain)
    before = _highest()
    for _ in range(2):
        step()
    return _highest() - before


def _highest() -> float:
    return torch.cuda.max_memory_allocated() / 2**20 if device().type == "cuda" else _highest_resident()


def _highest_resident() -> float:
    """MiB of this process at its peak (Linux); `resource` would tell that of the process that started it too."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


@row
def dkt_step_memory() -> Measured:
    """What two steps of DKT add to the peak of the memory of a process that has built the networks.

    That is resident memory on a processor, and what torch has given out on a GPU.
    """
    found = []
    for plain in (False, True):  # each in a process of its own
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            found.append(pool.submit(_peak, plain, device()).result())
    value, baseline = found
    return Measured(value, "MiB", baseline, baseline / value)


@row
def finetuning_views() -> Measured:
    """Ten epochs of fine-tuning of DKT on 256 exemplars, with one view of each read once; plain: read ten times."""
    batches = [_batch(_BATCH, 4) for _ in range(2)]
    epochs, sides = 10, []
    for plain in (False, True):
        fast, precision = way(plain=plain)
        learner, (_, phase) = _at_task("dkt", 2, fast=fast)
        sides.append(_finetuning(learner, phase, batches, precision, fast, epochs, views=not plain))
    return rate(epochs * 2 * _BATCH, *sides, repetitions=3)


def _finetuning(
    learner: Learner, phase: Phase, batches: list[Batch], precision: Precision, fast: Fast, epochs: int, *, views: bool
) -> Callable[[], None]:
    learner.phase = replace(phase, views=1 if views else None)
    for item in phase.frozen:
        item.requires_grad_(False)
        if isinstance(item, nn.Module):
            item.eval()

    step = _steps(learner, precision, fast)

    def run() -> None:
        shown = batches
        if views:
            with torch.no_grad(), precision.autocast():
                shown = [Batch(learner.network.encode(batch.images), batch.labels, batch.ids) for batch in batches]
        for batch in shown * epochs:
            step(batch)

    return run


@row
def dytox_step_02() -> Measured:
    """A step of DyTox at task 2, batches of 128."""
    return _step_row("dytox", 2)


@row
def dytox_step_10() -> Measured:
    """The same at task 10."""
    return _step_row("dytox", 10)


@row
def dytox_step_20() -> Measured:
    """The same at task 20."""
    return _step_row("dytox", 20)


def _static_sides(**switches: bool) -> list[Callable[[], None]]:
    wide = {"width": 64, "stem_width": 32, "shortcut": "conv"}
    batch, recipe = _batch(_STATIC_BATCH, 100), Recipe(optimizer="sgd", lr=0.05, momentum=0.9)
    sides = []
    for plain in (False, True):
        fast, precision = way(plain=plain)
        fast = fast if plain else fast.model_copy(update=switches)
        student, teacher = (models["resnet_cifar"]((3, 32, 32), depth=depth, **wide) for depth in (8, 32))
        teacher.grow(100)
        terms = WeightedSum({"kd": (0.9, distillers["kd"](temperature=4.0))})
        learner = StaticDistillation(student, lambda _, s=student: s, lambda t=terms: t, lambda _, t=teacher: t)
        learner.begin_stage(Stage(0, range(100), recipe, has_memory=False))
        learner.to(device())
        fast.apply(learner)
        sides.append(_step(learner.train(), batch, precision, fast, recipe))
    return sides


@row
def static_step() -> Measured:
    """ResNet-32x4 teaches ResNet-8x4 by KD, batches of 64, SGD with momentum."""
    return rate(_STATIC_BATCH, *_static_sides(), repetitions=5)


@row
def static_step_compiled() -> Measured:
    """The same with `fast.compile_teacher=true`."""
    return rate(_STATIC_BATCH, *_static_sides(compile_teacher=True), repetitions=5)


@row
def static_step_utilisation() -> Measured:
    """The same beside the rate of bf16 matrix products."""
    return _utilisation(_STATIC_GIGAFLOP * _STATIC_BATCH, _static_sides())
