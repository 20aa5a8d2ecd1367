"""Makes the result tables of docs/results.md: `python -m benchmarks.tables demo` or `cifar100_c50`.

Runs what is missing, one run after another, and prints a Markdown table of what is there; the same command again goes
on where it was stopped. `--print` only prints.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from cil.cli import compose
from cil.cli import main as run
from cil.events import read_events

TABLES: dict[str, list[list[str]]] = {
    "demo": [["experiment=demo", f"seed={seed}", f"name=demo-seed{seed}"] for seed in range(3)],
    "cifar100_c50": [["experiment=cifar100_c50", f"learner={learner}"] for learner in ("dkt_official", "dkt")],
}


def percent(values: list[float | None]) -> str:
    """Fractions as percentages with one decimal; a dash where there is none."""
    return ", ".join("-" if value is None else f"{100 * value:.1f}" for value in values)


def row(folder: Path) -> str:
    """One run as a line of the table."""
    metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    events = read_events(folder / "events.jsonl")
    stages = [event for event in events if event["event"] == "stage_finished"]
    rate = statistics.median(
        event["images_per_second"] for event in events if event.get("phase") == "training" and event["event"] == "epoch"
    )
    cells = [
        folder.name + ("" if metrics["finished"] else " (unfinished)"),
        percent(metrics["accuracy_after"]),
        percent(metrics["accuracy_before_finetuning"]),
        percent([metrics["average_incremental_accuracy"]]),
        percent([metrics["last_accuracy"]]),
        percent([metrics["forgetting"]]),
        percent(metrics["accuracy_matrix"][-1]),
        f"{metrics['views_trained']:,}".replace(",", " "),
        f"{rate:.0f}",
        f"{metrics['wall_seconds'] / 60:.1f}",
        f"{max(event['peak_resident_bytes'] for event in stages) / 2**30:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


HEADER = (
    "| run | after each task | before fine-tuning | average | last | forgetting | last row of the matrix | views "
    "| images/s (median epoch) | minutes | peak GiB |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


def main() -> int:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    parser.add_argument("table", choices=sorted(TABLES))
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--print", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    failed = 0
    for overrides in TABLES[arguments.table]:
        if not arguments.print:
            failed |= run([*overrides, f"runs_dir={arguments.runs_dir}"])
    folders = [arguments.runs_dir / compose(overrides)["name"] for overrides in TABLES[arguments.table]]
    print(HEADER)
    for folder in folders:
        if (folder / "metrics.json").exists():
            print(row(folder))
    return failed


if __name__ == "__main__":
    sys.exit(main())
