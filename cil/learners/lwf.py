"""Learning without Forgetting (Li and Hoiem, ECCV 2016, arXiv:1606.09282)."""

from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from cil.learners.base import Learner, learners
from cil.models.network import Network
from cil.stages import Phase, Stage
from cil.transfer import said
from kd import Batch, WeightedSum


@learners.register("lwf")
class LwF(Learner):
    """Cross-entropy on the data of the new task, distillation from the network as it was before it; no memory.

    $L = CE + w\\,KD$, with $KD$ over the scores of the old classes; in the first task $L = CE$.

    As in the class-incremental releases (PyCIL, FACIL), all weights learn from the start; the paper first trains the
    new rows of the head alone.

    Args:
        network: The network to train.
        distillation: What to learn from the old network. `configs/kd/kd2.yaml` is the published term: temperature 2,
            without the factor $T^2$.
        weight: $w$: 3 in PyCIL, 1 in FACIL and the paper.
        logits: `new` takes the softmax of $CE$ over the new classes alone, so that distillation has the old rows of the
            head to itself; `all` over every class seen, which pushes the old ones down.

    Raises:
        ValueError: If there is no distillation.
    """

    keeps_teacher = True
    uses_memory = False
    recordable = True

    def __init__(
        self,
        network: Network,
        distillation: WeightedSum | None,
        *,
        weight: Annotated[float, Field(gt=0)] = 3.0,
        logits: Literal["new", "all"] = "new",
    ) -> None:
        super().__init__(network, distillation)
        if distillation is None:
            raise ValueError(
                "learner=lwf remembers by distillation alone, found kd=none: leave kd out for its own term (kd2), name "
                "another, or take learner=finetune"
            )
        self.distillation: WeightedSum = distillation
        self.weight = weight
        self.logits = logits

    def phases(self, stage: Stage) -> list[Phase]:
        """One phase on the new data alone, whatever the memory holds."""
        return [Phase("training", "new", stage.recipe.for_task(stage.index))]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Mean cross-entropy, and the weighted distillation terms by name."""
        student = said(self.network, batch)
        first = sum(self.network.task_sizes[:-1]) if self.logits == "new" else 0
        losses = {"ce": F.cross_entropy(student.logits[:, first:], batch.labels - first)}
        return losses | self.transferred(student, batch, self.weight)
