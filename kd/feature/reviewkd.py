"""ReviewKD (Chen et al., "Distilling Knowledge via Knowledge Review", CVPR 2021, arXiv:2104.09044)."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from kd.base import Batch, Distiller, Outputs, distillers
from kd.connect import ABF
from kd.precision import full_precision
from kd.taps import read_tap, stage_taps

Side = Literal["pre", "post"]
Maps = Float[Tensor, "batch channels height width"]

_POOL_SIZES = (4, 2, 1)


def hcl(student: Maps, teacher: Maps) -> Float[Tensor, ""]:
    """Hierarchical context loss of one level: the mean squared difference at several sizes.

    $(\\mathrm{MSE} + \\frac{1}{2} \\mathrm{MSE}_{4 \\times 4} + \\frac{1}{4} \\mathrm{MSE}_{2 \\times 2} + \\frac{1}{8}
    \\mathrm{MSE}_{1 \\times 1}) / \\mathrm{sum\\ of\\ the\\ weights}$. Only pools smaller than the height
    count, and the weight is halved for those only.
    """
    student, teacher = full_precision(student), full_precision(teacher.detach())
    losses, weights = [F.mse_loss(student, teacher, reduction="mean")], [1.0]
    for size in _POOL_SIZES:
        if size < student.shape[2]:
            pooled = [F.adaptive_avg_pool2d(maps, size) for maps in (student, teacher)]
            weights.append(weights[-1] / 2)
            losses.append(weights[-1] * F.mse_loss(pooled[0], pooled[1], reduction="mean"))
    return torch.stack(losses).sum() / sum(weights)


@distillers.register("reviewkd")
class ReviewKD(Distiller):
    """Every stage of the student, fused with all deeper ones, matches the teacher's stage.

    From the embedding, as a map of one place, to the first stage: a level fuses its map with the fused map of the level
    below it (`kd.connect.ABF`) and compares it with the teacher's map of the same level (`hcl`, summed over levels).
    Stages are paired from the deepest; what one network has more at the shallow end drops out. Widths come from the
    probe outputs and sizes from the maps themselves, so any image size will do.

    The papers' scripts weight it by 0.6 to 8, by pair of networks, with a warm-up over 20 epochs on CIFAR; weight and
    warm-up are set where losses are summed. In training a process needs at least two samples, since BatchNorm looks at
    the embedding as a map of one place.

    Args:
        max_mid_channels: Width of the fused maps, at most; the student's embedding width where that is smaller.
        student_side: Student maps after ("post", CIFAR) or before ("pre", ImageNet) the last activation of a stage.
        teacher_side: The same of the teacher; "post" for networks without an activation there.

    Raises:
        ValueError: If `max_mid_channels` is below 1 or a side is neither; on use, if there are no taps of stages, an
            embedding is missing, or `connect` was not called for these stages.
    """

    needs = {"taps", "embedding"}
    recordable = True

    def __init__(self, *, max_mid_channels: int = 512, student_side: Side = "post", teacher_side: Side = "pre") -> None:
        super().__init__()
        if max_mid_channels < 1:
            raise ValueError(f"reviewkd.max_mid_channels must be at least 1, found {max_mid_channels}")
        for name, side in (("student_side", student_side), ("teacher_side", teacher_side)):
            if side not in get_args(Side):
                raise ValueError(f"reviewkd.{name} must be one of {', '.join(get_args(Side))}, found {side!r}")
        self.max_mid_channels = max_mid_channels
        self.student_side = student_side
        self.teacher_side = teacher_side
        #: One per level, the deepest first.
        self.abfs = nn.ModuleList()

    def connect(self, student: Outputs, teacher: Outputs) -> None:
        """Build one fusion module per level."""
        pairs = self._levels(student, teacher)
        mid_channels = min(self.max_mid_channels, pairs[0][0].shape[1])
        abfs = [
            ABF(ours.shape[1], mid_channels, theirs.shape[1], fuse=level > 0)
            for level, (ours, theirs) in enumerate(pairs)
        ]
        self.abfs = nn.ModuleList(abfs).to(student.logits.device, full_precision(pairs[0][0]).dtype)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Float[Tensor, ""]:
        """The hierarchical context loss, summed over the levels."""
        pairs = self._levels(student, teacher)
        if len(self.abfs) != len(pairs):
            raise ValueError(
                f"reviewkd has fusion modules for {len(self.abfs)} levels but there are {len(pairs)}: call "
                "connect(student, teacher) with what both networks say of a probe"
            )
        fused: Tensor | None = None
        losses = []
        for abf, (ours, theirs) in zip(self.abfs, pairs, strict=True):
            compared, fused = abf(full_precision(ours), fused, (theirs.shape[2], theirs.shape[3]))
            losses.append(hcl(compared, theirs))
        return torch.stack(losses).sum()

    def _levels(self, student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
        ours, theirs = (
            self._maps(student, self.student_side, "student"),
            self._maps(teacher, self.teacher_side, "teacher"),
        )
        return list(zip(ours, theirs, strict=False))

    def _maps(self, outputs: Outputs, side: Side, owner: str) -> list[Tensor]:
        """The embedding as a map of one place, then the stages from the deepest."""
        if outputs.embedding is None:
            raise ValueError(
                f"reviewkd, {owner}: needs the embedding, found none; kd.taps.Tapped(network, embedding=PATH_OF_HEAD) "
                "gives it"
            )
        names = stage_taps(outputs, side) or [f"stage0.{side}"]  # which `read_tap` then misses
        pooled = rearrange(outputs.embedding, "b c -> b c 1 1")
        return [pooled, *(read_tap(outputs, name, f"reviewkd, {owner}") for name in reversed(names))]
