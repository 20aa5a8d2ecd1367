"""Teachers: networks that answer and do not learn."""

import copy

import torch
from torch import nn

from kd.base import Outputs


class Frozen(nn.Module):
    """A network held still: no gradient, evaluation mode, BatchNorm statistics untouched.

    `train()` on it, or on a module that holds it, leaves it in evaluation mode, and so every module in it, whatever a
    `train` of its own does.

    Args:
        network: The network to hold; it is used as it is, not copied (see `frozen`).
        keep_graph: Record how the outputs follow from the images, for losses that read gradients inside the teacher
            (`at_gradient`). Costs the memory of a training pass; the parameters take no gradient all the same.
    """

    def __init__(self, network: nn.Module, *, keep_graph: bool = False) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        self.keep_graph = keep_graph
        self.train(False)

    def train(self, mode: bool = True) -> "Frozen":
        """Stay in evaluation mode, whatever `mode` is."""
        super().train(False)
        for module in self.modules():
            module.training = False
        return self

    def forward(self, images: torch.Tensor) -> Outputs:
        """What the held network says."""
        if self.keep_graph:
            images = images.detach().requires_grad_()  # the parameters are frozen: a graph has to begin at the images
        with torch.set_grad_enabled(self.keep_graph), torch.profiler.record_function("teacher"):
            outputs: Outputs = self.network(images)
        return outputs


def frozen(network: nn.Module, *, keep_graph: bool = False) -> Frozen:
    """A frozen deep copy of `network`, which goes on learning undisturbed."""
    return Frozen(copy.deepcopy(network), keep_graph=keep_graph)
