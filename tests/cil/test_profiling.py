import gzip
import json
from pathlib import Path

import pytest

from cil.profiling import PARTS, profiled
from tests.conftest import RunTiny
from tests.run_folders import facts_of, results_of


def parts(table: str) -> dict[str, float]:
    """Milliseconds by part, of a table."""
    lines = [line.split() for line in table.splitlines()]
    return {words[0]: float(words[1]) for words in lines if words and words[0] in PARTS}


def test_a_profile_is_a_table_and_a_trace_and_changes_nothing(
    run_tiny: RunTiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_tiny("profile=true", "optim.batch_size=16")
    folder = run / "profile"
    assert f"profile: {folder}/stage_001-training.txt" in capsys.readouterr().out.replace("\n", "")
    found = parts((folder / "stage_001-training.txt").read_text())
    assert set(found) == set(PARTS)
    assert found["forward"] > found["teacher"] > 0
    trace = json.loads(gzip.decompress((folder / "stage_001-training.json.gz").read_bytes()))
    assert {"teacher", "backward", "optimiser"} <= {event.get("name") for event in trace["traceEvents"]}
    other = run_tiny("optim.batch_size=16", f"runs_dir={tmp_path / 'other'}")
    assert results_of(other) == results_of(run)
    assert facts_of(other) == facts_of(run)


@pytest.mark.parametrize("batch_size", [512, 80])  # 1 and 4 steps
def test_a_phase_that_is_too_short_says_so(
    run_tiny: RunTiny, capsys: pytest.CaptureFixture[str], batch_size: int
) -> None:
    run = run_tiny("profile=true", f"optim.batch_size={batch_size}", "optim.epochs=1")
    assert "fewer than 8 steps" in capsys.readouterr().out
    assert not (run / "profile").exists()


def test_profiled_gives_the_items() -> None:
    assert list(profiled("data", iter("abc"))) == ["a", "b", "c"]
