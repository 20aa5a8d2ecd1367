"""A head whose scores are corrected task by task (Wu et al., CVPR 2019, arXiv:1905.13260)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cil.models.heads import GrowingLinear, HeadInit


class BiasCorrectedLinear(nn.Module):
    """A growing linear layer; the scores of every task from the second on pass through a scale and a shift of its own.

    $z_k = a_t\\,(w_k \\cdot x + c_k) + b_t$ for a class k of task t, with $a_t = 1$ and $b_t = 0$ at first; those of
    the first task stay as they are. This is a linear layer again, and `weight` and `bias` are those of the whole: class
    maps are made with $a_t w_k$, so that the mean of a map plus the bias is the corrected score.

    Args:
        in_features: Width of the input.
        keep_bias, init: See `GrowingLinear`.

    Attributes:
        linear: What is corrected.
        scales: $a_t$ of the tasks from the second on.
        shifts: $b_t$.
    """

    def __init__(self, in_features: int, *, keep_bias: bool = True, init: HeadInit = "torch") -> None:
        super().__init__()
        self.linear = GrowingLinear(in_features, keep_bias=keep_bias, init=init)
        self.scales = nn.ParameterList()
        self.shifts = nn.ParameterList()
        self._task_sizes: list[int] = []

    @property
    def out_features(self) -> int:
        """Number of outputs so far."""
        return self.linear.out_features

    @torch.no_grad()
    def grow(self, num_new: int) -> None:
        """Add outputs for one more task, not corrected yet."""
        self.linear.grow(num_new)
        if self._task_sizes:
            self.scales.append(nn.Parameter(self.linear.bias.new_ones(())))
            self.shifts.append(nn.Parameter(self.linear.bias.new_zeros(())))
        self._task_sizes.append(num_new)

    @property
    def weight(self) -> Float[Tensor, "outputs width"]:
        """$a_t w_k$."""
        return self._scale()[:, None] * self.linear.weight

    @property
    def bias(self) -> Float[Tensor, " outputs"]:
        """$a_t c_k + b_t$."""
        return self._scale() * self.linear.bias + self._shift()

    @property
    def map_weight(self) -> Float[Tensor, "outputs width"]:
        """What class maps weight the channels by."""
        return self.weight

    def forward(self, x: Float[Tensor, "batch width"]) -> Float[Tensor, "batch outputs"]:
        """One corrected score per output."""
        scores: Tensor = self._scale() * self.linear(x) + self._shift()
        return scores

    def _scale(self) -> Float[Tensor, " outputs"]:
        return self._by_output(self.linear.bias.new_ones(()), self.scales)

    def _shift(self) -> Float[Tensor, " outputs"]:
        return self._by_output(self.linear.bias.new_zeros(()), self.shifts)

    def _by_output(self, first: Float[Tensor, ""], later: nn.ParameterList) -> Float[Tensor, " outputs"]:
        sizes = self._task_sizes or [0]
        return torch.cat([value.expand(size) for value, size in zip([first, *later], sizes, strict=True)])
