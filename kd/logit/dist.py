"""DIST, distillation from a stronger teacher (Huang, You, Wang, Qian and Xu, NeurIPS 2022, arXiv:2205.10536)."""

import torch.nn.functional as F
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from kd.base import Batch, Distiller, Outputs, check_same_classes, distillers
from kd.distributed import gathered
from kd.precision import full_precision

_EPS = 1e-8  # of the release: a row without any spread correlates with nothing


@distillers.register("dist")
class DIST(Distiller):
    """The student keeps the relations among the teacher's probabilities, not the probabilities themselves.

    With P = softmax(z / T) [B, K] of the student (s) and of the teacher (t), and Pearson's correlation r (eq. 7 to 9):
    $T^2 \\left[ \\beta \\left(1 - \\frac{1}{B} \\sum_b r(P_s[b, :], P_t[b, :])\\right) +
    \\gamma \\left(1 - \\frac{1}{K} \\sum_k r(P_s[:, k], P_t[:, k])\\right) \\right]$: how a sample's classes relate
    (inter-class), and how the samples relate for a class (intra-class). The factor $T^2$ is that of the release. Over
    the batch of all processes.

    A row or column without any spread (a single class, a class that is never likely) has no correlation: it counts
    as 0, and sends no gradient.

    Args:
        beta: Weight of the inter-class part; not negative. The paper has 2.
        gamma: Weight of the intra-class part; not negative. The paper has 2.
        temperature: T, softens both distributions; above 0. 4 on CIFAR-100, 1 on ImageNet.

    Raises:
        ValueError: If a parameter is out of range; on use, if student and teacher do not score the same classes.
    """

    recordable = True

    def __init__(self, *, beta: float = 2.0, gamma: float = 2.0, temperature: float = 4.0) -> None:
        super().__init__()
        for name, value in (("beta", beta), ("gamma", gamma)):
            if not value >= 0:
                raise ValueError(f"dist.{name} must not be negative, found {value}")
        if not temperature > 0:
            raise ValueError(f"dist.temperature must be above 0, found {temperature}")
        self.beta = beta
        self.gamma = gamma
        self.temperature = temperature

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Float[Tensor, ""]:
        """The two parts, weighted, times $T^2$."""
        check_same_classes("dist", student, teacher)
        student, teacher, _ = gathered(Outputs(student.logits), Outputs(teacher.logits.detach()), batch)
        p_s = F.softmax(full_precision(student.logits) / self.temperature, dim=1)
        p_t = F.softmax(full_precision(teacher.logits) / self.temperature, dim=1)
        inter = 1 - correlation(p_s, p_t).mean()
        intra = 1 - correlation(p_s.T, p_t.T).mean()
        return self.temperature**2 * (self.beta * inter + self.gamma * intra)


def correlation(a: Float[Tensor, "rows some"], b: Float[Tensor, "rows some"]) -> Float[Tensor, " rows"]:
    """Pearson's correlation of every row of `a` with the same row of `b`, between -1 and 1."""
    a, b = (rows - reduce(rows, "rows some -> rows 1", "mean") for rows in (a, b))
    return F.cosine_similarity(a, b, dim=1, eps=_EPS)
