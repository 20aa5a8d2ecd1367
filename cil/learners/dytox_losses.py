"""The losses of DyTox (Douillard et al., CVPR 2022, arXiv:2111.11326) as a function of what student and teacher say."""

from jaxtyping import Float, Int
from torch import Tensor

from cil.learners.dkt_losses import binary_cross_entropy, dkt_losses
from kd import Batch, Outputs, WeightedSum


def divergence_loss(
    scores: Float[Tensor, "batch one_plus_new"], labels: Int[Tensor, " batch"], num_old: int
) -> Float[Tensor, ""]:
    """Binary cross-entropy of the divergence head: one score for every old class together, one for each new class."""
    return binary_cross_entropy(scores, (labels - num_old + 1).clamp(min=0))


def dytox_losses(
    student: Outputs,
    teacher: Outputs | None,
    batch: Batch,
    *,
    distillation: WeightedSum | None,
    divergence_weight: float,
) -> dict[str, Tensor]:
    """The weighted terms of a batch: those of `dkt_losses` without separation, and `divergence`.

    Args:
        student: Scores of all classes seen, and the tap `divergence` of `DyToxNetwork`.
        teacher: Scores of the old classes; None in the first task and in fine-tuning, then there is only `bce`.
        batch: Labels in learned order.
        distillation: What to learn from the teacher; None leaves it out.
        divergence_weight: Weight of the divergence loss (0.1 in the paper).
    """
    losses = dkt_losses(student, teacher, batch, distillation=distillation, separation=None, base_weight=1.0)
    if teacher is not None:
        scores = student.taps["divergence"]
        losses["divergence"] = divergence_weight * divergence_loss(scores, batch.labels, teacher.logits.shape[1])
    return losses
