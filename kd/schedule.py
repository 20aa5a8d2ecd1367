"""When a distillation term counts: warm-up, and early stop (ESKD: Cho and Hariharan, ICCV 2019, arXiv:1910.01348)."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from torch import nn

from kd.registry import Registry

stop_rules: Registry["type[StopRule]"] = Registry("stop rule")


class StopRule:
    """Says from which epoch on a term counts no more.

    `end` is that epoch, counted from 0; None while it is not known. `observe` is called at the start of every epoch.
    """

    #: What `observe` must be told: "learning_rate", "validation_loss".
    reads: ClassVar[set[str]] = set()
    #: Attributes that a resumed run needs.
    remembers: ClassVar[tuple[str, ...]] = ()

    end: int | None = None

    def restart(self) -> None:
        """Forget what was observed; the default observes nothing."""

    def observe(self, epoch: int, learning_rate: float | None, validation_loss: float | None) -> None:
        """Look at an epoch that begins; the default need not look."""

    def state(self) -> dict[str, Any]:
        """What was observed, as plain values."""
        return {name: getattr(self, name) for name in self.remembers}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave.

        Raises:
            ValueError: If it is of another rule.
        """
        if state.keys() != set(self.remembers):
            raise ValueError(
                f"the state of the stop rule {type(self).__name__} has {', '.join(self.remembers) or 'no values'}, "
                f"found {', '.join(state) or 'none'}: it was saved under another rule"
            )
        for name, value in state.items():
            setattr(self, name, value)


@stop_rules.register("epoch")
class AtEpoch(StopRule):
    """Stop at a fixed epoch.

    Args:
        epoch: The first epoch without the term, counted from 0: the number of epochs with it.

    Raises:
        ValueError: If there is no epoch with it.
    """

    def __init__(self, *, epoch: int) -> None:
        if epoch < 1:
            raise ValueError(f"stop.epoch must be at least 1, found {epoch}; weight 0 leaves the term out altogether")
        self.end = epoch


@stop_rules.register("last_drop")
class LastDrop(StopRule):
    """Stop at the last drop of a learning rate that falls in steps.

    Args:
        milestones: The epochs, counted from 0, that begin with a lower rate than the one before.
        num_drops: How many drops there are, where they are observed instead; a rate that falls every epoch (cosine)
            has no last drop in this sense.

    Raises:
        ValueError: If not exactly one of the two is given, or it names no drop; on use, without a learning rate.
    """

    remembers = ("end", "rate", "found")

    def __init__(self, *, milestones: list[int] | None = None, num_drops: int | None = None) -> None:
        if (milestones is None) == (num_drops is None):
            raise ValueError(
                f"stop=last_drop needs milestones, or num_drops to observe, and not both: found milestones={milestones}"
                f" and num_drops={num_drops}"
            )
        if milestones is not None and (not milestones or min(milestones) < 1):
            raise ValueError(f"stop.milestones must be epochs from 1 on, at least one, found {milestones}")
        if num_drops is not None and num_drops < 1:
            raise ValueError(f"stop.num_drops must be at least 1, found {num_drops}")
        self.milestones = milestones
        self.num_drops = num_drops
        self.restart()

    def restart(self) -> None:
        """Forget the rates seen."""
        self.end = max(self.milestones) if self.milestones is not None else None
        self.rate = math.inf
        self.found = -1  # the first rate is lower than none, and no drop

    def observe(self, epoch: int, learning_rate: float | None, validation_loss: float | None) -> None:
        """Count the drops."""
        if self.num_drops is None:
            return
        if learning_rate is None:
            raise ValueError("stop=last_drop with num_drops observes the rates: pass begin_epoch the learning_rate")
        self.found += learning_rate < self.rate
        self.rate = learning_rate
        if self.end is None and self.found >= self.num_drops:
            self.end = epoch


@stop_rules.register("plateau")
class Plateau(StopRule):
    """Stop when the cross-entropy on held-out samples has not improved for some epochs.

    Args:
        patience: How many epochs in a row may bring no new lowest loss before the term ends.

    Raises:
        ValueError: If `patience` is not positive; on use, without a validation loss.
    """

    reads = {"validation_loss"}
    remembers = ("end", "best", "waited")

    def __init__(self, *, patience: int) -> None:
        if patience < 1:
            raise ValueError(f"stop.patience must be at least 1, found {patience}")
        self.patience = patience
        self.restart()

    def restart(self) -> None:
        """Forget the losses seen."""
        self.end = None
        self.best = math.inf
        self.waited = 0

    def observe(self, epoch: int, learning_rate: float | None, validation_loss: float | None) -> None:
        """Compare the loss after the last epoch with the lowest so far."""
        if epoch == 0:
            return  # nothing is trained yet
        if validation_loss is None:
            raise ValueError("stop=plateau observes held-out samples: pass begin_epoch the validation_loss")
        improved = validation_loss < self.best
        self.best = validation_loss if improved else self.best
        self.waited = 0 if improved else self.waited + 1
        if self.end is None and self.waited >= self.patience:
            self.end = epoch


class Schedule(nn.Module):
    """A factor from 0 to 1 for every epoch: up in a straight line during warm-up, 0 after the stop.

    $\\min((e + e_0) / warmup, 1)$ for the epoch e, counted from 0. Its state is in the state dict. An epoch 0 starts
    everything again: in a sequence of tasks the schedule is that of each task.

    Args:
        warmup_epochs: Length of the warm-up; 0 has none.
        epoch_base: $e_0$: what the first epoch counts as. Releases disagree: with 1 it has one part of the weight, with
            0 (ReviewKD's authors) none.
        stop: When the term ends; None for never.

    Raises:
        ValueError: If a parameter is out of range or has no effect.
    """

    def __init__(self, *, warmup_epochs: int = 0, epoch_base: Literal[0, 1] = 1, stop: StopRule | None = None) -> None:
        super().__init__()
        if warmup_epochs < 0:
            raise ValueError(f"warmup_epochs must not be negative, found {warmup_epochs}")
        if epoch_base not in (0, 1):
            raise ValueError(f"epoch_base must be 0 or 1, found {epoch_base}")
        if epoch_base != 1 and not warmup_epochs:
            raise ValueError(f"epoch_base={epoch_base} has no effect without warmup_epochs")
        self.warmup_epochs = warmup_epochs
        self.epoch_base = epoch_base
        self.stop = stop
        self.epoch: int | None = None

    def begin_epoch(self, epoch: int, learning_rate: float | None = None, validation_loss: float | None = None) -> None:
        """Go on to an epoch; one that is begun twice in a row is observed once.

        Args:
            epoch: Counts from 0, which starts again.
            learning_rate: Its first rate, for `last_drop`.
            validation_loss: Cross-entropy on held-out samples after the epoch before, for `plateau`.
        """
        if self.stop is not None:
            if epoch == 0:
                self.stop.restart()
            if epoch == 0 or epoch != self.epoch:
                self.stop.observe(epoch, learning_rate, validation_loss)
        self.epoch = epoch

    def factor(self, epoch: int) -> float:
        """What the weight is multiplied by in an epoch, as far as the stop is known."""
        if self.stop is not None and self.stop.end is not None and epoch >= self.stop.end:
            return 0.0
        return min((epoch + self.epoch_base) / self.warmup_epochs, 1.0) if self.warmup_epochs else 1.0

    @property
    def stopped(self) -> bool:
        """Whether the term has come to its end."""
        end = self.stop.end if self.stop is not None else None
        return end is not None and self.epoch is not None and self.epoch >= end

    def get_extra_state(self) -> dict[str, Any]:
        """The epoch and what the stop rule has observed."""
        return {"epoch": self.epoch, "stop": self.stop.state() if self.stop is not None else None}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on where `get_extra_state` was called."""
        self.epoch = state["epoch"]
        (self.stop or StopRule()).restore(state["stop"] or {})


def shortened(epochs: int, milestones: Sequence[int], fraction: float) -> tuple[int, list[int]]:
    """The schedule of an early-stopped teacher: a shorter one that is complete, not a checkpoint from its middle.

    Args:
        epochs: Of the full schedule.
        milestones: Epochs, counted from 0, at which its learning rate drops.
        fraction: Length of the short one as a part of the full one; above 0, at most 1.

    Returns:
        Its epochs, and its milestones at the same parts of it, rounded.

    Raises:
        ValueError: If `fraction` is out of range or leaves no epoch before the first drop.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, found {fraction}")
    length = round(epochs * fraction)
    rescaled = [round(milestone * length / epochs) for milestone in milestones]
    if min([length, *rescaled]) < 1:
        raise ValueError(
            f"{fraction} of {epochs} epochs with milestones {list(milestones)} leaves no epoch before the first drop: "
            f"found {length} epochs with milestones {rescaled}; take a larger fraction"
        )
    return length, rescaled
