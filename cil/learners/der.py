"""DER: dynamically expandable representation (Yan et al., CVPR 2021, arXiv:2103.16788)."""

from dataclasses import replace
from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from cil.learners.base import Learner, learners
from cil.learners.wa import align as align_rows
from cil.models.expanding import ExpandingNetwork
from cil.models.network import BackboneNetwork, Network
from cil.stages import Phase, Stage
from cil.transfer import said
from kd import Batch, Frozen, Outputs, WeightedSum


def backbone_network(network: Network, learner: str) -> BackboneNetwork:
    """The network, if it has a backbone that can be copied.

    Raises:
        ValueError: If it is no `BackboneNetwork`.
    """
    if not isinstance(network, BackboneNetwork):
        raise ValueError(
            f"learner={learner} copies the backbone of a network with one linear head, found {type(network).__name__}: "
            "use model=resnet32 or model=timm, or another learner (replay, lwf)"
        )
    return network


def read_off(teacher: Frozen | None, student: Outputs) -> Outputs | None:
    """What a teacher says, read off what the network says that has grown from it (`ExpandingNetwork.read_off`)."""
    if teacher is None:
        return None
    assert isinstance(teacher.network, ExpandingNetwork)
    return teacher.network.read_off(student)


class Expansion(Learner):
    """What learners have in common that add a copy to the network with every task and freeze the old ones.

    $L = CE + w\\,CE_{aux}$, and the distillation terms where any are configured; in the first task $L = CE$.
    $CE_{aux}$ is of a head on the features of the newest copy alone, fresh in every task, which tells the new classes
    from each other and, as one more output, from all old ones.

    Args:
        network: The network to train.
        distillation: What to learn from the old network; None, as published, keeps none.
        aux_weight: $w$; 0 leaves head and term out.
        align: Whether the new rows of the head are scaled to the length of the old ones after a task (`wa.align`).
    """

    keeps_teacher = True
    needs_memory = True

    def __init__(
        self, network: ExpandingNetwork, distillation: WeightedSum | None, *, aux_weight: float, align: bool
    ) -> None:
        super().__init__(network, distillation)
        self.network: ExpandingNetwork = network
        self.aux_weight = aux_weight
        self.align = align

    def phases(self, stage: Stage) -> list[Phase]:
        """One phase on new data and memory, in which the copies of earlier tasks are held still."""
        return [replace(phase, frozen=self.network.settled) for phase in super().phases(stage)]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The weighted terms: `ce` over every class seen, from the second task on `aux`, and those of distillation."""
        student = said(self.network, batch)
        losses = {"ce": F.cross_entropy(student.logits, batch.labels)}
        if self.network.auxiliary is not None:
            scores = self.network.auxiliary_logits(student)
            num_old = sum(self.network.task_sizes[:-1])
            labels = (batch.labels - num_old + 1).clamp_min(0)
            losses["aux"] = self.aux_weight * F.cross_entropy(scores, labels)
        return losses | self.transferred(student, batch, teacher=self.teacher_says(student))

    def teacher_says(self, student: Outputs) -> Outputs | None:
        """What the teacher says, where it can be told without asking it."""
        return read_off(self.teacher, student)

    def end_stage(self, stage: Stage) -> None:
        """Align the rows of the new classes."""
        super().end_stage(stage)
        if self.align and stage.num_old:
            align_rows(self.network.head, stage.num_old)


@learners.register("der")
class DER(Expansion):
    """One backbone for every task, a copy of the one before it; the older ones are frozen.

    One head reads the features of all backbones: $L = CE + w\\,CE_{aux}$ (`Expansion`), then weight aligning.

    Without the masks and the pruning of the paper, which are in no release, so the network grows by a whole backbone
    with every task: compare it with the unpruned rows of published tables.

    Args:
        network: A `BackboneNetwork`.
        distillation: What to learn from the old network; None, as published, keeps none.
        aux_weight: $w$; 0 leaves head and term out.
        align: Whether the new rows of the head are scaled to the length of the old ones after a task, as in `wa`. So
            does PyCIL; the paper trains the head again on balanced data instead.

    Raises:
        ValueError: If the network is no `BackboneNetwork`.
    """

    def __init__(
        self,
        network: Network,
        distillation: WeightedSum | None = None,
        *,
        aux_weight: Annotated[float, Field(ge=0)] = 1.0,
        align: bool = True,
    ) -> None:
        backbone = backbone_network(network, "der")
        expanding = ExpandingNetwork(backbone, auxiliary="newest" if aux_weight else None)
        super().__init__(expanding, distillation, aux_weight=aux_weight, align=align)
