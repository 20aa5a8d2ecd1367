"""Losses are computed in float32 or better, whatever format the network ran in."""

from contextlib import AbstractContextManager

import torch
from jaxtyping import Float
from torch import Tensor


def full_precision(tensor: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The tensor in float32, or as it is if it is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def no_autocast(device: torch.device) -> AbstractContextManager[None]:
    """A block in which autocast does not narrow matrix products again."""
    return torch.autocast(device.type, enabled=False)
