"""Knowledge distillation (Hinton et al., NIPS 2014 Deep Learning Workshop, arXiv:1503.02531)."""

from typing import Literal, get_args

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from kd.base import Batch, Distiller, Outputs, check_same_classes, distillers
from kd.precision import full_precision

Reduction = Literal["batchmean", "mean"]


@distillers.register("kd")
class KD(Distiller):
    """The student matches the softened class probabilities of the teacher.

    With p = softmax(teacher / T) and q = softmax(student / T), over the classes of the teacher:
    $T^2 \\frac{1}{B} \\sum_b \\sum_k p_{bk} (\\log p_{bk} - \\log q_{bk})$.
    $T^2$ keeps the size of the gradient independent of the temperature.

    Args:
        temperature: T, softens both distributions; above 0.
        reduction: `batchmean` divides by the batch size, as in the formula. `mean` divides by the number of classes
            too, as several releases do (DKT, DyTox, TAKD), which weakens the term the more classes there are.

    Raises:
        ValueError: If `temperature` is not above 0 or `reduction` is neither; on use, if student and teacher do not
            score the same classes.
    """

    needs = {"logits"}
    recordable = True

    def __init__(self, *, temperature: float = 4.0, reduction: Reduction = "batchmean") -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"kd.temperature must be above 0, found {temperature}")
        if reduction not in get_args(Reduction):
            raise ValueError(f"kd.reduction must be one of {', '.join(get_args(Reduction))}, found {reduction!r}")
        self.temperature = temperature
        self.reduction = reduction

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Float[Tensor, ""]:
        """The divergence of the student from the teacher, times $T^2$."""
        check_same_classes("kd", student, teacher)
        log_q = F.log_softmax(full_precision(student.logits) / self.temperature, dim=1)
        log_p = F.log_softmax(full_precision(teacher.logits.detach()) / self.temperature, dim=1)
        num_terms = log_p.shape[0] if self.reduction == "batchmean" else log_p.numel()
        divergence = F.kl_div(log_q, log_p, reduction="sum", log_target=True) / num_terms
        return self.temperature**2 * divergence
