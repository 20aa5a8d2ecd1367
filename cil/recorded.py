"""A training step as a CUDA graph.

A step of DKT starts some two thousand small operations. A GPU is done with each sooner than Python can start the next,
so it waits most of the time. A CUDA graph records what is started once, and starts all of it again by one call: the
same kernels on the same memory, and so the same numbers. What differs from step to step is copied to where the graph
reads it: images, labels, ids, and the keys of the noise.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from cil.learners.base import Learner
from cil.precision import Precision
from cil.profiling import RECORDED
from cil.room import is_out_of_memory
from cil.seeding import SampleNoise, derive, sample_noise
from kd import DOT, Batch
from kd.distributed import world_size

Losses = dict[str, Tensor]

_MOST_WORDS = 1024  # purposes that a network may draw noise for


@dataclass(frozen=True)
class _Noise(SampleNoise):
    """Noise whose key is read from memory, so that a graph that was recorded once draws other numbers every epoch."""

    words: Tensor = field(default_factory=lambda: torch.zeros(_MOST_WORDS, dtype=torch.int64))
    purposes: list[str] = field(default_factory=list)

    def word(self, purpose: str) -> Tensor:
        """The same number as that of other noise, where the graph finds it."""
        if purpose not in self.purposes:
            self.purposes.append(purpose)
        return self.words[self.purposes.index(purpose)]

    def follow(self, noise: SampleNoise, *, new_key: bool) -> None:
        """Draw what `noise` draws."""
        self.ids.copy_(noise.ids)
        self.views.copy_(noise.views)
        if new_key:
            words = [derive(noise.key, purpose) for purpose in self.purposes]
            self.words[: len(words)] = torch.tensor(words, dtype=torch.int64)


@dataclass
class _Recording:
    """A recorded step: how to do it again, and where it reads and writes."""

    replay: Callable[[], object]
    batch: Batch
    noise: _Noise
    losses: Losses
    gradients: list[tuple[nn.Parameter, Tensor | None]]
    key: int | None = None

    def __call__(self, batch: Batch, noise: SampleNoise) -> Losses:
        for own, given in zip(_tensors(self.batch), _tensors(batch), strict=True):
            own.copy_(given)
        self.noise.follow(noise, new_key=noise.key != self.key)
        self.key = noise.key
        for parameter, gradient in self.gradients:  # which a step that was not recorded may have set
            if parameter.grad is not gradient:
                parameter.grad = gradient
        self.replay()
        return self.losses


def _tensors(batch: Batch) -> list[Tensor]:
    return [batch.images, batch.labels, batch.ids, *batch.views.values()]


def capture(compute: Callable[[], Losses]) -> tuple[Callable[[], object], Losses]:
    """Record what `compute` starts, without doing it; returns what does it, and what it gives."""
    graph = torch.cuda.CUDAGraph()
    # other threads may go on calling CUDA: those that bring images into pinned memory do
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        losses = compute()
    return graph.replay, losses


class Recorder:
    """Losses and gradients of the steps of a phase: the first of every shape step by step, the others recorded.

    Args:
        learner: In training; what it learns is settled.
        optimizer: Of the phase.
        scaler: Of the phase.
        precision: What it computes in.
        say: Tells a person a line.
    """

    def __init__(
        self,
        learner: Learner,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        precision: Precision,
        say: Callable[[str], None],
    ) -> None:
        self.learner, self.optimizer, self.scaler, self.precision, self.say = learner, optimizer, scaler, precision, say
        #: By shape of the batch; None where one has been seen.
        self._recordings: dict[Hashable, _Recording | None] = {}
        self._weights_then: Hashable = None
        self._failed = False

    @staticmethod
    def suits(learner: Learner, optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
        """Whether the steps can be recorded: on one GPU, with losses that are functions of tensors alone."""
        terms = learner.distillation.distillers.values() if learner.distillation is not None else ()
        return (
            device.type == "cuda"
            and world_size() == 1
            and learner.recordable
            and all(getattr(term, "recordable", False) for term in terms)
            and not isinstance(optimizer, DOT)
        )

    def __call__(self, batch: Batch, noise: SampleNoise) -> Losses | None:
        """The losses of a batch, with the gradients where the optimiser reads them; None if it is not recorded."""
        if self._failed:
            return None
        if (weights := self._weights()) != self._weights_then:
            self._recordings.clear()
            self._weights_then = weights
        shape = tuple((tensor.shape, tensor.dtype) for tensor in _tensors(batch))
        if shape not in self._recordings:
            self._recordings[shape] = None  # what a library does at its first call cannot be recorded
            return None
        recording = self._recordings[shape]
        if recording is None:
            recording = self._record(batch, noise)
            if recording is None:
                return None
            self._recordings[shape] = recording
        with record_function(RECORDED):
            return recording(batch, noise)

    def _weights(self) -> Hashable:
        """What is a number in Python, and so the same in every repetition of a recording."""
        terms = self.learner.distillation
        return () if terms is None else (terms.task_weight, *(terms.weight(name) for name in terms.weights))

    def _record(self, batch: Batch, noise: SampleNoise) -> _Recording | None:
        device = self.precision.device
        own = replace(
            batch,
            images=batch.images.clone(),
            labels=batch.labels.clone(),
            ids=batch.ids.clone(),
            views={name: view.clone() for name, view in batch.views.items()},
        )
        words = torch.zeros(_MOST_WORDS, dtype=torch.int64, device=device)
        own_noise = _Noise(noise.key, noise.ids.clone(), noise.views.clone(), words)

        def compute() -> Losses:
            with sample_noise(own_noise):
                with self.precision.autocast():
                    losses: Losses = self.learner(own)
                self.learner.differentiate(losses, self.optimizer, self.scaler)
            return {name: loss.detach() for name, loss in losses.items()}

        try:
            replay, losses = capture(compute)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self._failed = True
            reason = str(error).splitlines()[0]
            self.say(f"a step cannot be recorded as a CUDA graph ({reason}); fast.cuda_graphs=false does not try")
            return None
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        return _Recording(replay, own, own_noise, losses, [(one, one.grad) for one in parameters])
