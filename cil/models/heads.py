"""Heads: a linear layer that gets more outputs, and the duplex classifier of DKT."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

#: How new outputs of a head begin: `torch` is the default of torch's linear layer, weights and biases uniform in
#: $\pm 1/\sqrt{in}$; `kaiming` is that of the PyCIL line, weights uniform in $\pm\sqrt{3/in}$ and biases 0.
HeadInit = Literal["torch", "kaiming"]


def fresh_linear(in_features: int, out_features: int, init: HeadInit) -> nn.Linear:
    """A linear layer as a head begins."""
    linear = nn.Linear(in_features, out_features)
    if init == "kaiming":
        nn.init.kaiming_uniform_(linear.weight, nonlinearity="linear")
        nn.init.zeros_(linear.bias)
    return linear


class GrowingLinear(nn.Module):
    """A linear layer that starts without outputs and gets more; old rows stay as they are.

    Args:
        in_features: Width of the input.
        keep_bias: Keep the biases of the old outputs when there are more. The DKT release draws them anew
            (discrepancy R3c): `keep_bias=False`.
        init: How new outputs begin.
    """

    def __init__(self, in_features: int, *, keep_bias: bool = True, init: HeadInit = "torch") -> None:
        super().__init__()
        self.in_features = in_features
        self.keep_bias = keep_bias
        self.init: HeadInit = init
        self.weight = nn.Parameter(torch.empty(0, in_features))
        self.bias = nn.Parameter(torch.empty(0))

    @property
    def out_features(self) -> int:
        """Number of outputs so far."""
        return self.weight.shape[0]

    @property
    def map_weight(self) -> Float[Tensor, "outputs width"]:
        """What class maps weight the channels by."""
        return self.weight

    @torch.no_grad()
    def grow(self, num_new: int) -> None:
        """Add outputs."""
        fresh = fresh_linear(self.in_features, num_new, self.init)
        kept = self.bias if self.keep_bias else self.fresh_bias()
        self.assign(torch.cat([self.weight, fresh.weight.to(self.weight)]), torch.cat([kept, fresh.bias.to(self.bias)]))

    @torch.no_grad()
    def widen(self, num_added: int) -> None:
        """Read more features, behind those it reads; what they count for begins as in a head of that width."""
        self.in_features += num_added
        fresh = fresh_linear(self.in_features, self.out_features, self.init).weight[:, -num_added:]
        self.assign(torch.cat([self.weight, fresh.to(self.weight)], dim=1), self.bias)

    def fresh_bias(self) -> Float[Tensor, " outputs"]:
        """Biases as torch draws them for a new layer of this shape."""
        bound = self.in_features**-0.5
        return torch.empty(self.out_features).uniform_(-bound, bound).to(self.bias)

    def assign(self, weight: Float[Tensor, "outputs width"], bias: Float[Tensor, " outputs"]) -> None:
        """Replace the parameters, perhaps by ones of another number of outputs."""
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = nn.Parameter(bias.detach().clone())

    def forward(self, x: Float[Tensor, "batch width"]) -> Float[Tensor, "batch outputs"]:
        """One score per output."""
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f"{self.in_features} -> {self.out_features}, keep_bias={self.keep_bias}, init={self.init}"


class Classifier(nn.Module):
    """LayerNorm, then one linear score per class.

    Args:
        width: Width of an embedding.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.head = GrowingLinear(width)

    def forward(self, embedding: Float[Tensor, "batch width"]) -> Float[Tensor, "batch classes"]:
        """One score per class."""
        scores: Tensor = self.head(self.norm(embedding))
        return scores


class PlasticityClassifier(Classifier):
    """Scores the classes of the newest task, from the second task on."""


class StabilityClassifier(Classifier):
    """Scores all old classes (in the first task: all there are)."""

    @torch.no_grad()
    def absorb(self, newest: PlasticityClassifier, *, merge_norm: bool = True, merge_bias: bool = True) -> None:
        """Take over the classes of another classifier, behind those already here.

        A classifier computes $W(\\gamma\\, n(x) + \\beta) + b$, where n only normalises. Two of them share one norm if
        its affine part goes into the linear layer: $W' = W\\,\\mathrm{diag}(\\gamma)$, $b' = b + W\\beta$, and then
        $\\gamma = 1$, $\\beta = 0$. Every score stays what it was.

        Args:
            newest: The classifier to take over; it is not changed.
            merge_norm: Fold both norms as above. False is the release (R3b): the norm here serves both, the other is
                lost, so the scores of the absorbed classes change.
            merge_bias: Keep the biases $b$. False is the release (R3a): those of both are drawn anew, uniform in
                $\\pm 1/\\sqrt{width}$.
        """
        weights, biases = [], []
        for classifier in (self, newest):
            norm, head = classifier.norm, classifier.head
            bias = head.bias if merge_bias else head.fresh_bias()
            weights.append(head.weight * norm.weight if merge_norm else head.weight)
            biases.append(bias + head.weight @ norm.bias if merge_norm else bias)
        if merge_norm:
            self.norm.reset_parameters()
        self.head.assign(torch.cat(weights), torch.cat(biases))
