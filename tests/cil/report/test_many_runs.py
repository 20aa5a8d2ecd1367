"""A page about hundreds of runs is made soon and is small."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cil.report import write_comparison

MakeRun = Callable[..., Path]
NUM_RUNS, SEEDS = 200, 4
MOST_SECONDS = 20  # of the processor, of which it takes 2 to 3
MOST_BYTES = 1_500_000


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, write_run: MakeRun) -> list[Path]:
    """50 learners of 4 seeds each, made of one run."""
    folder = tmp_path_factory.mktemp("many")
    original = write_run(folder / "original")
    made = []
    for index in range(NUM_RUNS):
        learner, seed = f"learner{index // SEEDS:02d}", index % SEEDS
        run = shutil.copytree(original, folder / "runs" / f"{learner}-seed{seed}")
        config = (run / "config.yaml").read_text()
        config = config.replace("name: dkt", f"name: {learner}").replace("seed: 0", f"seed: {seed}")
        (run / "config.yaml").write_text(config.replace("name: original", f"name: {run.name}"))
        facts = json.loads((run / "metrics.json").read_text())
        facts |= {"name": run.name, "seed": seed, "learner": learner, "finished": True}
        facts["average_incremental_accuracy"] -= index / 1000
        (run / "metrics.json").write_text(json.dumps(facts))
        made.append(run)
    return made


def test_a_page_of_200_runs_is_made_soon_and_is_small(runs: list[Path], tmp_path: Path) -> None:
    start = time.process_time()
    page = write_comparison(runs, tmp_path / "page.html")
    seconds = time.process_time() - start
    html = page.read_text()
    assert seconds < MOST_SECONDS
    assert page.stat().st_size < MOST_BYTES
    assert html.count("<svg ") == 2
    assert "The 8 groups with the best average incremental accuracy" in html
    assert "Comparison of 200 runs" in html


def test_the_diary_of_a_finished_run_is_not_read_for_a_comparison(runs: list[Path], tmp_path: Path) -> None:
    for run in runs[:8]:
        (run / "events.jsonl").write_text("damaged\ndamaged\n")
    assert "learner00" in write_comparison(runs[:8], tmp_path / "page.html").read_text()
