"""MEMO: memory-efficient expandable model (Zhou et al., ICLR 2023, arXiv:2205.13218)."""

from dataclasses import replace
from typing import Annotated

from pydantic import Field

from cil.learners.base import learners
from cil.learners.der import Expansion, backbone_network
from cil.models.backbones.resnet_cifar import StagedBackbone
from cil.models.expanding import ExpandingNetwork
from cil.models.network import Network
from cil.stages import Phase, Stage
from kd import Outputs, WeightedSum


@learners.register("memo")
class MEMO(Expansion):
    """DER that copies the last stage of the backbone only: all copies read the maps of the earlier, shared stages.

    $L = CE + w\\,CE_{aux}$ (`Expansion`), then weight aligning. The old copies are frozen; gradients pass through them
    to the shared stages.

    Args:
        network: A `BackboneNetwork` whose backbone is a `StagedBackbone`.
        distillation: What to learn from the old network; None, as published, keeps none.
        aux_weight: $w$; 0 leaves head and term out.
        align: Whether the new rows of the head are scaled to the length of the old ones after a task, as in `wa`.
        train_base: Whether the shared stages go on learning after the first task. Held still, they cost no backward
            pass and old copies keep the features that they have learned to read.

    Raises:
        ValueError: If the backbone has no such stages, or a distillation term differentiates through the shared stages
            and they are held still.
    """

    def __init__(
        self,
        network: Network,
        distillation: WeightedSum | None = None,
        *,
        aux_weight: Annotated[float, Field(ge=0)] = 1.0,
        align: bool = True,
        train_base: bool = True,
    ) -> None:
        network = backbone_network(network, "memo")
        backbone = network.backbone
        if not isinstance(backbone, StagedBackbone):
            raise ValueError(
                f"learner=memo copies the last stage of a backbone of stages, found {type(backbone).__name__}: use "
                "model=resnet32, model=resnet50 or model=shufflenetv1, or learner=der, which copies any backbone"
            )
        if distillation is not None and "teacher_graph" in distillation.needs and not train_base:
            raise ValueError(
                f"kd={'+'.join(distillation.weights)} differentiates through all stages of the network, and "
                "learner.train_base=false holds the first ones still: set it to true, or take another term"
            )
        part = f"backbone.stages.{len(backbone.stages) - 1}"
        expanding = ExpandingNetwork(network, part=part, auxiliary="newest" if aux_weight else None)
        super().__init__(expanding, distillation, aux_weight=aux_weight, align=align)
        self.train_base = train_base

    def phases(self, stage: Stage) -> list[Phase]:
        """One phase on new data and memory, in which old copies, and perhaps the shared stages, are held still."""
        phases = super().phases(stage)
        if self.train_base or stage.index == 0:
            return phases
        backbone = self.network.backbone
        assert isinstance(backbone, StagedBackbone)
        shared = [backbone.conv, backbone.bn, *backbone.stages[:-1]]
        return [replace(phase, frozen=[*phase.frozen, *shared]) for phase in phases]

    def teacher_says(self, student: Outputs) -> Outputs | None:
        """What the teacher says, where it can be told without asking it: not while the shared stages move."""
        return None if self.train_base else super().teacher_says(student)
