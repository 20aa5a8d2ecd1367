"""Optimisers and learning-rate schedules by name (timm's), and the recipe that ties them to batches and epochs."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from timm.optim import create_optimizer_v2, list_optimizers, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from kd import DOT
from kd.registry import unknown

_FUSED = {"adam", "adamw", "sgd"}  # torch's own, with one kernel for all parameters


class Schedule(BaseModel):
    """How the learning rate moves over a phase.

    `cosine` is $lr(e) = min + (peak - min)(1 + \\cos(\\pi e / E)) / 2$ after a linear warm-up from `warmup_lr`; the
    warm-up is not subtracted from $e$ (timm's and the DKT release's form).

    Attributes:
        name: The curve.
        unit: Whether the rate changes every epoch or every step.
        warmup_epochs: Length of the linear warm-up.
        warmup_lr: Rate at its beginning, after scaling by batch size (it is not scaled itself).
        min_lr: Rate at the end of the curve (not scaled).
        milestones: For `multistep`: epochs at which the rate is multiplied by `decay_rate`.
        decay_epochs: For `step`: the same every so many epochs.
        decay_rate: See the two above.
        legacy_shift: The release steps its schedule with the index of the epoch just finished, so epoch e runs at the
            rate of e - 1 and the first two epochs at `warmup_lr`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: Literal["constant", "cosine", "multistep", "poly", "step", "tanh"] = "cosine"
    unit: Literal["epoch", "step"] = "epoch"
    warmup_epochs: int = Field(0, ge=0)
    warmup_lr: float = Field(1e-6, ge=0)
    min_lr: float = Field(1e-5, ge=0)
    milestones: list[int] = []
    decay_epochs: int = Field(30, gt=0)
    decay_rate: float = Field(0.1, gt=0)
    legacy_shift: bool = False

    @model_validator(mode="after")
    def _effects(self) -> "Schedule":
        if self.legacy_shift and self.unit == "step":
            raise ValueError("legacy_shift is about epochs and has no effect with unit=step: set unit=epoch")
        return self


def learning_rates(schedule: Schedule, epochs: int, peak: float, steps_per_epoch: int = 1) -> list[float]:
    """The learning rate in effect in every epoch (or step, with `unit=step`) of a phase.

    A table made once, instead of a scheduler with a state: going on after an interruption reads it at another place.

    Args:
        schedule: The curve.
        epochs: Length of the phase.
        peak: Rate after the warm-up.
        steps_per_epoch: Only read with `unit=step`.
    """
    by_step = schedule.unit == "step"
    count = epochs * steps_per_epoch if by_step else epochs
    if schedule.name == "constant" and not schedule.warmup_epochs:
        return [peak] * count
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=peak)
    # timm lowers the rate one epoch (or step) before a milestone; half of one more puts it on the milestone
    half = 0.5 / (steps_per_epoch if by_step else 1)
    milestones: list[Any] = (
        [] if schedule.name == "constant" else [milestone + half for milestone in schedule.milestones]
    )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        # a multistep curve without milestones is timm's way to say constant after a warm-up
        sched="multistep" if schedule.name == "constant" else schedule.name,
        num_epochs=epochs,
        decay_milestones=milestones,
        decay_epochs=schedule.decay_epochs,
        decay_rate=schedule.decay_rate,
        min_lr=schedule.min_lr,
        warmup_lr=schedule.warmup_lr,
        warmup_epochs=schedule.warmup_epochs,
        step_on_epochs=not by_step,
        updates_per_epoch=steps_per_epoch if by_step else 0,
    )
    rates = []
    for index in range(count):
        time = max(index - 1, 0) if schedule.legacy_shift else index
        if by_step:
            scheduler.step_update(time)
        else:
            scheduler.step(time)
        rates.append(float(optimizer.param_groups[0]["lr"]))
    return rates


class Sampling(BaseModel):
    """Which samples an epoch shows, and in which order.

    Attributes:
        shuffle: A new permutation every epoch; otherwise the order in which the samples are stored (by class).
        views: Repeated augmentation: every sample stands `views` times in a row of the permutation, which is cut at
            the number of samples, so an epoch sees 1/`views` of them.
        round_to: Cut the number of samples to a multiple of this (the release: 256).
        drop_last: Leave out a last batch that is not full, unless it is the only one.
        epoch_parts: A pass over the samples counts as so many epochs, each a part of one permutation. What is counted
            in epochs (schedule, warm-up, stop, checkpoints) is then finer, for runs of a few passes.
        emulate_missing_launcher: The release without a distributed launcher: every second entry, and the same
            permutation every epoch.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    shuffle: bool = True
    views: int = Field(1, ge=1)
    round_to: int = Field(1, ge=1)
    drop_last: bool = False
    epoch_parts: int = Field(1, ge=1)
    emulate_missing_launcher: bool = False


class Recipe(BaseModel):
    """How a phase is trained.

    Attributes:
        optimizer: Any name timm knows (`adamw`, `sgd`, `lion`, ...), or `dot` (`kd.DOT`).
        lr: Learning rate at the batch size `lr_reference_batch`.
        lr_reference_batch: The rate used is `lr * batch_size / lr_reference_batch`; null uses `lr` as it is.
        weight_decay: Not applied to biases and vectors (timm's rule), unless `decay_vectors`.
        decay_vectors: Decay them too, as torch's own optimisers do.
        momentum: For optimisers that have one.
        nesterov: Nesterov's momentum, for `sgd`.
        betas: For optimisers of the Adam family.
        delta: For `dot`: how much longer the momentum of the distillation lasts; null takes its default.
        carry_state: Whether the optimiser's state (momenta) of a parameter goes on into the next task, with zeros for
            what is new in it; null does so for `dot` only. Otherwise every task begins with a new optimiser.
        skip_nonfinite: Leave out a step whose loss or gradient is not finite, and count it, instead of ending the run.
        clip_norm: Largest allowed norm of the whole gradient; null does not clip.
        epochs: Passes over the samples, in each task.
        initial_epochs: The same for the first task; null takes `epochs`.
        initial_weight_decay: The same for the first task; null takes `weight_decay`.
        initial_schedule: The same for the first task; null takes `schedule`.
        batch_size: Samples per step, over all processes.
        schedule: The learning-rate curve.
        sampling: Order and choice of the samples of an epoch.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    optimizer: str = "adamw"
    lr: float = Field(5e-4, gt=0)
    lr_reference_batch: int | None = Field(256, gt=0)
    weight_decay: float = Field(1e-6, ge=0)
    decay_vectors: bool = False
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    nesterov: bool = False
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] | None = None
    delta: Annotated[float, Field(ge=0, lt=1)] | None = None
    carry_state: bool | None = None
    skip_nonfinite: bool = False
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    epochs: int = Field(500, gt=0)
    initial_epochs: Annotated[int, Field(gt=0)] | None = None
    initial_weight_decay: Annotated[float, Field(ge=0)] | None = None
    initial_schedule: Schedule | None = None
    batch_size: int = Field(128, gt=1)
    schedule: Schedule = Schedule()
    sampling: Sampling = Sampling()

    @model_validator(mode="after")
    def _equal_epochs(self) -> "Recipe":
        if self.sampling.epoch_parts > 1 and self.schedule.unit == "step":
            raise ValueError("sampling.epoch_parts makes epochs of a few steps: it goes with schedule.unit=epoch")
        return self

    @model_validator(mode="after")
    def _known_optimizer(self) -> "Recipe":
        known = ["dot", *(str(name) for name in list_optimizers())]
        if self.optimizer not in known:
            raise ValueError(
                unknown("optimizer", self.optimizer, known).split(" Known:")[0] + " (see timm's optimisers)"
            )
        return self

    @model_validator(mode="after")
    def _momenta(self) -> "Recipe":
        if self.optimizer != "dot" and self.delta is not None:
            raise ValueError(f"optim.delta is about optimizer=dot and has no effect with {self.optimizer}")
        if self.nesterov and (self.optimizer != "sgd" or not self.momentum):
            raise ValueError("optim.nesterov=true is about optimizer=sgd with a momentum, and has no effect otherwise")
        if self.optimizer == "dot":
            if self.betas is not None:
                raise ValueError("optim.betas has no effect with optimizer=dot, which has momentum and delta")
            DOT([nn.Parameter(torch.zeros(()))], lr=self.lr, **self.momenta)  # its own ranges
        return self

    @property
    def momenta(self) -> dict[str, float]:
        """Momentum and delta, where they are set."""
        found = {"momentum": self.momentum, "delta": self.delta}
        return {name: value for name, value in found.items() if value is not None}

    @property
    def carries_state(self) -> bool:
        """Whether the optimiser's state goes on into the next task."""
        return self.optimizer == "dot" if self.carry_state is None else self.carry_state

    @property
    def peak_lr(self) -> float:
        """The learning rate after scaling by the batch size."""
        return self.lr * self.batch_size / self.lr_reference_batch if self.lr_reference_batch else self.lr

    def changed(self, **fields: object) -> "Recipe":
        """The same recipe with other fields, checked again."""
        return Recipe.model_validate(self.model_dump() | fields)

    def for_task(self, index: int) -> "Recipe":
        """The recipe of task `index`: the first has its own epochs, weight decay and schedule where they are set."""
        own = {name: getattr(self, f"initial_{name}") for name in ("epochs", "weight_decay", "schedule")}
        own = {name: value for name, value in own.items() if value is not None}
        return self.changed(**own) if index == 0 and own else self


def make_optimizer(module: nn.Module, recipe: Recipe, *, fused: bool = True) -> torch.optim.Optimizer:
    """An optimiser over the parameters of `module` that take gradients.

    Args:
        module: What it trains.
        recipe: Which optimiser, and its parameters.
        fused: One kernel for all parameters, where the optimiser has one.

    Raises:
        ValueError: If none does.
    """
    if not any(parameter.requires_grad for parameter in module.parameters()):
        raise ValueError(f"{type(module).__name__} has no parameter left to train in this phase: everything is frozen")
    if recipe.optimizer == "dot":
        groups: Any = (
            [parameter for parameter in module.parameters() if parameter.requires_grad]
            if recipe.decay_vectors
            else param_groups_weight_decay(module, recipe.weight_decay)
        )
        return DOT(groups, lr=recipe.peak_lr, weight_decay=recipe.weight_decay, **recipe.momenta)
    given: dict[str, Any] = {"momentum": recipe.momentum, "betas": recipe.betas}
    given = {name: value for name, value in given.items() if value is not None}
    if recipe.optimizer == "sgd":  # which timm would give Nesterov's momentum
        given["nesterov"] = recipe.nesterov
    if recipe.optimizer in _FUSED:
        given["fused"] = fused
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        module,
        opt=recipe.optimizer,
        lr=recipe.peak_lr,
        weight_decay=recipe.weight_decay,
        filter_bias_and_bn=not recipe.decay_vectors,
        **given,
    )
    return optimizer


Carried = dict[str, dict[str, Tensor]]


def state_by_name(optimizer: torch.optim.Optimizer, module: nn.Module) -> Carried:
    """What an optimiser knows of every parameter of `module`, by the parameter's name."""
    found = {}
    for name, parameter in module.named_parameters():
        state = optimizer.state.get(parameter, {})
        tensors = {key: value.detach().clone() for key, value in state.items() if isinstance(value, Tensor)}
        if tensors:
            found[name] = tensors
    return found


def take_state(optimizer: torch.optim.Optimizer, module: nn.Module, carried: Carried, fresh: Sequence[str]) -> None:
    """Let a new optimiser go on from what `state_by_name` gave, after `module` has grown.

    A tensor of the shape that a parameter had fills the first rows of one of the shape it has now, and the rest is 0;
    others (numbers of steps) are taken as they are. A parameter that has shrunk, or has another number of axes, begins
    anew.

    Args:
        optimizer: Has made no step yet.
        module: What it trains.
        carried: By name of a parameter.
        fresh: Beginnings of the names of parameters that begin anew.
    """
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in module.named_parameters():
        if parameter not in trained or name not in carried or name.startswith(tuple(fresh)):
            continue
        state = {}
        for key, value in carried[name].items():
            if value.ndim == 0 and parameter.ndim:
                state[key] = value.clone()
            elif value.ndim == parameter.ndim and all(
                old <= new for old, new in zip(value.shape, parameter.shape, strict=True)
            ):
                state[key] = torch.zeros_like(parameter, requires_grad=False)
                state[key][tuple(slice(size) for size in value.shape)] = value.to(parameter)
        if len(state) == len(carried[name]):
            optimizer.state[parameter] = state
    if isinstance(optimizer, torch.optim.SGD):  # the fused one can begin with no momentum at all, but not with some
        for parameter in trained if optimizer.state else ():
            if not optimizer.state[parameter]:
                optimizer.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter, requires_grad=False)}


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of every parameter group."""
    groups: Sequence[dict[str, object]] = optimizer.param_groups
    for group in groups:
        group["lr"] = rate
