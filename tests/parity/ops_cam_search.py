"""Operations of class activation maps, class attention transfer and the student search."""

import torch
import torch.nn.functional as F
from einops import reduce

from kd import Batch, Outputs
from kd.cam import class_maps, normalised
from kd.feature.cat_kd import CATKD
from kd.search.diswot import head_gradient, relation_score, semantic_score
from tests.parity.distillation import Answer, Problem, operation


@operation("cam.maps")
def cam_maps(problem: Problem) -> Answer:
    maps = class_maps(problem.inputs["features"], problem.inputs["fc_weight"])
    logits = reduce(maps, "b k h w -> b k", "mean") + problem.inputs["fc_bias"]
    return Answer({"cam": maps, "logits": logits, "cam_norm01": normalised(maps)})


def on_maps(distiller: CATKD, problem: Problem) -> Answer:
    maps_s, maps_t = problem.inputs["cam_s"], problem.inputs["cam_t"]
    means = reduce(maps_t, "b k h w -> b k", "mean")  # logits are read by partial transfer only
    teacher = Outputs(problem.inputs.get("logits_t", means), taps={"class_maps": maps_t})
    labels = torch.zeros(len(maps_s), dtype=torch.int64)
    batch = Batch(maps_s.new_zeros(len(maps_s), 1, 1, 1), labels, torch.arange(len(maps_s)))
    loss = distiller(Outputs(reduce(maps_s, "b k h w -> b k", "mean"), taps={"class_maps": maps_s}), teacher, batch)
    assert torch.autograd.grad(loss, [maps_t], retain_graph=True, allow_unused=True) == (None,)
    return Answer({"loss": loss})


@operation("catkd.loss")
def catkd_loss(problem: Problem) -> Answer:
    hp = problem.hp
    return on_maps(CATKD(resolution=int(hp["resolution"]), normalize=bool(hp["normalize"])), problem)


@operation("catkd.binarize")
def catkd_binarize(problem: Problem) -> Answer:
    hp = problem.hp
    distiller = CATKD(resolution=int(hp["resolution"]), normalize=bool(hp["normalize"]), binarize=True)
    return on_maps(distiller, problem)


@operation("catkd.partial_released")
def catkd_partial_released(problem: Problem) -> Answer:
    hp = problem.hp
    distiller = CATKD(
        resolution=int(hp["resolution"]),
        normalize=bool(hp["normalize"]),
        keep=int(hp["n"]),
        strategy=str(hp["strategy"]),  # type: ignore[arg-type]
        variant="released",
    )
    return on_maps(distiller, problem)


@operation("diswot.relation")
def diswot_relation(problem: Problem) -> Answer:
    return Answer({"score": relation_score(problem.inputs["feat_s"], problem.inputs["feat_t"])})


@operation("diswot.semantic")
def diswot_semantic(problem: Problem) -> Answer:
    def gradient(which: str) -> torch.Tensor:
        embedding = reduce(problem.inputs[f"feat_{which}"], "b c h w -> b c", "mean")
        logits = F.linear(embedding, problem.params[f"fc_{which}.weight"], problem.params[f"fc_{which}.bias"])
        return head_gradient(logits, embedding, problem.inputs["target"])

    student, teacher = gradient("s"), gradient("t")
    return Answer({"grad_s": student, "grad_t": teacher, "score": semantic_score(student, teacher)})
