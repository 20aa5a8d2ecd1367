"""The losses of DKT (Gao et al., CVPR 2023, pages 24236-24245) as a function of what student and teacher say."""

from typing import Literal, get_args

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kd import Batch, Outputs, WeightedSum
from kd.feature.cluster_separation import ClusterSeparation
from kd.precision import full_precision

Reduction = Literal["batchmean", "mean"]


def binary_cross_entropy(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"], reduction: Reduction = "mean"
) -> Float[Tensor, ""]:
    """Binary cross-entropy of each score against the one-hot label.

    Args:
        logits: Scores.
        labels: Labels in learned order.
        reduction: `mean` over batch and classes, or `batchmean`: summed over classes, mean over the batch.

    Raises:
        ValueError: If `reduction` is neither.
    """
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {', '.join(get_args(Reduction))}, found {reduction!r}")
    logits = full_precision(logits)
    loss = F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, logits.shape[1]).to(logits))
    return loss * logits.shape[1] if reduction == "batchmean" else loss


def dkt_losses(
    student: Outputs,
    teacher: Outputs | None,
    batch: Batch,
    *,
    distillation: WeightedSum | None,
    separation: ClusterSeparation | None,
    base_weight: float,
    base_reduction: Reduction = "mean",
) -> dict[str, Tensor]:
    """The weighted terms of a batch.

    With $\\lambda = C_{old} / C$: `bce` is $w (1 - \\lambda) BCE$, every distillation term stands under its own name
    times $\\lambda$ (over the scores of the old classes), `separation` is what `separation` returns. Without a teacher
    there is only `bce`, the whole of it; without distillation terms, or after the end of their schedules,
    $\\lambda = 0$.

    Args:
        student: Scores of all classes seen.
        teacher: Scores of the old classes; None in the first task and in fine-tuning.
        batch: Labels in learned order.
        distillation: What to learn from the teacher; None leaves it out.
        separation: The cluster-separation loss; None leaves it out.
        base_weight: $w$: 1, or 2 for the release, which counts the base loss twice (R1).
        base_reduction: How BCE is reduced, see `binary_cross_entropy`.
    """
    bce = binary_cross_entropy(student.logits, batch.labels, base_reduction)
    if teacher is None:
        return {"bce": bce}
    num_old, num_classes = teacher.logits.shape[1], student.logits.shape[1]
    old_share = num_old / num_classes if distillation is not None and not distillation.ended else 0.0
    losses = {"bce": base_weight * (1 - old_share) * bce}
    if distillation is not None:
        terms = distillation.terms(student.first(num_old), teacher, batch)
        losses |= {name: old_share * term for name, term in terms.items()}
    if separation is not None:
        losses["separation"] = separation(student, teacher, batch)
    return losses
