"""Teachers: networks that answer and do not learn."""

import copy

import torch
from torch import nn

from kd.base import Outputs


class Frozen(nn.Module):
    """A network held still: no gradient, evaluation mode, BatchNorm statistics untouched.

    `train()` on it, or on a module that holds it, leaves it in evaluation mode.

    Args:
        network: The network to hold; it is used as it is, not copied (see `frozen`).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "Frozen":
        """Stay in evaluation mode, whatever `mode` is."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> Outputs:
        """What the held network says."""
        outputs: Outputs = self.network(images)
        return outputs


def frozen(network: nn.Module) -> Frozen:
    """A frozen deep copy of `network`, which goes on learning undisturbed."""
    return Frozen(copy.deepcopy(network))
