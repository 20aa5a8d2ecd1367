"""Born-again networks (Furlanello, Lipton, Tschannen, Itti and Anandkumar, ICML 2018, arXiv:1805.04770).

Every generation learns from the one before, with new weights in the same architecture; there is no official code.
With the labels beside it (BAN+L), the task loss stands next to the term with weight 1.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kd.base import Batch, Distiller, Outputs, check_same_classes, distillers
from kd.distributed import gathered
from kd.precision import full_precision

Logits = Float[Tensor, "batch classes"]
Probabilities = Float[Tensor, "batch classes"]


def soft_cross_entropy(logits: Logits, probabilities: Probabilities) -> Float[Tensor, ""]:
    """$-\\frac{1}{B} \\sum_b \\sum_k p_{bk} \\log \\mathrm{softmax}(z_b)_k$; no gradient reaches the probabilities."""
    return F.cross_entropy(full_precision(logits), full_precision(probabilities.detach()), reduction="mean")


@distillers.register("ban")
class BAN(Distiller):
    """Cross-entropy of the student with the teacher's probabilities, mean over the batch, at temperature 1.

    It is KD at temperature 1 plus the entropy of the teacher, so its gradient is the same.

    Raises:
        ValueError: On use, if student and teacher do not score the same classes.
    """

    needs = {"logits"}
    recordable = True

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Float[Tensor, ""]:
        """The soft-target cross-entropy."""
        check_same_classes("ban", student, teacher)
        return soft_cross_entropy(student.logits, _probabilities(teacher))


@distillers.register("cwtm")
class CWTM(Distiller):
    """Confidence-weighted by the teacher maximum: the label loss of samples by how sure the teacher is.

    $\\sum_b w_b \\, CE_b(s, y)$ with $w_b = \\max_k p_{bk} / \\sum_b \\max_k p_{bk}$, over the batch of all processes.
    It takes the place of the label loss: give the task loss weight 0. What the teacher says is right does not count.
    Samples of classes that the teacher does not know (class-incremental learning) are left out, of the sum of the
    weights too.

    Raises:
        ValueError: On use, if student and teacher do not score the same classes.
    """

    needs = {"logits", "labels"}
    recordable = True

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Float[Tensor, ""]:
        """The weighted cross-entropy with the labels."""
        student, teacher, batch = gathered(Outputs(student.logits), Outputs(teacher.logits), batch)
        check_same_classes("cwtm", student, teacher)
        confidence = _probabilities(teacher).amax(dim=1)
        is_known = (batch.labels >= 0) & (batch.labels < student.logits.shape[1])
        ce = F.cross_entropy(full_precision(student.logits), torch.where(is_known, batch.labels, 0), reduction="none")
        weights = torch.where(is_known, confidence, 0)
        tiny = torch.finfo(weights.dtype).tiny  # a batch without a known class: 0 and not 0 / 0
        return (weights * ce).sum() / weights.sum().clamp_min(tiny)


@distillers.register("dkpp")
class DKPP(Distiller):
    """Dark knowledge with permuted predictions: the teacher's probabilities but for the largest change places.

    Cross-entropy with them, mean over the batch, at temperature 1. Every sample has a permutation of its own, drawn
    from torch's generator of the device. What is left of the teacher is how sure it is, not what it confuses.

    Raises:
        ValueError: On use, if student and teacher do not score the same classes.
    """

    needs = {"logits"}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Float[Tensor, ""]:
        """The soft-target cross-entropy with permuted targets."""
        check_same_classes("dkpp", student, teacher)
        probabilities = _probabilities(teacher)
        count, num_classes = probabilities.shape
        permutation = torch.rand(count, num_classes - 1, device=probabilities.device).argsort(dim=1)
        return soft_cross_entropy(student.logits, permuted(probabilities, permutation))


def permuted(probabilities: Probabilities, permutation: Int[Tensor, "batch others"]) -> Probabilities:
    """All but the largest probability of every sample in another order.

    Args:
        probabilities: Of every class.
        permutation: Of the classes but the largest, counted in their order: place j gets what stands at
            `permutation[b, j]`.
    """
    index = torch.arange(permutation.shape[1], device=probabilities.device)
    places = index + (index >= probabilities.argmax(dim=1, keepdim=True))
    return probabilities.scatter(1, places, probabilities.gather(1, places.gather(1, permutation)))


def ensemble(members: Sequence[Logits]) -> Probabilities:
    """The mean of the members' probabilities: what several generations say together.

    Raises:
        ValueError: If there are none.
    """
    if not members:
        raise ValueError("an ensemble has at least one member, found none")
    return torch.stack([F.softmax(full_precision(logits), dim=1) for logits in members]).mean(dim=0)


def _probabilities(teacher: Outputs) -> Probabilities:
    return F.softmax(full_precision(teacher.logits.detach()), dim=1)
