"""Faster ways to compute the same thing: switches that change rounding and nothing else."""

import itertools

from pydantic import BaseModel, ConfigDict

from cil.learners.base import Learner


class Fast(BaseModel):
    """Which fast paths are taken; `fast=off` takes none. Number formats are `precision`.

    Attributes:
        channels_last: Feature maps in channels-last memory, in which convolutions are faster.
        recompute: What BatchNorm and GELU make of a map is computed again for the gradient instead of kept: half of the
            memory of DKT's blocks for a few percent of the time.
        fused_optimizer: One kernel for all parameters, where the optimiser has one.
        compile_teacher: The frozen network is compiled by torch.compile, which takes half a minute and more at the
            beginning of every task.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    channels_last: bool = True
    recompute: bool = True
    fused_optimizer: bool = True
    compile_teacher: bool = False

    def apply(self, learner: Learner) -> None:
        """Let the networks of a learner compute in this way, from now on."""
        _, *teachers = learner.speakers()
        for module in itertools.chain(learner.modules(), *(teacher.modules() for teacher in teachers)):
            for switch in ("channels_last", "recompute"):
                if hasattr(module, switch):
                    setattr(module, switch, getattr(self, switch))
        for teacher in teachers if self.compile_teacher else ():
            teacher.compile()  # in place: names of parameters stay as they are, and so do saved states
