"""Fine-tuning on views that the frozen encoder reads once."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from cil import checkpoint
from cil.checking import check
from cil.cli import compose
from cil.config import ConfigError
from cil.learners.base import Learner, learners
from cil.models.dkt import DKTNetwork
from cil.models.network import models
from cil.optim import Recipe
from cil.stages import Stage
from kd import Batch
from tests.conftest import RunTiny, run_tiny_in
from tests.run_folders import assert_same_weights, facts_of, metrics_of, results_of, weights_of
from tests.test_resume import INTERRUPTED, interrupt

SMALL = {"width": 24, "num_heads": 2, "depth": 2}
VIEWS = ("learner.finetune_views=2", "learner.finetune_epochs=3")


@pytest.fixture
def run_tiny(tmp_path: Path) -> RunTiny:
    """As everywhere, without the report."""
    return partial(run_tiny_in, tmp_path / "runs", report=False)


@pytest.mark.parametrize("name", ["dkt", "dytox"])
def test_fine_tuning_on_what_the_encoder_made_has_the_losses_and_gradients_of_fine_tuning_on_images(name: str) -> None:
    torch.manual_seed(0)
    learner: Learner = learners[name](models[name]((3, 16, 16), **SMALL), None, finetune_views=1)
    for index in range(2):
        stage = Stage(index, range(2 * index, 2 * index + 2), Recipe(), has_memory=True)
        learner.begin_stage(stage)
    _, phase = learner.phases(stage)
    assert phase.views == 1
    learner.train()
    for item in phase.frozen:
        item.requires_grad_(False)
        if isinstance(item, torch.nn.Module):
            item.eval()
    batch = Batch(torch.randn(6, 3, 16, 16), torch.arange(6) % 4, torch.arange(6))
    found = []
    for views in (None, 1):
        learner.phase = phase.__class__(phase.name, phase.source, phase.recipe, views=views)
        learner.zero_grad(set_to_none=True)
        with torch.no_grad():
            images = batch.images if views is None else learner.network.encode(batch.images)
        losses = learner(Batch(images, batch.labels, batch.ids))
        losses["bce"].backward()
        gradients = {key: value.grad for key, value in learner.named_parameters() if value.grad is not None}
        found.append({"bce": losses["bce"].detach(), **gradients})
    assert_same_weights(found[1], found[0])
    assert not any("encoder" in key for key in found[0])


def test_the_encoder_reads_every_exemplar_once_for_each_view(run_tiny: RunTiny) -> None:
    seen = []
    original: Callable[..., Tensor] = DKTNetwork.encode

    def counting(network: DKTNetwork, images: Tensor, *others: object) -> Tensor:
        if torch.is_inference_mode_enabled() and "encode" in _callers():
            seen.append(len(images))
        return original(network, images, *others)

    with mock.patch.object(DKTNetwork, "encode", counting):
        run = run_tiny(*VIEWS)
    shown = [
        event["num_samples"]
        for event in facts_of(run)
        if event["event"] == "phase_started" and event["phase"] == "finetuning"
    ]
    assert len(shown) == 2
    assert sum(seen) == 2 * sum(shown)


def _callers() -> set[str]:
    """Names of the methods of the engine below which this is called."""
    import inspect

    return {frame.function for frame in inspect.stack() if frame.filename.endswith("cil/engine.py")}


def test_a_run_stopped_between_views_ends_as_one_that_was_not(
    run_tiny: RunTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_tiny_in(tmp_path / "whole", *VIEWS, report=False)
    with monkeypatch.context() as patch:
        interrupt(patch, checkpoint, "save_state", 6, after=True, what=KeyboardInterrupt)
        run_tiny(*VIEWS, code=INTERRUPTED)
    run = run_tiny(*VIEWS)
    assert results_of(run) == results_of(whole)
    assert_same_weights(weights_of(run), weights_of(whole))
    assert facts_of(run) == facts_of(whole)


def test_views_are_planned(run_tiny: RunTiny, capsys: pytest.CaptureFixture[str]) -> None:
    run_tiny_in(Path("nowhere"), *VIEWS, "plan=true", report=False)
    assert "finetuning" in capsys.readouterr().out


def test_dytox_fine_tunes_on_views_too(run_tiny: RunTiny) -> None:
    small = ("model=dytox", "model.width=24", "model.num_heads=2", "model.depth=1", "model.patch_size=4")
    run = run_tiny(*small, *VIEWS, learner="dytox")
    assert metrics_of(run)["finished"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("learner.finetune_frozen_in_eval=false",), "finetune_frozen_in_eval=false: set it to true"),
        (("learner.finetune_general_token=true",), "does not go with learner.finetune_general_token=true"),
        (("learner.finetune_epochs=0",), "has no effect with learner.finetune_epochs=0"),
    ],
)
def test_views_that_cannot_be_kept_are_refused(
    run_tiny: RunTiny, capsys: pytest.CaptureFixture[str], overrides: tuple[str, ...], message: str
) -> None:
    run_tiny("learner.finetune_views=2", *overrides, code=2)
    assert message in capsys.readouterr().err


def test_no_view_is_no_number_of_views() -> None:
    with pytest.raises(ConfigError, match="finetune_views"):
        check(compose(["learner.finetune_views=0"]))
