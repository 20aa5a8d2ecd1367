"""Similarity-preserving distillation (Tung and Mori, ICCV 2019, arXiv:1907.09682)."""

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from kd.base import Batch, Distiller, Outputs, distillers
from kd.distributed import gathered
from kd.precision import full_precision, no_autocast
from kd.taps import read_tap, stage_taps


def similarity(features: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch batch"]:
    """How similar every sample is to every other: rows of $F F^T$ with length 1, F the flattened features.

    An orthogonal transform of the flattened features changes nothing.
    """
    with no_autocast(features.device):  # sums over all places overflow float16
        flat = rearrange(full_precision(features), "b ... -> b (...)")
        return F.normalize(flat @ flat.T, p=2.0, dim=1)


@distillers.register("sp")
class SP(Distiller):
    """Samples that are alike for the teacher are alike for the student.

    With the similarities G (`similarity`): $\\frac{1}{B^2} \\| G_t - G_s \\|_F^2$ over the batch of all processes. The
    paper and the releases weight it by 3000. Widths and sizes of the two networks may differ.

    Args:
        stage: Tap to compare, of maps or vectors; None is the highest "stageN.post" of each network, or "last" where
            there is none.

    Raises:
        ValueError: On use, if the tap is missing.
    """

    needs = {"taps"}
    recordable = True

    def __init__(self, *, stage: str | None = None) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Float[Tensor, ""]:
        """The mean squared difference of the similarities of all pairs."""
        student, teacher, _ = gathered(self._only_tap(student, "student"), self._only_tap(teacher, "teacher"), batch)
        g_s, g_t = similarity(student.taps["compared"]), similarity(teacher.taps["compared"].detach())
        return F.mse_loss(g_s, g_t, reduction="mean")

    def _only_tap(self, outputs: Outputs, owner: str) -> Outputs:
        """Without what this loss does not read, so that it is not sent between processes."""
        name = self.stage or ["last", *stage_taps(outputs, "post")][-1]
        return Outputs(outputs.logits, taps={"compared": read_tap(outputs, name, f"sp, {owner}")})
