"""Attention transfer (Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017, arXiv:1612.03928)."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from einops import reduce
from jaxtyping import Float, Int
from torch import Tensor

from kd.base import Batch, Distiller, Outputs, distillers
from kd.precision import full_precision
from kd.taps import read_tap, stage_taps

Variant = Literal["code", "paper"]
Maps = Float[Tensor, "batch channels height width"]
OtherMaps = Float[Tensor, "batch other_channels other_height other_width"]

_NO_CLASS = -1  # stands for every class that one of the networks does not know
_SMALLEST = 1e-12  # of a map that has a direction, as in F.normalize
_SMALLEST_LENGTH = 1e-30  # of a gradient by logits, whose inverse float32 can still hold
_GRADIENT_SCALE = 1024.0  # keeps gradients within float16 and is divided out, as of a GradScaler with sums of 64


def attention_map(features: Maps, p: float = 2.0, *, signed: bool = False) -> Float[Tensor, "batch places"]:
    """Where a map is active, as one unit vector per sample: $Q / \\|Q\\|_2$ with $Q = \\mathrm{vec}(\\sum_c |f_c|^p)$.

    Permuting the channels, or scaling them all by one factor, changes nothing. A map that is as good as zero, below
    1e-12 or the normal numbers of its type, gives zeros.

    Args:
        features: Feature maps.
        p: The larger, the more the strongest channels count; 1 or more.
        signed: Take $f^p$ instead, as releases write it: the same for even p and behind a ReLU. For a p that is no
            whole number, of which negative numbers have no power, it changes nothing.
    """
    smallest = max(_SMALLEST, torch.finfo(features.dtype).tiny)
    features = full_precision(features)
    # the length is divided out below; without this high powers of large numbers overflow, of small ones vanish
    largest = features.detach().abs().amax((1, 2, 3), keepdim=True)
    scaled = features * (largest >= smallest) / largest.clamp_min(smallest)
    powers = scaled ** int(p) if signed and p == int(p) else scaled.abs() ** p
    return F.normalize(reduce(powers, "b c h w -> b (h w)", "mean"), dim=1)


def attention_maps(
    student: Maps, teacher: OtherMaps, p: float = 2.0, *, signed: bool = False
) -> tuple[Float[Tensor, "batch places"], Float[Tensor, "batch places"]]:
    """The attention maps of both at the smaller height and width of the two; the larger features are average-pooled."""
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    pooled = [
        maps if maps.shape[2:] == size else F.adaptive_avg_pool2d(full_precision(maps), size)
        for maps in (student, teacher)
    ]
    return attention_map(pooled[0], p, signed=signed), attention_map(pooled[1], p, signed=signed)


@distillers.register("at")
class AT(Distiller):
    """The student looks where the teacher looks, in every stage.

    With the attention maps Q (`attention_map`), over stages j: "code", as released with a weight of 1000, is
    $\\sum_j$ of the mean over batch and places of $(Q_s^j - Q_t^j)^2$, with signed powers. "paper" (eq. 2) is
    $\\sum_j \\frac{1}{B} \\sum_b \\| Q_s^j - Q_t^j \\|_2$, with a weight of beta / 2: not squared, so that its size
    depends neither on the number of places nor on how close the maps are.

    Args:
        stages: Taps to compare; None is every "stageN.post" that both networks have.
        p: Power of the activations; 1 or more.
        variant: "code" or "paper".

    Raises:
        ValueError: If `stages` is empty, `p` is below 1 or `variant` is neither; on use, if a tap is missing.
    """

    needs = {"taps"}
    recordable = True

    def __init__(self, *, stages: list[str] | None = None, p: float = 2.0, variant: Variant = "code") -> None:
        super().__init__()
        _check("at", stages, p)
        if variant not in get_args(Variant):
            raise ValueError(f"at.variant must be one of {', '.join(get_args(Variant))}, found {variant!r}")
        self.stages = stages
        self.p = p
        self.variant = variant

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Float[Tensor, ""]:
        """The distance of the attention maps, summed over the stages."""
        losses = []
        for name in self.stages or _common_stages("at", student, teacher):
            maps = read_tap(student, name, "at, student"), read_tap(teacher, name, "at, teacher").detach()
            q_s, q_t = attention_maps(*maps, self.p, signed=self.variant == "code")
            if self.variant == "code":
                losses.append(F.mse_loss(q_s, q_t, reduction="mean"))
            else:
                losses.append(torch.linalg.vector_norm(q_s - q_t, dim=1).mean())  # its gradient is 0 at distance 0
        return torch.stack(losses).sum()


@distillers.register("at_gradient")
class ATGradient(Distiller):
    """The student's decision is sensitive where the teacher's is (section 3.2).

    With the gradients $g = \\partial L / \\partial f$ of the cross-entropy L of each network and their attention maps Q
    (`attention_map` of g): $\\sum_j \\frac{1}{B} \\sum_b \\| Q_s^j - Q_t^j \\|_2^2$. The paper compares the gradients
    at the images, with the plain norm; here they are compared at any tap, each scaled to length 1, so that a network
    that is sure of itself, whose gradients are small, can be compared at all. Samples of classes that either network
    does not know count as equal.

    The loss is differentiated through the student's gradients, which costs about one more training step. The taps have
    to be on the path to the logits, as those of `kd.taps` are, and the teacher has to keep its graph:
    `frozen(network, keep_graph=True)`.

    Args:
        stages: Taps to compare; None is every "stageN.post" that both networks have.
        p: Power of the gradients; 1 or more.

    Raises:
        ValueError: If `stages` is empty or `p` is below 1; on use, if a tap is missing or no gradient reaches it.
    """

    needs = {"taps", "logits", "labels", "teacher_graph"}

    def __init__(self, *, stages: list[str] | None = None, p: float = 1.0) -> None:
        super().__init__()
        _check("at_gradient", stages, p)
        self.stages = stages
        self.p = p

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Float[Tensor, ""]:
        """The distance of the attention maps of the gradients, summed over the stages."""
        stages = self.stages or _common_stages("at_gradient", student, teacher)
        num_known = min(student.logits.shape[1], teacher.logits.shape[1])
        labels = batch.labels.where(batch.labels < num_known, _NO_CLASS)
        losses = []
        ours, theirs = (
            _sensitivity(student, stages, labels, "student"),
            _sensitivity(teacher, stages, labels, "teacher"),
        )
        for g_s, g_t in zip(ours, theirs, strict=True):
            q_s, q_t = attention_maps(g_s, g_t.detach(), self.p)
            losses.append((q_s - q_t).square().sum(dim=1).mean())
        return torch.stack(losses).sum()


def _sensitivity(outputs: Outputs, stages: list[str], labels: Int[Tensor, " batch"], owner: str) -> tuple[Tensor, ...]:
    """Gradients of each sample's cross-entropy by the taps; differentiable for the student."""
    features = [read_tap(outputs, name, f"at_gradient, {owner}") for name in stages]
    keep = "use frozen(network, keep_graph=True)" if owner == "teacher" else "it must run with gradients"
    if not outputs.logits.requires_grad or not all(feature.requires_grad for feature in features):
        raise ValueError(f"at_gradient: the {owner} has no graph from its taps to its logits; {keep}")
    logits = full_precision(outputs.logits)
    is_label = labels[:, None] == torch.arange(logits.shape[1], device=labels.device)
    wrong = F.softmax(logits, dim=1).masked_fill(is_label, 0)
    # the cross-entropy by the logits: of the label minus the sum of the others, since p - 1 is 0 when all but sure
    by_logits = torch.where(is_label, -wrong.sum(dim=1, keepdim=True), wrong) * is_label.any(dim=1, keepdim=True)
    if owner == "teacher":
        # Sure of itself, its gradients would be 0 in float16. Their lengths are divided out later, and in evaluation
        # mode each sample has its own. The student's samples meet in BatchNorm, where factors would not divide out.
        by_logits = F.normalize(by_logits, dim=1, eps=_SMALLEST_LENGTH)
    gradients = torch.autograd.grad(
        logits,
        features,
        _GRADIENT_SCALE * by_logits,
        create_graph=owner == "student",
        retain_graph=True,
        allow_unused=True,
    )
    for name, gradient in zip(stages, gradients, strict=True):
        if gradient is None:
            raise ValueError(
                f"at_gradient: the logits of the {owner} are not computed from its tap {name!r} but beside it; "
                "kd.taps.Tapped makes taps that are on the way"
            )
    return gradients


def _common_stages(reader: str, student: Outputs, teacher: Outputs) -> list[str]:
    common = [name for name in stage_taps(student, "post") if name in teacher.taps]
    if not common:
        raise ValueError(
            f"{reader}: student and teacher have no tap 'stageN.post' in common, found "
            f"{', '.join(sorted(student.taps)) or 'no taps'} of the student and "
            f"{', '.join(sorted(teacher.taps)) or 'no taps'} of the teacher; make them with kd.taps.Tapped"
        )
    return common


def _check(name: str, stages: list[str] | None, p: float) -> None:
    if stages is not None and not stages:
        raise ValueError(f"{name}.stages must name at least one tap, found none; null is every stage in common")
    if not p >= 1:
        raise ValueError(f"{name}.p must be 1 or more, found {p}")
