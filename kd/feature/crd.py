"""Contrastive representation distillation (Tian, Krishnan, Isola, ICLR 2020, arXiv:1910.10699)."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from kd.base import Batch, Distiller, Outputs, distillers
from kd.distributed import gathered
from kd.feature.crd_memory import SIDES, SampleMemory
from kd.precision import no_autocast

Positives = Literal["exact", "relax"]


@dataclass(frozen=True)
class Contrast:
    """The two halves of the loss of one batch, and the scores x they were made from, the positive first.

    Attributes:
        student_scores: The student's embeddings against the bank of the teacher's; without gradient.
        teacher_scores: The teacher's embeddings against the bank of the student's; without gradient.
        student_loss: Reaches the student and its embedding layer.
        teacher_loss: Reaches the embedding layer of the teacher only.
    """

    student_scores: Float[Tensor, "batch candidates"]
    teacher_scores: Float[Tensor, "batch candidates"]
    student_loss: Float[Tensor, ""]
    teacher_loss: Float[Tensor, ""]


@distillers.register("crd")
class CRD(Distiller):
    """The student's embedding of a sample is told, as its teacher's, from the embeddings of other classes; and back.

    Embeddings v are linear in the pooled features and of length 1; those of every training sample are kept in two
    banks M. With n samples in all, the sample itself as candidate 0, K negatives behind it, and
    $x_{bj} = \\exp(\\langle M^{teacher}_{bj}, v^{student}_b \\rangle / \\tau) / Z$:
    $-\\frac{1}{B} \\sum_b \\big[ \\log \\frac{x_{b0}}{x_{b0} + K/n + \\epsilon}
    + \\sum_{j > 0} \\log \\frac{K/n}{x_{bj} + K/n + \\epsilon} \\big]$,
    plus the same with student and teacher exchanged. Z is n times the mean of the exponentials of the first batch, and
    stays until samples arrive. After the scores are read, $M_b \\leftarrow$ normalise$(m M_b + (1 - m) v_b)$
    (`kd.feature.crd_memory`); the negatives are drawn anew in every step (`kd.feature.crd_sampling`). In evaluation
    mode nothing is changed.

    Args:
        embedding_width: Numbers in an embedding.
        num_negatives: K.
        temperature: $\\tau$; above 0.
        momentum: m, what is kept of a row when its sample is seen; at least 0, below 1.
        positives: `exact` compares with the sample itself, `relax` with any sample of its class.
        eps: $\\epsilon$; not negative.

    Raises:
        ValueError: If an argument is out of its range; on use, if there is no embedding, if `connect` or `remember`
            has not been called, if all samples are of one class, or if a sample is not among those remembered.
    """

    needs = {"embedding", "ids"}

    def __init__(
        self,
        *,
        embedding_width: int = 128,
        num_negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        positives: Positives = "exact",
        eps: float = 1e-7,
    ) -> None:
        super().__init__()
        for name, number in (("embedding_width", embedding_width), ("num_negatives", num_negatives)):
            if number < 1:
                raise ValueError(f"crd.{name} must be at least 1, found {number}")
        if not temperature > 0:
            raise ValueError(f"crd.temperature must be above 0, found {temperature}")
        if not 0 <= momentum < 1:
            raise ValueError(f"crd.momentum must be at least 0 and below 1, found {momentum}")
        if positives not in get_args(Positives):
            raise ValueError(f"crd.positives must be one of {', '.join(get_args(Positives))}, found {positives!r}")
        if not eps >= 0:
            raise ValueError(f"crd.eps must not be negative, found {eps}")
        self.embedding_width, self.num_negatives = embedding_width, num_negatives
        self.temperature, self.momentum, self.positives, self.eps = temperature, momentum, positives, eps
        self.embeds = nn.ModuleDict()
        self.memory = SampleMemory(embedding_width)

    def connect(self, student: Outputs, teacher: Outputs) -> None:
        """Make the two embedding layers; the banks go where these are."""
        for side, outputs in zip(SIDES, (student, teacher), strict=True):
            features = _embedding(side, outputs)
            self.embeds[side] = nn.Linear(features.shape[1], self.embedding_width, device=features.device)
            self.memory.to(features.device)

    def remember(self, ids: Int[Tensor, " samples"], labels: Int[Tensor, " samples"]) -> None:
        """Make rows for samples that are new; those of known samples stay. Every process must call it."""
        self.memory.remember(ids, labels)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Float[Tensor, ""]:
        """The sum of both halves, with candidates drawn for this step."""
        # the embeddings are all that is read, so all that is sent
        student, teacher = (Outputs(outputs.logits[:, :1], outputs.embedding) for outputs in (student, teacher))
        student, teacher, batch = gathered(student, teacher, batch)
        features = [_embedding(side, outputs) for side, outputs in zip(SIDES, (student, teacher), strict=True)]
        rows = self.memory.rows(batch.ids)
        blocks, generator = self.memory.blocks(), self.memory.generator()
        first = rows if self.positives == "exact" else blocks.positives(rows, generator)
        negatives = blocks.negatives(rows, self.num_negatives, generator)
        contrast = self._contrast(features[0], features[1], rows, torch.cat([first[:, None], negatives], dim=1))
        return contrast.student_loss + contrast.teacher_loss

    def step(
        self,
        student: Float[Tensor, "batch student_width"],
        teacher: Float[Tensor, "batch teacher_width"],
        ids: Int[Tensor, " batch"],
        candidates: Int[Tensor, "batch candidates"],
    ) -> Contrast:
        """Both halves for given candidates; the banks are changed as by `forward`.

        Args:
            student: Pooled features of the student.
            teacher: Pooled features of the teacher.
            ids: The samples.
            candidates: For each sample the id of its positive, then those of its negatives.
        """
        return self._contrast(student, teacher, self.memory.rows(ids), self.memory.rows(candidates))

    def _contrast(self, student: Tensor, teacher: Tensor, rows: Tensor, candidates: Tensor) -> Contrast:
        with no_autocast(student.device):
            v_student, v_teacher = self._embed("student", student), self._embed("teacher", teacher.detach())
            student_scores, student_loss = self._half("student", v_student, self.memory.bank("teacher"), candidates)
            teacher_scores, teacher_loss = self._half("teacher", v_teacher, self.memory.bank("student"), candidates)
            if self.training:
                self.memory.keep_z()
                self.memory.update("student", rows, v_student, self.momentum)
                self.memory.update("teacher", rows, v_teacher, self.momentum)
        return Contrast(student_scores, teacher_scores, student_loss, teacher_loss)

    def _embed(self, side: str, features: Tensor) -> Tensor:
        if side not in self.embeds:
            raise ValueError("crd has no embedding layers yet: call connect(student, teacher) with probe outputs first")
        layer = self.embeds[side]
        assert isinstance(layer, nn.Linear)
        wide = torch.promote_types(layer.weight.dtype, torch.float32)
        return F.normalize(F.linear(features.to(wide), layer.weight.to(wide), layer.bias.to(wide)), dim=1)

    def _half(self, side: str, v: Tensor, bank: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """The scores of one side, and its half of the loss.

        The gradient is computed at once, while the scores exist, and only its [batch, width] numbers are kept for the
        backward: scores and rows are much larger than that, and the banks will have changed by then.
        """
        leaf = v.detach().requires_grad_(v.requires_grad)
        # logs of scores throughout, since exp(1 / temperature) need not fit into a float32
        log_x = _similarities(leaf, bank.to(v.dtype), candidates) / self.temperature
        log_x = log_x - self.memory.log_z(side, log_x.detach())
        num_negatives = candidates.shape[1] - 1
        noise = num_negatives / len(bank)
        margin = log_x - math.log(noise + self.eps)
        told_apart = F.logsigmoid(margin[:, 0]).sum() + F.logsigmoid(-margin[:, 1:]).sum()
        loss = num_negatives * math.log1p(self.eps / noise) - told_apart / len(v)
        if v.requires_grad and torch.is_grad_enabled():
            (gradient,) = torch.autograd.grad(loss, leaf)
            loss = loss.detach() + ((v - leaf.detach()) * gradient).sum()  # the value of the loss, and its gradient
        return log_x.detach().exp(), loss


def _similarities(v: Tensor, bank: Tensor, candidates: Tensor) -> Tensor:
    """<M_bj, v_b>, by products with the whole bank where these are fewer numbers than the candidates' rows."""
    if len(bank) <= candidates.shape[1] * v.shape[1]:
        return (v @ bank.T).gather(1, candidates)
    return torch.einsum("bd,bkd->bk", v, bank[candidates])


def _embedding(side: str, outputs: Outputs) -> Tensor:
    if outputs.embedding is None:
        raise ValueError(f"crd compares pooled features: the {side} gives no embedding")
    return outputs.embedding
