"""Faster ways to compute the same thing: switches that change rounding and nothing else."""

import itertools
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, ConfigDict

from cil.models.dkt import BeforeNorm
from cil.models.network import Network

if TYPE_CHECKING:
    from cil.learners.base import Learner


class Fast(BaseModel):
    """Which fast paths are taken; `fast=off` takes none. Number formats are `precision`.

    Attributes:
        channels_last: Feature maps in channels-last memory, in which convolutions are faster.
        recompute: What BatchNorm and GELU make of a map is computed again for the gradient instead of kept: half of the
            memory of DKT's blocks for up to a tenth of the time.
        fused_optimizer: One kernel for all parameters, where the optimiser has one.
        cuda_graphs: On a GPU, losses and gradients of a step are recorded once and then started by one call
            (`cil.recorded`): the same kernels, and a fraction of the time where they are small.
        compile_teacher: The frozen network is compiled by torch.compile, which takes half a minute and more at the
            beginning of every task.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    channels_last: bool = True
    recompute: bool = True
    fused_optimizer: bool = True
    cuda_graphs: bool = True
    compile_teacher: bool = False

    def apply(self, learner: "Learner") -> None:
        """Let the networks of a learner compute in this way, from now on."""
        _, *others = learner.speakers()
        for module in itertools.chain(learner.modules(), *(other.modules() for other in others)):
            if isinstance(module, Network | BeforeNorm):
                module.channels_last = self.channels_last
            if isinstance(module, BeforeNorm):
                module.recompute = self.recompute
        # FOSTER's student speaks too, and learns
        teachers = [other for other in others if not any(weight.requires_grad for weight in other.parameters())]
        for teacher in teachers if self.compile_teacher else ():
            torch._dynamo.reset()  # what was compiled for the teachers before it
            teacher.compile()  # in place: names of parameters stay as they are, and so do saved states


#: What `fast=off` stands for.
PLAIN = Fast(channels_last=False, recompute=False, fused_optimizer=False, cuda_graphs=False)
