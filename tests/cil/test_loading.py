from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch

import cil
from tests.conftest import RunTiny

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 1, 8, 8)).astype(np.uint8)


def test_a_run_is_loaded_after_its_last_stage_or_after_any(whole_run: RunTiny) -> None:
    assert cil.load(whole_run()).logits(IMAGES).shape == (5, 6)
    assert cil.load(str(whole_run())).class_names == tuple("012345")
    for stage in range(3):
        assert cil.load(whole_run(), stage).logits(IMAGES).shape == (5, 2 * stage + 2)


def test_names_are_those_of_the_best_scores(whole_run: RunTiny) -> None:
    model = cil.load(whole_run())
    best = model.logits(IMAGES).argmax(dim=1).tolist()
    assert model.predict(IMAGES) == [model.class_names[index] for index in best]
    assert model.predict(torch.from_numpy(IMAGES)) == model.predict(IMAGES)


def test_the_network_is_ready_to_use(whole_run: RunTiny) -> None:
    model = cil.load(whole_run())
    assert not any(module.training for module in model.network.modules())
    assert model.logits(IMAGES).equal(model.logits(IMAGES))
    assert model.config.data.name == "digits"


def test_a_run_of_double_precision_is_loaded_and_used(run_tiny: RunTiny) -> None:
    run = run_tiny("precision=fp64", "optim.epochs=1", "scenario.classes=4", learner="replay")
    assert cil.load(run).logits(IMAGES).shape == (5, 4)


@pytest.mark.parametrize(
    "images",
    [
        IMAGES.astype(np.float32) / 255,
        IMAGES[:, 0],
        IMAGES.repeat(3, axis=1),
        IMAGES.transpose(0, 2, 3, 1),
    ],
)
def test_other_than_bytes_in_channels_first_is_refused(whole_run: RunTiny, images: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"images must be uint8 \[batch, 1, height, width\], found"):
        cil.load(whole_run()).logits(images)


def test_a_folder_without_a_finished_stage_is_refused(whole_run: RunTiny, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere", whole_run().parent):
        with pytest.raises(ValueError, match="no run with a finished stage"):
            cil.load(folder)


@pytest.mark.parametrize("stage", [-1, 3])
def test_a_stage_that_is_not_there_is_refused(whole_run: RunTiny, stage: int) -> None:
    with pytest.raises(ValueError, match=f"stage {stage} is not there; stages 0 to 2 are finished"):
        cil.load(whole_run(), stage)


def test_damaged_weights_are_refused(whole_run: RunTiny, tmp_path: Path) -> None:
    run = copytree(whole_run(), tmp_path / "run")
    weights = run / "stage_002" / "network.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match="missing or damaged"):
        cil.load(run)
    assert cil.load(run, 1).class_names == tuple("0123")


def test_a_run_may_be_moved_and_needs_its_own_folder_alone(whole_run: RunTiny, tmp_path: Path) -> None:
    moved = copytree(whole_run(), tmp_path / "elsewhere", ignore=lambda *_: {"state.pt", "events.jsonl", "report.html"})
    assert cil.load(moved).logits(IMAGES).equal(cil.load(whole_run()).logits(IMAGES))
