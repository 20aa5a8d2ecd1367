"""A training step as a CUDA graph.

A step of DKT starts about 1 700 small operations. A GPU is done with each sooner than Python can start the next,
so it waits most of the time. A CUDA graph records what is started once, and starts all of it again by one call: the
same kernels on the same memory, and so the same numbers. What differs from step to step is copied to where the graph
reads it: images, labels, ids, and the keys of the noise.
"""

import warnings
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from torch.profiler import record_function

from cil.learners.base import Learner
from cil.precision import Precision
from cil.profiling import RECORDED
from cil.room import is_out_of_memory
from cil.seeding import SampleNoise, derive, sample_noise
from kd import DOT, Batch, Distiller
from kd.distributed import world_size

Losses = dict[str, Tensor]

_MOST_WORDS = 1024  # purposes that a network may draw noise for


@dataclass(frozen=True)
class _Noise(SampleNoise):
    """Noise whose key is read from memory, so that a graph that was recorded once draws other numbers every epoch.

    `key` itself stays that of the recording: what is recorded must not read it.
    """

    words: Int64[Tensor, " purposes"]
    purposes: list[str] = field(default_factory=list)

    def word(self, purpose: str) -> Tensor:
        """The same number as that of other noise, where the graph finds it."""
        if purpose not in self.purposes:
            if len(self.purposes) == _MOST_WORDS:
                raise NotRecordable(f"noise is drawn for more than {_MOST_WORDS} purposes")
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


class NotRecordable(RuntimeError):
    """A step that does something a graph cannot hold, in one line."""


def capture(compute: Callable[[], Losses], pool: Any) -> tuple[Callable[[], object], Losses]:
    """Record what `compute` starts, without doing it; returns what does it, and what it gives.

    Raises:
        NotRecordable: If it waits for the GPU, or for memory beside it. CUDA is in no state to go on with then.
    """
    graph = torch.cuda.CUDAGraph()
    reason: Exception | None = None
    losses: Losses = {}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "The CUDA Graph is empty")
            # other threads may go on calling CUDA: those that bring images into pinned memory do
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                try:
                    losses = compute()
                except RuntimeError as error:  # the end of the recording fails too, and says less
                    reason = error
        if reason is not None:
            raise reason
    except (RuntimeError, UserWarning) as error:
        cause = reason or error
        if is_out_of_memory(cause):
            raise cause from None
        raise NotRecordable(str(cause).splitlines()[0]) from cause
    return graph.replay, losses


class Recorder:
    """Losses and gradients of the steps of a phase: the first of every shape as it stands, the others recorded.

    Args:
        learner: In training; what it learns is settled.
        optimizer: Of the phase.
        scaler: Of the phase.
        precision: What it computes in.
    """

    def __init__(
        self,
        learner: Learner,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        precision: Precision,
    ) -> None:
        self.learner, self.optimizer, self.scaler, self.precision = learner, optimizer, scaler, precision
        #: By shape of the batch; None where one has been seen.
        self._recordings: dict[Hashable, _Recording | None] = {}
        self._weights_then: Hashable = None
        #: Of the memory of all recordings, since no two are replayed at a time; it ends with them.
        self._pool: Any = None

    @staticmethod
    def suits(learner: Learner, optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
        """Whether the steps can be recorded: on one GPU, with losses that are functions of tensors alone."""
        terms = learner.distillation.distillers.values() if learner.distillation is not None else ()
        return (
            device.type == "cuda"
            and world_size() == 1
            and learner.recordable
            and type(learner).update is Learner.update
            and all(term.recordable for term in terms if isinstance(term, Distiller))
            and not isinstance(optimizer, DOT)
        )

    def __call__(self, batch: Batch, noise: SampleNoise) -> Losses | None:
        """The losses of a batch, with the gradients where the optimiser reads them; None if it is not recorded."""
        if (weights := self._weights()) != self._weights_then:
            self._recordings.clear()
            self._weights_then = weights
            self._pool = torch.cuda.graph_pool_handle() if self.precision.device.type == "cuda" else None
        shape = tuple((tensor.shape, tensor.dtype) for tensor in _tensors(batch))
        if shape not in self._recordings:
            self._recordings[shape] = None  # what a library does at its first call cannot be recorded
            return None
        recording = self._recordings[shape]
        if recording is None:
            recording = self._recordings[shape] = self._record(batch, noise)
        with record_function(RECORDED):
            return recording(batch, noise)

    def _weights(self) -> Hashable:
        """Numbers of the epoch that a recording would keep."""
        terms = self.learner.distillation
        if terms is None:
            return ()
        return terms.ended, terms.task_weight, *(terms.weight(name) for name in terms.weights)

    def _record(self, batch: Batch, noise: SampleNoise) -> _Recording:
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

        replay, losses = capture(compute, self._pool)
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        return _Recording(replay, own, own_noise, losses, [(one, one.grad) for one in parameters])
