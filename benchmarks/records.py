"""What finished runs of the tables came to, in `benchmarks/records/TABLE.json`: tables can be finished elsewhere.

A record is the `metrics.json` of a run, with what its log says of speed, memory and adapters.
"""

import json
import statistics
from pathlib import Path
from typing import Any

from cil.checkpoint import write_json
from cil.events import read_events

FOLDER = Path(__file__).parent / "records"
_LEFT_OUT = ("class_order", "num_test_images")  # long, and told by `protocol`

Record = dict[str, Any]


def read(table: str) -> dict[str, Record]:
    """The records of a table, by the name of the run."""
    path = FOLDER / f"{table}.json"
    found: dict[str, Record] = json.loads(path.read_text()) if path.exists() else {}
    return found


def of_run(folder: Path) -> Record | None:
    """The record of a run; None if it is not finished."""
    path = folder / "metrics.json"
    metrics: Record = json.loads(path.read_text()) if path.exists() else {"finished": False}
    if not metrics["finished"]:
        return None
    events = read_events(folder / "events.jsonl")
    epochs = [event for event in events if event["event"] == "epoch" and event["phase"] != "finetuning"]
    stages = [event for event in events if event["event"] == "stage_finished"]
    started = [event for event in events if event["event"] == "stage_started"]
    return {
        **{key: value for key, value in metrics.items() if key not in _LEFT_OUT},
        "median_images_per_second": statistics.median(event["images_per_second"] for event in epochs),
        "peak_resident_bytes": max(event["peak_resident_bytes"] for event in stages),
        "num_auxiliary": max(event.get("num_auxiliary", 0) for event in started),
    }


def keep(table: str, folder: Path) -> None:
    """Add the record of a run, if it is finished."""
    record = of_run(folder)
    if record is not None:
        write_json(FOLDER / f"{table}.json", dict(sorted({**read(table), folder.name: record}.items())))
