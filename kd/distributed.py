"""Losses over the batch of all processes.

Under DistributedDataParallel every process sees a share of the batch, and the gradients are averaged. A loss that pairs
samples needs the others' outputs too. `gather` puts the shares together, differentiably, and every process computes the
same loss L of the whole batch: the backward of `gather` sums what all W processes send back, W dL/dx, which the average
over W processes turns into dL/dx.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

from kd.base import Batch, Outputs


def world_size() -> int:
    """Number of processes that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


class _Gather(torch.autograd.Function):
    """Shares of perhaps different length, one behind the other in the order of the processes."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, lengths: list[int]) -> Tensor:
        ctx.lengths = lengths
        longest = max(lengths)
        padded = share.new_zeros(longest, *share.shape[1:])
        padded[: len(share)] = share
        shares = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(shares, padded)
        return torch.cat([part[:length] for part, length in zip(shares, lengths, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        share: Tensor = _Sum.apply(gradients[0], ctx.lengths)
        return share, None


class _Sum(torch.autograd.Function):
    """The share of this process of the sum over the processes: the backward of `_Gather`, and the other way round."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, lengths: list[int]) -> Tensor:
        ctx.lengths = lengths
        total = whole.contiguous().clone()
        dist.all_reduce(total)
        return torch.split(total, lengths)[rank()].clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        whole: Tensor = _Gather.apply(gradients[0], ctx.lengths)
        return whole, None


def share_lengths(length: int, device: torch.device) -> list[int]:
    """How many rows every process holds."""
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size())]
    dist.all_gather(lengths, torch.tensor([length], device=device))
    return [int(found) for found in lengths]


def gather(share: Shaped[Tensor, "share ..."], lengths: list[int] | None = None) -> Shaped[Tensor, "batch ..."]:
    """The rows of all processes, in the order of the processes; differentiable. Every process must call it.

    Args:
        share: The rows of this process; only the number of rows may differ between processes.
        lengths: `share_lengths`, if it is known already.
    """
    if world_size() == 1:
        return share
    if lengths is None:
        lengths = share_lengths(len(share), share.device)
    narrow = share.dtype is torch.bool  # not a type that every backend sends
    whole: Tensor = _Gather.apply(share.byte() if narrow else share, lengths)
    return whole.bool() if narrow else whole


def all_reduce_sum(value: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """The sum over the processes, without gradient. Every process must call it."""
    if world_size() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def gathered(student: Outputs, teacher: Outputs, batch: Batch) -> tuple[Outputs, Outputs, Batch]:
    """The same for everything a distiller reads; what is gathered already, or is all there is, comes back as it is."""
    if world_size() == 1 or batch.gathered:
        return student, teacher, batch
    lengths = share_lengths(len(batch.labels), batch.labels.device)
    labels, ids = gather(batch.labels, lengths), gather(batch.ids, lengths)
    whole = replace(batch, labels=labels, ids=ids, gathered=True)
    return gather_outputs(student, lengths), gather_outputs(teacher, lengths), whole


def gather_outputs(outputs: Outputs, lengths: list[int]) -> Outputs:
    """`gather` for everything a network says."""
    return Outputs(
        gather(outputs.logits, lengths),
        None if outputs.embedding is None else gather(outputs.embedding, lengths),
        {name: gather(tap, lengths) for name, tap in outputs.taps.items()},
        {name: gather_outputs(view, lengths) for name, view in outputs.views.items()},
    )
