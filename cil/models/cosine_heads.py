"""Heads that compare directions: one vector for each class (LUCIR), or several (PODNet)."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn

from cil.models.network import BackboneNetwork, Network
from kd.precision import full_precision, no_autocast

H = TypeVar("H", bound="DirectionHead")


class DirectionHead(nn.Module):
    """Vectors for every class, of which only the directions count, and one learned scale $\\eta$ of all scores.

    The vectors of every task are a parameter of their own (`weights`), so that those of old tasks can be frozen: no
    weight decay, no momentum moves a parameter without gradient. A head starts without classes.

    Args:
        in_features: Width of the input.
    """

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.eta = nn.Parameter(torch.ones(()))
        self.weights = nn.ParameterList()

    @property
    def out_features(self) -> int:
        """Number of classes so far."""
        return sum(len(weight) for weight in self.weights)

    @property
    def old(self) -> list[nn.Parameter]:
        """The vectors of all tasks but the newest."""
        return list(self.weights)[:-1]

    def grow(self, num_new: int) -> None:
        """Add the vectors of one more task, uniform in $\\pm 1/\\sqrt{in}$ as torch draws those of a linear layer."""
        bound = self.in_features**-0.5
        fresh = torch.empty(num_new, *self._vectors, self.in_features).uniform_(-bound, bound)
        self.weights.append(nn.Parameter(fresh.to(self.eta.detach())))

    @property
    def _vectors(self) -> tuple[int, ...]:
        """The axis of the vectors of a class, if there are several."""
        return ()

    @property
    def weight(self) -> Float[Tensor, "classes ..."]:
        """The vectors of all classes."""
        if not len(self.weights):
            return self.eta.new_empty(0, *self._vectors, self.in_features)
        return torch.cat(list(self.weights))

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f"{self.in_features} -> {self.out_features}"


class CosineHead(DirectionHead):
    """$z_k = \\eta \\cos(f, w_k)$ (Hou et al., CVPR 2019: Learning a Unified Classifier Incrementally via Rebalancing).

    Computed in float32 or better.

    Args:
        in_features: Width of the input.
    """

    @property
    def map_weight(self) -> Float[Tensor, "classes width"]:
        """What class maps weight the channels by: $w_k / \\|w_k\\|$, so that their means are scores up to a factor."""
        return F.normalize(full_precision(self.weight))

    def cosines(self, x: Float[Tensor, "batch width"]) -> Float[Tensor, "batch classes"]:
        """$\\cos(f, w_k)$."""
        with no_autocast(x.device):
            return F.normalize(full_precision(x)) @ F.normalize(full_precision(self.weight)).T

    def forward(self, x: Float[Tensor, "batch width"]) -> Float[Tensor, "batch classes"]:
        """One score per class."""
        return self.eta * self.cosines(x)


class ProxyHead(DirectionHead):
    """$z_k = \\eta \\sum_p a_{kp} c_{kp}$ with $c_{kp} = \\cos(f, w_{kp})$ and $a_k = \\mathrm{softmax}(c_k)$ over the
    proxies p of a class (Douillard et al., ECCV 2020, arXiv:2004.13513).

    With one proxy it is `CosineHead`. Computed in float32 or better.

    Args:
        in_features: Width of the input.
        num_proxies: Vectors for each class.
    """

    def __init__(self, in_features: int, num_proxies: int = 10) -> None:
        super().__init__(in_features)
        self.num_proxies = num_proxies

    @property
    def _vectors(self) -> tuple[int, ...]:
        return (self.num_proxies,)

    @property
    def map_weight(self) -> None:
        """None: which vector of a class counts depends on the image, so there are no class maps."""
        return

    def cosines(self, x: Float[Tensor, "batch width"]) -> Float[Tensor, "batch classes proxies"]:
        """$c_{kp}$."""
        with no_autocast(x.device):
            directions = F.normalize(full_precision(x)), F.normalize(full_precision(self.weight), dim=2)
            return einsum(*directions, "b c, k p c -> b k p")

    def forward(self, x: Float[Tensor, "batch width"]) -> Float[Tensor, "batch classes"]:
        """One score per class."""
        cosines = self.cosines(x)
        return self.eta * (cosines.softmax(dim=2) * cosines).sum(dim=2)

    def extra_repr(self) -> str:
        """The arguments, for printing."""
        return f"{super().extra_repr()}, num_proxies={self.num_proxies}"


def give_head(network: Network, make: Callable[[int], H], *, learner: str, signed_features: bool) -> H:
    """Put a head in the place of the linear one of a network that has no classes yet.

    Args:
        network: The network.
        make: Width of an embedding to the head.
        learner: Who asks, for the message.
        signed_features: Take the last activation of the network away, where there is one.

    Returns:
        The head.

    Raises:
        ValueError: If the network is no `BackboneNetwork`, has classes, or has a setting that only a linear head
            follows.
    """
    if not isinstance(network, BackboneNetwork):
        raise ValueError(
            f"learner={learner} puts a cosine head behind a backbone with one embedding for each image, found "
            f"{type(network).__name__}: use model=resnet32 or model=timm, or another learner (replay, icarl)"
        )
    if network.task_sizes:
        raise ValueError(
            f"learner={learner} begins with a network without classes, found tasks of {network.task_sizes}"
        )
    if not network.head.keep_bias:
        raise ValueError(f"model.keep_bias=false has no effect with learner={learner}, whose head has no biases")
    if signed_features:
        network.drop_last_activation()
    head = make(network.embedding_width)
    network.add_module("head", head)
    return head
