"""iCaRL: Incremental Classifier and Representation Learning (Rebuffi et al., CVPR 2017, arXiv:1611.07725)."""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cil.learners.base import Learner, Reading, learners
from cil.models.network import Network
from cil.transfer import said
from kd import Batch, WeightedSum
from kd.precision import full_precision

Loss = Literal["ce_kd", "bce", "ce_bce"]
Reduction = Literal["batchmean", "mean"]


@learners.register("icarl")
class ICaRL(Learner):
    """Replay with distillation; the class whose exemplars are nearest on average is the answer.

    With $\\sigma_k$ the sigmoid of score k, $\\sigma'_k$ that of the old network, $y_k$ the one-hot label, and
    $H(t, p) = -t \\log p - (1 - t) \\log (1 - p)$:

    - `ce_kd`: $CE + KD$, cross-entropy over all classes and the distillation terms with weight 1 (PyCIL);
    - `bce`: $\\frac1B \\sum_b (\\sum_{new} H(y_k, \\sigma_k) + \\sum_{old} H(\\sigma'_k, \\sigma_k))$, the paper. Old
      classes are learned from the old network alone, also on their exemplars. The second sum is the distillation of
      this loss: a distillation that is configured takes its place;
    - `ce_bce`: $CE + \\frac1B \\sum_b \\sum_{old} H(\\sigma'_k, \\sigma_k)$ (FACIL).

    In the first task all classes are new and nothing is distilled.

    Args:
        network: The network to train. A prediction by the nearest mean reads its embedding.
        distillation: What to learn from the old network; None for the losses that distil by themselves, with `ce_kd` an
            ablation. `configs/kd/kd2.yaml` is the term of PyCIL: temperature 2, without the factor $T^2$.
        loss: See above.
        bce_reduction: Of `bce`: `batchmean` is a sum over classes and a mean over the batch, as written; `mean` divides
            by the number of classes seen, too. The release divides by 100, all classes of the data set.
        prediction: `nearest_mean` reads the nearest mean of exemplars, whose accuracy then counts (features of clean
            images; the release adds their mirror images); `classifier` the scores. The other is told beside it.

    Raises:
        ValueError: If a distillation or a reduction is given that the loss does not have.
    """

    keeps_teacher = True
    needs_memory = True
    recordable = True

    def __init__(
        self,
        network: Network,
        distillation: WeightedSum | None,
        *,
        loss: Loss = "ce_kd",
        bce_reduction: Reduction = "batchmean",
        prediction: Reading = "nearest_mean",
    ) -> None:
        super().__init__(network, distillation)
        if loss == "ce_bce" and distillation is not None:
            raise ValueError(
                f"learner.loss=ce_bce distils by a term of its own, found kd={_names(distillation)} beside it: use "
                "kd=none, or learner.loss=ce_kd for cross-entropy with other terms"
            )
        if loss != "bce" and bce_reduction != "batchmean":
            raise ValueError(
                f"learner.bce_reduction={bce_reduction} is about learner.loss=bce and has no effect with {loss}: leave "
                "it out, or set the loss"
            )
        self.loss: Loss = loss
        self.bce_reduction: Reduction = bce_reduction
        self.read_by = prediction

    @property
    def needs_teacher(self) -> bool:
        """Two of the losses read the sigmoids of the old network."""
        return super().needs_teacher or self.loss != "ce_kd"

    def notice(self, batch: Batch) -> str | None:
        """That the loss is not the paper's, once, when it first makes a difference."""
        if self.loss == "bce" and self.distillation is not None and self.network.num_tasks == 2:
            return f"learner.loss=bce: kd={_names(self.distillation)} replaces its own distillation, kd=none keeps it"
        return None

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`ce` or `bce` from the labels, `bce_old` from the sigmoids of the old network, or its terms by name."""
        student = said(self.network, batch)
        num_old = 0 if self.teacher is None else sum(self.network.task_sizes[:-1])
        if self.loss == "bce":
            one_hot = F.one_hot(batch.labels, self.network.num_classes).to(student.logits)
            losses = {"bce": self._binary(student.logits[:, num_old:], one_hot[:, num_old:])}
        else:
            losses = {"ce": F.cross_entropy(student.logits, batch.labels)}
        if self.teacher is not None and self.loss != "ce_kd" and self.distillation is None:
            targets = full_precision(self.teacher(batch.images).logits).sigmoid()
            losses["bce_old"] = self._binary(student.logits[:, :num_old], targets)
        return losses | self.transferred(student, batch)

    def _binary(
        self, logits: Float[Tensor, "batch classes"], targets: Float[Tensor, "batch classes"]
    ) -> Float[Tensor, ""]:
        logits = full_precision(logits)
        summed = F.binary_cross_entropy_with_logits(logits, targets.to(logits), reduction="sum")
        num_terms = len(logits) * (self.network.num_classes if self.bce_reduction == "mean" else 1)
        return summed / num_terms


def _names(distillation: WeightedSum) -> str:
    return "+".join(distillation.weights)
