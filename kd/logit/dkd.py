"""Decoupled knowledge distillation (Zhao, Cui, Song, Qiu and Liang, CVPR 2022, arXiv:2203.08679)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kd.base import Batch, Distiller, Outputs, check_same_classes, distillers
from kd.precision import full_precision


@distillers.register("dkd")
class DKD(Distiller):
    """Splits distillation into a target-class part and a part over the other classes, weighted apart.

    With p = softmax(teacher / T), q = softmax(student / T) and the label y, mean over the batch:
    $T^2 \\frac{1}{B} \\sum_b (\\alpha\\,\\mathrm{TCKD}_b + \\beta\\,\\mathrm{NCKD}_b)$, where
    $\\mathrm{TCKD} = KL([p_y, 1 - p_y] \\| [q_y, 1 - q_y])$ and NCKD is the KL divergence of the two softmaxes over
    the classes other than y (eq. 7). Plain KD is $\\alpha = 1$ with $\\beta = 1 - p_y$ of each sample.

    With two classes nothing is left over, and NCKD is 0. A sample of a class that the teacher does not know (class-
    incremental learning) has no TCKD, and plain KD over all the teacher's classes for its NCKD.

    Args:
        alpha: Weight of the target-class part; not negative.
        beta: Weight of the part over the other classes; not negative. Tuned per pair of networks: 8, 6 or 2 on
            CIFAR-100, 0.5 or 2 on ImageNet.
        temperature: T, softens both distributions; above 0.

    Raises:
        ValueError: If a parameter is out of range; on use, if labels are no class numbers, or if student and teacher
            do not score the same classes.
    """

    needs = {"logits", "labels"}
    recordable = True

    def __init__(self, *, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0) -> None:
        super().__init__()
        for name, value in (("alpha", alpha), ("beta", beta)):
            if not value >= 0:
                raise ValueError(f"dkd.{name} must not be negative, found {value}")
        if not temperature > 0:
            raise ValueError(f"dkd.temperature must be above 0, found {temperature}")
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Float[Tensor, ""]:
        """The two parts, weighted, times $T^2$."""
        check_same_classes("dkd", student, teacher)
        labels = batch.labels
        if labels.ndim != 1 or labels.is_floating_point():
            raise ValueError(
                f"dkd splits at one target class per sample and has no meaning for soft labels: found labels of shape "
                f"{tuple(labels.shape)} and type {labels.dtype}; switch mixup and label smoothing of the targets off, "
                "or use kd, which reads no labels"
            )
        s = full_precision(student.logits) / self.temperature
        t = full_precision(teacher.logits.detach()) / self.temperature
        num_classes = s.shape[1]
        if num_classes == 1:
            return 0 * s.sum()  # a single class is certain for both
        is_known = (labels >= 0) & (labels < num_classes)
        target = torch.where(is_known, labels, 0)
        target_part = kl(target_or_not(s, target), target_or_not(t, target))
        others_part = torch.where(is_known, kl(others(s, target), others(t, target)), kl(log_all(s), log_all(t)))
        parts = self.alpha * torch.where(is_known, target_part, 0) + self.beta * others_part
        return self.temperature**2 * parts.mean()


def target_or_not(logits: Float[Tensor, "batch classes"], target: Int[Tensor, " batch"]) -> Float[Tensor, "batch 2"]:
    """log p and log(1 - p) of the target class.

    Neither is the logarithm of a softmax, which is log(0) from a margin of about 100 on.
    """
    whole = logits.logsumexp(dim=1)
    at_target = logits.gather(1, target[:, None])[:, 0]
    return torch.stack([at_target - whole, without(logits, target).logsumexp(dim=1) - whole], dim=1)


def others(logits: Float[Tensor, "batch classes"], target: Int[Tensor, " batch"]) -> Float[Tensor, "batch others"]:
    """Log-probabilities among the classes other than the target."""
    return log_all(without(logits, target))


def log_all(logits: Float[Tensor, "batch some"]) -> Float[Tensor, "batch some"]:
    """Log-probabilities of all classes."""
    return F.log_softmax(logits, dim=1)


def without(logits: Float[Tensor, "batch classes"], target: Int[Tensor, " batch"]) -> Float[Tensor, "batch others"]:
    """The logits of all classes but one per sample, in their order."""
    index = torch.arange(logits.shape[1] - 1, device=logits.device)
    return logits.gather(1, index + (index >= target[:, None]))  # a gather, since a mask would wait for the device


def kl(log_q: Float[Tensor, "batch some"], log_p: Float[Tensor, "batch some"]) -> Float[Tensor, " batch"]:
    """KL(p || q) of every sample, from logarithms; the teacher's p comes second, as in `F.kl_div`."""
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=1)
