"""Cluster separation, of DKT (Gao et al., "Diverse Knowledge Transfer Transformer", CVPR 2023, pages 24236-24245)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kd.base import Batch, Distiller, Outputs, distillers
from kd.distributed import gathered
from kd.precision import full_precision, no_autocast

_SMALLEST_NORM = 1e-8  # under the cosine, as in torch's cosine_similarity


@distillers.register("cluster_separation")
class ClusterSeparation(Distiller):
    """Pulls embeddings to the teacher's of the same class and pushes old and new classes apart.

    $s \\cdot \\frac{1}{B^2} \\sum_{ij} w_{ij} (1 - \\cos(z_i, u_j))$ with the student's embeddings z and the teacher's
    u, where $w_{ij}$ is `same` for two samples of one class (i = j included), `across` if exactly one of them is of an
    old class, and `otherwise` for the rest. Old are the classes that the teacher knows. The value may be negative.

    Args:
        same: Weight of pairs of one class.
        across: Weight of pairs of an old and a new class.
        otherwise: Weight of pairs of two old or two new classes.
        scale: $s$, the coefficient of the whole term (0.003 in the release).

    Raises:
        ValueError: If `scale` is negative; on use, if an embedding is missing or the widths differ.
    """

    needs = {"embedding", "labels", "logits"}
    recordable = True

    def __init__(
        self, *, same: float = 4.0, across: float = -4.0, otherwise: float = -1.0, scale: float = 0.003
    ) -> None:
        super().__init__()
        if scale < 0:
            raise ValueError(f"cluster_separation.scale must not be negative, found {scale}")
        self.same = same
        self.across = across
        self.otherwise = otherwise
        self.scale = scale

    def weights(
        self, labels: Int[Tensor, " batch"], num_old: int, dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "batch batch"]:
        """$w_{ij}$ for every pair of samples; labels below `num_old` are old."""
        is_old = labels < num_old
        is_same = labels[:, None] == labels[None, :]
        is_across = is_old[:, None] != is_old[None, :]
        weights = torch.full(is_same.shape, self.otherwise, dtype=dtype, device=labels.device)
        return weights.masked_fill_(is_across, self.across).masked_fill_(is_same, self.same)

    def cosine(
        self, student: Float[Tensor, "batch width"], teacher: Float[Tensor, "batch width"]
    ) -> Float[Tensor, "batch batch"]:
        """$\\cos(z_i, u_j)$; no gradient reaches the teacher."""
        with no_autocast(student.device):
            z = F.normalize(full_precision(student), eps=_SMALLEST_NORM)
            u = F.normalize(full_precision(teacher.detach()), eps=_SMALLEST_NORM)
            return z @ u.T

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Float[Tensor, ""]:
        """The weighted mean over all pairs of student and teacher embeddings, of all processes."""
        read = Outputs(student.logits, student.embedding), Outputs(teacher.logits, teacher.embedding)
        student, teacher, batch = gathered(*read, batch)
        z, u = student.embedding, teacher.embedding
        if z is None or u is None:
            raise ValueError("cluster_separation compares embeddings, but the student or the teacher gives none")
        if z.shape != u.shape:
            raise ValueError(
                f"cluster_separation needs embeddings of one width, found {tuple(z.shape)} of the student and "
                f"{tuple(u.shape)} of the teacher"
            )
        cosine = self.cosine(z, u)
        weights = self.weights(batch.labels, num_old=teacher.logits.shape[1], dtype=cosine.dtype)
        return self.scale * (weights * (1 - cosine)).mean()
