"""Training on new data and exemplars together."""

import torch.nn.functional as F
from torch import Tensor

from cil.learners.base import Learner, learners
from cil.models.network import Network
from cil.transfer import said
from kd import Batch, WeightedSum


@learners.register("replay")
class Replay(Learner):
    """Cross-entropy over all classes on the new data and the memory, shuffled together without balancing.

    $L = CE + KD$, where a distillation is configured: the old network is then kept for it. By itself $L = CE$.

    Args:
        network: The network to train.
        distillation: What to learn from the old network; None, as published, keeps none.
    """

    keeps_teacher = True
    needs_memory = True
    recordable = True

    def __init__(self, network: Network, distillation: WeightedSum | None = None) -> None:
        super().__init__(network, distillation)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Mean cross-entropy over every class seen, and the distillation terms by name."""
        student = said(self.network, batch)
        return {"ce": F.cross_entropy(student.logits, batch.labels)} | self.transferred(student, batch)
