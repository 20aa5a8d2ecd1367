"""Checks of the networks of DKT and DyTox (goldens/dkt.md, sections 1, 2 and 6)."""

import re
from collections.abc import Iterable

import torch
from einops import rearrange
from torch import Tensor, nn

from cil.convert import dkt_from_release, name_here, name_there, to_release
from cil.learners.dkt import DKT
from cil.learners.dkt_losses import dkt_losses
from cil.learners.dytox_losses import dytox_losses
from cil.models.dkt import DKTNetwork
from cil.models.dytox import DyToxNetwork
from cil.optim import Recipe
from cil.stages import Stage
from kd import Batch, Outputs, WeightedSum, frozen
from kd.feature.cluster_separation import ClusterSeparation
from kd.logit.kd import KD
from kd.taps import Taps
from tests.parity.case import Case, Comparison

RELEASE_BASE_WEIGHT = 2.0
DIVERGENCE_WEIGHT = 0.1  # of goldens/dkt.md, section 6
NORM_AFTER_EXPANSION = {"head.1.norm.weight": 1.0, "head.1.norm.bias": 0.0}


def check_dkt(case: Case, comparison: Comparison) -> None:
    images, labels = case.tensor("input/images"), case.tensor("input/targets")
    task_sizes = case["classes"].tolist()
    num_old, num_classes = sum(task_sizes[:-1]), sum(task_sizes)
    num_heads = int(case["hp"][1])
    student = _dkt(case, "state/", images, task_sizes, num_heads)
    mlp = student.skab.mlp.expand
    shape = [student.embedding_width, num_heads, len(student.encoder.blocks)]
    shape += [mlp.out_channels // mlp.in_channels, student.num_tasks, student.task_sizes[-1]]
    comparison.exact("hp", shape, case["hp"])

    _compare_evaluation(case, comparison, student, images)
    out = student.train()(images)
    comparison.close("train/tokens", out.embedding, case["train/tokens"])
    comparison.close("train/logits", out.logits, case["train/logits"])
    case.ignore(*(f"train/bn/{name}" for name in case.names("train/bn/") if name_here(name) is None))
    state = to_release(student)
    for name in case.names("train/bn/"):
        if name_here(name) is not None:
            compare = comparison.exact if name.endswith("num_batches_tracked") else comparison.close
            compare(f"train/bn/{name}", state[name], case[f"train/bn/{name}"])

    teacher = None
    if case.names("teacher/"):
        teacher = frozen(_dkt(case, "teacher/", images, task_sizes[:-1], num_heads))(images)
        comparison.close("teacher_out/tokens", teacher.embedding, case["teacher_out/tokens"])
        comparison.close("teacher_out/logits", teacher.logits, case["teacher_out/logits"])
    comparison.close("lambda", num_old / num_classes, case["lambda"])
    batch = Batch(images, labels, torch.arange(len(labels)))
    _compare_losses(case, comparison, out, teacher, batch)
    total = sum(_terms(out, teacher, batch, temperature=1.0).values())
    gradients = _gradients(total, student)
    for group in ("grad", "grad_frozen"):
        for name in case.names(f"{group}/"):
            comparison.close(f"{group}/{name}", gradients.get(name, 0.0), case[f"{group}/{name}"])
    _compare_names(case, comparison, student, gradients)
    if "ft/loss" in case:
        loss = dkt_losses(student(images), None, batch, distillation=None, separation=None, base_weight=1.0)["bce"]
        comparison.close("ft/loss", loss, case["ft/loss"])
        gradients = _gradients(loss, student)
        for name in case.names("ft/grad/"):
            comparison.close(f"ft/grad/{name}", gradients.get(name, 0.0), case[f"ft/grad/{name}"])


def _dkt(case: Case, group: str, images: Tensor, task_sizes: list[int], num_heads: int) -> DKTNetwork:
    size = (images.shape[2], images.shape[3])
    return dkt_from_release(case.group(group), size, task_sizes=task_sizes, num_heads=num_heads, drop_path=0.0)


def _compare_evaluation(case: Case, comparison: Comparison, student: DKTNetwork, images: Tensor) -> None:
    taps = {"patch_embed": "encoder.patch_embedding"}
    taps |= {f"sab{i}": f"encoder.blocks.{i}" for i in range(len(student.encoder.blocks))}
    with Taps(student, taps) as features:
        out = student.eval()(images)
        for name in case.names("eval/act/"):
            comparison.close(f"eval/act/{name}", features[name], case[f"eval/act/{name}"])
    comparison.close("eval/tokens", out.embedding, case["eval/tokens"])
    comparison.close("eval/logits", out.logits, case["eval/logits"])


def _kd(temperature: float) -> KD:
    return KD(temperature=temperature, reduction="mean")


def _terms(
    out: Outputs, teacher: Outputs | None, batch: Batch, temperature: float, base_weight: float = RELEASE_BASE_WEIGHT
) -> dict[str, Tensor]:
    distillation = WeightedSum({"kd": (1.0, _kd(temperature))})
    return dkt_losses(
        out, teacher, batch, distillation=distillation, separation=ClusterSeparation(), base_weight=base_weight
    )


def _compare_losses(case: Case, comparison: Comparison, out: Outputs, teacher: Outputs | None, batch: Batch) -> None:
    found: dict[str, Tensor] = dkt_losses(out, None, batch, distillation=None, separation=None, base_weight=1.0)
    found["total"] = found["total_base_once"] = found["bce"]
    if teacher is not None:
        num_old = teacher.logits.shape[1]
        old = out.first(num_old)
        assert out.embedding is not None
        assert teacher.embedding is not None
        once = _terms(out, teacher, batch, temperature=1.0, base_weight=1.0)
        found |= {"base": once["bce"], "second": once["bce"] + once["kd"], "cs": once["separation"]}
        found["total_base_once"] = sum(once.values(), torch.zeros(()))
        found["kd"] = _kd(1.0)(old, teacher, batch)
        found["kd_batchmean"] = KD(temperature=1.0, reduction="batchmean")(old, teacher, batch)
        separation = ClusterSeparation()
        found["cs_weights"] = separation.weights(batch.labels, num_old)
        found["cs_cosine"] = separation.cosine(out.embedding, teacher.embedding)
        found["total"] = sum(_terms(out, teacher, batch, temperature=1.0).values(), torch.zeros(()))
        for name in case.names("loss/"):
            if softened := re.fullmatch(r"(kd|total)_tau(\d+(?:\.\d+)?)", name):
                temperature = float(softened[2])
                terms = _terms(out, teacher, batch, temperature)
                kd = _kd(temperature)(old, teacher, batch)
                found[name] = kd if softened[1] == "kd" else sum(terms.values(), torch.zeros(()))
    for name in case.names("loss/"):
        if name not in found:
            raise LookupError(f"there is no loss {name!r} here; known: {', '.join(found)}")
        comparison.close(f"loss/{name}", found[name], case[f"loss/{name}"])


def _gradients(loss: Tensor | int, network: nn.Module) -> dict[str, Tensor]:
    """By the release's names; parameters without one are left out."""
    assert isinstance(loss, Tensor)
    names, parameters = zip(*network.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name_there(n): g for n, g in zip(names, gradients, strict=True) if g is not None}


def _compare_names(case: Case, comparison: Comparison, student: DKTNetwork, gradients: dict[str, Tensor]) -> None:
    """Which parameters learn in which phase, by the learner that decides it."""
    task_sizes = student.task_sizes
    labels = range(sum(task_sizes[:-1]), sum(task_sizes))
    stage = Stage(student.num_tasks - 1, labels, Recipe(), has_memory=True)
    phases = {phase.name: phase for phase in DKT(student, None, finetune_general_token=True).phases(stage)}
    ours = {name_there(name) for name, _ in student.named_parameters()}
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    dead = {name for name in case.names("state/") if name_here(name) is None and not name.endswith(buffers)}
    old = _names(student, phases["training"].frozen)
    comparison.same_names("names/frozen", old, case["names/frozen"])
    comparison.same_names("names/trainable", (ours | dead) - old, case["names/trainable"])
    comparison.same_names("names/dead", dead | (ours - gradients.keys()), case["names/dead"])
    comparison.same_names("grad", ours - old, case.names("grad/"))
    comparison.same_names("grad_frozen", old, case.names("grad_frozen/"))
    for name in case["names/zero_grad"].tolist():
        comparison.close(f"zero_grad {name}", gradients[name], torch.zeros_like(gradients[name]))
    if "ft/trainable" in case:
        finetuned = ours - _names(student, phases["finetuning"].frozen)
        comparison.same_names("ft/trainable", finetuned, case["ft/trainable"])


def _names(network: nn.Module, parts: Iterable[nn.Module | nn.Parameter]) -> set[str]:
    held = {id(p) for part in parts for p in (part.parameters() if isinstance(part, nn.Module) else [part])}
    return {name_there(name) for name, parameter in network.named_parameters() if id(parameter) in held}


def check_merge(case: Case, comparison: Comparison) -> None:
    tokens = case.tensor("tokens")
    random = set(case["random_names"].tolist()) if "random_names" in case else set()
    after = case.names("after/")
    num_new = case["after/head.1.head.bias"].shape[0] if after else 1

    folding = _only_heads(case, merge=True)
    comparison.close("before/logits", folding.classify(tokens), case["before/logits"])
    folding.grow(num_new)
    comparison.close("fixed/logits", folding.stability(tokens), case["fixed/logits"])
    if "fixed/folded_weight" in case:
        comparison.close("fixed/folded_weight", folding.stability.head.weight, case["fixed/folded_weight"])
        comparison.close("fixed/folded_bias", folding.stability.head.bias, case["fixed/folded_bias"])
        comparison.exact("folded norm weight", folding.stability.norm.weight, torch.ones(tokens.shape[1]))
        comparison.exact("folded norm bias", folding.stability.norm.bias, torch.zeros(tokens.shape[1]))
    if not after:
        return
    official = _only_heads(case, merge=False)
    official.grow(num_new)
    state = to_release(official)
    for name in after:
        if name in random:
            comparison.exact(f"shape of after/{name}", state[name].shape, case[f"after/{name}"].shape)
            comparison.true(f"{name} is drawn", not torch.equal(state[name], case.group("before/").get(name, tokens)))
        else:
            comparison.close(f"after/{name}", state[name], case[f"after/{name}"])
    bound = float(case["official/bias_bound"])
    for bias in (official.stability.head.bias, case.tensor("after/head.0.head.bias")):
        comparison.true("merged biases lie within official/bias_bound", bool((bias.abs() <= bound).all()))
    drawn = official.stability.head
    drawn.assign(drawn.weight, case.tensor("after/head.0.head.bias"))
    comparison.close("official/logits", official.stability(tokens), case["official/logits"])


def _only_heads(case: Case, merge: bool) -> DKTNetwork:
    """A network of the width and heads of the case; the rest of it is as small as can be."""
    before = {name: value for name, value in case.group("before/").items() if name != "logits"}
    heads = [before[name].shape[0] for name in ("head.0.head.bias", "head.1.head.bias") if name in before]
    num_tasks = sum(name.startswith("task_tokens.") for name in before) or len(heads)
    task_sizes = [heads[0] - max(num_tasks - 2, 0)] + [1] * (num_tasks - 2) + heads[1:]
    width = case["tokens"].shape[1]
    network = DKTNetwork(
        (1, 1, 1),
        width=width,
        num_heads=1,
        depth=1,
        mlp_ratio=1,
        stem_width=1,
        pool_stride=1,
        patch_kernel=1,
        merge_norm=merge,
        merge_bias=merge,
    ).double()
    network.rebuild({"task_sizes": task_sizes})
    network.load_state_dict(network.state_dict() | {str(name_here(name)): value for name, value in before.items()})
    return network


DYTOX_NAMES = {
    "pos_embed": "position",
    "patch_embed.proj.": "patch_embedding.",
    "sabs.": "encoder.",
    "tabs.": "decoder.",
    "task_tokens.": "task_tokens.",
    "head.": "heads.",
    "head_div.": "divergence.",
}
DYTOX_NAMES_IN_BLOCKS = {".attn.": ".attention.", ".gating_param": ".gate", ".pos_proj.": ".position."}


def dytox_name_here(name: str) -> str:
    there = next(there for there in DYTOX_NAMES if name.startswith(there))
    name = DYTOX_NAMES[there] + name.removeprefix(there)
    for inner, here in DYTOX_NAMES_IN_BLOCKS.items():
        name = name.replace(inner, here)
    return name


def check_dytox(case: Case, comparison: Comparison) -> None:
    images, labels = case.tensor("input/images"), case.tensor("input/targets")
    student = _dytox(case, "state/", images)
    blocks = [len(student.encoder), len(student.decoder)]
    _, num_heads, _, _, patch_size, mlp_ratio, _, _ = case["hp"].tolist()
    shape = [student.embedding_width, num_heads, *blocks, patch_size, mlp_ratio, student.num_tasks]
    comparison.exact("hp", [*shape, student.task_sizes[-1]], case["hp"])
    out = student(images)
    answers = student.decode(student.encode(images))
    comparison.close("out/tokens", rearrange(answers, "b t d -> t b d"), case["out/tokens"])
    comparison.close("out/logits", out.logits, case["out/logits"])
    divergence = None if student.divergence is None else student.divergence(out.embedding)
    if "out/div" in case:
        comparison.close("out/div", divergence, case["out/div"])
    teacher = None
    if case.names("teacher/"):
        teacher = frozen(_dytox(case, "teacher/", images))(images)
        comparison.close("teacher_out/logits", teacher.logits, case["teacher_out/logits"])
    losses = dytox_losses(
        out,
        teacher,
        Batch(images, labels, torch.arange(len(labels))),
        distillation=WeightedSum({"kd": (1.0, _kd(1.0))}),
        divergence=divergence,
        divergence_weight=DIVERGENCE_WEIGHT,
    )
    total = sum(losses.values(), torch.zeros(()))
    found = losses | {"base": losses["bce"], "total": total}
    found["div"] = found.get("divergence", torch.zeros(()))
    for name in case.names("loss/"):
        comparison.close(f"loss/{name}", found[name], case[f"loss/{name}"])

    parameters = {name: student.get_parameter(dytox_name_here(name)) for name in case.names("state/")}
    old = [*student.task_tokens[:-1], *student.heads[:-1].parameters()]
    frozen_names = {name for name, parameter in parameters.items() if any(parameter is held for held in old)}
    comparison.same_names("names/frozen", frozen_names, case["names/frozen"])
    comparison.same_names("grad", parameters.keys() - frozen_names, case.names("grad/"))
    for name, gradient in zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True):
        if f"grad/{name}" in case:
            comparison.close(f"grad/{name}", gradient, case[f"grad/{name}"])


def _dytox(case: Case, group: str, images: Tensor) -> DyToxNetwork:
    width, num_heads, depth, decoder_depth, patch_size, mlp_ratio, _, _ = case["hp"].tolist()
    _, channels, height, image_width = images.shape
    network = DyToxNetwork(
        (channels, height, image_width),
        width=width,
        num_heads=num_heads,
        depth=depth,
        decoder_depth=decoder_depth,
        patch_size=patch_size,
        mlp_ratio=mlp_ratio,
        drop_path=0.0,
    ).double()
    state = case.group(group)
    num_tasks = sum(name.startswith("task_tokens.") for name in state)
    network.rebuild({"task_sizes": [state[f"head.{i}.head.bias"].shape[0] for i in range(num_tasks)]})
    network.load_state_dict({dytox_name_here(name): value for name, value in state.items()})
    return network
