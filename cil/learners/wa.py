"""Weight aligning (Zhao et al., CVPR 2020, arXiv:1911.07053: Maintaining Discrimination and Fairness in CIL)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from cil.learners.base import Learner, learners
from cil.models.heads import GrowingLinear
from cil.models.network import BackboneNetwork, Network
from cil.stages import Stage
from cil.transfer import said
from kd import Batch, WeightedSum


@torch.no_grad()
def align(head: GrowingLinear, num_old: int) -> float:
    """Scale the newest rows of a head until they are as long as the old ones, on average.

    $w_k \\leftarrow \\gamma w_k$ for every new class k, with
    $\\gamma = \\mathrm{mean}_{old} \\|w\\| / \\mathrm{mean}_{new} \\|w\\|$. Biases stay as they are.

    Args:
        head: The head; its first `num_old` rows are the old ones.
        num_old: Number of old classes.

    Returns:
        $\\gamma$.

    Raises:
        ValueError: If there are no old rows, no new rows, or nothing but zeros in one of them.
    """
    if not 0 < num_old < head.out_features:
        raise ValueError(f"aligning needs old and new rows: found {num_old} old ones of {head.out_features}")
    norms = head.weight.norm(dim=1)
    old, new = float(norms[:num_old].mean()), float(norms[num_old:].mean())
    if not old or not new:
        raise ValueError(f"rows of zeros cannot be aligned: the mean norm is {old} of the old and {new} of the new")
    gamma = old / new
    head.weight[num_old:] *= gamma
    return gamma


@learners.register("wa")
class WA(Learner):
    """Replay with distillation; after each task the new rows of the head are scaled to the length of the old ones.

    $L = (1-\\lambda)\\,CE + \\lambda\\,KD$ with $\\lambda = C_{old} / C$, then `align`: without it the new classes, of
    which there are many more images, get the larger weights and thereby the larger scores. In the first task $L = CE$.

    Args:
        network: A `BackboneNetwork`: the rows of its one linear head are aligned.
        distillation: What to learn from the old network; None leaves it out, with $\\lambda = 0$ (an ablation of the
            paper). `configs/kd/kd2.yaml` is the published term: temperature 2, without the factor $T^2$.
        clip_positive: Set negative weights of the head to 0 after every step, as the paper has it, so that long rows
            mean large scores. PyCIL leaves it out.

    Raises:
        ValueError: If the network is no `BackboneNetwork`.
    """

    keeps_teacher = True
    needs_memory = True
    recordable = True

    def __init__(self, network: Network, distillation: WeightedSum | None, *, clip_positive: bool = False) -> None:
        super().__init__(network, distillation)
        if not isinstance(network, BackboneNetwork):
            raise ValueError(
                f"learner=wa aligns the rows of one linear head, found {type(network).__name__}: use model=resnet32 or "
                "model=timm, or another learner (replay, lwf)"
            )
        self.network: BackboneNetwork = network
        self.clip_positive = clip_positive

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The weighted terms: `ce` over every class seen, and those of distillation by name."""
        student = said(self.network, batch)
        ce = F.cross_entropy(student.logits, batch.labels)
        if not self.learns_from_old:
            return {"ce": ce}
        old_share = sum(self.network.task_sizes[:-1]) / self.network.num_classes
        return {"ce": (1 - old_share) * ce} | self.transferred(student, batch, old_share)

    def advance(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, clip_norm: float | None) -> None:
        """One optimiser step, and clipping if it is asked for."""
        super().advance(optimizer, scaler, clip_norm)
        if self.clip_positive:
            with torch.no_grad():
                self.network.head.weight.clamp_(min=0)

    def end_stage(self, stage: Stage) -> None:
        """Align the rows of the new classes."""
        super().end_stage(stage)
        if stage.num_old:
            align(self.network.head, stage.num_old)
