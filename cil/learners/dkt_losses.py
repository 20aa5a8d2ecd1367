"""The losses of DKT (Gao et al., CVPR 2023, pages 24236-24245) as a function of what student and teacher say."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kd import Batch, Outputs, WeightedSum
from kd.feature.cluster_separation import ClusterSeparation
from kd.precision import full_precision

Reduction = Literal["batchmean", "mean"]
#: The loss against the labels; the first is published.
BaseLoss = Literal["bce", "cross_entropy", "balanced_cross_entropy"]


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


def balanced_cross_entropy(
    logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"], counts: Int[Tensor, " classes"]
) -> Float[Tensor, ""]:
    """Cross-entropy of scores to which the log of each class's share of the training samples is added.

    The network then has to say what the shares do not: its own scores, without them, are those for classes of equal
    shares. Few exemplars of old classes beside many new samples need no correction afterwards. Ren et al., NeurIPS
    2020, arXiv:2007.10740 (Balanced Softmax); Menon et al., ICLR 2021, arXiv:2007.07314 (logit adjustment, tau = 1).

    Args:
        logits: Scores.
        labels: Labels in learned order.
        counts: Training samples of every class; one without any takes no part.
    """
    shares = counts.to(logits.device) / counts.sum()
    return F.cross_entropy(full_precision(logits) + torch.log(shares), labels)


def dkt_losses(
    student: Outputs,
    teacher: Outputs | None,
    batch: Batch,
    *,
    distillation: WeightedSum | None,
    separation: ClusterSeparation | None,
    base_weight: float,
    base_reduction: Reduction = "mean",
    base_loss: BaseLoss = "bce",
    counts: Int[Tensor, " classes"] | None = None,
) -> dict[str, Tensor]:
    """The weighted terms of a batch.

    With $\\lambda = C_{old} / C$: the base loss, `bce`, is $w (1 - \\lambda) BCE$, every distillation term stands under
    its own name times $\\lambda$ (over the scores of the old classes), `separation` is what `separation` returns.
    Without a teacher there is only the base loss, the whole of it; without distillation terms, or after the end of
    their schedules, $\\lambda = 0$.

    Args:
        student: Scores of all classes seen.
        teacher: Scores of the old classes; None in the first task and in fine-tuning.
        batch: Labels in learned order.
        distillation: What to learn from the teacher; None leaves it out.
        separation: The cluster-separation loss; None leaves it out.
        base_weight: $w$: 1, or 2 for the release, which counts the base loss twice (R1).
        base_reduction: How BCE is reduced, see `binary_cross_entropy`.
        base_loss: What stands in the place of BCE, under its own name.
        counts: For the balanced cross-entropy; None where all classes count the same.
    """
    if base_loss == "bce":
        base = binary_cross_entropy(student.logits, batch.labels, base_reduction)
    elif base_loss == "balanced_cross_entropy" and counts is not None:
        base = balanced_cross_entropy(student.logits, batch.labels, counts)
    else:
        base = F.cross_entropy(full_precision(student.logits), batch.labels)
    if teacher is None:
        return {base_loss: base}
    num_old, num_classes = teacher.logits.shape[1], student.logits.shape[1]
    old_share = num_old / num_classes if distillation is not None and not distillation.ended else 0.0
    losses: dict[str, Tensor] = {base_loss: base_weight * (1 - old_share) * base}
    if distillation is not None:
        terms = distillation.terms(student.first(num_old), teacher, batch)
        losses |= {name: old_share * term for name, term in terms.items()}
    if separation is not None:
        losses["separation"] = separation(student, teacher, batch)
    return losses
