"""The loop over stages, phases, epochs and batches; the only place that sums, logs and steps."""

import itertools
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from cil import checkpoint, distributed, snapshots
from cil.batches import Batches
from cil.build import Run
from cil.encoded import Encoded
from cil.evaluation import Counts
from cil.events import EventLog
from cil.folder import config_digest, machine
from cil.learners.base import Reading
from cil.optim import Carried, learning_rates, make_optimizer, set_learning_rate, state_by_name, take_state
from cil.profiling import NoProfile, Profile, profiled
from cil.progress import Progress
from cil.recorded import NotRecordable, Recorder
from cil.results import History, protocol
from cil.room import is_out_of_memory, largest_that_fits
from cil.seeding import SampleNoise, derive, sample_noise, seeded
from cil.stages import Phase, Stage
from cil.stopping import Signals
from cil.transfer import num_auxiliary, taught_by
from kd import DOT, Batch, Frozen
from kd.distributed import rank, world_size

_SAVE_SHARE = 50  # times as long as a save takes lie between two of them: 2 % of the time
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes per unit of ru_maxrss


class RunFailed(RuntimeError):
    """A run that cannot go on, in one sentence for a person."""


@dataclass
class Position:
    """Where a run is: the next step to train."""

    stage: int = 0
    begun: bool = False
    phase: int = 0
    epoch: int = 0
    step: int = 0

    def text(self) -> str:
        """For a person: what a state saved here goes on with."""
        return f"the state of stage {self.stage}, phase {self.phase}, epoch {self.epoch}, step {self.step}"


@dataclass
class Epoch:
    """What an epoch in work has come to.

    Attributes:
        sums: Each loss, summed over the steps.
        images: Shown so far.
        seconds: Spent so far.
        skipped: Steps left out, of which the losses do not count.
    """

    sums: dict[str, Tensor] = field(default_factory=dict)
    images: int = 0
    seconds: float = 0.0
    skipped: int = 0


class Engine:
    """Trains a learner on every stage in order, and writes the run folder.

    With several processes every one runs this; what they do apart is said in `cil.distributed`. Rank 0 alone writes.

    Args:
        run: The parts of the run.
        log: The events; a `SilentLog` for all but rank 0.
        signals: What ends the run from outside; None for nothing.
    """

    def __init__(self, run: Run, log: EventLog, signals: Signals | None = None) -> None:
        self.parts = run
        self.config, self.data, self.tasks, self.samples = run.config, run.data, run.tasks, run.samples
        self.learner, self.memory, self.precision, self.reader = run.learner, run.memory, run.precision, run.reader
        self.batches = Batches(run)
        self.log = log
        self.folder = run.config.folder
        self.signals = signals or Signals()
        self.position = Position()
        self.epoch = Epoch()
        self.history = History()
        self.saved_at, self.save_seconds, self.steps_since = time.monotonic(), 0.0, 0
        self.kept = "nothing, it had not been saved yet"
        self.model: nn.Module = self.learner
        #: Of the phase in work, if its steps can be recorded.
        self.recorder: Recorder | None = None
        #: What a phase with `views` is shown instead of images.
        self.encoded: Encoded | None = None
        wanted = run.config.profile and rank() == 0
        self.profile = Profile(self.folder / "profile", run.num_stages) if wanted else NoProfile()
        self.optimizer: torch.optim.Optimizer | None = None
        self.scaler = run.precision.scaler()
        self.saved_optimizer: dict[str, Any] | None = None
        #: Of the classes, at the last evaluation; None if their exemplars were not all there.
        self.means: Tensor | None = None
        #: What the optimiser of a phase knew at its end, for the phase of that name in the next stage.
        self.carried: dict[str, Carried] = {}
        self.seconds: dict[str, float] = defaultdict(float)
        labels = run.samples.eval_labels.numpy()
        self.num_images = np.array(
            [np.isin(labels, run.tasks.labels(task)).sum() for task in range(run.tasks.num_tasks)]
        )
        self.writes = rank() == 0
        self.progress = Progress(total_images=0, num_stages=run.num_stages, quiet=not self.writes)
        distributed.prepare(self.learner, *self.learner.speakers())

    def run(self) -> dict[str, Any]:
        """Train every stage; after each, evaluate on all classes seen so far. Returns what `metrics.json` holds.

        After a resume the grown network is rebuilt from the checkpoint: `begin_stage` never runs twice.
        """
        self.restore()
        stages = [self.parts.stage(index) for index in range(self.parts.num_stages)]
        self.progress = Progress(
            total_images=self.total_images,
            num_stages=self.parts.num_stages,
            done_images=self.history.images,
            quiet=not self.writes,
        )
        with self.progress:
            if self.position == Position():  # with a state, the log has what was looked at before
                self.parts.started(self.log, self.progress)
            for stage in stages[self.position.stage :]:
                self.train(stage)
                self.finish(stage)
                if stage is not stages[-1] and self.writes:
                    checkpoint.write_json(self.folder / "metrics.json", self.report(), checked=True)
        report = self.report()
        self.log.write(
            "run_finished", wall_seconds=report["wall_seconds"], images_per_second=report["images_per_second"]
        )
        if self.writes:
            # from now on the run counts as finished
            checkpoint.write_json(self.folder / "metrics.json", report, checked=True)
            checkpoint.forget_previous(self.folder)
        return report

    # Stages

    def train(self, stage: Stage) -> None:
        """Train the phases of a stage that are still to come, and choose its exemplars; it is not evaluated."""
        self.progress.stage(stage.index)
        if not self.position.begun:
            self.begin(stage)
        phases = self.learner.phases(stage)
        for number in range(self.position.phase, len(phases)):
            self.fit(stage, number, phases)
        self.learner.phase = None
        if self.memory.size and (not self.memory_is_current(stage) or self.config.exemplars.when == "after_finetuning"):
            self.choose_exemplars(stage)
        with seeded(self.config.seed, "end", stage.index):
            self.learner.end_stage(stage)

    def begin(self, stage: Stage) -> None:
        """Let the learner grow, with random numbers that belong to this stage alone."""
        before = self.learner.distillation
        with seeded(self.config.seed, "begin", stage.index):
            self.learner.begin_stage(stage)
        if self.learner.distillation is not before:  # adapters made anew have nothing to go on from
            self.carried = {
                phase: {name: state for name, state in carried.items() if not name.startswith("distillation.")}
                for phase, carried in self.carried.items()
            }
        self.learner.to(self.precision.device, self.precision.dtype)
        self.prepare(stage)
        self.position = Position(stage.index, begun=True)
        self.seconds.clear()
        self.set_trainable(self.learner.phases(stage)[0])
        parameters = list(self.learner.network.parameters())
        self.log.write(
            "stage_started",
            stage=stage.index,
            labels=[stage.labels.start, stage.labels.stop - 1],
            class_names=[self.data.class_names[self.tasks.original(label)] for label in stage.labels],
            num_new_samples=len(self.batches.ids("new", stage)),
            num_parameters=sum(parameter.numel() for parameter in parameters),
            num_trainable=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
            num_auxiliary=num_auxiliary(self.learner.distillation),
        )

    def prepare(self, stage: Stage) -> None:
        """What the modules of a stage need once they are built: to know the samples, and the other processes."""
        ids = self.batches.ids("new+memory", stage)
        with seeded(self.config.seed, "remember", stage.index):
            self.learner.remember(ids, self.samples.labels[ids])
        self.config.fast.apply(self.learner)
        distributed.prepare(self.learner, *self.learner.speakers())

    def finish(self, stage: Stage) -> None:
        """Evaluate, record and save a stage."""
        found = self.evaluate(stage, "after")
        counts = next(iter(found.values()))
        history = self.history
        for name, by in found.items():
            history.accuracy_by.setdefault(name, []).append(by.accuracy)
        history.correct.append(counts.correct)
        history.top5.append(counts.top5 / sum(counts.num_images))
        history.exemplars.append(len(self.memory))
        history.num_parameters.append(sum(parameter.numel() for parameter in self.learner.network.parameters()))
        if len(history.before_finetuning) <= stage.index:
            history.before_finetuning.append(None)
        self.position = Position(stage.index + 1)
        summary = {
            "stage": stage.index,
            "config": self.digest,
            "labels": [stage.labels.start, stage.labels.stop - 1],
            "network": self.learner.network.structure(),
            **self.parts.facts(stage),
            "correct": counts.correct,
            "num_images": counts.num_images,
            "exemplars": self.memory.state_dict(),
            "data": {
                "input_shape": list(self.data.train.input_shape),
                "mean": list(self.data.mean),
                "std": list(self.data.std),
                "class_names": [self.data.class_names[self.tasks.original(label)] for label in range(stage.num_seen)],
                "class_labels": [self.tasks.original(label) for label in range(stage.num_seen)],
            },
        }
        if self.writes and self.config.snapshots:
            with self.timed("report"):
                snapshots.write(self.folder, self.parts, stage, counts, self.means)
        # before the state is saved, since a resume keeps only what the log held then
        self.log.write(
            "stage_finished",
            stage=stage.index,
            seconds=dict(self.seconds),
            peak_resident_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT,
        )
        if self.writes:
            means = self.means if self.learner.read_by == "nearest_mean" else None
            checkpoint.save_stage(self.folder, stage.index, self.state(), summary, means)
        self.kept = self.position.text()
        self.saved_at, self.steps_since = time.monotonic(), 0
        self.parts.tell(self.progress, history, self.num_images, stage)

    @cached_property
    def total_images(self) -> int:
        """Training images of the whole run, each counted as often as it is seen."""
        stages = [self.parts.stage(index) for index in range(self.parts.num_stages)]
        return sum(self.batches.num_images(stage, phase) for stage in stages for phase in self.learner.phases(stage))

    def report(self) -> dict[str, Any]:
        """What `metrics.json` holds."""
        return self.parts.metrics(self.history, self.num_images, round(self.log.elapsed_seconds, 3))

    # Training

    def fit(self, stage: Stage, number: int, phases: list[Phase]) -> None:
        """Train one phase, then read the accuracy before fine-tuning if that comes next."""
        phase = phases[number]
        if phase.source == "memory" and not self.memory_is_current(stage):
            self.choose_exemplars(stage)
        if self.position.phase != number:
            self.position.phase, self.position.epoch, self.position.step = number, 0, 0
            self.saved_optimizer = None
        self.learner.phase = phase
        ids = self.batches.of_phase(phase, stage)
        steps = len(self.batches.plan(ids, stage, number, phase, epoch=0))
        if not steps:
            raise RunFailed(f"stage {stage.index}, phase {phase.name}: there is no batch to train on")
        self.encoded = self.encode(stage, number, phase, ids)
        self.set_trainable(phase)
        rates = learning_rates(phase.recipe.schedule, phase.recipe.epochs, phase.recipe.peak_lr, steps)
        self.model = distributed.wrap(self.learner)
        self.optimizer = make_optimizer(self.learner, phase.recipe, fused=self.config.fast.fused_optimizer)
        self.scaler = self.precision.scaler(skips=phase.recipe.skip_nonfinite)
        if self.saved_optimizer is not None:
            self.optimizer.load_state_dict(self.saved_optimizer["optimizer"])
            self.scaler.load_state_dict(self.saved_optimizer["scaler"])
            self.saved_optimizer = None
        elif phase.name in self.carried:
            fresh = [f"network.{part}" for part in self.learner.network.fresh_parts]
            take_state(self.optimizer, self.learner, self.carried.pop(phase.name), fresh)
        self.recorder = self.make_recorder()
        self.progress.phase(phase.name, phase.recipe.epochs, steps)
        if self.position.epoch == self.position.step == 0:
            self.log.write(
                "phase_started",
                stage=stage.index,
                phase=phase.name,
                phase_index=number,
                epochs=phase.recipe.epochs,
                num_samples=len(ids),
                num_steps=steps,
            )
        self.profile.begin(stage, number, phase)
        for epoch in range(self.position.epoch, phase.recipe.epochs):
            self.train_epoch(stage, number, phase, epoch, ids, rates)
            self.position.epoch = epoch + 1
            every = self.config.evaluation.every_epochs
            if every and (epoch + 1) % every == 0 and epoch + 1 < phase.recipe.epochs:
                self.evaluate(stage, f"{phase.name} epoch {epoch + 1}")
                self.set_trainable(phase)
                self.progress.phase(phase.name, phase.recipe.epochs, steps)
            wanted = self.config.checkpoint.every_epochs
            if self.is_due() or (wanted and (epoch + 1) % wanted == 0):
                self.save(stage)
        if phase.recipe.carries_state and self.learner.continues:
            self.carried[phase.name] = state_by_name(self.optimizer, self.learner)
        if written := self.profile.end():
            self.progress.say(written)
        if self.recorder is not None:
            self.learner.zero_grad(set_to_none=True)  # what the next phase does not train would keep its memory
        self.optimizer, self.model, self.encoded, self.recorder = None, self.learner, None, None
        if any(later.source == "memory" for later in phases[number + 1 : number + 2]):
            counts = next(iter(self.evaluate(stage, "before_finetuning").values()))
            self.history.before_finetuning.append(counts.accuracy)

    def make_recorder(self) -> Recorder | None:
        """What records the steps of the phase in work, whose optimiser is made; None if they cannot be."""
        assert self.optimizer is not None
        if self.config.fast.cuda_graphs and Recorder.suits(self.learner, self.optimizer, self.precision.device):
            return Recorder(self.learner, self.optimizer, self.scaler, self.precision)
        return None

    def train_epoch(self, stage: Stage, number: int, phase: Phase, epoch: int, ids: Tensor, rates: list[float]) -> None:
        """One pass, or the rest of one: augment, forward, sum, backward, step."""
        assert self.optimizer is not None
        start, first = time.perf_counter() - self.epoch.seconds, self.position.step
        key = self.batches.key(stage, number, epoch)
        by_step = phase.recipe.schedule.unit == "step"
        plan = self.batches.plan(ids, stage, number, phase, epoch)
        shares = [(distributed.share(some), distributed.share(views)) for some, views in plan][first:]
        view_key = self.batches.view_key(stage, number, phase, epoch)
        first_rate = rates[epoch * len(plan) if by_step else epoch]
        self.learner.begin_epoch(epoch, learning_rate=first_rate, view_key=view_key, again=first > 0)
        batches = self.shown(shares, view_key) if self.encoded is None else self.encoded.shown(shares, view_key)
        steps = zip(range(first, len(plan)), plan[first:], shares, profiled("data", batches), strict=True)
        with self.signals.deferred():
            for step, (some, _), own, batch in steps:
                set_learning_rate(self.optimizer, rates[epoch * len(plan) + step if by_step else epoch])
                noise = SampleNoise(key, *(part.to(self.precision.device, non_blocking=True) for part in own))
                if world_size() > 1:
                    batch = self.with_labels_of_all(batch, some)
                losses = self.step(phase, batch, noise, (key, epoch, step), len(some))
                for name, loss in losses.items():
                    self.epoch.sums[name] = self.epoch.sums.get(name, 0) + loss
                self.epoch.images += len(some)
                self.epoch.seconds = time.perf_counter() - start
                self.position.step = step + 1
                self.steps_since += 1
                shown = None
                if self.progress.wants_losses():
                    shown = {name: float(loss) for name, loss in losses.items()}
                self.progress.step(epoch, step, shown, len(some))
                self.profile.step()
                stopping = self.signals.pending is not None and not self.signals.patient
                if stopping or (step + 1 < len(plan) and self.is_due()):
                    self.check_finite(phase)
                    self.save(stage)
                    self.signals.raise_pending()
        sums, images = self.epoch.sums, self.epoch.images
        if self.epoch.skipped == len(plan):
            raise RunFailed(f"stage {stage.index}, phase {phase.name}, epoch {epoch}: no step had finite gradients")
        means = {name: float(value) / (len(plan) - self.epoch.skipped) for name, value in sums.items()}
        seconds = time.perf_counter() - start
        self.check_finite(phase)
        self.history.images += images
        self.history.training_seconds += seconds
        self.seconds[phase.name] += seconds
        self.log.write(
            "epoch",
            stage=stage.index,
            phase=phase.name,
            phase_index=number,
            epoch=epoch,
            learning_rate=rates[(epoch + 1) * len(plan) - 1 if by_step else epoch],
            losses=means,
            num_images=images,
            images_per_second=images / seconds,
            seconds=seconds,
        )
        self.position.step, self.epoch = 0, Epoch()

    def check_finite(self, phase: Phase) -> None:
        """Refuse to save or go on with numbers that are none.

        Raises:
            RunFailed: If a loss of this epoch, or a weight, is not finite.
        """
        counted = max(self.position.step - self.epoch.skipped, 1)
        losses = {name: float(value) / counted for name, value in self.epoch.sums.items()}
        values = itertools.chain(self.learner.named_parameters(), self.learner.network.named_buffers())
        weights = (name for name, value in values if not torch.isfinite(value).all())
        if not np.isfinite(list(losses.values())).all():
            what = f"the loss is not finite ({losses})"
        elif (name := next(weights, None)) is not None:
            what = f"a weight is not finite ({name}; losses {losses})"
        else:
            return
        advice = "Try a lower optim.lr, optim.clip_norm=1 or precision=fp32"
        raise RunFailed(f"{self.place(phase)}: {what}; kept is {self.kept}. {advice}")

    def place(self, phase: Phase) -> str:
        """The step in work, for a person."""
        position = self.position
        return f"stage {position.stage}, phase {phase.name}, epoch {position.epoch}, step {position.step}"

    def step(
        self, phase: Phase, batch: Batch, noise: SampleNoise, place: tuple[int, int, int], num_all: int
    ) -> dict[str, Tensor]:
        """Forward, sum, backward, step; returns the losses, none of a step that was left out.

        Args:
            phase: The phase in work.
            batch: This process's share.
            noise: What is random in the networks.
            place: Key and number of the epoch, number of the step.
            num_all: Samples of all processes.

        Raises:
            RunFailed: If there is not enough memory, with what would fit, or the step cannot be recorded.
        """
        try:
            return self._step(phase, batch, noise, place, num_all)
        except NotRecordable as error:
            raise RunFailed(
                f"{self.place(phase)}: the step cannot be recorded as a CUDA graph ({error}); kept is {self.kept}. The "
                "same command with fast.cuda_graphs=false goes on from there"
            ) from error
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        more = ""
        if self.recorder is not None:
            self.recorder, more = None, ". A recorded step needs more than fast.cuda_graphs=false"
        # behind the error, whose traceback holds what the step had computed
        raise RunFailed(
            f"{self.place(phase)}: out of memory ({reason}). {self.advice(phase, batch, noise, place)}{more}"
        )

    def advice(self, phase: Phase, batch: Batch, noise: SampleNoise, place: tuple[int, int, int]) -> str:
        """What would fit where a step did not; the learner is of no use after that."""
        count = len(batch.images)

        def attempt(num: int) -> None:
            views = {name: view[:num] for name, view in batch.views.items()}
            part = Batch(batch.images[:num], batch.labels[:num], batch.ids[:num], views=views)
            some = replace(noise, ids=noise.ids[:num], views=noise.views[:num])
            self._step(phase, part, some, place, num)

        if world_size() > 1:  # the others wait in a sum over all processes
            fits = f"A process had {count} images: more processes, or a smaller optim.batch_size"
        elif (num := largest_that_fits(attempt, count)) is None:
            fits = "Not even one image fits: a smaller model"
        else:
            fits = f"Of the {count} images of a batch {num} fit: optim.batch_size={num} in another run"
        return f"{fits}, or precision=bf16, needs less; kept is {self.kept}"

    def _step(
        self, phase: Phase, batch: Batch, noise: SampleNoise, place: tuple[int, int, int], num_all: int
    ) -> dict[str, Tensor]:
        assert self.optimizer is not None
        key, epoch, step = place
        # DOT averages its two gradients over the processes itself
        alone: AbstractContextManager[Any] = nullcontext()
        if isinstance(self.optimizer, DOT) and isinstance(self.model, DistributedDataParallel):
            alone = self.model.no_sync()
        before = [(buffer, buffer.clone()) for buffer in self.learner.buffers()] if phase.recipe.skip_nonfinite else []
        with seeded(key, step), sample_noise(noise), distributed.sharing(num_all), alone:
            scale = self.scaler.get_scale()
            recorded = self.recorder(batch, noise) if self.recorder is not None else None
            if recorded is not None:
                losses = recorded
                self.learner.advance(self.optimizer, self.scaler, phase.recipe.clip_norm)
            else:
                with self.precision.autocast(), record_function("forward"):
                    if step == 0 and epoch == 0 and (line := self.learner.notice(batch)):
                        self.progress.say(line)
                    losses = self.model(batch)
                self.learner.update(losses, self.optimizer, self.scaler, phase.recipe.clip_norm)
        if self.scaler.get_scale() < scale:
            self.history.skipped_steps += 1
            if phase.recipe.skip_nonfinite:
                for buffer, value in before:
                    buffer.copy_(value)
                self.epoch.skipped += 1
                return {}
        return {name: loss.detach() for name, loss in losses.items()}  # the graph is not kept until the next step

    def shown(self, shares: list[tuple[Tensor, Tensor]], view_key: int) -> Iterator[Batch]:
        """This process's share of one batch after another: ids and views of `shares`."""
        device = self.precision.device
        for (ids, views), pixels in zip(shares, self.samples.images.stream(shares, view_key), strict=True):
            on_device = (part.to(device, non_blocking=True) for part in (ids, views))
            yield self.batch(SampleNoise(view_key, *on_device), ids, pixels)

    def encode(self, stage: Stage, number: int, phase: Phase, ids: Tensor) -> Encoded | None:
        """What the frozen part of a network makes of the samples of a phase that shows the same views again."""
        if phase.views is None:
            return None
        reader = replace(self.reader, precision=self.precision)
        to_come = range(self.position.epoch, phase.recipe.epochs)
        keys = [self.batches.view_key(stage, number, phase, epoch) for epoch in to_come]
        with self.timed("encoding"):
            found = {
                key: reader.answers(self.learner, self.learner.network.encode, self.samples.images, ids, key)
                for key in dict.fromkeys(keys)
            }
        return Encoded(found, ids, self.samples.labels.to(self.precision.device))

    def batch(self, noise: SampleNoise, ids: Tensor, pixels: Tensor) -> Batch:
        """The augmented images of some samples."""
        raw = pixels.to(self.precision.device, non_blocking=True)
        images = self.samples.transform.train(raw, noise).to(self.precision.dtype)
        views = {}
        if self.samples.strong is not None and taught_by(self.learner.distillation, "strong"):
            other = replace(noise, key=derive(noise.key, "strong"))
            views["strong"] = self.samples.strong.train(raw, other).to(self.precision.dtype)
        labels = self.samples.labels[ids].to(self.precision.device, non_blocking=True)
        return Batch(images, labels, noise.ids, views=views)

    def with_labels_of_all(self, batch: Batch, ids: Tensor) -> Batch:
        """A batch whose images are a share, and whose labels are those of the whole batch, as the losses need them."""
        device = self.precision.device
        return replace(batch, labels=self.samples.labels[ids].to(device), ids=ids.to(device), gathered=True)

    def set_trainable(self, phase: Phase) -> None:
        """Gradients and training mode for what learns in this phase; teachers stay as they are."""
        self.learner.requires_grad_(True)
        for module in self.learner.modules():
            if isinstance(module, Frozen):
                module.requires_grad_(False)
        self.learner.train()
        for item in phase.frozen:
            item.requires_grad_(False)
            if phase.frozen_in_eval and isinstance(item, nn.Module):
                item.eval()

    # Memory and evaluation

    def memory_is_current(self, stage: Stage) -> bool:
        """Whether the exemplars of the new classes have been chosen."""
        return stage.labels[-1] in self.memory.per_class()

    def choose_exemplars(self, stage: Stage) -> None:
        """Choose exemplars of the new classes and shorten the old ones. All processes read features, rank 0 chooses."""
        self.progress.phase("exemplars")
        start = time.perf_counter()
        with self.timed("memory"):
            quota = self.memory.quota(stage.num_seen, self.tasks.num_classes)
            chosen = {}
            for label in stage.labels:
                ids = torch.nonzero(self.samples.labels == label).flatten()
                key = derive(self.config.seed, "exemplars", stage.index)
                noise_key = key if self.config.exemplars.transform == "train" else None
                features = self.reader.features(self.learner, self.samples.images, ids, noise_key)
                if self.writes:
                    chosen[label] = ids[self.memory.select(features, quota, seed_key=derive(key, label))].tolist()
            self.memory.update(distributed.broadcast(chosen), stage.num_seen, self.tasks.num_classes)
        self.log.write(
            "memory_updated",
            stage=stage.index,
            num_exemplars=len(self.memory),
            per_class=quota,
            seconds=time.perf_counter() - start,
        )

    def evaluate(self, stage: Stage, when: str) -> dict[Reading, Counts]:
        """Count right answers over all classes seen, in every way there is to read them; every reading is recorded.

        The first is the one that counts (`Learner.read_by`): by the learner's scores, or, once the exemplars of all
        classes are there, by the nearest of their means.
        """
        self.progress.phase("evaluation")
        start = time.perf_counter()
        sizes = self.tasks.task_sizes[: stage.index + 1]
        images, labels = self.samples.eval_images, self.samples.eval_labels
        found: dict[Reading, Counts] = {}
        with self.timed("evaluation"):
            self.means = self.class_means(stage)
            if self.means is not None:
                found["nearest_mean"] = self.reader.count(self.learner, images, labels, sizes, self.means)
            if self.means is None or self.config.evaluation.nearest_mean:
                found["classifier"] = self.reader.count(self.learner, images, labels, sizes)
        found = dict(sorted(found.items(), key=lambda item: item[0] != self.learner.read_by))
        counts = next(iter(found.values()))
        self.history.test_reads += self.samples.eval_split == "test"
        self.log.write(
            "test_read", stage=stage.index, when=when, split=self.samples.eval_split, num_images=sum(counts.num_images)
        )
        self.log.write(
            "evaluated",
            stage=stage.index,
            when=when,
            accuracy=counts.accuracy,
            accuracy_by={name: by.accuracy for name, by in found.items()},
            per_task=[right / images for right, images in zip(counts.correct, counts.num_images, strict=True)],
            accuracy_old=counts.part(slice(0, stage.index)),
            accuracy_new=counts.part(slice(stage.index, None)),
            top5=counts.top5 / sum(counts.num_images),
            seconds=time.perf_counter() - start,
        )
        return found

    def class_means(self, stage: Stage) -> Tensor | None:
        """The means of the exemplars, if they are to be read and those of every class have been chosen."""
        wanted = self.config.evaluation.nearest_mean or self.learner.read_by == "nearest_mean"
        if not (wanted and self.memory.size and self.memory_is_current(stage)):
            return None
        ids = self.memory.ids()
        return self.reader.class_means(self.learner, self.samples.images, ids, self.samples.labels[ids])

    # State

    @property
    def protocol(self) -> str:
        """What this run's results are comparable with; a state of another protocol is none of this run."""
        return protocol(self.config, self.data, self.tasks)

    @property
    def digest(self) -> str:
        """What the weights of this run belong to."""
        return config_digest(self.config.model_dump(mode="json"))

    def is_due(self) -> bool:
        """Whether it is time to save the state."""
        wanted = self.config.checkpoint
        if wanted.every_steps and self.steps_since >= wanted.every_steps:
            return True
        if wanted.every_seconds is None:
            return False
        waited = time.monotonic() - self.saved_at
        return waited >= max(wanted.every_seconds, _SAVE_SHARE * self.save_seconds)

    def save(self, stage: Stage) -> None:
        """Save the state, on rank 0."""
        start = time.monotonic()
        if self.writes:
            with self.timed("checkpoint"):
                checkpoint.save_state(self.folder, stage.index, self.state())
        self.kept = self.position.text()
        self.saved_at, self.steps_since = time.monotonic(), 0
        self.save_seconds = self.saved_at - start

    def state(self) -> dict[str, Any]:
        """Everything the run needs to go on. Random numbers need no state: they come from keys (`cil.seeding`)."""
        training = None
        if self.optimizer is not None:
            training = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        return {
            "position": asdict(self.position),
            "structure": self.learner.structure(),
            "learner": self.learner.state_dict(),
            "training": training,
            "epoch": asdict(self.epoch),
            "config": self.digest,
            "protocol": self.protocol,
            "carried": self.carried,
            "memory": self.memory.state_dict(),
            "history": self.history.to_json(),
            "seconds": dict(self.seconds),
            "log_position": self.log.position(),
        }

    def restore(self) -> None:
        """Go back to the newest checkpoint, if there is one."""
        state = checkpoint.load_state(self.folder, self.precision.device, self.protocol)
        resumed_at = None
        if state is not None:
            if state.get("config", self.digest) != self.digest:
                raise ValueError(
                    f"{self.folder}: its newest checkpoint is of a run of another config, copied here; take it away, "
                    "or begin again with overwrite=true"
                )
            self.position = Position(**state["position"])
            self.learner.rebuild(state["structure"])
            self.learner.to(self.precision.device, self.precision.dtype)
            self.memory.load_state_dict(state["memory"])
            self.prepare(self.parts.stage(min(self.position.stage, self.parts.num_stages - 1)))
            self.learner.load_state_dict(state["learner"])
            self.saved_optimizer = state["training"]
            self.epoch = Epoch(**state["epoch"])
            self.carried = state["carried"]
            self.kept = self.position.text()
            self.history = History(**state["history"])
            self.seconds.update(state["seconds"])
            self.log.truncate(state["log_position"])
            resumed_at = {key: value for key, value in asdict(self.position).items() if key != "begun"}
        else:
            self.log.truncate(0)
        self.log.write(
            "run_started",
            name=self.config.name,
            resumed_at=resumed_at,
            num_processes=world_size(),
            num_stages=self.parts.num_stages,
            total_images=self.total_images,
            **machine(self.precision),
        )

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time of a block to a part of the stage."""
        start = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - start
