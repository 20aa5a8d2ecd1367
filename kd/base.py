"""What every distillation method sees and returns."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import cast

from jaxtyping import Float, Int
from torch import Tensor, nn

from kd.precision import full_precision
from kd.registry import Registry, unknown
from kd.schedule import Schedule


@dataclass
class Batch:
    """One batch of training samples.

    Attributes:
        images: Augmented, normalised images.
        labels: Class labels, counted in the order in which the classes are learned.
        ids: Stable ids of the samples in their data set.
        gathered: Whether labels, ids and what the networks say are those of all processes; the images are always those
            of this process (`kd.distributed.gathered`).
        views: Other augmentations of the same images, by name ("strong").
    """

    images: Float[Tensor, "share channels height width"]
    labels: Int[Tensor, " batch"]
    ids: Int[Tensor, " batch"]
    gathered: bool = False
    views: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Outputs:
    """What a network says about a batch.

    Attributes:
        logits: One score per class.
        embedding: The pooled features that the head reads, before any norm of the head.
        taps: Named intermediate features: "stem", "stage0.pre" and "stage0.post" (before and after the last activation
            of the first stage) and so on, "last" (the map that is pooled), "class_maps" (`kd.cam`).
        views: What the network says of other views of the same images, by name ("strong").
    """

    logits: Float[Tensor, "batch classes"]
    embedding: Float[Tensor, "batch width"] | None = None
    taps: dict[str, Tensor] = field(default_factory=dict)
    views: dict[str, "Outputs"] = field(default_factory=dict)

    def first(self, num_classes: int) -> "Outputs":
        """The same outputs with the logits and class maps of the first `num_classes` classes only."""
        taps = dict(self.taps)
        if "class_maps" in taps:
            taps["class_maps"] = taps["class_maps"][:, :num_classes]
        views = {name: view.first(num_classes) for name, view in self.views.items()}
        return replace(self, logits=self.logits[:, :num_classes], taps=taps, views=views)


class Distiller(nn.Module):
    """A distillation loss: what "beside a teacher" means.

    `forward(student, teacher, batch)` returns a 0-d tensor, the mean over the batch, computed in float32 or better,
    and sends no gradient to the teacher. Constructors take hyper-parameters only; what depends on the two networks is
    made by `connect`, what depends on the data by `remember`. A loss that pairs samples calls `kd.distributed.gathered`
    first, so that it sees the batch of all processes.

    `needs` names what it reads: "logits", "embedding", "labels", "ids", "class_maps", "strong" (a second view), or
    "taps" (feature maps by name), "teacher_graph" (a teacher that keeps its graph).
    """

    needs: set[str] = {"logits"}
    #: Whether `forward` is the same operations on tensors every time, so that a GPU can be given all of them at once:
    #: it draws no random numbers and keeps nothing from batch to batch.
    recordable: bool = False

    def auxiliary_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters of adapters: trained with the student, not part of it."""
        return list(self.parameters())

    def connect(self, student: Outputs, teacher: Outputs) -> None:
        """Build the adapters between two networks from what both say about a probe batch (`kd.connect.probe`).

        Called once, before the optimiser is made. The default has no adapters.
        """

    def remember(self, ids: Int[Tensor, " samples"], labels: Int[Tensor, " samples"]) -> None:
        """Make room for what is kept of every training sample, by its id; called again when samples arrive.

        The default keeps nothing.
        """

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Float[Tensor, ""]:
        """The loss of one batch."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to compare student and teacher")


class WeightedSum(Distiller):
    """Several distillers beside each other, summed by name with explicit weights, each on a schedule if it has one.

    A term whose weight is 0 in an epoch (before its warm-up, after its stop) is not computed.

    Args:
        terms: Name to (weight, distiller).
        schedules: Name of a term to when it counts. `begin_epoch` must then be called at the start of every epoch.
        task_weight: Weight of the task loss beside the terms, for whoever adds the two: $1 - \\alpha$ in ESKD and TAKD.

    Raises:
        ValueError: If a weight is negative or a schedule is of no term; on use, if there are schedules and no epoch
            has begun.
    """

    def __init__(
        self,
        terms: Mapping[str, tuple[float, Distiller]],
        *,
        schedules: Mapping[str, Schedule] | None = None,
        task_weight: float = 1.0,
    ) -> None:
        super().__init__()
        for name, (weight, _) in terms.items():
            if not weight >= 0:
                raise ValueError(f"kd.{name}.weight must not be negative, found {weight}")
        if not task_weight >= 0:
            raise ValueError(f"the task weight must not be negative, found {task_weight}")
        for name in schedules or {}:
            if name not in terms:
                raise ValueError(unknown("distillation term", name, list(terms)))
        self.weights = {name: weight for name, (weight, _) in terms.items()}
        self.distillers = nn.ModuleDict({name: distiller for name, (_, distiller) in terms.items()})
        self.schedules = nn.ModuleDict(schedules or {})  # empty, it leaves no trace in the state dict
        self.needs = set().union(*(distiller.needs for _, distiller in terms.values()))
        self._task_weight = task_weight

    def begin_epoch(
        self, epoch: int, *, learning_rate: float | None = None, validation_loss: float | None = None
    ) -> None:
        """Set the weights of an epoch; see `Schedule.begin_epoch`. Every process must call it with the same values."""
        for schedule in self._schedules().values():
            schedule.begin_epoch(epoch, learning_rate, validation_loss)

    def weight(self, name: str) -> float:
        """The weight of a term in this epoch."""
        schedule = self._schedules().get(name)
        if schedule is None:
            return self.weights[name]
        if schedule.epoch is None:
            raise ValueError(f"kd.{name} has a schedule: call begin_epoch at the start of every epoch, the first is 0")
        return self.weights[name] * schedule.factor(schedule.epoch)

    @property
    def task_weight(self) -> float:
        """Weight of the task loss in this epoch: exactly 1 once every scheduled term has stopped (ESKD)."""
        stopped = [schedule.stopped for schedule in self._schedules().values()]
        return 1.0 if stopped and all(stopped) else self._task_weight

    @property
    def ended(self) -> bool:
        """Whether every term has come to the end of its schedule: there is nothing more to learn from the teacher."""
        stopped = [schedule.stopped for schedule in self._schedules().values()]
        return bool(stopped) and len(stopped) == len(self.weights) and all(stopped)

    @property
    def counts(self) -> bool:
        """Whether any term counts in this epoch; without one the teacher need not be asked."""
        return any(self.weight(name) for name in self.weights)

    def connect(self, student: Outputs, teacher: Outputs) -> None:
        """Build the adapters of every term."""
        for distiller in self._distillers().values():
            distiller.connect(student, teacher)

    def remember(self, ids: Int[Tensor, " samples"], labels: Int[Tensor, " samples"]) -> None:
        """Make room for samples in every term."""
        for distiller in self._distillers().values():
            distiller.remember(ids, labels)

    def auxiliary_parameters(self) -> list[nn.Parameter]:
        """Those of every term."""
        return [
            parameter for distiller in self._distillers().values() for parameter in distiller.auxiliary_parameters()
        ]

    def terms(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Every weighted term that counts in this epoch, by its name."""
        weights = {name: self.weight(name) for name in self.weights}
        return {
            name: weights[name] * distiller(student, teacher, batch)
            for name, distiller in self.distillers.items()
            if weights[name]
        }

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Float[Tensor, ""]:
        """The sum of the weighted terms; 0 in an epoch in which none of them counts."""
        terms = self.terms(student, teacher, batch)
        if self.weights and not terms:
            return full_precision(student.logits.new_zeros(()))
        return total(terms.values())

    def _distillers(self) -> dict[str, Distiller]:
        return cast(dict[str, Distiller], dict(self.distillers.items()))

    def _schedules(self) -> dict[str, Schedule]:
        return cast(dict[str, Schedule], dict(self.schedules.items()))


def total(losses: Iterable[Tensor]) -> Tensor:
    """The sum of 0-d losses.

    Raises:
        ValueError: If there are none.
    """
    terms = list(losses)
    if not terms:
        raise ValueError("there is no loss to sum: found no term")
    return sum(terms[1:], terms[0])


def check_same_classes(method: str, student: Outputs, teacher: Outputs) -> None:
    """Raise unless both networks score the same samples and classes.

    Args:
        method: Who asks, for the message.
        student: Its logits cut to the teacher's classes.
        teacher: What it is compared with.

    Raises:
        ValueError: If the shapes of the logits differ.
    """
    if student.logits.shape != teacher.logits.shape:
        raise ValueError(
            f"{method} compares the same classes: found logits {tuple(student.logits.shape)} of the student and "
            f"{tuple(teacher.logits.shape)} of the teacher; cut the student's with Outputs.first(num_classes)"
        )


distillers: Registry[type[Distiller]] = Registry("distillation method", "kd.logit", "kd.feature")
