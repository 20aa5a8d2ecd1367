"""PODNet: pooled outputs distillation for small tasks (Douillard et al., ECCV 2020, arXiv:2004.13513)."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from cil.learners.base import Learner, learners
from cil.learners.lucir import cosine_distance
from cil.models.cosine_heads import ProxyHead, give_head
from cil.models.network import Network
from cil.optim import Sampling, Schedule
from cil.stages import Phase, Stage
from cil.transfer import said
from kd import Batch, WeightedSum
from kd.precision import full_precision

Variant = Literal["paper", "released"]
Scores = Float[Tensor, "batch classes"]


def nca(
    scores: Scores,
    labels: Int[Tensor, " batch"],
    scale: Float[Tensor, ""],
    *,
    margin: float = 0.6,
    variant: Variant = "paper",
    scale_sees_margin: bool = False,
) -> Float[Tensor, ""]:
    """The loss of the local similarity classifier, the mean over the batch.

    `paper`: $[-\\eta (\\hat y_t - m) + \\log \\sum_{k \\ne t} e^{\\eta \\hat y_k}]_+$ with the true class t.

    `released` is what PyCIL computes. The margin is taken from all scores, where it cancels; the true class, meant to
    be left out of the sum, stays in it as $e^0$; and nothing is cut at 0: with $z = \\eta \\hat y$,
    $\\max_k z_k - z_t + \\log (1 + \\sum_{k \\ne t} e^{z_k - \\max_j z_j})$.

    Args:
        scores: $\\eta \\hat y$, one per class.
        labels: The true classes.
        scale: $\\eta$.
        margin: $m$.
        variant: See above.
        scale_sees_margin: Whether $\\eta$ learns from $\\eta m$ too, as the formula has it. A smaller $\\eta$ then has
            a smaller loss as long as the margin is not reached, and with two classes $\\eta = 0$ the smallest of all:
            nothing is learned. Without, the loss has the same value and that part of its gradient is left out.

    Returns:
        The loss; 0 for a single class, which nothing is near to.
    """
    scores = full_precision(scores)
    if scores.shape[1] == 1:
        return (0 * scores).sum()
    true = scores.gather(1, labels[:, None])[:, 0]
    if variant == "released":
        largest = scores.amax(dim=1)
        others = (scores - largest[:, None]).scatter(1, labels[:, None], 0.0)
        return (largest - true + others.logsumexp(dim=1)).mean()
    others = scores.scatter(1, labels[:, None], -torch.inf)
    distance = margin * (scale if scale_sees_margin else scale.detach())
    return (others.logsumexp(dim=1) - (true - distance)).clamp(min=0).mean()


def pod_spatial(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Float[Tensor, ""]:
    """The distance of squared maps that are summed over their width and over their height, on average.

    For every stage $\\| u - u' \\|_2$ with $u = v / \\|v\\|$, where v holds $\\sum_w h_{cwh}^2$ and
    $\\sum_h h_{cwh}^2$; the mean over the batch, and over the stages. No gradient reaches the teacher.

    Args:
        student: Maps [batch, channels, height, width], one of each stage.
        teacher: Likewise, of the same shapes.
    """
    distances = [
        (pooled(ours) - pooled(theirs.detach())).norm(dim=1).mean()
        for ours, theirs in zip(student, teacher, strict=True)
    ]
    return torch.stack(distances).mean()


def pooled(maps: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch places"]:
    """Sums of the squares over the width and over the height, as one vector of length 1."""
    squares = full_precision(maps).square()
    columns = rearrange(squares.sum(dim=3), "b c h -> b (c h)")
    rows = rearrange(squares.sum(dim=2), "b c w -> b (c w)")
    return F.normalize(torch.cat([columns, rows], dim=1))


@learners.register("podnet")
class PODNet(Learner):
    """A classifier of several proxies for each class, on new data and memory, whose maps may change little.

    $L = NCA + \\sqrt{C / C_{new}}\\,(w_s\\,POD_{spatial} + w_f\\,POD_{flat})$ with `nca`, `pod_spatial`, and
    $POD_{flat} = 1 - \\cos(f, f')$ for the features of the new and the old network; in the first task $L = NCA$. Then,
    from the second task on, the same on the balanced memory at a low rate.

    New proxies are drawn at random, as in PyCIL; the authors' release begins them at clusters of the features. The
    memory has as many images of every class as fit with the new classes, where PyCIL has those that fit without them.

    Args:
        network: A `BackboneNetwork` with feature maps of its stages; its head is replaced by a `ProxyHead`.
        distillation: Takes the place of both POD terms, with the weight $\\sqrt{C / C_{new}}$; None, as published,
            leaves them.
        pod_spatial: $w_s$: 5 in PyCIL, 3 in the authors' settings for CIFAR-100; 0 leaves the term out.
        pod_flat: $w_f$; 0 leaves the term out.
        num_proxies: For each class.
        classification: `nca`, or `ce` for cross-entropy (an ablation of the paper).
        variant: Of `nca`; see there.
        margin: Of `nca`.
        scale_sees_margin: Of `nca`; see there.
        signed_features: Take the last activation away, so that features have both signs. Networks of timm that are not
            its ResNets keep it.
        frozen_old: Hold the proxies of old classes still.
        finetune_epochs: Epochs of fine-tuning; 0 leaves it out.
        finetune_lr: Its first rate, scaled by batch size like the main one; it falls to 0 along a cosine.
        finetune_part: What is fine-tuned: the `network` but for old proxies, with all terms (PyCIL), or all proxies of
            the `head` alone, without the POD terms, which do not reach them (the authors, at a rate of 0.05).

    Raises:
        ValueError: If the network is no `BackboneNetwork` or has no maps of its stages, or a switch has nothing to act
            on.
    """

    keeps_teacher = True
    needs_memory = True
    cannot_say: ClassVar[Mapping[str, str]] = {
        "class_maps": "it reads class maps, and a class that has several proxies has no one vector to make them with"
    }

    def __init__(
        self,
        network: Network,
        distillation: WeightedSum | None = None,
        *,
        pod_spatial: Annotated[float, Field(ge=0)] = 5.0,
        pod_flat: Annotated[float, Field(ge=0)] = 1.0,
        num_proxies: Annotated[int, Field(gt=0)] = 10,
        classification: Literal["nca", "ce"] = "nca",
        variant: Variant = "paper",
        margin: Annotated[float, Field(ge=0)] = 0.6,
        scale_sees_margin: bool = False,
        signed_features: bool = True,
        frozen_old: bool = True,
        finetune_epochs: Annotated[int, Field(ge=0)] = 20,
        finetune_lr: Annotated[float, Field(gt=0)] = 0.005,
        finetune_part: Literal["network", "head"] = "network",
    ) -> None:
        super().__init__(network, distillation)
        if classification == "ce" and variant != "paper":
            raise ValueError(f"learner.variant={variant} is about classification=nca and has no effect with ce")
        if scale_sees_margin and (classification == "ce" or variant == "released"):
            raise ValueError(
                "learner.scale_sees_margin is about the margin, and has no effect with classification=ce, which has "
                "none, or variant=released, in which it cancels"
            )
        give_head(
            network, partial(ProxyHead, num_proxies=num_proxies), learner="podnet", signed_features=signed_features
        )
        self.pod_spatial = pod_spatial
        self.pod_flat = pod_flat
        self.classification = classification
        self.variant: Variant = variant
        self.margin = margin
        self.scale_sees_margin = scale_sees_margin
        self.frozen_old = frozen_old
        self.finetune_epochs = finetune_epochs
        self.finetune_lr = finetune_lr
        self.finetune_part = finetune_part
        #: Names of the maps that are compared; none where POD-spatial is not computed.
        self.stages: list[str] = []
        if pod_spatial and distillation is None:
            self.stages = [name for name in network.taps() if name.startswith("stage") and name.endswith(".post")]
            if not self.stages:
                raise ValueError(
                    "learner=podnet compares the feature maps of the stages of a network, and this "
                    f"{type(network).__name__} has none, like some transformers: use one such as model=resnet32, "
                    "or learner.pod_spatial=0 for POD-flat alone, or name a kd that reads no maps"
                )

    @property
    def head(self) -> ProxyHead:
        """The head of the network."""
        head = self.network.get_submodule("head")
        assert isinstance(head, ProxyHead)
        return head

    @property
    def needs_teacher(self) -> bool:
        """Both POD terms compare with the old network."""
        return super().needs_teacher or self.pod_spatial > 0 or self.pod_flat > 0

    def connect(self) -> None:
        """Let teacher and grown network say what the terms read."""
        super().connect()
        self._expose_stages()

    def rebuild(self, structure: dict[str, Any]) -> None:
        """Give a fresh learner the modules of a saved one; the values come from its state dict."""
        super().rebuild(structure)
        self._expose_stages()

    def _expose_stages(self) -> None:
        if self.teacher is not None and self.stages:
            for network in self.speakers():
                network.expose(self.stages)

    def phases(self, stage: Stage) -> list[Phase]:
        """Training, and from the second task on fine-tuning on the balanced memory."""
        if stage.index == 0:
            return super().phases(stage)
        recipe = stage.recipe.for_task(stage.index)
        still: list[nn.Module | nn.Parameter] = [*self.head.old] if self.frozen_old else []
        found = [Phase("training", "new+memory", recipe, frozen=still)]
        if self.finetune_epochs and stage.has_memory:
            slow = recipe.changed(
                epochs=self.finetune_epochs,
                initial_epochs=None,
                lr=self.finetune_lr,
                schedule=Schedule(name="cosine", min_lr=0.0).model_dump(),
                sampling=Sampling().model_dump(),
            )
            if self.finetune_part == "head":
                still = [self.network.get_submodule("backbone"), self.head.eta]
            found.append(Phase("finetuning", "memory", slow, frozen=still))
        return found

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The weighted terms: `nca` or `ce`, and `pod_spatial` and `pod_flat` or those of distillation by name."""
        student = said(self.network, batch)
        losses: dict[str, Tensor] = {self.classification: self._classify(student.logits, batch.labels)}
        finetunes = self.phase is not None and self.phase.source == "memory"
        if self.teacher is None or (finetunes and self.finetune_part == "head"):
            return losses
        weight = math.sqrt(self.network.num_classes / self.network.task_sizes[-1])
        if self.distillation is not None:
            return losses | self.transferred(student, batch, weight)
        teacher = said(self.teacher, batch)
        if self.stages:
            ours, theirs = ([outputs.taps[name] for name in self.stages] for outputs in (student, teacher))
            losses["pod_spatial"] = weight * self.pod_spatial * pod_spatial(ours, theirs)
        if self.pod_flat:
            assert student.embedding is not None
            assert teacher.embedding is not None
            losses["pod_flat"] = weight * self.pod_flat * cosine_distance(student.embedding, teacher.embedding)
        return losses

    def _classify(self, scores: Scores, labels: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
        if self.classification == "ce":
            return F.cross_entropy(scores, labels)
        return nca(
            scores,
            labels,
            self.head.eta,
            margin=self.margin,
            variant=self.variant,
            scale_sees_margin=self.scale_sees_margin,
        )
