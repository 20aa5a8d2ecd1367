"""The losses of DyTox (Douillard et al., CVPR 2022, arXiv:2111.11326) as a function of what student and teacher say."""

from jaxtyping import Float, Int
from torch import Tensor

from cil.learners.dkt_losses import Reduction, binary_cross_entropy, dkt_losses
from kd import Batch, Outputs, WeightedSum


def divergence_loss(
    scores: Float[Tensor, "batch one_plus_new"],
    labels: Int[Tensor, " batch"],
    num_old: int,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""]:
    """Binary cross-entropy of the divergence head: one score for every old class together, one for each new class."""
    return binary_cross_entropy(scores, (labels - num_old + 1).clamp(min=0), reduction)


def dytox_losses(
    student: Outputs,
    teacher: Outputs | None,
    batch: Batch,
    *,
    distillation: WeightedSum | None,
    divergence: Float[Tensor, "batch one_plus_new"] | None,
    divergence_weight: float,
    base_reduction: Reduction = "mean",
) -> dict[str, Tensor]:
    """The weighted terms of a batch: those of `dkt_losses` without separation, and `divergence`.

    Args:
        student: Scores of all classes seen.
        teacher: Scores of the old classes; None in the first task, in fine-tuning and without distillation.
        batch: Labels in learned order.
        distillation: What to learn from the teacher; None leaves it out.
        divergence: Scores of the divergence head; None in the first task and in fine-tuning.
        divergence_weight: Weight of the divergence loss (0.1 in the paper).
        base_reduction: How both cross-entropies are reduced, see `binary_cross_entropy`.
    """
    losses = dkt_losses(
        student,
        teacher,
        batch,
        distillation=distillation,
        separation=None,
        base_weight=1.0,
        base_reduction=base_reduction,
    )
    if divergence is not None:
        num_old = student.logits.shape[1] - (divergence.shape[1] - 1)
        found = divergence_loss(divergence, batch.labels, num_old, base_reduction)
        losses["divergence"] = divergence_weight * found
    return losses
