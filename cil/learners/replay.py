"""Training on new data and exemplars together."""

import torch.nn.functional as F
from torch import Tensor

from cil.learners.base import Learner, learners
from cil.models.network import Network
from kd import Batch, WeightedSum


@learners.register("replay")
class Replay(Learner):
    """Cross-entropy over all classes on the new data and the memory, shuffled together without balancing.

    Args:
        network: The network to train.
        distillation: Must be None: this learner keeps no old network.
    """

    needs_memory = True

    def __init__(self, network: Network, distillation: WeightedSum | None = None) -> None:
        super().__init__(network, distillation)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Mean cross-entropy over every class seen."""
        return {"ce": F.cross_entropy(self.network(batch.images).logits, batch.labels)}
