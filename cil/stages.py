"""What a learner is told about a stage, and what it answers: the phases to train."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from cil.optim import Recipe

Source = Literal["new", "new+memory", "memory", "seen"]


@dataclass(frozen=True)
class Stage:
    """One task of the sequence.

    Attributes:
        index: Counts from 0.
        labels: The new classes, as labels in learned order.
        recipe: How the run trains unless a phase says otherwise.
        has_memory: Whether exemplars of old classes are kept.
    """

    index: int
    labels: range
    recipe: Recipe
    has_memory: bool

    @property
    def num_old(self) -> int:
        """Number of classes learned before this stage."""
        return self.labels.start

    @property
    def num_new(self) -> int:
        """Number of classes that arrive with this stage."""
        return len(self.labels)

    @property
    def num_seen(self) -> int:
        """Number of classes known after this stage."""
        return self.labels.stop


@dataclass(frozen=True)
class SetApart:
    """As many samples of each old class as of each new one, set apart from the others of a phase's source (BiC).

    Attributes:
        fraction: Of the exemplars that an old class may have; rounded down.
        shown: Whether the phase shows the samples set apart, or the others.
    """

    fraction: float
    shown: bool


@dataclass(frozen=True)
class Phase:
    """A part of a stage: what to train on, how long, and which parameters.

    Attributes:
        name: For people and logs.
        source: The samples: of the new classes, with the exemplars, the exemplars alone (then those of the new classes
            are chosen before the phase), or everything seen so far.
        recipe: Optimiser, rate, epochs, batches.
        frozen: Modules and parameters that do not learn in this phase.
        frozen_in_eval: Hold the frozen modules in evaluation mode (BatchNorm statistics, drop path).
        set_apart: Divides the source, for a phase that trains on a part of it.
        loader_batch_size: Batch size of the loader where it differs from the one the learning rate is scaled by.
        views: Show the same so many augmented views of every sample again and again, one an epoch, as what
            `Network.encode` makes of them, computed once; None draws new ones.
    """

    name: str
    source: Source
    recipe: Recipe
    frozen: Sequence[nn.Module | nn.Parameter] = ()
    frozen_in_eval: bool = True
    set_apart: SetApart | None = None
    loader_batch_size: int | None = None
    views: int | None = None

    @property
    def batch_size(self) -> int:
        """Samples per step."""
        return self.loader_batch_size or self.recipe.batch_size
