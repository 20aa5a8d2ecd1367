import json
from pathlib import Path
from time import sleep

import pytest

from benchmarks import bench
from benchmarks.measuring import Measured, rate, rows, side_by_side


def test_the_faster_side_has_a_ratio_above_one() -> None:
    measured = side_by_side(lambda: sleep(0.001), lambda: sleep(0.01), repetitions=3)
    assert measured.unit == "ms"
    assert measured.ratio == pytest.approx(measured.baseline / measured.value)
    assert measured.ratio > 2
    assert rate(10, lambda: sleep(0.001), lambda: sleep(0.01), repetitions=3).ratio > 2


def test_rows_are_printed_and_kept_beside_those_of_other_calls(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latest = tmp_path / "latest.json"
    monkeypatch.setattr(bench, "LATEST", latest)
    monkeypatch.setitem(rows, "herding", lambda: Measured(2.0, "ms", 4.0, 2.0))
    monkeypatch.setitem(rows, "report", lambda: Measured(1.0, "s", 3.0, 3.0))
    bench.main(["herding"])
    bench.main(["report"])
    assert json.loads(latest.read_text()) == {
        "herding": {"value": 2.0, "unit": "ms", "baseline": 4.0, "ratio": 2.0},
        "report": {"value": 1.0, "unit": "s", "baseline": 3.0, "ratio": 3.0},
    }
    assert "2.00x" in capsys.readouterr().out


def test_a_row_that_there_is_not_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        bench.main(["dkt_stepp"])
    assert stop.value.code == 2
    assert "dkt_step_02" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["crop_flip", "herding", "show_help"])
def test_a_row_measures_two_sides(name: str) -> None:
    measured = rows[name]()
    assert measured.value > 0
    assert measured.baseline > 0
