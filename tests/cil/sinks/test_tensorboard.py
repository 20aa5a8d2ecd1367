"""What TensorBoard reads back is what the run wrote."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cil import checkpoint
from cil.sinks import Sinks, scalars
from tests.conftest import RunTiny
from tests.run_folders import facts_of

pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")

Read = Callable[[Path], dict[str, list[tuple[int, float]]]]


@pytest.fixture
def read() -> Read:
    """Every curve of a run as TensorBoard shows it: steps and values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
        found: Any = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
        found.Reload()
        return {name: [(one.step, one.value) for one in found.Scalars(name)] for name in found.Tags()["scalars"]}

    return curves


def told(run: Path) -> dict[str, list[tuple[int, float]]]:
    """The same from the events."""
    curves: dict[str, list[tuple[int, float]]] = {}
    epochs = 0
    for event in facts_of(run):
        epochs += event["event"] == "epoch"
        untimed = {"images_per_second": None, "seconds": {}, "peak_resident_bytes": None}
        for name, value in scalars(event | untimed).items():
            curves.setdefault(name, []).append((epochs, pytest.approx(value, rel=1e-6)))
    return curves


def without_times(curves: dict[str, list[tuple[int, float]]]) -> dict[str, list[tuple[int, float]]]:
    measured = ("seconds/", "memory/peak_resident_bytes")
    return {
        name: curve
        for name, curve in curves.items()
        if not name.startswith(measured) and not name.endswith("images_per_second")
    }


def test_every_curve_of_an_interrupted_run_is_there_once(
    run_tiny: RunTiny, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = checkpoint.save_state, []

    def interrupting(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == 4:  # in the second task; what was logged since the third save is cut off
            raise KeyboardInterrupt
        save(*args, **kwargs)

    words = ("log=tensorboard", "scenario.classes=4", "checkpoint.every_epochs=2")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_state", interrupting)
        run = run_tiny(*words, report=False, code=130)
    cut_off = read(run)["training/bce"]
    run = run_tiny(*words, report=False)
    assert len(list((run / "tensorboard").iterdir())) == 2
    curves = read(run)
    assert without_times(curves) == told(run)
    assert curves["training/bce"][: len(cut_off)] == cut_off
    assert [step for step, _ in curves["accuracy/all"]] == [2, 6]
    assert {"finetuning/learning_rate", "accuracy/old", "accuracy_before_finetuning/all"} <= set(curves)
    assert {"memory/num_exemplars", "network/num_parameters", "seconds/training"} <= set(curves)


def test_the_config_is_kept_as_text(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "events.jsonl").touch()
    with Sinks(["tensorboard"], tmp_path, {"name": "run"}) as given:
        given({"event": "run_started"})
    found: Any = EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    (text,) = found.Tensors("config/text_summary")
    assert b"name: run" in text.tensor_proto.string_val[0]
