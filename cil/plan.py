"""What a run will be, before it is one: steps, parameters, multiply-adds, memory and time of every task.

The run is rehearsed with the real parts: the engine grows the learner task by task under the run's seeds, and every
phase takes a few steps on a few images, after which the weights are put back. Nothing is trained, nothing is written.
"""

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cil.build import Run
from cil.config import RunConfig, StaticConfig
from cil.costs import idle_parameters, multiply_adds, num_bytes, saved_bytes
from cil.engine import Engine
from cil.events import SilentLog
from cil.optim import Sampling, make_optimizer
from cil.progress import Progress
from cil.seeding import seeded
from cil.stages import Phase, Stage
from cil.static import build
from kd import Batch, Frozen
from kd.base import total

PROBE_IMAGES = 4  # BatchNorm over 2 passes no gradient on
TIMED_STEPS = 3
#: On a CPU the batch of a timed step is cut to about so many multiply-adds, which take a second or so.
TIMED_MULTIPLY_ADDS = 5e10


@dataclass(frozen=True)
class PhasePlan:
    """A phase of a task.

    Attributes:
        name: As in the log.
        num_samples: Samples it draws from.
        epochs: Passes.
        steps_per_epoch: Steps of a pass.
        images_per_epoch: Images shown in a pass, repeated views included.
        batch_size: Images of its largest step.
        num_trainable: Parameters of the learner that take gradients.
        idle: Those of them that get none in a step, by name of the parameter.
        multiply_adds: Of a step per image: student forward and backward, teacher forward, losses.
        gradient_bytes: Gradients.
        optimizer_bytes: State of the optimiser.
        activation_bytes: What autograd keeps between forward and backward of a step.
        seconds: Of all its epochs, without saving.
    """

    name: str
    num_samples: int
    epochs: int
    steps_per_epoch: int
    images_per_epoch: int
    batch_size: int
    num_trainable: int
    idle: Mapping[str, int]
    multiply_adds: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    seconds: float

    @property
    def num_steps(self) -> int:
        """Steps of all epochs."""
        return self.epochs * self.steps_per_epoch

    @property
    def num_images(self) -> int:
        """Images shown in all epochs."""
        return self.epochs * self.images_per_epoch

    @property
    def num_idle(self) -> int:
        """Parameters that take gradients and get none."""
        return sum(self.idle.values())

    @property
    def num_bytes(self) -> int:
        """What the phase takes beside the modules."""
        return self.gradient_bytes + self.optimizer_bytes + self.activation_bytes


@dataclass(frozen=True)
class TaskPlan:
    """A task of a run.

    Attributes:
        labels: Its classes in learned order.
        num_new_samples: Training images of its classes.
        num_parameters: Of the network.
        num_trainable: Those of them that learn in the first phase.
        phases: In order.
        multiply_adds: Of the answer to one image.
        num_exemplars: In memory after the task.
        exemplar_bytes: What they would take if their pixels were stored.
        model_bytes: Parameters and buffers of the learner without its teacher.
        teacher_bytes: Those of the teacher.
        num_evaluated: Images read for evaluation, each as often as it is read.
        num_embedded: Images read to choose exemplars.
        reading_seconds: Of evaluation and of the choice of exemplars.
    """

    labels: range
    num_new_samples: int
    num_parameters: int
    num_trainable: int
    phases: tuple[PhasePlan, ...]
    multiply_adds: int
    num_exemplars: int
    exemplar_bytes: int
    model_bytes: int
    teacher_bytes: int
    num_evaluated: int
    num_embedded: int
    reading_seconds: float

    @property
    def largest_phase(self) -> PhasePlan:
        """The one that takes most memory."""
        return max(self.phases, key=lambda phase: phase.num_bytes)

    @property
    def peak_bytes(self) -> int:
        """Modules, gradients, optimiser and activations, in the largest phase."""
        return self.model_bytes + self.teacher_bytes + self.largest_phase.num_bytes


@dataclass(frozen=True)
class Plan:
    """A whole run.

    Attributes:
        name: Of the run.
        description: Its task sequence in words.
        place: Number format, device and threads it was measured with.
        tasks: In order.
    """

    name: str
    description: str
    place: str
    tasks: tuple[TaskPlan, ...]

    @property
    def num_steps(self) -> int:
        """Optimiser steps."""
        return sum(phase.num_steps for task in self.tasks for phase in task.phases)

    @property
    def num_images(self) -> int:
        """Training images shown."""
        return sum(phase.num_images for task in self.tasks for phase in task.phases)

    @property
    def training_seconds(self) -> float:
        """Time of all phases."""
        return sum(phase.seconds for task in self.tasks for phase in task.phases)

    @property
    def reading_seconds(self) -> float:
        """Time of all evaluation and of all choices of exemplars."""
        return sum(task.reading_seconds for task in self.tasks)


def plan(config: RunConfig) -> Plan:
    """The plan of a run.

    Steps, samples, parameters, exemplars and multiply-adds are those of the run itself. Memory is that of tensors, so
    what the process and the data set take comes on top. Times are the median of a few steps of the first task and of
    the next, data path included, and carried over to the other tasks in proportion to multiply-adds.

    Raises:
        ValueError: If a part cannot be built as configured, there are too few samples for a batch, or networks are
            trained one after another.
        RunFailed: If a loss is not finite in a step.
    """
    if isinstance(config, StaticConfig):
        if len(config.networks) > 1:
            raise ValueError(
                "plan=true looks at one network, and a later one learns from those before it, which are not trained: "
                "plan without assistants and generations"
            )
        config = config.model_copy(update={"teacher_cache": None})  # a plan writes nothing
    run = build(config)
    rehearsal = Rehearsal(run)
    tasks = tuple(rehearsal.task(index) for index in range(run.num_stages))
    threads = torch.get_num_threads()
    place = f"{run.precision.name} on {run.precision.device}, {threads} thread{'s' if threads > 1 else ''}"
    return Plan(config.name, run.describe(), place, tasks)


class Unwritten(SilentLog):
    """An event log that keeps its events instead of writing them."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[dict[str, Any]] = []

    def write(self, event: str, /, **fields: Any) -> None:
        """Keep one event."""
        self.events.append({"event": event} | fields)


@dataclass(frozen=True)
class Pace:
    """How long a kind of work takes per image, and what it computes meanwhile."""

    seconds: float
    adds: int

    def of(self, adds: int) -> float:
        """Seconds per image of the same kind of work in another task, by its multiply-adds."""
        return self.seconds * adds / self.adds if self.adds else self.seconds


class Rehearsal:
    """Takes a run through its tasks without training it.

    Args:
        run: The parts of the run; they are used up.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.log = Unwritten()
        self.engine = Engine(run, self.log)
        self.engine.progress = Progress(total_images=0, num_stages=run.num_stages, quiet=True)
        self.paces: dict[tuple[str, bool], Pace] = {}

    def task(self, index: int) -> TaskPlan:
        """Grow to a task, try its phases, fill the memory, end the task. To be called in order."""
        run, engine, learner = self.run, self.engine, self.run.learner
        stage = run.stage(index)
        engine.begin(stage)
        started = self.log.events[-1]
        teacher_bytes = sum(
            num_bytes(module.state_dict().values()) for module in learner.modules() if isinstance(module, Frozen)
        )
        model_bytes = num_bytes(learner.state_dict().values()) - teacher_bytes
        phases, embedded, evaluated = [], 0, 1
        every = run.config.evaluation.every_epochs
        listed = learner.phases(stage)
        for number, phase in enumerate(listed):
            if phase.source == "memory" and not engine.memory_is_current(stage):
                self.fill_memory(stage)
                embedded += 1
            phases.append(self.phase(stage, number, phase))
            evaluated += (phase.recipe.epochs - 1) // every if every else 0
            evaluated += any(later.source == "memory" for later in listed[number + 1 : number + 2])
        learner.phase = None
        if run.memory.size and (not engine.memory_is_current(stage) or run.config.exemplars.when == "after_finetuning"):
            self.fill_memory(stage)
            embedded += 1
        with seeded(run.config.seed, "end", index):
            learner.end_stage(stage)
        adds = self.answer_multiply_adds()
        num_images = int(engine.num_images[: index + 1].sum())
        num_new = int(started["num_new_samples"])
        pace = self.reading_pace(stage, adds) if num_images else 0.0
        channels, height, width = run.data.input_shape
        return TaskPlan(
            labels=stage.labels,
            num_new_samples=num_new,
            num_parameters=started["num_parameters"],
            num_trainable=started["num_trainable"],
            phases=tuple(phases),
            multiply_adds=adds,
            num_exemplars=len(run.memory),
            exemplar_bytes=run.memory.exemplar_bytes(channels * height * width),
            model_bytes=model_bytes,
            teacher_bytes=teacher_bytes,
            num_evaluated=evaluated * num_images,
            num_embedded=embedded * num_new,
            reading_seconds=pace * (evaluated * num_images + embedded * num_new),
        )

    def fill_memory(self, stage: Stage) -> None:
        """Take the first images of each class as exemplars: as many as would be chosen, but not the chosen ones."""
        memory, num_classes = self.run.memory, self.run.tasks.num_classes
        quota = memory.quota(stage.num_seen, num_classes)
        labels = self.run.samples.labels
        first = {label: torch.nonzero(labels == label).flatten()[:quota].tolist() for label in stage.labels}
        memory.update(first, stage.num_seen, num_classes)

    def phase(self, stage: Stage, number: int, phase: Phase) -> PhasePlan:
        """Try a phase; the learner is the same before and after."""
        engine, learner = self.engine, self.run.learner
        ids = engine.batches.of_phase(phase, stage)
        batches = [len(some) for some, _ in engine.batches.plan(ids, stage, number, phase, epoch=0)]
        learner.phase = phase
        engine.set_trainable(phase)
        before = copy.deepcopy(learner.state_dict())
        epoch = self.begin_epoch(phase)
        with seeded(self.run.config.seed, "plan", stage.index, number):
            idle = self.idle(ids)
            adds, optimizer_bytes, activation_bytes = self.step_costs(phase, ids, max(batches))
            pace = self.training_pace(stage, number, phase, epoch, ids, adds)
        learner.load_state_dict(before)
        learner.zero_grad(set_to_none=True)
        trainable = [parameter for parameter in learner.parameters() if parameter.requires_grad]
        return PhasePlan(
            name=phase.name,
            num_samples=len(ids),
            epochs=phase.recipe.epochs,
            steps_per_epoch=len(batches),
            images_per_epoch=sum(batches),
            batch_size=max(batches),
            num_trainable=sum(parameter.numel() for parameter in trainable),
            idle=idle,
            multiply_adds=adds,
            gradient_bytes=num_bytes(trainable),
            optimizer_bytes=optimizer_bytes,
            activation_bytes=activation_bytes,
            seconds=pace * sum(batches) * phase.recipe.epochs,
        )

    def begin_epoch(self, phase: Phase) -> int:
        """Begin an epoch in which distillation counts: the second if a warm-up makes nothing of the first."""
        distillation, epoch = self.run.learner.distillation, 0
        if distillation is not None:
            distillation.begin_epoch(epoch, learning_rate=phase.recipe.peak_lr)
            if not distillation.counts and phase.recipe.epochs > 1:
                epoch = 1
                distillation.begin_epoch(epoch, learning_rate=phase.recipe.peak_lr)
        return epoch

    def batch(self, ids: Tensor, num_images: int, dtype: torch.dtype) -> Batch:
        """Images of noise under the ids and labels of samples from the whole range of `ids`."""
        device = self.run.precision.device
        some = ids[torch.linspace(0, len(ids) - 1, num_images).round().long()]
        images = torch.randn(num_images, *self.run.data.input_shape, dtype=dtype).to(device)
        learner = self.run.learner
        if learner.phase is not None and learner.phase.views is not None:
            with torch.no_grad():
                images = learner.network.encode(images)
        return Batch(images, self.run.samples.labels[some].to(device), some.to(device))

    def idle(self, ids: Tensor) -> dict[str, int]:
        """Parameters without gradient in a step, found in float64."""
        learner, precision = self.run.learner, self.run.precision
        learner.to(torch.float64)
        losses = learner(self.batch(ids, PROBE_IMAGES, torch.float64))
        total(losses.values()).backward()  # type: ignore[no-untyped-call]
        found = idle_parameters(learner)
        learner.zero_grad(set_to_none=True)
        learner.to(precision.dtype)
        return found

    def step_costs(self, phase: Phase, ids: Tensor, batch_size: int) -> tuple[int, int, int]:
        """Multiply-adds per image, bytes of the optimiser's state and of activations at `batch_size`.

        Activations grow with the batch, beside a part that does not (weights in the format of autocast): both follow
        from two sizes. What a loss keeps of pairs of samples grows faster, and is small.
        """
        learner, precision = self.run.learner, self.run.precision

        def forward(batch: Batch) -> dict[str, Tensor]:
            with precision.autocast():
                losses: dict[str, Tensor] = learner(batch)
            return losses

        constants = [*learner.parameters(), *learner.buffers()]
        small, large = (self.batch(ids, count * PROBE_IMAGES, precision.dtype) for count in (1, 2))
        kept = [saved_bytes(lambda batch=batch: total(forward(batch).values()), constants) for batch in (small, large)]  # type: ignore[misc]
        per_image = (kept[1] - kept[0]) / PROBE_IMAGES
        optimizer = make_optimizer(learner, phase.recipe, fused=self.run.config.fast.fused_optimizer)
        unscaled = torch.amp.GradScaler(precision.device.type, enabled=False)
        adds = multiply_adds(lambda: learner.update(forward(large), optimizer, unscaled, phase.recipe.clip_norm))
        state = num_bytes(value for values in optimizer.state.values() for value in values.values())
        return adds // (2 * PROBE_IMAGES), state, round(kept[0] + per_image * (batch_size - PROBE_IMAGES))

    def timed_images(self, adds: int, batch_size: int) -> int:
        """Images of a timed batch: all of them on an accelerator, few on a CPU if each is much work."""
        if self.run.precision.device.type != "cpu":
            return batch_size
        return min(batch_size, max(int(TIMED_MULTIPLY_ADDS / max(adds, 1)), 2 * PROBE_IMAGES))

    def pace(self, kind: str, later: bool, adds: int, work: Callable[[], object], num_images: int) -> float:
        """Seconds per image; measured once in the first task and once later, otherwise carried over."""
        if (kind, later) not in self.paces:
            work()
            times = []
            for _ in range(TIMED_STEPS):
                start = time.perf_counter()
                work()
                times.append(time.perf_counter() - start)
            self.paces[kind, later] = Pace(statistics.median(times) / num_images, adds)
        return self.paces[kind, later].of(adds)

    def training_pace(self, stage: Stage, number: int, phase: Phase, epoch: int, ids: Tensor, adds: int) -> float:
        """Seconds per image of the engine's own training step, at a learning rate of 0."""
        engine = self.engine
        count = min(self.timed_images(adds, phase.batch_size), len(ids))
        shown = ids[torch.linspace(0, len(ids) - 1, count).round().long()]
        whole = phase.recipe.changed(sampling=Sampling().model_dump())
        short = replace(phase, recipe=whole, loader_batch_size=count)
        engine.encoded = engine.encode(stage, number, short, shown)
        engine.set_trainable(phase)
        engine.optimizer = make_optimizer(self.run.learner, phase.recipe, fused=self.run.config.fast.fused_optimizer)
        engine.scaler = self.run.precision.scaler()
        engine.recorder = engine.make_recorder()

        def step() -> None:
            engine.train_epoch(stage, number, short, epoch, shown, [0.0] * (epoch + 1))

        return self.pace(phase.name, stage.index > 0, adds, step, count)

    def reading_pace(self, stage: Stage, adds: int) -> float:
        """Seconds per image of the run's own evaluation."""
        run = self.run
        known = torch.nonzero((run.samples.eval_labels >= 0) & (run.samples.eval_labels < stage.num_seen)).flatten()
        some = known[: self.timed_images(adds, run.reader.batch_size)]
        labels = torch.full_like(run.samples.eval_labels, -1)
        labels[some] = run.samples.eval_labels[some]
        sizes = run.tasks.task_sizes[: stage.index + 1]

        def read() -> None:
            run.reader.count(run.learner, run.samples.eval_images, labels, sizes)

        return self.pace("evaluation", stage.index > 0, adds, read, len(some))

    def answer_multiply_adds(self) -> int:
        """Multiply-adds of the answer to one image."""
        learner, precision = self.run.learner.eval(), self.run.precision
        image = torch.zeros(1, *self.run.data.input_shape, dtype=precision.dtype, device=precision.device)
        with torch.no_grad():
            return multiply_adds(lambda: learner.predict(image))
