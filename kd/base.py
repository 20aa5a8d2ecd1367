"""What every distillation method sees and returns."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor, nn

from kd.registry import Registry


@dataclass
class Batch:
    """One batch of training samples.

    Attributes:
        images: Augmented, normalised images.
        labels: Class labels, counted in the order in which the classes are learned.
        ids: Stable ids of the samples in their data set.
    """

    images: Float[Tensor, "batch channels height width"]
    labels: Int[Tensor, " batch"]
    ids: Int[Tensor, " batch"]


@dataclass
class Outputs:
    """What a network says about a batch.

    Attributes:
        logits: One score per class.
        embedding: The pooled features that the head reads, before any norm of the head.
        taps: Named intermediate features.
    """

    logits: Float[Tensor, "batch classes"]
    embedding: Float[Tensor, "batch width"] | None = None
    taps: dict[str, Tensor] = field(default_factory=dict)

    def first(self, num_classes: int) -> "Outputs":
        """The same outputs with the logits of the first `num_classes` classes only."""
        return replace(self, logits=self.logits[:, :num_classes])


class Distiller(nn.Module):
    """A distillation loss: what "beside a teacher" means.

    `forward(student, teacher, batch)` returns a 0-d tensor, the mean over the batch, computed in float32 or better,
    and sends no gradient to the teacher. `needs` names what it reads: "logits", "embedding", "labels", "ids", "taps".
    """

    needs: ClassVar[set[str]] = {"logits"}

    def auxiliary_parameters(self) -> list[nn.Parameter]:
        """Trainable parameters of adapters: trained with the student, not part of it."""
        return list(self.parameters())

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Float[Tensor, ""]:
        """The loss of one batch."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to compare student and teacher")


class WeightedSum(Distiller):
    """Several distillers beside each other, summed by name with explicit weights.

    Args:
        terms: Name to (weight, distiller).

    Raises:
        ValueError: If a weight is negative.
    """

    def __init__(self, terms: Mapping[str, tuple[float, Distiller]]) -> None:
        super().__init__()
        for name, (weight, _) in terms.items():
            if weight < 0:
                raise ValueError(f"kd.{name}.weight must not be negative, found {weight}")
        self.weights = {name: weight for name, (weight, _) in terms.items()}
        self.distillers = nn.ModuleDict({name: distiller for name, (_, distiller) in terms.items()})

    def terms(self, student: Outputs, teacher: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Every weighted term by its name."""
        return {
            name: self.weights[name] * distiller(student, teacher, batch) for name, distiller in self.distillers.items()
        }

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Float[Tensor, ""]:
        """The sum of the weighted terms."""
        return total(self.terms(student, teacher, batch).values())


def total(losses: Iterable[Tensor]) -> Tensor:
    """The sum of 0-d losses.

    Raises:
        ValueError: If there are none.
    """
    terms = list(losses)
    if not terms:
        raise ValueError("there is no loss to sum: found no term")
    return sum(terms[1:], terms[0])


distillers: Registry[type[Distiller]] = Registry("distillation method", "kd.logit", "kd.feature")
