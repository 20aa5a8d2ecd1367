"""Training on everything seen so far, the upper bound of every comparison."""

import copy
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from cil.learners.base import Learner, learners
from cil.models.network import Network
from cil.stages import Phase, Stage
from kd import Batch, WeightedSum


@learners.register("joint")
class Joint(Learner):
    """Cross-entropy on all data of all tasks so far.

    Args:
        network: The network to train.
        distillation: Must be None: nothing is forgotten that a teacher could bring back.
        start: `fresh` begins again from the untrained network before every task (the published upper bounds);
            `continue` goes on from the last task.
    """

    uses_memory = False
    recordable = True

    def __init__(
        self,
        network: Network,
        distillation: WeightedSum | None = None,
        *,
        start: Literal["fresh", "continue"] = "fresh",
    ) -> None:
        super().__init__(network, distillation)
        self.start = start
        self.continues = start == "continue"
        # in a tuple, so that it is no part of the state: the run's seed makes it again
        self.untrained = (copy.deepcopy(network),)

    def begin_stage(self, stage: Stage) -> None:
        """Grow, or begin again from the untrained network with all classes seen."""
        if self.start == "fresh":
            self.network = copy.deepcopy(self.untrained[0]).to(next(self.network.parameters()))
            self.network.grow(stage.num_seen)
        else:
            self.network.grow(stage.num_new)

    def phases(self, stage: Stage) -> list[Phase]:
        """One phase on everything seen so far."""
        return [Phase("training", "seen", stage.recipe.for_task(stage.index))]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Mean cross-entropy over every class seen."""
        return {"ce": F.cross_entropy(self.network(batch.images).logits, batch.labels)}
