"""BiC: Large Scale Incremental Learning by bias correction (Wu et al., CVPR 2019, arXiv:1905.13260)."""

from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from cil.learners.base import Learner, learners
from cil.models.bias_correction import BiasCorrectedLinear
from cil.models.network import BackboneNetwork, Network
from cil.stages import Phase, SetApart, Stage
from cil.transfer import said
from kd import Batch, WeightedSum
from kd.precision import full_precision

BIAS = "bias"  # the phase that learns the correction of the newest scores, and nothing else


@learners.register("bic")
class BiC(Learner):
    """Replay with distillation; then the scores of the new classes are corrected on balanced samples set apart.

    Stage 1: $L = (1-\\lambda)\\,CE + \\lambda\\,KD$ with $\\lambda = C_{old} / C$, on new data and memory but for the
    samples set apart: `fraction` of the exemplars of every old class, and as many of every new one. Stage 2: everything
    rests but two numbers, $z \\leftarrow a z + b$ for the scores of the new classes, which learn from $CE$ on the
    samples set apart, by the recipe of stage 1. In the first task there is $CE$ alone.

    The correction is part of the network: the teacher of the next task answers after it, and so does a loaded network.
    It keeps its values while later tasks learn, as in PyCIL. In the authors' code the next network begins without it
    and learns it from the teacher, and only the newest is applied.

    Args:
        network: A `BackboneNetwork` without classes yet; its head is replaced by a `BiasCorrectedLinear`.
        distillation: What to learn from the old network; None leaves it out, with $\\lambda = 0$. `configs/kd/kd2.yaml`
            is the published term: temperature 2, without the factor $T^2$.
        fraction: Of the exemplars of an old class that are set apart; rounded down.
        bias_epochs: Passes of stage 2; null as many as in stage 1, as published.
        bias_lr: Rate of stage 2, scaled by batch size like that of the run; null takes the run's, as published.
        shift_penalty: Adds $\\frac{1}{2} b^2$ times this to stage 2: 0.1 in the authors' code.
        variant: Of stage 2. `released` is PyCIL: it takes the softmax of the scores before the cross-entropy, which
            takes it again, and leaves BatchNorm in training mode, so that its statistics move on.

    Raises:
        ValueError: If the network is no `BackboneNetwork`, or has classes already.
    """

    keeps_teacher = True
    needs_memory = True

    def __init__(
        self,
        network: Network,
        distillation: WeightedSum | None,
        *,
        fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1,
        bias_epochs: Annotated[int, Field(gt=0)] | None = None,
        bias_lr: Annotated[float, Field(gt=0)] | None = None,
        shift_penalty: Annotated[float, Field(ge=0)] = 0.0,
        variant: Literal["single_softmax", "released"] = "single_softmax",
    ) -> None:
        super().__init__(network, distillation)
        if not isinstance(network, BackboneNetwork):
            raise ValueError(
                f"learner=bic corrects the scores of one linear head, found {type(network).__name__}: use "
                "model=resnet32 or model=timm, or another learner (replay, icarl)"
            )
        if network.num_classes:
            raise ValueError(
                f"learner=bic gives the network a head of its own, which would lose the {network.num_classes} classes "
                "it has: start from a network without classes"
            )
        corrected = BiasCorrectedLinear(
            network.embedding_width, keep_bias=network.head.keep_bias, init=network.head.init
        )
        network.add_module("head", corrected)
        self.network: BackboneNetwork = network
        self.fraction = fraction
        self.bias_epochs = bias_epochs
        self.bias_lr = bias_lr
        self.shift_penalty = shift_penalty
        self.variant = variant

    @property
    def head(self) -> BiasCorrectedLinear:
        """The head of the network."""
        head: nn.Module = self.network.head
        assert isinstance(head, BiasCorrectedLinear)
        return head

    def phases(self, stage: Stage) -> list[Phase]:
        """Training, and from the second task on bias correction, on samples that training does not show.

        Both divide the new data and the exemplars as they were before this task.
        """
        recipe, head = stage.recipe.for_task(stage.index), self.head
        corrections = [head.scales, head.shifts]
        if stage.index == 0 or not stage.has_memory:
            return [Phase("training", "new+memory" if stage.has_memory else "new", recipe, frozen=corrections)]
        changes = {"epochs": self.bias_epochs, "lr": self.bias_lr}
        rest = [self.network.backbone, head.linear, *head.scales[:-1], *head.shifts[:-1]]
        if self.distillation is not None:
            rest.append(self.distillation)  # its adapters
        return [
            Phase("training", "new+memory", recipe, frozen=corrections, set_apart=SetApart(self.fraction, shown=False)),
            Phase(
                BIAS,
                "new+memory",
                recipe.changed(**{name: value for name, value in changes.items() if value is not None}),
                frozen=rest,
                frozen_in_eval=self.variant != "released",
                set_apart=SetApart(self.fraction, shown=True),
            ),
        ]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Training: the weighted terms `ce` and those of distillation by name. Bias correction: `ce`, and `shift`."""
        if self.phase is not None and self.phase.name == BIAS:
            return self._correction(batch)
        student = said(self.network, batch)
        ce = F.cross_entropy(student.logits, batch.labels)
        if not self.learns_from_old:
            return {"ce": ce}
        old_share = sum(self.network.task_sizes[:-1]) / self.network.num_classes
        return {"ce": (1 - old_share) * ce} | self.transferred(student, batch, old_share)

    def _correction(self, batch: Batch) -> dict[str, Tensor]:
        scores = full_precision(self.network(batch.images).logits)
        if self.variant == "released":
            scores = scores.softmax(dim=1)
        losses = {"ce": F.cross_entropy(scores, batch.labels)}
        if self.shift_penalty:
            losses["shift"] = self.shift_penalty / 2 * self.head.shifts[-1].square()
        return losses
