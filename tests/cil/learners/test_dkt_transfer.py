"""DKT and DyTox with every distillation method, on the digits: two short tasks to a finite end."""

import math
from pathlib import Path

import pytest

from cil import checkpoint
from tests.conftest import SMALL_DKT, run_tiny_in
from tests.run_folders import facts_of, metrics_of
from tests.test_resume import INTERRUPTED, assert_as_if_nothing_happened, interrupt

#: Networks of two blocks, for the hint of `fitnet` is the second.
MODELS = {
    "dkt": ("model=dkt_tiny", *SMALL_DKT, "model.depth=2"),
    "dytox": ("model=dytox_tiny", "model.width=16", "model.num_heads=2", "model.depth=2", "model.mlp_ratio=1"),
}
SHORT = (
    *("scenario.classes=4", "optim.epochs=1", "memory.size=12", "learner.finetune_epochs=1"),
    "evaluation.nearest_mean=false",
)
#: Terms to what they need in short runs.
METHODS: dict[str, tuple[str, ...]] = {
    "kd": (),
    "dkd": ("kd.dkd.warmup_epochs=1",),
    "mld": (),
    "fitnet": (),
    "at": (),
    "at_gradient": (),
    "sp": (),
    "crd": ("kd.crd.num_negatives=64", "kd.crd.embedding_width=8"),
    "reviewkd": ("kd.reviewkd.warmup_epochs=1",),
    "cat_kd": (),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("learner", MODELS)
def test_every_method_runs_to_a_finite_end(tmp_path: Path, learner: str, method: str) -> None:
    settings = (*MODELS[learner], *SHORT, f"kd={method}", *METHODS[method])
    run = run_tiny_in(tmp_path, *settings, learner=learner, report=False)
    assert metrics_of(run)["finished"]
    epochs = [event for event in facts_of(run) if event["event"] == "epoch"]
    assert all(math.isfinite(loss) for event in epochs for loss in event["losses"].values())
    assert [(event["stage"], event["phase"], method in event["losses"]) for event in epochs] == [
        (0, "training", False),
        (1, "training", True),
        (1, "finetuning", False),
    ]
    assert epochs[1]["losses"][method] > 0


@pytest.mark.parametrize("learner", MODELS)
def test_a_run_with_banks_of_samples_ends_as_if_it_had_not_been_interrupted(
    tmp_path: Path, learner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(runs_dir: str, code: int = 0) -> Path:
        settings = (*MODELS[learner], *SHORT, "optim.epochs=2", "kd=crd", *METHODS["crd"])
        return run_tiny_in(tmp_path / runs_dir, *settings, learner=learner, code=code, report=False)

    for call in (4, 1, 1):  # after the first epoch of the second task, after its second, and in fine-tuning
        with monkeypatch.context() as patch:
            interrupt(patch, checkpoint, "save_state", call, after=True, what=KeyboardInterrupt)
            run("stopped", INTERRUPTED)
    assert_as_if_nothing_happened(run("stopped"), run("whole"))
