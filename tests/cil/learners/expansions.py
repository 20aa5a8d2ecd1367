"""What the tests of expanding learners have in common: stages without an engine, and every distillation method."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cil import checkpoint
from cil.learners.base import Learner
from cil.models.network import Network, models
from cil.optim import Recipe
from cil.stages import Phase, Stage
from kd import Batch, WeightedSum, distillers
from kd.base import total
from tests.conftest import run_tiny_in
from tests.run_folders import assert_same_weights, facts_of
from tests.test_resume import INTERRUPTED, assert_as_if_nothing_happened, interrupt

SMALL = ("model=resnet32", "model.depth=8", "model.width=4")
#: Three tasks of two digits, of which training on each alone keeps the last.
DIGITS = (
    "model=resnet32",
    "model.depth=8",
    "model.width=8",
    "memory.size=60",
    "optim=sgd",
    "optim.initial_epochs=null",
    "optim.initial_schedule=null",
    "optim.epochs=6",
    "optim.batch_size=64",
    "optim.schedule.name=cosine",
)
STAGES = [Stage(index, range(2 * index, 2 * index + 2), Recipe(), has_memory=True) for index in range(3)]
#: Methods whose defaults are for more data, or for a second view of every image.
_SETTINGS: dict[str, dict[str, Any]] = {"crd": {"num_negatives": 8, "embedding_width": 4}, "mld": {"views": "weak"}}
METHODS = [name for name in distillers if name != "cluster_separation"]


def network_of() -> Network:
    torch.manual_seed(0)
    network: Network = models["resnet_cifar"]((1, 8, 8), depth=8, width=2)
    return network


def distillation_of(method: str) -> WeightedSum:
    return WeightedSum({method: (1.0, distillers[method](**_SETTINGS.get(method, {})))})


def batch_of(stage: Stage, count: int = 6) -> Batch:
    """Images of the new classes and of old ones."""
    generator = torch.Generator().manual_seed(stage.index)
    labels = torch.arange(count) % stage.num_seen
    return Batch(torch.rand(count, 1, 8, 8, generator=generator), labels, torch.arange(count) + 100 * stage.index)


def samples_of(stage: Stage) -> tuple[Tensor, Tensor]:
    """Ids and labels of its samples: three of every class, those of `batch_of` among them."""
    labels = torch.arange(stage.num_seen).repeat(3)
    return torch.arange(len(labels)) + 100 * stage.index, labels


def enter(learner: Learner, phase: Phase) -> None:
    """What the engine does before it trains a phase."""
    learner.phase = phase
    learner.train()
    learner.requires_grad_(True)
    if learner.teacher is not None:
        learner.teacher.requires_grad_(False)
    for item in phase.frozen:
        item.requires_grad_(False)
        if isinstance(item, torch.nn.Module):
            item.eval()


def begin(learner: Learner, stage: Stage) -> None:
    """Begin a stage and enter its first phase."""
    learner.begin_stage(stage)
    learner.remember(*samples_of(stage))
    enter(learner, learner.phases(stage)[0])


def step(learner: Learner, batch: Batch) -> dict[str, Tensor]:
    """One optimiser step on what learns; the losses before it."""
    optimizer = torch.optim.SGD([p for p in learner.parameters() if p.requires_grad], lr=0.05)
    losses: dict[str, Tensor] = learner(batch)
    learner.update(losses, optimizer, torch.amp.GradScaler("cpu", enabled=False), None)
    return {name: loss.detach() for name, loss in losses.items()}


def in_stage(learner: Learner, index: int) -> None:
    """Take a learner to a stage, with one step in every phase of those before."""
    for stage in STAGES[:index]:
        begin(learner, stage)
        for phase in learner.phases(stage):
            enter(learner, phase)
            step(learner, batch_of(stage))
        learner.phase = None
        learner.end_stage(stage)
    begin(learner, STAGES[index])


def assert_method_teaches(make: Callable[[WeightedSum], Learner], method: str) -> None:
    """In two further tasks the term is there, is finite, and trains what is not frozen."""
    learner = make(distillation_of(method))
    in_stage(learner, 0)
    assert method not in step(learner, batch_of(STAGES[0]))
    learner.phase = None
    learner.end_stage(STAGES[0])
    for stage in STAGES[1:]:
        begin(learner, stage)
        assert learner.distillation is not None
        learner.distillation.begin_epoch(1, learning_rate=0.1)
        batch = batch_of(stage)
        step(learner, batch)  # away from the old network, beside which the newest part begins
        losses = learner(batch)
        assert all(loss.isfinite() for loss in losses.values())
        backbone = learner.network.get_submodule("backbone")
        learning = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(losses[method], learning, allow_unused=True, retain_graph=True)
        assert any(gradient is not None and gradient.any() for gradient in gradients)
        total(losses.values()).backward()  # type: ignore[no-untyped-call]
        learner.zero_grad()
        learner.phase = None
        learner.end_stage(stage)


def assert_goes_on_as_rebuilt(learner: Learner, fresh: Learner, stage: Stage, phases: Sequence[Phase]) -> None:
    """A learner made anew from structure and state takes the same steps, to the bit."""
    fresh.rebuild(copy.deepcopy(learner.structure()))
    fresh.remember(*samples_of(stage))
    fresh.load_state_dict(copy.deepcopy(learner.state_dict()))
    for number in range(len(phases)):
        for one in (learner, fresh):
            enter(one, one.phases(stage)[number])
            step(one, batch_of(stage))
    for one in (learner, fresh):
        one.phase = None
        one.end_stage(stage)
    assert_same_weights(_tensors(fresh.state_dict()), _tensors(learner.state_dict()))


def _tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    """What is saved, with what a module adds of its own (the banks of CRD) beside the rest."""
    found = {}
    for name, value in state.items():
        found |= _tensors({f"{name}/{key}": part for key, part in value.items()}) if isinstance(value, dict) else {}
        found |= {name: torch.as_tensor(value)} if isinstance(value, Tensor | int | bool) else {}
    return found


def assert_interruptions_leave_no_trace(
    patches: pytest.MonkeyPatch, folder: Path, *overrides: str, learner: str, first: int, num_more: int
) -> None:
    """A run that is interrupted after a save, and again after each one that follows, ends as an uninterrupted one.

    Args:
        patches: Interrupts.
        folder: Of both runs.
        overrides: As on the command line.
        learner: Choice of the group.
        first: The first save after which the run is interrupted, counted from 1.
        num_more: How many saves follow it.
    """
    whole = run_tiny_in(folder / "whole", *overrides, learner=learner, report=False)
    for call in (first, *[1] * num_more):
        with patches.context() as patch:
            interrupt(patch, checkpoint, "save_state", call, after=True, what=KeyboardInterrupt)
            run_tiny_in(folder / "parts", *overrides, learner=learner, code=INTERRUPTED, report=False)
    run = run_tiny_in(folder / "parts", *overrides, learner=learner, report=False)
    assert_as_if_nothing_happened(run, whole)


def losses_of(run: Path) -> list[list[str]]:
    """Names of the losses of every epoch."""
    return [list(event["losses"]) for event in facts_of(run) if event["event"] == "epoch"]
