"""Training on each task alone, the lower bound of every comparison."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from cil.learners.base import Learner, learners
from cil.models.network import Network
from cil.stages import Phase, Stage
from kd import Batch, WeightedSum


@learners.register("finetune")
class Finetune(Learner):
    """Cross-entropy on the data of the new task, no memory and no teacher.

    Args:
        network: The network to train.
        distillation: Must be None: there is no old network to learn from.
        logits: `new` takes the softmax over the new classes alone (the PyCIL line), so old rows of the head get no
            gradient, and a task of one class has nothing to learn; `all` over every class seen, which pushes the old
            ones down.
    """

    uses_memory = False
    recordable = True

    def __init__(
        self, network: Network, distillation: WeightedSum | None = None, *, logits: Literal["new", "all"] = "new"
    ) -> None:
        super().__init__(network, distillation)
        self.logits = logits

    def phases(self, stage: Stage) -> list[Phase]:
        """One phase on the new data alone, whatever the memory holds."""
        return [Phase("training", "new", stage.recipe.for_task(stage.index))]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Mean cross-entropy."""
        first = sum(self.network.task_sizes[:-1]) if self.logits == "new" else 0
        return {"ce": F.cross_entropy(self.network(batch.images).logits[:, first:], batch.labels - first)}
