"""Fifty tasks take the memory, the files and the time per step that a few take."""

from pathlib import Path

import pytest

from benchmarks.long_run import FLAT_FROM, GROWTH_MIB, SLOWER, growth_mebibytes, slowdown, watch


@pytest.mark.slow
@pytest.mark.parametrize("learner", ["dkt", "icarl"])
def test_fifty_tasks_leave_nothing_behind(learner: str, tmp_path: Path) -> None:
    tasks = watch(learner, tmp_path)
    assert len(tasks) == 50
    assert growth_mebibytes(tasks) < GROWTH_MIB
    assert len({task.num_files for task in tasks[FLAT_FROM - 1 :]}) == 1
    assert len({task.num_threads for task in tasks[FLAT_FROM - 1 :]}) == 1
    assert slowdown(tasks) <= SLOWER
