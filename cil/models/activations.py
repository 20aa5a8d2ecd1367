"""GELU (Hendrycks and Gimpel, arXiv:1606.08415) of feature maps, fast, and without keeping what it gives."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

Maps = Float[Tensor, "batch channels rows columns"]


def gelu(x: Maps) -> Maps:
    """GELU of a map, read in the order of memory where that is channels-last: half the time of torch's on a CPU."""
    if not x.is_contiguous(memory_format=torch.channels_last):
        return F.gelu(x)
    return rearrange(F.gelu(rearrange(x, "b d h w -> b h w d")), "b h w d -> b d h w")


def norm_gelu(x: Maps, norm: nn.BatchNorm2d, then: Callable[[Tensor], Tensor]) -> Tensor:
    """`then(gelu(norm(x)))` for the gradient of which `x` is kept, and neither what the norm gives nor the GELU.

    Both are computed again, once, in the backward pass: elementwise work for two maps of memory.

    Args:
        x: A map.
        norm: In training.
        then: Something that keeps its input for its gradient, like a convolution.
    """
    made = _Made(norm.eps)
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    active: Tensor = _NormGELU.apply(
        x, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.momentum, made
    )
    with torch.autograd.graph.saved_tensors_hooks(
        lambda kept: made if kept.data_ptr() == active.data_ptr() else kept,
        lambda kept: kept.active() if isinstance(kept, _Made) else kept,
    ):
        return then(active)


class _Made:
    """What BatchNorm and GELU made of a map, as a way to make it again.

    Args:
        eps: Of the norm.
    """

    def __init__(self, eps: float) -> None:
        self.eps = eps
        self.of: tuple[Tensor, ...] = ()  # map, weight, bias, mean and inverse deviation
        self._normalised: Tensor | None = None

    def active(self) -> Tensor:
        """The GELU; what is below it stays for `normalised`, which is asked next."""
        self._normalised = self.normalised()
        return gelu(self._normalised)

    def normalised(self) -> Tensor:
        """What the norm gave."""
        if self._normalised is not None:
            found, self._normalised = self._normalised, None
            return found
        x, weight, bias, mean, inverse = self.of
        variance = inverse.square().reciprocal() - self.eps
        return F.batch_norm(x, mean, variance, weight, bias, eps=self.eps)


class _NormGELU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        made: _Made,
    ) -> Tensor:
        normalised, mean, inverse = torch.native_batch_norm(
            x, weight, bias, running_mean, running_var, True, momentum, made.eps
        )
        ctx.save_for_backward(x, weight, bias, mean, inverse)
        ctx.made = made
        made.of = tuple(value.detach() for value in (x, weight, bias, mean, inverse))
        return gelu(normalised)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, inverse = ctx.saved_tensors
        (gradient,) = gradients
        if torch.is_grad_enabled():  # a gradient of this gradient is wanted, which follows from what was normalised too
            normalised = F.batch_norm(x, None, None, weight, bias, training=True, eps=ctx.made.eps)
        else:
            normalised = ctx.made.normalised()
        before = torch.ops.aten.gelu_backward(_in_order(gradient), _in_order(normalised))
        of_x, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            before.permute(0, 3, 1, 2), x, weight, None, None, mean, inverse, True, ctx.made.eps, [True, True, True]
        )
        return of_x, of_weight, of_bias, None, None, None, None


def _in_order(maps: Tensor) -> Tensor:
    return maps.permute(0, 2, 3, 1)
