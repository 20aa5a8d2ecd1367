"""Which parts of the network learn in which phase of DKT, seen in whole runs."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from torch import Tensor

from cil import checkpoint
from cil.learners.dkt import DKT
from cil.stages import Stage
from tests.conftest import run_tiny_in

Weights = dict[str, Tensor]
Place = tuple[int, int]  # stage and phase


@pytest.fixture(scope="module", params=["dkt", "dkt_official"])
def snapshots(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[Place, Weights]]:
    """The learner's state at the end of every phase, and (stage, -1) before the first one."""
    found: dict[Place, Weights] = {}
    original_save, original_begin = checkpoint.save_state, DKT.begin_stage

    def copy_of(state: Weights) -> Weights:
        return {name: value.clone() for name, value in state.items() if name.startswith("network.")}

    def save(run: Path, stage: int, state: dict[str, Any]) -> None:
        if state["position"]["begun"]:
            found[stage, state["position"]["phase"]] = copy_of(state["learner"])
        original_save(run, stage, state)

    def begin(self: DKT, stage: Stage) -> None:
        original_begin(self, stage)
        found[stage.index, -1] = copy_of(self.state_dict())

    with mock.patch.object(checkpoint, "save_state", save), mock.patch.object(DKT, "begin_stage", begin):
        run_tiny_in(tmp_path_factory.mktemp("runs"), "model.depth=2", learner=request.param, report=False)
    return request.param, found


def changed(before: Weights, after: Weights) -> set[str]:
    assert before.keys() == after.keys()
    return {name.removeprefix("network.") for name in before if not before[name].equal(after[name])}


def is_buffer(name: str) -> bool:
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


@pytest.mark.parametrize("stage", [1, 2])
def test_the_main_phase_leaves_old_task_tokens_and_the_stability_classifier_alone(
    snapshots: tuple[str, dict[Place, Weights]], stage: int
) -> None:
    _, found = snapshots
    moved = changed(found[stage, -1], found[stage, 0])
    everything = {name.removeprefix("network.") for name in found[stage, -1]}
    frozen = {name for name in everything if name.startswith("stability.")}
    frozen |= {f"token_pool.task_tokens.{task}" for task in range(stage)}
    assert not moved & frozen
    # a bias before a BatchNorm has no gradient but rounding
    assert all(name.endswith(".bias") for name in everything - moved - frozen)
    assert {"token_pool.general_token", f"token_pool.task_tokens.{stage}", "plasticity.head.bias"} <= moved


@pytest.mark.parametrize("stage", [1, 2])
def test_fine_tuning_trains_the_decoder_and_both_classifiers_alone(
    snapshots: tuple[str, dict[Place, Weights]], stage: int
) -> None:
    learner, found = snapshots
    moved = {name for name in changed(found[stage, 0], found[stage, 1]) if not is_buffer(name)}
    parts = {name.split(".")[0] for name in moved}
    if learner == "dkt_official":  # R7
        assert "token_pool.general_token" in moved
        parts -= {"token_pool"}
    assert {name for name in moved if name.startswith("token_pool")} <= {"token_pool.general_token"}
    assert parts == {"skab", "stability", "plasticity"}


@pytest.mark.parametrize("stage", [1, 2])
def test_statistics_of_the_frozen_encoder_rest_in_fine_tuning_but_for_the_release(
    snapshots: tuple[str, dict[Place, Weights]], stage: int
) -> None:
    learner, found = snapshots
    moved = {name for name in changed(found[stage, 0], found[stage, 1]) if is_buffer(name)}
    of_encoder = {name for name in moved if name.startswith("encoder.")}
    expected = {name.removeprefix("network.") for name in found[stage, 0] if is_buffer(name) and "encoder." in name}
    assert of_encoder == (expected if learner == "dkt_official" else set())  # R6
    assert "skab.mlp.bn1.running_mean" in moved


def test_everything_learns_in_the_first_task(snapshots: tuple[str, dict[Place, Weights]]) -> None:
    _, found = snapshots
    still = {name.removeprefix("network.") for name in found[0, -1]} - changed(found[0, -1], found[0, 0])
    assert all(name.endswith(".bias") for name in still)
