import csv
import io
from collections.abc import Callable
from pathlib import Path

import pytest

from cil.report.comparison import grouped
from cil.report.folders import read_run
from cil.report.table import as_csv, as_latex

MakeRun = Callable[..., Path]


@pytest.fixture
def runs(make_run: MakeRun) -> list[Path]:
    """Two seeds of one learner, one of another, one of another protocol that is not finished."""
    return [
        make_run("dkt-seed0"),
        make_run("dkt-seed1", seed=1),
        make_run("a_b&c-seed0", learner="finetune"),
        make_run("later-seed0", learner="replay", protocol="0123456789abcdef", stages=2),
    ]


def test_csv_has_a_line_a_group_and_the_fractions_of_its_runs(runs: list[Path]) -> None:
    folders = [read_run(run) for run in runs]
    dkt, finetune, later = csv.DictReader(io.StringIO(as_csv(grouped(folders))))
    values = [run.summary["last_accuracy"] for run in folders]
    assert float(dkt["last_accuracy_mean"]) == pytest.approx(sum(values[:2]) / 2, rel=1e-5)
    assert float(dkt["last_accuracy_std"]) == pytest.approx(abs(values[0] - values[1]) / 2**0.5, rel=1e-4)
    assert (dkt["runs"], dkt["num_finished"], dkt["protocol"]) == ("dkt", "2", "5f1d0c0ffee01234")
    assert float(finetune["last_accuracy_mean"]) == pytest.approx(values[2], rel=1e-5)
    assert finetune["last_accuracy_std"] == ""
    assert (later["num_finished"], later["num_unfinished"], later["last_accuracy_mean"]) == ("0", "1", "")


def test_latex_is_escaped_and_parts_protocols(runs: list[Path]) -> None:
    text = as_latex(grouped([read_run(run) for run in runs]))
    assert text.count(r"\midrule") == 2
    assert r"a\_b\&c & 1 & $" in text
    assert r"later & 0 & -- & -- & -- & -- \\" in text
    assert r"\pm" in text
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {row.replace(r"\&", "").count("&") for row in rows} == {5}
