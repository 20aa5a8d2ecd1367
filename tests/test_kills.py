"""Runs that are killed again and again end as if nothing had happened."""

from pathlib import Path

import pytest

from tests.kills import KINDS, NUM_KILLS, kill


@pytest.mark.parametrize(
    ("name", "num_kills"), [("dkt", 4), *(pytest.param(name, NUM_KILLS, marks=pytest.mark.slow) for name in KINDS)]
)
def test_a_killed_run_ends_as_one_that_was_left_alone(tmp_path: Path, name: str, num_kills: int) -> None:
    outcome = kill(name, tmp_path / "runs", num_kills)
    assert outcome.kills.total() == num_kills
    assert outcome.runs
    assert outcome.differing == []
    if num_kills == NUM_KILLS:
        assert set(outcome.kills) == set(KINDS[name].places)
