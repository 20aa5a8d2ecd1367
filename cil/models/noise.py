"""Layers that are random per sample: what they draw depends on the sample, not on its place in the batch.

Within `cil.seeding.sample_noise(...)` they draw from the noise of the batch, as a function of (key, sample id, name of
the layer); outside it they draw from torch's generator.
"""

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from timm.layers.drop import DropBlock2d
from timm.layers.drop import DropPath as TimmDropPath
from timm.layers.patch_dropout import PatchDropout
from torch import Tensor, nn

from cil.seeding import current_noise

# layers that drop something, and the attribute that says how often
_NOT_KEYED: dict[type[nn.Module], str] = {
    DropBlock2d: "drop_prob",
    PatchDropout: "prob",
    nn.modules.dropout._DropoutNd: "p",
}


class _KeyedDrop(nn.Module):
    """Sets parts of its input to 0 while training, and scales the rest so that the mean stays.

    Args:
        rate: Probability of dropping a part; 0 leaves the input as it is.
        name: What is drawn; two layers of one name drop the same parts.

    Raises:
        ValueError: If `rate` is not in [0, 1); on use, if the rows of the input are no multiple of the batch.
    """

    def __init__(self, rate: float, name: str) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"the drop rate of {name} must lie in [0, 1), found {rate}")
        self.rate = rate
        self.name = name

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f"rate={self.rate}, name={self.name!r}"

    def _uniform(self, x: Float[Tensor, "rows ..."], per_sample: int) -> Float[Tensor, "batch count"]:
        noise = current_noise()
        if noise is None:
            return torch.rand(x.shape[0], per_sample, device=x.device)
        num_samples = noise.ids.shape[0]
        if x.shape[0] % num_samples:
            raise ValueError(
                f"{self.name} cannot tell which rows belong to which sample: found {x.shape[0]} rows for "
                f"{num_samples} samples; the rows must be a multiple of the samples, those of one sample adjacent"
            )
        return noise.uniform(self.name, per_sample).to(x.device)

    def _drop(self, x: Float[Tensor, "rows ..."], kept: Float[Tensor, "rows ..."]) -> Float[Tensor, "rows ..."]:
        return x * (kept.to(x.dtype) / (1 - self.rate))


class DropPath(_KeyedDrop):
    """Stochastic depth (Huang et al., ECCV 2016, arXiv:1603.09382): drops a whole branch for a sample.

    Rows that belong to one sample (windows, heads) share its fate.
    """

    def forward(self, x: Float[Tensor, "rows ..."]) -> Float[Tensor, "rows ..."]:
        """The input with the branch of some samples set to 0."""
        if not self.training or self.rate == 0:
            return x
        drawn = self._uniform(x, 1)
        kept = repeat(drawn >= self.rate, "batch 1 -> (batch copies)", copies=x.shape[0] // drawn.shape[0]).float()
        return self._drop(x, kept.view(-1, *[1] * (x.ndim - 1)))


class Dropout(_KeyedDrop):
    """Dropout (Srivastava et al., JMLR 2014): drops single numbers."""

    @property
    def p(self) -> float:
        """The rate under the name that `torch.nn.Dropout` gives it."""
        return self.rate

    def forward(self, x: Float[Tensor, "rows ..."]) -> Float[Tensor, "rows ..."]:
        """The input with some numbers set to 0."""
        if not self.training or self.rate == 0:
            return x
        noise = current_noise()
        num_samples = x.shape[0] if noise is None else noise.ids.shape[0]
        drawn = self._uniform(x, x.numel() // num_samples)
        return self._drop(x, rearrange(drawn >= self.rate, "batch count -> (batch count)").float().view(x.shape))


def key_by_sample(module: nn.Module) -> nn.Module:
    """Replace timm's `DropPath` and torch's `Dropout` in `module` by the layers above, in place.

    Each is named by its path in the module. Layers that never drop anything are left alone.

    Raises:
        ValueError: If the module holds another layer that is random and cannot be keyed.
    """
    for path, layer in list(module.named_modules()):
        replacement: _KeyedDrop | None = None
        if isinstance(layer, TimmDropPath) and layer.drop_prob:
            replacement = DropPath(layer.drop_prob, path)
        elif type(layer) is nn.Dropout and layer.p:
            replacement = Dropout(layer.p, path)
        elif any(isinstance(layer, kind) and getattr(layer, rate) for kind, rate in _NOT_KEYED.items()):
            raise ValueError(
                f"{path} is a {type(layer).__name__}, whose randomness cannot be tied to samples; set its rate to 0"
            )
        if replacement is not None:
            parent = module.get_submodule(path.rpartition(".")[0])
            setattr(parent, path.rpartition(".")[2], replacement)
            if getattr(parent, "fused_attn", False):  # the fused kernel draws its own dropout from torch's generator
                setattr(parent, "fused_attn", False)  # noqa: B010 - mypy takes attributes of modules for tensors
    return module
