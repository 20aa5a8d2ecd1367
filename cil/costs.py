"""What a step costs, measured on real modules: multiply-adds, bytes kept for the backward pass, idle parameters."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

#: A gradient this small beside the largest one, in float64, is the rounding error of a sum that is zero.
ROUNDING = 1e-12


def _convolution_backward(
    grad_shape: Any, x_shape: Any, weight_shape: Any, *rest: Any, out_shape: Any = None, **_: Any
) -> int:
    """As much as forward for each of the two gradients that are wanted; torch's own count forgets the groups."""
    _bias, _stride, _padding, _dilation, transposed, _output_padding, _groups, wanted = rest
    return (int(wanted[0]) + int(wanted[1])) * int(conv_flop_count(x_shape, weight_shape, grad_shape, transposed))


_CORRECTED = {torch.ops.aten.convolution_backward: _convolution_backward}


def multiply_adds(work: Callable[[], object]) -> int:
    """Multiply-adds of the convolutions and matrix products (linear layers, attention) that `work` computes.

    Everything else is left out, as is usual: norms, activations, softmax, pooling, sums. Attention is computed step by
    step meanwhile, since torch does not count its fused form on a CPU.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=_CORRECTED) as counter:
        work()
    return int(counter.get_total_flops()) // 2


def saved_bytes(work: Callable[[], Tensor], constants: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of what `work` returns.

    Args:
        work: A forward pass.
        constants: Tensors that exist anyway, such as parameters; they are not counted.
    """
    known = {tensor.untyped_storage().data_ptr() for tensor in constants}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()  # by address: views of one storage are kept once
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = work()
    assert result.requires_grad, "nothing is kept for a result without gradient"
    return sum(sizes.values())


def num_bytes(tensors: Iterable[object]) -> int:
    """Bytes of the tensors among some values."""
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))


def idle_parameters(module: nn.Module) -> dict[str, int]:
    """Numbers that take gradients but got none in the last backward pass, by the name of their parameter.

    The backward pass should be in float64: a gradient that is zero by construction (of a bias before BatchNorm, of the
    bias of attention's keys) comes out as a rounding error, which `ROUNDING` only tells from a small gradient there.
    """
    trainable = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    gradients = [parameter.grad for parameter in trainable.values() if parameter.grad is not None]
    floor = ROUNDING * max((float(gradient.abs().max()) for gradient in gradients if gradient.numel()), default=0.0)
    found = {}
    for name, parameter in trainable.items():
        idle = parameter.numel() if parameter.grad is None else int((parameter.grad.abs() <= floor).sum())
        if idle:
            found[name] = idle
    return found
