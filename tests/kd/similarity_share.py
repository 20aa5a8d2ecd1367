"""What one process computes of the similarity loss; a module of its own, since every process imports it."""

import torch
from torch import Tensor

from kd import Batch, Outputs
from kd.distributed import all_reduce_sum, rank, world_size
from kd.feature.sp import SP


def random(rows: int, width: int, seed: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def said(features: Tensor) -> Outputs:
    return Outputs(features.new_zeros(len(features), 1), taps={"last": features})


def shared_loss() -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of a weight averaged over the processes, each of which has a share of the batch."""
    weight = random(3, 4, seed=2).requires_grad_()
    lengths = [3, 2] if world_size() > 1 else [5]
    images, theirs = (torch.split(rows, lengths)[rank()] for rows in (random(5, 3, seed=0), random(5, 2, seed=1)))
    count = len(images)
    batch = Batch(torch.zeros(count, 1, 1, 1), torch.zeros(count, dtype=torch.int64), torch.arange(count))
    value = SP()(said((images @ weight).tanh()), said(theirs), batch)
    (gradient,) = torch.autograd.grad(value, [weight])
    return value.detach(), all_reduce_sum(gradient) / world_size()
