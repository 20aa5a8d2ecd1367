"""FOSTER: feature boosting and compression (Wang et al., ECCV 2022, arXiv:2204.04662)."""

import copy
from fractions import Fraction
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from cil.learners.base import Learner, learners
from cil.learners.der import backbone_network, read_off
from cil.learners.wa import align
from cil.models.expanding import ExpandingNetwork
from cil.models.network import Network
from cil.optim import Recipe, Schedule
from cil.stages import Phase, Source, Stage
from cil.transfer import said
from kd import Batch, WeightedSum
from kd.precision import full_precision

BOOSTING, COMPRESSION = "boosting", "compression"  # the phases from the second task on

_PUBLISHED_RATIO = Fraction(130, 170)  # epochs of compression to those of boosting, in the settings of the release

Beta = Annotated[float, Field(ge=0, lt=1)]


def class_weights(sizes: Int[Tensor, " classes"], beta: float) -> Float[Tensor, " classes"]:
    """Weights by effective numbers of samples (Cui et al., CVPR 2019, arXiv:1901.05555): rare classes get larger ones.

    $w_k = \\frac{1 - \\beta}{1 - \\beta^{n_k}}$, scaled to a sum of the number of classes. $\\beta = 0$ gives 1 to all;
    the nearer it is to 1, the nearer the weights are to $1 / n_k$.

    Args:
        sizes: $n_k$, images of each class.
        beta: $\\beta$, at least 0 and below 1.
    """
    weights = (1 - beta) / (1 - beta ** sizes.double())
    return weights * len(sizes) / weights.sum()


def balanced_distillation(
    student: Float[Tensor, "batch classes"],
    teacher: Float[Tensor, "batch classes"],
    weights: Float[Tensor, " classes"],
    temperature: float,
) -> Float[Tensor, ""]:
    """Balanced knowledge distillation: the teacher's answers are weighted by class before they are learned.

    $-\\frac{1}{B} \\sum_b \\sum_k q_{bk} \\log \\mathrm{softmax}(s_b / T)_k$ with
    $q_{bk} \\propto w_k\\,\\mathrm{softmax}(t_b / T)_k$ and a sum of 1 over k; without the factor $T^2$.

    Args:
        student: $s$.
        teacher: $t$; it gets no gradient.
        weights: $w$, above 0.
        temperature: $T$.
    """
    softened = F.softmax(full_precision(teacher.detach()) / temperature, dim=1)
    targets = F.normalize(softened * weights.to(softened), p=1, dim=1)
    return F.cross_entropy(full_precision(student) / temperature, targets, reduction="mean")


@learners.register("foster")
class FOSTER(Learner):
    """Two backbones fit what one left over, then one network learns what both say.

    **Boosting.** The old network is frozen and gets a copy of its backbone beside it; a head reads the features of
    both, another ($z_{new}$) those of the copy alone. $L = CE(z / w) + CE(z_{new}) + \\lambda\\,KD$, where w are the
    `class_weights` and KD compares z with the scores of the old network.

    **Compression.** A single network, which starts as the old one with rows for the new classes, learns what the
    boosted one says, by `balanced_distillation` alone. It is the old network of the next task.

    In the first task $L = CE$. Both networks exist from the beginning of a task: one of them is frozen in each phase.

    Args:
        network: A `BackboneNetwork`.
        distillation: What boosting learns from the old network; None leaves it out. `configs/kd/kd2.yaml` is the
            published term: temperature 2, without the factor $T^2$.
        beta1: $\\beta$ of the weights in boosting; 0 weights all classes alike.
        beta2: The same in compression.
        kd_weight: $\\lambda$.
        temperature: Of compression.
        compression_epochs: Null takes 130 / 170 of the epochs of boosting, the published ratio.
        compression_weight_decay: In the place of that of the recipe. The rate is the recipe's, its curve a cosine, as
            published, whatever that of boosting is.
        new_class_size: Images of a new class, for the weights; null counts them, as it does those of an old class in
            the memory. The release has 500, which is right for CIFAR-100.
        prediction: Whether the `compressed` network is the one that answers and is saved, or the `boosted` one
            ("FOSTER B4"), which is twice as large.
        align_boosted: Whether the new rows of the boosted head are scaled to the length of the old ones before
            compression, as in `wa`.
        align_compressed: The same for the compressed network at the end.

    Raises:
        ValueError: If the network is no `BackboneNetwork`; on use, if a class has no image or nobody has told which
            there are (`remember`).
    """

    keeps_teacher = True
    needs_memory = True
    continues = False  # boosting begins with a copy of the compressed network, not with the boosted one of before

    def __init__(
        self,
        network: Network,
        distillation: WeightedSum | None,
        *,
        beta1: Beta = 0.96,
        beta2: Beta = 0.97,
        kd_weight: Annotated[float, Field(gt=0)] = 1.0,
        temperature: Annotated[float, Field(gt=0)] = 2.0,
        compression_epochs: Annotated[int, Field(gt=0)] | None = None,
        compression_weight_decay: Annotated[float, Field(ge=0)] = 0.0,
        new_class_size: Annotated[int, Field(gt=0)] | None = None,
        prediction: Literal["compressed", "boosted"] = "compressed",
        align_boosted: bool = False,
        align_compressed: bool = False,
    ) -> None:
        expanding = ExpandingNetwork(backbone_network(network, "foster"), auxiliary="all")
        super().__init__(expanding, distillation)
        #: The old network when a task begins, the boosted one while it is learned, at the end the one that answers.
        self.network: ExpandingNetwork = expanding
        #: The network that is compressed to, while `network` is the boosted one.
        self.student: ExpandingNetwork | None = None
        self.beta1, self.beta2 = beta1, beta2
        self.kd_weight = kd_weight
        self.temperature = temperature
        self.compression_epochs = compression_epochs
        self.compression_weight_decay = compression_weight_decay
        self.new_class_size = new_class_size
        self.prediction = prediction
        self.align_boosted, self.align_compressed = align_boosted, align_compressed
        #: Images of every class in this task; not saved, since `remember` says it again after a resume.
        self.class_sizes: Tensor | None = None

    def begin_stage(self, stage: Stage) -> None:
        """Make the boosted network and the one that is compressed to from the compressed one of the last task."""
        if self.student is not None:
            self.network, self.student = self.student, None
        student = copy.deepcopy(self.network)
        super().begin_stage(stage)
        if stage.index > 0:
            student.grow_head(stage.num_new)
            self.student = student

    def phases(self, stage: Stage) -> list[Phase]:
        """Training in the first task; then boosting and compression."""
        recipe = stage.recipe.for_task(stage.index)
        source: Source = "new+memory" if stage.has_memory else "new"
        if stage.index == 0:
            return [Phase("training", source, recipe)]
        resting = [] if self.student is None else [self.student]  # before the task begins there is none
        return [
            Phase(BOOSTING, source, recipe, frozen=[*self.network.settled, *resting]),
            Phase(COMPRESSION, source, self._compression_recipe(recipe), frozen=[self.network]),
        ]

    def _compression_recipe(self, recipe: Recipe) -> Recipe:
        curve = recipe.schedule
        return recipe.changed(
            epochs=self.compression_epochs or max(1, round(_PUBLISHED_RATIO * recipe.epochs)),
            initial_epochs=None,
            weight_decay=self.compression_weight_decay,
            schedule=Schedule(name="cosine", unit=curve.unit, min_lr=curve.min_lr).model_dump(),
        )

    @property
    def compresses(self) -> bool:
        """Whether the phase in work is the one that compresses."""
        return self.phase is not None and self.phase.name == COMPRESSION

    def remember(self, ids: Int[Tensor, " samples"], labels: Int[Tensor, " samples"]) -> None:
        """Which samples the phases of a stage will show: count those of every class."""
        super().remember(ids, labels)
        self.class_sizes = torch.bincount(labels.cpu())

    def weights(self, beta: float) -> Float[Tensor, " classes"]:
        """The weights of the classes in this task.

        Raises:
            ValueError: If a class has no image, or `remember` was not called for these classes.
        """
        sizes, num_classes = self.class_sizes, self.network.num_classes
        if sizes is None or len(sizes) != num_classes or not sizes.all():
            found = "none" if sizes is None else f"those of {int((sizes > 0).sum())}"
            raise ValueError(
                f"learner=foster weights each of its {num_classes} classes by the number of its images, found {found}: "
                "call remember(ids, labels) with new images and exemplars after begin_stage"
            )
        if self.new_class_size is not None:
            sizes = sizes.clone()
            sizes[-self.network.task_sizes[-1] :] = self.new_class_size
        return class_weights(sizes, beta)

    def begin_epoch(self, epoch: int, *, learning_rate: float, view_key: int, again: bool = False) -> None:
        """An epoch begins; the first of compression aligns the boosted head, if that is asked for."""
        super().begin_epoch(epoch, learning_rate=learning_rate, view_key=view_key, again=again)
        if self.align_boosted and self.compresses and epoch == 0 and not again:
            align(self.network.head, sum(self.network.task_sizes[:-1]))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The weighted terms: `ce`, from the second task on `ce_new` and those of distillation; or `bkd` alone."""
        if self.compresses:
            assert self.student is not None
            teacher, student = self.network(batch.images), self.student(batch.images)
            weights = self.weights(self.beta2)
            return {"bkd": balanced_distillation(student.logits, teacher.logits, weights, self.temperature)}
        student = said(self.network, batch)
        if self.network.auxiliary is None:
            return {"ce": F.cross_entropy(student.logits, batch.labels)}
        logits = full_precision(student.logits)
        losses = {
            "ce": F.cross_entropy(logits / self.weights(self.beta1).to(logits), batch.labels),
            "ce_new": F.cross_entropy(self.network.auxiliary_logits(student), batch.labels),
        }
        return losses | self.transferred(student, batch, self.kd_weight, read_off(self.teacher, student))

    def end_stage(self, stage: Stage) -> None:
        """Align the compressed head if that is asked for, and let the network that answers take its place."""
        super().end_stage(stage)
        if self.student is None:
            return
        if self.align_compressed:
            align(self.student.head, stage.num_old)
        if self.prediction == "compressed":
            self.network, self.student = self.student, None

    @property
    def answering(self) -> ExpandingNetwork:
        """The network that answers: the compressed one, if so configured, once compression has begun."""
        boosting = self.phase is not None and not self.compresses
        return self.network if self.student is None or self.prediction == "boosted" or boosting else self.student

    def predict(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Scores of all classes seen so far, for evaluation."""
        logits: Tensor = self.answering(images).logits
        return logits

    def embed(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch embedding"]:
        """The features by which exemplars are chosen."""
        embedding: Tensor = self.answering(images).embedding
        return embedding

    def speakers(self) -> list[Network]:
        """The networks that are asked about training images; several processes put together what these say."""
        return [*super().speakers(), *([] if self.student is None else [self.student])]

    def structure(self) -> dict[str, Any]:
        """What growing has made of the modules, as plain JSON values."""
        return super().structure() | {"student": None if self.student is None else self.student.structure()}

    def rebuild(self, structure: dict[str, Any]) -> None:
        """Give a fresh learner the modules of a saved one; the values come from its state dict."""
        if structure["student"] is not None:
            self.student = copy.deepcopy(self.network)
            self.student.rebuild(structure["student"])
        super().rebuild(structure)
