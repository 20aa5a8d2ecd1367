"""The losses of DKT (Gao et al., CVPR 2023, pages 24236-24245) as a function of what student and teacher say."""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kd import Batch, Outputs, WeightedSum
from kd.feature.cluster_separation import ClusterSeparation
from kd.precision import full_precision


def binary_cross_entropy(logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Mean over batch and classes of the binary cross-entropy of each score against the one-hot label."""
    logits = full_precision(logits)
    return F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, logits.shape[1]).to(logits))


def dkt_losses(
    student: Outputs,
    teacher: Outputs | None,
    batch: Batch,
    *,
    distillation: WeightedSum | None,
    separation: ClusterSeparation | None,
    base_weight: float,
) -> dict[str, Tensor]:
    """The weighted terms of a batch.

    With $\\lambda = C_{old} / C$: `bce` is $w (1 - \\lambda) BCE$, every distillation term stands under its own name
    times $\\lambda$ (over the scores of the old classes), `separation` is what `separation` returns. Without a teacher
    there is only `bce`, the whole of it.

    Args:
        student: Scores of all classes seen.
        teacher: Scores of the old classes; None in the first task and in fine-tuning.
        batch: Labels in learned order.
        distillation: What to learn from the teacher; None leaves it out.
        separation: The cluster-separation loss; None leaves it out.
        base_weight: $w$: 1, or 2 for the release, which counts the base loss twice (R1).
    """
    bce = binary_cross_entropy(student.logits, batch.labels)
    if teacher is None:
        return {"bce": bce}
    num_old, num_classes = teacher.logits.shape[1], student.logits.shape[1]
    old_share = num_old / num_classes
    losses = {"bce": base_weight * (1 - old_share) * bce}
    if distillation is not None:
        terms = distillation.terms(student.first(num_old), teacher, batch)
        losses |= {name: old_share * term for name, term in terms.items()}
    if separation is not None:
        losses["separation"] = separation(student, teacher, batch)
    return losses
