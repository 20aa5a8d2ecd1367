"""LUCIR: Learning a Unified Classifier Incrementally via Rebalancing (Hou et al., CVPR 2019)."""

import math
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from cil.learners.base import Learner, learners
from cil.models.cosine_heads import CosineHead, give_head
from cil.models.network import Network
from cil.optim import Sampling, Schedule
from cil.stages import Phase, Stage
from cil.transfer import said
from kd import Batch, WeightedSum
from kd.base import total
from kd.precision import full_precision, no_autocast

#: The phase that looks at the new images before any of them is learned, and the one that learns them.
IMPRINTING, TRAINING = "imprinting", "training"
_FINETUNING_DECAY = 0.1  # of the rate, after half of the epochs of fine-tuning (the release: 10 of 20)


def cosine_distance(student: Float[Tensor, "batch width"], teacher: Float[Tensor, "batch width"]) -> Float[Tensor, ""]:
    """$1 - \\cos(f, f')$, the mean over the batch; no gradient reaches the teacher."""
    return 1 - F.cosine_similarity(full_precision(student), full_precision(teacher.detach())).mean()


def margin_ranking(
    cosines: Float[Tensor, "batch classes"],
    labels: Int[Tensor, " batch"],
    num_old: int,
    *,
    num_hardest: int = 2,
    margin: float = 0.5,
) -> Float[Tensor, ""]:
    """$\\max(0, m - \\cos_{true} + \\cos_k)$, the mean over samples of old classes and the new classes nearest to each.

    Args:
        cosines: Of features and classes.
        labels: Of the samples; below `num_old` are old ones.
        num_old: Number of old classes, which come first.
        num_hardest: How many new classes each sample is ranked against; all, if there are fewer.
        margin: $m$.

    Returns:
        The mean; 0 without samples of old classes.
    """
    is_old = labels < num_old
    hardest = cosines[is_old, num_old:].topk(min(num_hardest, cosines.shape[1] - num_old), dim=1).values
    true = cosines[is_old].gather(1, labels[is_old, None])
    violations = (margin - true + hardest).clamp(min=0)
    return violations.sum() / max(violations.numel(), 1)


@learners.register("lucir")
class LUCIR(Learner):
    """A cosine classifier on new data and memory, whose features may turn little and whose old classes stay in front.

    $L = CE(\\eta \\cos) + \\lambda (1 - \\cos(f, f')) + w\\,MR$ with the feature $f'$ of the old network and
    $\\lambda = \\lambda_0 \\sqrt{C_{old} / C_{new}}$; $MR$ is `margin_ranking`. In the first task $L = CE$.

    From the second task on, a phase before training shows every new image once (an augmented view of it, where the
    release has the clean one) and changes nothing: the vectors of the new classes begin at the mean direction of their
    features, as long as the old ones on average. The release has that, the paper has not.

    Args:
        network: A `BackboneNetwork`; its head is replaced by a `CosineHead`.
        distillation: Takes the place of the second term, with the weight $\\lambda$; None, as published, leaves it.
        less_forget: $\\lambda_0$: 5, on ImageNet 10; 0 leaves the term out.
        lambda_scale: `classes` as above; `tasks` has the root of the number of finished tasks (mammoth), the same for
            tasks of one size.
        margin_ranking: $w$; 0 leaves the term out.
        num_hardest: New classes that a sample of an old class is ranked against.
        margin: By which it shall be nearer to its own.
        signed_features: Take the last activation away, so that features have both signs. Networks of timm that are not
            its ResNets keep it.
        imprint: Whether there is that phase; without, the new vectors are drawn at random.
        frozen_old: Hold the vectors of old classes still in training.
        finetune_epochs: Epochs of fine-tuning all vectors on the balanced memory, with the rest of the network held
            still, from the second task on (20 in the release); 0 leaves it out.
        finetune_lr: Its rate, scaled by batch size like the main one; a tenth in the second half.

    Raises:
        ValueError: If the network is no `BackboneNetwork`, or a distillation has the weight 0.
    """

    keeps_teacher = True
    needs_memory = True

    def __init__(
        self,
        network: Network,
        distillation: WeightedSum | None = None,
        *,
        less_forget: Annotated[float, Field(ge=0)] = 5.0,
        lambda_scale: Literal["classes", "tasks"] = "classes",
        margin_ranking: Annotated[float, Field(ge=0)] = 1.0,
        num_hardest: Annotated[int, Field(gt=0)] = 2,
        margin: Annotated[float, Field(ge=0)] = 0.5,
        signed_features: bool = True,
        imprint: bool = True,
        frozen_old: bool = True,
        finetune_epochs: Annotated[int, Field(ge=0)] = 0,
        finetune_lr: Annotated[float, Field(gt=0)] = 0.01,
    ) -> None:
        super().__init__(network, distillation)
        if distillation is not None and not less_forget:
            raise ValueError(
                "learner.less_forget is the weight of what kd names, and with 0 kd has no effect: raise it, or kd=none"
            )
        give_head(network, CosineHead, learner="lucir", signed_features=signed_features)
        self.less_forget = less_forget
        self.lambda_scale = lambda_scale
        self.margin_ranking = margin_ranking
        self.num_hardest = num_hardest
        self.margin = margin
        self.imprint = imprint
        self.frozen_old = frozen_old
        self.finetune_epochs = finetune_epochs
        self.finetune_lr = finetune_lr
        #: Sums of the directions of the features, for every new class.
        self.directions: Tensor
        self._make_room()

    @property
    def head(self) -> CosineHead:
        """The head of the network."""
        head = self.network.get_submodule("head")
        assert isinstance(head, CosineHead)
        return head

    @property
    def needs_teacher(self) -> bool:
        """The features of the old network count, unless their weight is 0."""
        return self.less_forget > 0

    def begin_stage(self, stage: Stage) -> None:
        """Take the teacher, grow, and begin to sum anew."""
        super().begin_stage(stage)
        self._make_room()

    def rebuild(self, structure: dict[str, Any]) -> None:
        """Give a fresh learner the modules of a saved one; the values come from its state dict."""
        super().rebuild(structure)
        self._make_room()

    def _make_room(self) -> None:
        num_new = self.network.task_sizes[-1] if self.network.task_sizes else 0
        self.register_buffer("directions", self.head.eta.detach().new_zeros(num_new, self.head.in_features))

    def phases(self, stage: Stage) -> list[Phase]:
        """Training; from the second task on a look at the new images before it, and fine-tuning after it."""
        recipe = stage.recipe.for_task(stage.index)
        if stage.index == 0:
            return super().phases(stage)
        still: list[nn.Module | nn.Parameter] = [*self.head.old] if self.frozen_old else []
        own = {"initial_epochs": None, "sampling": Sampling().model_dump()}
        found = [Phase(TRAINING, "new+memory", recipe, frozen=still)]
        if self.imprint:
            once = recipe.changed(**own, epochs=1, schedule=Schedule(name="constant").model_dump())
            found.insert(0, Phase(IMPRINTING, "new", once, frozen=still))
        if self.finetune_epochs and stage.has_memory:
            half = math.ceil(self.finetune_epochs / 2)
            schedule = Schedule(name="multistep", milestones=[half], decay_rate=_FINETUNING_DECAY).model_dump()
            slow = recipe.changed(**own, epochs=self.finetune_epochs, lr=self.finetune_lr, schedule=schedule)
            backbone = self.network.get_submodule("backbone")
            found.append(Phase("finetuning", "memory", slow, frozen=[backbone, self.head.eta]))
        return found

    @property
    def imprints(self) -> bool:
        """Whether the phase in work is the one before training."""
        return self.phase is not None and self.phase.name == IMPRINTING

    def begin_epoch(self, epoch: int, *, learning_rate: float, view_key: int, again: bool = False) -> None:
        """An epoch begins; before the first of training, the vectors of the new classes are set."""
        super().begin_epoch(epoch, learning_rate=learning_rate, view_key=view_key, again=again)
        first = self.phase is not None and self.phase.name == TRAINING and epoch == 0 and not again
        if self.imprint and first and self.network.num_tasks > 1:
            self._set_new()

    @torch.no_grad()
    def _set_new(self) -> None:
        length = torch.cat([*self.head.old]).norm(dim=1).mean()
        newest = self.head.weights[-1]
        # a class whose features have no direction (no image was seen, or all is zero) keeps what was drawn for it
        known = self.directions.norm(dim=1, keepdim=True) > 0
        newest.copy_(torch.where(known, length * F.normalize(self.directions), newest))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The weighted terms `ce`, `margin_ranking`, and `less_forget` or those of distillation by name.

        Fine-tuning has no term for the features, which do not move there; the phase before training has `ce` alone.
        """
        if self.imprints:
            return {"ce": self._look(batch)}
        student = said(self.network, batch)
        losses = {"ce": F.cross_entropy(student.logits, batch.labels)}
        num_old = sum(self.network.task_sizes[:-1])
        if not num_old:
            return losses
        assert student.embedding is not None
        if self.margin_ranking:
            ranking = margin_ranking(
                self.head.cosines(student.embedding),
                batch.labels,
                num_old,
                num_hardest=self.num_hardest,
                margin=self.margin,
            )
            losses["margin_ranking"] = self.margin_ranking * ranking
        if self.teacher is None or (self.phase is not None and self.phase.source == "memory"):
            return losses
        if self.distillation is not None:
            return losses | self.transferred(student, batch, self.weight)
        teacher = said(self.teacher, batch)
        assert teacher.embedding is not None
        return losses | {"less_forget": self.weight * cosine_distance(student.embedding, teacher.embedding)}

    @property
    def weight(self) -> float:
        """$\\lambda$ of the task in work."""
        *old, new = self.network.task_sizes
        ratio = sum(old) / new if self.lambda_scale == "classes" else len(old)
        return self.less_forget * math.sqrt(ratio)

    def _look(self, batch: Batch) -> Float[Tensor, ""]:
        """Add the directions of the features to the sums; the loss of the vectors as they are, which nobody follows."""
        self.network.eval()  # nothing is learned from these images yet, no statistics of BatchNorm either
        with torch.no_grad(), no_autocast(batch.images.device):
            embedding = self.network(batch.images).embedding
            new = batch.labels - sum(self.network.task_sizes[:-1])
            is_of = F.one_hot(new, len(self.directions)).to(self.directions)
            self.directions += is_of.T @ F.normalize(full_precision(embedding)).to(self.directions)
        return F.cross_entropy(self.head(embedding), batch.labels)

    def update(
        self,
        losses: dict[str, Tensor],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        clip_norm: float | None,
    ) -> None:
        """One optimiser step; none in the phase before training."""
        if not self.imprints:
            super().update(losses, optimizer, scaler, clip_norm)
            return
        total(losses.values()).backward()  # type: ignore[no-untyped-call]  # for which several processes wait
        optimizer.zero_grad(set_to_none=True)
