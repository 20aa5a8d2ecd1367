import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from cil.models.dkt import DKTNetwork
from cil.optim import (
    Recipe,
    Sampling,
    Schedule,
    learning_rates,
    make_optimizer,
    set_learning_rate,
    state_by_name,
    take_state,
)
from kd import DOT
from kd.optim.dot import BUFFERS

GOLDENS = Path(__file__).parents[1] / "goldens" / "dkt.npz"
CURVES = ["constant", "cosine", "multistep", "poly", "step", "tanh"]


@pytest.fixture(scope="module")
def goldens() -> dict[str, np.ndarray]:
    with np.load(GOLDENS) as archive:
        return {name: archive[name] for name in archive.files if name.startswith("schedule/")}


@pytest.mark.parametrize("case", ["cifar", "short"])
@pytest.mark.parametrize(("array", "legacy_shift"), [("lr", True), ("curve", False)])
def test_the_cosine_is_that_of_the_release(
    goldens: dict[str, np.ndarray], case: str, array: str, legacy_shift: bool
) -> None:
    epochs, warmup_epochs, warmup_lr, peak, min_lr = goldens[f"schedule/{case}/hp"].tolist()
    schedule = Schedule(warmup_epochs=int(warmup_epochs), warmup_lr=warmup_lr, min_lr=min_lr, legacy_shift=legacy_shift)
    rates = learning_rates(schedule, int(epochs), peak)
    np.testing.assert_allclose(rates, goldens[f"schedule/{case}/{array}"], rtol=1e-12, atol=0)


def test_the_shift_of_the_release_runs_the_first_two_epochs_at_the_warm_up_rate() -> None:
    schedule = Schedule(warmup_epochs=2, warmup_lr=1e-6)
    shifted = learning_rates(schedule.model_copy(update={"legacy_shift": True}), 9, 1e-3)
    assert shifted == [1e-6, *learning_rates(schedule, 9, 1e-3)[:-1]]


@given(st.integers(1, 30), st.integers(0, 5), st.floats(1e-4, 1))
def test_the_cosine_follows_its_formula(epochs: int, warmup_epochs: int, peak: float) -> None:
    rates = learning_rates(Schedule(warmup_epochs=warmup_epochs, warmup_lr=1e-6, min_lr=1e-5), epochs, peak)
    expected = [
        1e-6 + epoch * (peak - 1e-6) / warmup_epochs
        if epoch < warmup_epochs
        else 1e-5 + 0.5 * (peak - 1e-5) * (1 + math.cos(math.pi * epoch / epochs))
        for epoch in range(epochs)
    ]
    assert rates == pytest.approx(expected, rel=1e-9)


def test_a_schedule_by_step_warms_up_within_the_first_epoch() -> None:
    schedule = Schedule(unit="step", warmup_epochs=1, warmup_lr=1e-6, min_lr=1e-5)
    rates = learning_rates(schedule, 3, 1e-3, steps_per_epoch=4)
    assert len(rates) == 12
    assert rates[:4] == pytest.approx([1e-6 + step * (1e-3 - 1e-6) / 4 for step in range(4)])
    assert rates[4:] == pytest.approx(
        [1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + math.cos(math.pi * step / 12)) for step in range(4, 12)]
    )


def test_a_schedule_by_epoch_does_not_read_the_steps() -> None:
    assert learning_rates(Schedule(), 5, 1e-3, steps_per_epoch=7) == learning_rates(Schedule(), 5, 1e-3)


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("unit", ["epoch", "step"])
@pytest.mark.parametrize("warmup_epochs", [0, 2])
def test_every_curve_starts_as_said_and_never_exceeds_its_peak(name: Any, unit: Any, warmup_epochs: int) -> None:
    schedule = Schedule(
        name=name, unit=unit, warmup_epochs=warmup_epochs, warmup_lr=1e-6, milestones=[4], decay_epochs=3
    )
    rates = learning_rates(schedule, 8, 0.1, steps_per_epoch=3)
    assert len(rates) == (24 if unit == "step" else 8)
    assert all(0 < rate <= 0.1 * (1 + 1e-9) for rate in rates)
    assert rates[0] == pytest.approx(1e-6 if warmup_epochs else 0.1)
    after_warmup = rates[warmup_epochs * (3 if unit == "step" else 1) :]
    assert after_warmup == sorted(after_warmup, reverse=True)
    assert (after_warmup[-1] == after_warmup[0]) == (name == "constant")


def test_a_constant_rate_is_exactly_that() -> None:
    assert learning_rates(Schedule(name="constant"), 4, 3e-4) == [3e-4] * 4
    assert learning_rates(Schedule(name="constant", unit="step"), 2, 3e-4, steps_per_epoch=3) == [3e-4] * 6


def test_a_multistep_rate_falls_at_its_milestones() -> None:
    rates = learning_rates(Schedule(name="multistep", milestones=[2, 4], decay_rate=0.1), 6, 1.0)
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=1.0)
    reference = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4], gamma=0.1)
    for rate in rates:
        assert rate == pytest.approx(reference.get_last_lr()[0])
        optimizer.step()
        reference.step()


def test_a_multistep_rate_by_step_falls_with_the_first_step_of_a_milestone() -> None:
    schedule = Schedule(name="multistep", unit="step", milestones=[1, 2], decay_rate=0.1)
    assert learning_rates(schedule, 3, 1.0, steps_per_epoch=3) == pytest.approx([1] * 3 + [0.1] * 3 + [0.01] * 3)


def test_a_step_rate_falls_every_so_many_epochs() -> None:
    assert learning_rates(Schedule(name="step", decay_epochs=2, decay_rate=0.5), 5, 1.0) == pytest.approx(
        [1, 1, 0.5, 0.5, 0.25]
    )


def test_a_shift_by_steps_is_refused() -> None:
    with pytest.raises(ValidationError, match="no effect with unit=step"):
        Schedule(legacy_shift=True, unit="step")


def test_the_peak_is_scaled_by_the_batch_size() -> None:
    assert Recipe(lr=5e-4, batch_size=512, lr_reference_batch=256).peak_lr == 1e-3
    assert Recipe(lr=5e-4, batch_size=512, lr_reference_batch=None).peak_lr == 5e-4


def test_the_first_task_may_have_epochs_of_its_own() -> None:
    recipe = Recipe(epochs=7, initial_epochs=20)
    assert [recipe.for_task(index).epochs for index in range(3)] == [20, 7, 7]
    assert Recipe(epochs=7).for_task(0).epochs == 7


def test_the_first_task_may_have_a_schedule_and_a_decay_of_its_own() -> None:
    first = Schedule(name="multistep", milestones=[2])
    recipe = Recipe(weight_decay=1e-4, initial_weight_decay=0.0, initial_schedule=first)
    assert [recipe.for_task(index).weight_decay for index in range(2)] == [0.0, 1e-4]
    assert [recipe.for_task(index).schedule for index in range(2)] == [first, recipe.schedule]


def test_a_changed_recipe_is_checked_again() -> None:
    recipe = Recipe(schedule=Schedule(name="constant"), sampling=Sampling(views=3))
    changed = recipe.changed(lr=1.0, batch_size=8)
    assert (changed.lr, changed.batch_size, changed.schedule, changed.sampling) == (
        1.0,
        8,
        recipe.schedule,
        recipe.sampling,
    )
    with pytest.raises(ValidationError):
        recipe.changed(batch_size=0)


def test_weight_decay_leaves_biases_norms_and_vectors_alone_and_counts_a_token_as_a_matrix() -> None:
    network = DKTNetwork((1, 8, 8), width=8, num_heads=2, depth=1, mlp_ratio=1, stem_width=4, pool_stride=1)
    network.grow(2)
    optimizer = make_optimizer(network, Recipe(weight_decay=0.05))
    decay = {id(parameter): group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    found = {name: decay[id(parameter)] for name, parameter in network.named_parameters()}
    expected = {name: 0.05 if parameter.ndim > 1 else 0.0 for name, parameter in network.named_parameters()}
    assert found == expected
    assert found["token_pool.general_token"] == found["token_pool.task_tokens.0"] == 0.05
    assert found["stability.norm.weight"] == found["stability.head.bias"] == 0.0


def test_only_what_takes_gradients_is_optimised() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    module[0].requires_grad_(False)
    optimizer = make_optimizer(module, Recipe())
    found = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert found == {id(parameter) for parameter in module[1].parameters()}
    module.requires_grad_(False)
    with pytest.raises(ValueError, match="Sequential has no parameter left to train in this phase"):
        make_optimizer(module, Recipe())


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "lamb", "adam", "nadam", "rmsprop"])
def test_optimisers_are_known_by_their_names_and_lower_a_loss(name: str) -> None:
    torch.manual_seed(0)
    module = nn.Linear(4, 1)
    optimizer = make_optimizer(module, Recipe(optimizer=name, lr=0.01, lr_reference_batch=None))
    x = torch.randn(32, 4)
    losses = []
    for _ in range(20):
        loss = (module(x) - x[:, :1]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_betas_and_momentum_reach_the_optimiser() -> None:
    adamw = make_optimizer(nn.Linear(2, 2), Recipe(betas=(0.8, 0.9)))
    assert adamw.param_groups[0]["betas"] == (0.8, 0.9)
    assert type(adamw) is torch.optim.AdamW
    sgd = make_optimizer(nn.Linear(2, 2), Recipe(optimizer="sgd", momentum=0.5))
    assert sgd.param_groups[0]["momentum"] == 0.5


def test_momentum_is_plain_unless_nesterovs_is_asked_for() -> None:
    for nesterov in (False, True):
        sgd = make_optimizer(nn.Linear(2, 2), Recipe(optimizer="sgd", momentum=0.5, nesterov=nesterov))
        assert {group["nesterov"] for group in sgd.param_groups} == {nesterov}
    for recipe in ({"optimizer": "adamw"}, {"optimizer": "sgd"}, {"optimizer": "dot", "momentum": 0.9}):
        with pytest.raises(ValidationError, match=r"optim\.nesterov=true is about optimizer=sgd with a momentum"):
            Recipe(**recipe, nesterov=True)


def test_the_optimiser_starts_at_the_peak_and_the_rate_can_be_set_for_all_groups() -> None:
    optimizer = make_optimizer(nn.Linear(2, 2), Recipe(lr=5e-4, batch_size=512))
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3}
    set_learning_rate(optimizer, 0.25)
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}


def test_an_unknown_optimiser_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValidationError, match="unknown optimizer 'adamww'; did you mean 'adamw'"):
        Recipe(optimizer="adamww")


def grown(layer: nn.Linear, num_new: int) -> nn.Sequential:
    wider = nn.Linear(layer.in_features, layer.out_features + num_new)
    return nn.Sequential(wider, nn.BatchNorm1d(wider.out_features))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "dot"])
def test_the_state_of_an_optimiser_follows_grown_parameters(optimizer: str) -> None:
    betas = {"sgd": {"momentum": 0.9}, "dot": {"momentum": 0.9}}.get(optimizer, {})
    recipe = Recipe(optimizer=optimizer, lr=0.1, lr_reference_batch=None, **betas)
    before = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    old = make_optimizer(before, recipe)
    loss = before(torch.rand(5, 3)).square().mean()
    if isinstance(old, DOT):
        old.backward(loss, before(torch.rand(5, 3)).exp().mean())
    else:
        loss.backward()
    old.step()
    carried = state_by_name(old, before)
    after = grown(before[0], 4)
    new = make_optimizer(after, recipe)
    take_state(new, after, carried, fresh=["1."])
    keys = {"sgd": {"momentum_buffer"}, "dot": set(BUFFERS)}.get(optimizer, {"exp_avg", "exp_avg_sq", "step"})
    state = new.state[after[0].weight]
    assert state.keys() == keys
    for key, value in state.items():
        known = carried["0.weight"][key]
        if key == "step":
            assert value == known
            continue
        assert value.shape == after[0].weight.shape
        assert value[:2].equal(known)
        assert not value[2:].any()
    anew = new.state.get(after[1].weight, {})  # with no momentum; the fused SGD wants to be told
    assert not any(value.any() for value in anew.values())
    after(torch.rand(5, 3)).square().mean().backward()
    if not isinstance(new, DOT):
        new.step()
        assert torch.isfinite(after[0].weight).all()


def test_state_goes_on_by_itself_with_dot_only() -> None:
    assert Recipe(optimizer="dot").carries_state
    assert not Recipe(optimizer="sgd").carries_state
    assert Recipe(optimizer="sgd", carry_state=True).carries_state
    assert not Recipe(optimizer="dot", carry_state=False).carries_state
