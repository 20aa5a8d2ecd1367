"""Feature distillation: FitNet, attention transfer, similarity, ReviewKD."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kd import Batch, Outputs
from kd.base import Distiller
from kd.connect import ABF
from kd.feature.at import AT
from kd.feature.fitnet import FitNet
from kd.feature.reviewkd import ReviewKD, hcl
from kd.feature.sp import SP
from kd.schedule import Schedule
from tests.parity.distillation import Answer, Problem, operation


def with_taps(maps: Tensor | dict[str, Tensor], embedding: Tensor | None = None) -> Outputs:
    """What a network would say: one map is that of stage 0."""
    taps = {"stage0.post": maps} if isinstance(maps, Tensor) else maps
    first = next(iter(taps.values()))
    return Outputs(first.new_zeros(len(first), 1), embedding, taps)


def loss_of(distiller: Distiller, student: Outputs, teacher: Outputs) -> Tensor:
    count = len(student.logits)
    batch = Batch(torch.zeros(count, 1, 1, 1), torch.zeros(count, dtype=torch.int64), torch.arange(count))
    loss: Tensor = distiller(student, teacher, batch)
    return loss


def counted(problem: Problem, prefix: str, start: int = 0) -> list[Tensor]:
    """in/PREFIXn for n from `start`, as many as there are."""
    names = [f"{prefix}{number}" for number in range(start, start + len(problem.inputs))]
    return [problem.inputs[name] for name in names if name in problem.inputs]


@operation("fitnet.regress")
def fitnet_regress(problem: Problem) -> Answer:
    student, teacher = with_taps(problem.inputs["f_s"]), with_taps(problem.inputs["f_t"])
    fitnet = FitNet(hint="stage0.post")
    fitnet.connect(student, teacher)
    regressor = fitnet.regressor
    assert regressor is not None
    regressor.load_state_dict(problem.params)
    seen: list[Tensor] = []
    with regressor.register_forward_hook(lambda module, inputs, output: seen.append(output)):
        loss = loss_of(fitnet, student, teacher)
    return Answer(
        {"regressed": seen[0], "loss": loss}, dict(regressor.named_buffers()), dict(regressor.named_parameters())
    )


@operation("at.code")
def at_code(problem: Problem) -> Answer:
    at = AT(p=problem.number("p"), variant="code")
    return Answer({"loss": loss_of(at, with_taps(problem.inputs["f_s"]), with_taps(problem.inputs["f_t"]))})


@operation("at.multi")
def at_multi(problem: Problem) -> Answer:
    student, teacher = (
        with_taps({f"stage{stage}.post": maps for stage, maps in enumerate(counted(problem, prefix))})
        for prefix in ("f_s", "f_t")
    )
    return Answer({"loss": loss_of(AT(p=problem.number("p")), student, teacher)})


@operation("at.paper")
def at_paper(problem: Problem) -> Answer:
    at = AT(p=problem.number("p"), variant="paper")
    return Answer({"loss": loss_of(at, with_taps(problem.inputs["f_s"]), with_taps(problem.inputs["f_t"]))})


@operation("sp.loss")
def sp_loss(problem: Problem) -> Answer:
    return Answer({"loss": loss_of(SP(), with_taps(problem.inputs["f_s"]), with_taps(problem.inputs["f_t"]))})


@operation("reviewkd.hcl")
def reviewkd_hcl(problem: Problem) -> Answer:
    pairs = zip(counted(problem, "f_s"), counted(problem, "f_t"), strict=True)
    return Answer({"loss": torch.stack([hcl(ours, theirs) for ours, theirs in pairs]).sum()})


@operation("reviewkd.abf")
def reviewkd_abf(problem: Problem) -> Answer:
    widths = (int(problem.number(f"{name}_channels")) for name in ("in", "mid", "out"))
    fuse = bool(problem.hp["fuse"])
    abf = ABF(*widths, fuse=fuse).double()
    abf.load_state_dict(problem.params)
    x, out_shape = problem.inputs["x"], problem.hp["out_shape"]
    height, width = np.broadcast_to(out_shape, 2).tolist()
    if not out_shape.ndim and x.shape[3] == width:
        height = x.shape[2]  # the release looks at the width only
    out, residual = abf(x, problem.inputs["y"] if fuse else None, (height, width))
    loss = (problem.inputs["cotangent_out"] * out).sum() + (problem.inputs["cotangent_residual"] * residual).sum()
    answer = {"out": out, "residual": residual, "loss": loss}
    return Answer(answer, dict(abf.named_buffers()), dict(abf.named_parameters()))


@operation("reviewkd.full")
def reviewkd_full(problem: Problem) -> Answer:
    student, teacher = (
        with_taps(
            {f"stage{stage}.{side}": maps for stage, maps in enumerate(counted(problem, prefix, start=1))},
            embedding=problem.inputs[pooled],
        )
        for side, prefix, pooled in (("post", "feat_s", "pooled_s"), ("pre", "preact_t", "pooled_t"))
    )
    # mdistiller reads the maximum and ignores it: the parameters say how wide the fused maps are
    reviewkd = ReviewKD(max_mid_channels=len(problem.params["abfs.0.conv1.0.weight"]))
    reviewkd.connect(student, teacher)
    reviewkd.load_state_dict(problem.params)
    warmup = int(problem.number("warmup_epochs"))
    schedule = Schedule(warmup_epochs=warmup, epoch_base=0 if warmup else 1)  # the epoch of the file is the factor's
    factor = schedule.factor(int(problem.number("epoch")))
    loss = problem.number("weight") * factor * loss_of(reviewkd, student, teacher)
    ce = F.cross_entropy(problem.inputs["logits_s"], problem.inputs["target"])
    answer = {"loss_ce": problem.number("ce_weight") * ce, "loss": loss}
    return Answer(answer, dict(reviewkd.named_buffers()), dict(reviewkd.named_parameters()))
