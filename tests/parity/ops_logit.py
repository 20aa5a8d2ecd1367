"""Operations on logits: DKD, MLD, Born-Again, TAKD, ESKD."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kd import Batch, Outputs, WeightedSum
from kd.logit.ban import BAN, CWTM, ensemble, permuted, soft_cross_entropy
from kd.logit.dkd import DKD
from kd.logit.kd import KD, Reduction
from kd.logit.mld import MLD, rare_classes, uncertain_samples
from tests.parity.distillation import Answer, Problem, on_logits, operation

RELEASED_AUGMENTATION = (3.0, 5.0, 2.0, 6.0)  # the temperatures behind hp/temperature, part of the variant


@operation("dkd.loss")
def dkd_loss(problem: Problem) -> Answer:
    names = ("alpha", "beta", "temperature")
    return Answer({"loss": on_logits(DKD(**{name: problem.number(name) for name in names}), problem)})


def mld_level(problem: Problem, level: str) -> Answer:
    mld = MLD(temperatures=(problem.number("temperature"),), views="weak")
    student, teacher = Outputs(problem.inputs["student"]), Outputs(problem.inputs["teacher"])
    return Answer({"loss": mld.terms(student, teacher)[level]})


@operation("mld.kd")
def mld_kd(problem: Problem) -> Answer:
    return mld_level(problem, "kd")


@operation("mld.cc")
def mld_cc(problem: Problem) -> Answer:
    return mld_level(problem, "cc")


@operation("mld.bc")
def mld_bc(problem: Problem) -> Answer:
    return mld_level(problem, "bc")


@operation("mld.full_released")
def mld_full_released(problem: Problem) -> Answer:
    given, weight = problem.inputs, problem.number("kd_weight")
    mld = MLD(temperatures=(problem.number("temperature"), *RELEASED_AUGMENTATION), variant="released")
    student = Outputs(given["s_weak"], views={"strong": Outputs(given["s_strong"])})
    teacher = Outputs(given["t_weak"], views={"strong": Outputs(given["t_strong"])})
    losses = {f"loss_{name}": weight * term for name, term in mld.terms(student, teacher).items()}
    ce = F.cross_entropy(given["s_weak"], given["target"]) + F.cross_entropy(given["s_strong"], given["target"])
    losses["loss_ce"] = problem.number("ce_weight") * ce
    masks = {"mask": uncertain_samples(given["t_weak"]), "class_mask": rare_classes(given["t_weak"])}
    return Answer(losses | masks | {"loss": sum(losses.values(), torch.zeros(()))})


@operation("ban.kd_and_label")
def ban_kd_and_label(problem: Problem) -> Answer:
    loss = on_logits(BAN(), problem)
    ce = F.cross_entropy(problem.inputs["student"], problem.inputs["target"])
    return Answer({"loss": loss, "loss_plus_label": loss + ce})


@operation("ban.cwtm")
def ban_cwtm(problem: Problem) -> Answer:
    return Answer({"loss": on_logits(CWTM(), problem)})


@operation("ban.dkpp")
def ban_dkpp(problem: Problem) -> Answer:
    probabilities = permuted(problem.inputs["teacher"].softmax(dim=1), problem.inputs["perm"])
    return Answer({"permuted": probabilities, "loss": soft_cross_entropy(problem.inputs["student"], probabilities)})


@operation("ban.ensemble")
def ban_ensemble(problem: Problem) -> Answer:
    return Answer({"probs": ensemble(problem.inputs["members"].unbind())})


def beside_the_task(problem: Problem, weight: float, reduction: Reduction) -> Tensor:
    """KD at weight w and the label loss at 1 - w."""
    kd = KD(temperature=problem.number("T"), reduction=reduction)
    distillation = WeightedSum({"kd": (weight, kd)}, task_weight=1 - weight)
    student, teacher, labels = (problem.inputs[name] for name in ("student", "teacher", "target"))
    batch = Batch(torch.zeros(len(labels), 1, 1, 1), labels, torch.arange(len(labels)))
    loss: Tensor = distillation.task_weight * F.cross_entropy(student, labels)
    return loss + distillation(Outputs(student), Outputs(teacher), batch)


@operation("takd.paper")
def takd_paper(problem: Problem) -> Answer:
    return Answer({"loss": beside_the_task(problem, problem.number("lam"), "batchmean")})


@operation("takd.code")
def takd_code(problem: Problem) -> Answer:
    return Answer({"loss": beside_the_task(problem, problem.number("lam"), "mean")})


@operation("eskd.loss")
def eskd_loss(problem: Problem) -> Answer:
    return Answer({"loss": beside_the_task(problem, problem.number("alpha"), "batchmean")})
