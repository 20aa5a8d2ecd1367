"""What tests read from run folders, and what two runs of the same config have in common."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from cil.events import read_events

#: The keys of `metrics.json` that a repeat does not reproduce.
CIRCUMSTANCES = {"name", "wall_seconds", "images_per_second"}
_TIMES = {"time", "elapsed_seconds", "seconds", "images_per_second", "wall_seconds", "peak_resident_bytes"}


def metrics_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "metrics.json").read_text())


def results_of(run: Path) -> dict[str, Any]:
    """`metrics.json` without what a repeat does not reproduce."""
    return {key: value for key, value in metrics_of(run).items() if key not in CIRCUMSTANCES}


def weights_of(run: Path) -> dict[str, Tensor]:
    """The weights after every stage."""
    return {
        f"{path.parent.name}/{name}": value
        for path in sorted(run.glob("stage_*/network.safetensors"))
        for name, value in load_file(path).items()
    }


def facts_of(run: Path) -> list[dict[str, Any]]:
    """The events in order without their times, and without the starts, of which a resume adds one."""
    events = read_events(run / "events.jsonl")
    return [
        {key: value for key, value in event.items() if key not in _TIMES}
        for event in events
        if event["event"] != "run_started"
    ]


def content_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_same_weights(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit by bit."""
    assert list(found) == list(expected)
    assert [name for name in expected if not found[name].equal(expected[name])] == []
