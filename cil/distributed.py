"""Several processes that compute what one would: started by torchrun, on one machine or many.

Every process holds the whole network and trains on its share of every batch. So that nothing depends on their number:

- what the networks say is put together (`sharing`), so that every loss, whatever it pairs or divides by, is computed
  over the whole batch; `kd.distributed` says why its gradients come out right;
- BatchNorm statistics are those of the whole batch (`synchronise_batch_norm`);
- random numbers are functions of the seed and the sample (`cil.seeding`);
- rank 0 alone writes files and chooses exemplars; the others are told which.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from kd import Outputs
from kd.distributed import gather_outputs, rank, world_size

T = TypeVar("T")


def num_launched() -> int:
    """How many processes torchrun started for this run; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start(device: torch.device) -> None:
    """Find the other processes, if torchrun started any: nccl for CUDA, gloo for the processor."""
    if num_launched() > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def stop() -> None:
    """Wait for the other processes, and part from them."""
    if world_size() > 1:
        dist.barrier()
        dist.destroy_process_group()


def broadcast(value: T | None) -> T:
    """What rank 0 holds, on every process."""
    if world_size() > 1:
        box = [value]
        dist.broadcast_object_list(box, src=0)
        value = box[0]
    assert value is not None
    return value


def agree(problem: str | None) -> None:
    """Stop every process if one has a problem.

    Args:
        problem: What keeps this process from going on, if anything does.

    Raises:
        ValueError: With the problem of the first process that has one.
    """
    problems = [problem]
    if world_size() > 1:
        problems = [None] * world_size()
        dist.all_gather_object(problems, problem)
    for found in problems:
        if found is not None:
            raise ValueError(found)


def first_to_speak() -> bool:
    """Whether this process is the one that says why the run ends; True for exactly one of them.

    The one that fails asks while it still lives, and the others only notice when it is gone.
    """
    if num_launched() == 1:
        return True
    try:
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        return bool(store.add("cil/last words", 1) == 1)
    except RuntimeError:  # the store went with the process that held it
        return True


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether an error comes from another process being gone."""
    words = str(error).lower()
    return world_size() > 1 and (isinstance(error, dist.DistError) or "gloo" in words or "nccl" in words)


# Shares


def share(rows: Shaped[Tensor, "all ..."]) -> Shaped[Tensor, "share ..."]:
    """The rows of this process: contiguous, sizes differing by at most one, none twice."""
    return torch.tensor_split(rows, world_size())[rank()]


_lengths: ContextVar[list[int] | None] = ContextVar("lengths", default=None)


@contextmanager
def sharing(num_samples: int) -> Iterator[None]:
    """A block in which networks are given shares of a batch, and say what they say of the whole batch.

    Args:
        num_samples: Of the whole batch.
    """
    smaller, larger = divmod(num_samples, world_size())
    token = _lengths.set([smaller + (number < larger) for number in range(world_size())])
    try:
        yield
    finally:
        _lengths.reset(token)


def _share_outputs(network: nn.Module, arguments: object, outputs: Outputs) -> Outputs | None:
    lengths = _lengths.get()
    return None if lengths is None else gather_outputs(outputs, lengths)


def prepare(learner: nn.Module, *networks: nn.Module) -> None:
    """Make a learner fit for `wrap`, after it has been built or has grown; a second call changes nothing.

    Args:
        learner: What is trained.
        networks: Those whose outputs are put together (`sharing`).
    """
    if world_size() == 1:
        return
    synchronise_batch_norm(learner)
    for network in networks:
        if _share_outputs not in network._forward_hooks.values():  # the copy of a network has it already
            network.register_forward_hook(_share_outputs)


def wrap(learner: nn.Module) -> nn.Module:
    """The learner with its gradients averaged over the processes; alone, the learner itself."""
    if world_size() == 1:
        return learner
    # a gradient may come in another layout than its bucket, which costs a copy of it
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # broadcast_buffers has another name in newer versions
        # BatchNorm statistics are equal on all processes already; a phase may leave parameters of a network out
        return DistributedDataParallel(learner, broadcast_buffers=False, find_unused_parameters=True)


# BatchNorm


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) with the statistics of all processes, and these statistics.

    In two passes, the mean and then the mean squared distance to it. Backward:
    $dx = (dy - \\overline{dy} - y\\,\\overline{y\\,dy}) / \\sigma$ with means over the batch of all processes.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        places, shape = _places(x)
        mean = x.sum(places)
        dist.all_reduce(mean)
        mean /= count
        y = x - mean.view(shape)
        variance = y.square().sum(places)
        dist.all_reduce(variance)
        variance /= count
        scale = (variance + eps).rsqrt()
        y *= scale.view(shape)
        ctx.save_for_backward(y, scale, count)
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        y, scale, count = ctx.saved_tensors
        places, shape = _places(y)
        dy = gradients[0]
        sums = torch.stack([dy.sum(places), (dy * y).sum(places)])
        dist.all_reduce(sums)
        mean_dy, mean_y_dy = (part.view(shape) for part in sums / count)
        return (dy - mean_dy - y * mean_y_dy) * scale.view(shape), None, None


def _places(x: Tensor) -> tuple[list[int], list[int]]:
    """Every dimension but that of the channels, and the shape in which a vector of channels stands against `x`."""
    return [dimension for dimension in range(x.ndim) if dimension != 1], [1, -1, *[1] * (x.ndim - 2)]


class _Synchronised(_BatchNorm):
    """BatchNorm (Ioffe and Szegedy, ICML 2015, arXiv:1502.03167) with the statistics of the batch of all processes.

    Torch's own runs on CUDA only. Computed in float32 or better.
    """

    def forward(self, x: Float[Tensor, "batch channels *places"]) -> Float[Tensor, "batch channels *places"]:
        """Normalised maps."""
        if not self.training or world_size() == 1:
            plain: Tensor = super().forward(x)
            return plain
        self._check_input_dim(x)  # type: ignore[no-untyped-call]
        y = self._normalised(x)
        if isinstance(self, BatchNormAct2d):
            y = self.act(self.drop(y))
        return y

    def _normalised(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        count = torch.tensor([x.numel() // x.shape[1]], dtype=wide.dtype, device=x.device)
        dist.all_reduce(count)
        y: Tensor
        y, mean, variance = _Normalise.apply(wide, count, self.eps)
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            rate = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.to(self.running_mean), rate)
            self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var), rate)
        if self.affine:
            _, shape = _places(x)
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)


class _Synchronised1d(_Synchronised, nn.BatchNorm1d):
    pass


class _Synchronised2d(_Synchronised, nn.BatchNorm2d):
    pass


class _Synchronised3d(_Synchronised, nn.BatchNorm3d):
    pass


class _SynchronisedAct2d(_Synchronised, BatchNormAct2d):
    pass


_SYNCHRONISED: dict[type[nn.Module], type[_Synchronised]] = {
    nn.BatchNorm1d: _Synchronised1d,
    nn.BatchNorm2d: _Synchronised2d,
    nn.BatchNorm3d: _Synchronised3d,
    BatchNormAct2d: _SynchronisedAct2d,
}


def synchronise_batch_norm(module: nn.Module) -> None:
    """Let every BatchNorm layer of a module use the statistics of all processes; parameters and names stay.

    Raises:
        ValueError: If there is a kind of BatchNorm that is not known here.
    """
    for path, layer in module.named_modules():
        if not isinstance(layer, _BatchNorm) or isinstance(layer, _Synchronised):
            continue
        if type(layer) not in _SYNCHRONISED:
            known = ", ".join(kind.__name__ for kind in _SYNCHRONISED)
            raise ValueError(
                f"{path} is a {type(layer).__name__}, which several processes cannot compute as one; known: {known}"
            )
        layer.__class__ = _SYNCHRONISED[type(layer)]
