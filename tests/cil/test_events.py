import json
import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from cil.events import EventLog, read_events


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


def clock_of(*seconds: float) -> Callable[[], float]:
    """A clock that shows these times, one a look."""
    times = iter(seconds)
    return lambda: next(times)


def test_every_event_has_kind_time_and_elapsed_seconds(path: Path) -> None:
    with EventLog(path, clock=clock_of(100.0, 102.5)) as log:
        log.write("epoch", epoch=3, losses={"bce": 0.5})
    (event,) = read_events(path)
    written = datetime.fromisoformat(event.pop("time"))
    assert written.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - written) < timedelta(minutes=1)
    assert event == {"event": "epoch", "elapsed_seconds": 2.5, "epoch": 3, "losses": {"bce": 0.5}}


def test_an_event_can_be_read_as_soon_as_it_is_written(path: Path) -> None:
    with EventLog(path) as log:
        log.write("run_started", name="demo")
        assert [event["name"] for event in read_events(path)] == ["demo"]


def test_numbers_that_are_not_finite_become_null(path: Path) -> None:
    with EventLog(path) as log:
        log.write(
            "epoch", losses={"bce": math.nan}, rate=math.inf, rows=[(1.0, -math.inf)], array=np.array([np.nan, 1])
        )
    (event,) = read_events(path)
    assert (event["losses"], event["rate"]) == ({"bce": None}, None)
    assert (event["rows"], event["array"]) == ([[1.0, None]], [None, 1.0])
    assert "NaN" not in path.read_text()


def test_numpy_numbers_are_written_as_numbers(path: Path) -> None:
    with EventLog(path) as log:
        log.write("evaluated", accuracy=np.float32(0.5), num_images=np.int64(7), nothing=np.float32(np.nan))
    (event,) = read_events(path)
    assert (event["accuracy"], event["num_images"], event["nothing"]) == (0.5, 7, None)


def test_what_json_does_not_know_is_refused_and_leaves_no_trace(path: Path) -> None:
    with EventLog(path) as log:
        with pytest.raises(TypeError, match="not JSON serializable"):
            log.write("epoch", where=object())
        with pytest.raises(ValueError, match="'time'"):
            log.write("epoch", time="now")
    assert read_events(path) == []


def test_elapsed_seconds_go_on_over_a_resume(path: Path) -> None:
    with EventLog(path, clock=clock_of(0.0, 10.0)) as log:
        log.write("run_started")
    with EventLog(path, clock=clock_of(5000.0, 5001.0, 5003.0)) as log:
        assert log.elapsed_seconds == 11.0
        log.write("run_started")
    assert [event["elapsed_seconds"] for event in read_events(path)] == [10.0, 13.0]


def test_a_resume_forgets_what_was_not_saved(path: Path) -> None:
    with EventLog(path) as log:
        log.write("epoch", epoch=0)
        saved = log.position()
        log.write("epoch", epoch=1)
    with EventLog(path) as log:
        log.truncate(saved)
        assert log.position() == saved
        log.write("epoch", epoch=1, again=True)
    assert [(event["epoch"], "again" in event) for event in read_events(path)] == [(0, False), (1, True)]


def test_truncating_to_the_start_forgets_everything(path: Path) -> None:
    with EventLog(path) as log:
        log.write("epoch")
        log.truncate(0)
        assert log.position() == 0
    assert read_events(path) == []


def test_a_position_inside_an_event_is_refused(path: Path) -> None:
    with EventLog(path) as log:
        log.write("epoch")
        for wrong in (5, log.position() + 1, -1):
            with pytest.raises(ValueError, match="no event can start"):
                log.truncate(wrong)
    assert len(read_events(path)) == 1


def test_a_torn_last_line_is_passed_over_and_cut_off(path: Path) -> None:
    with EventLog(path) as log:
        log.write("epoch", epoch=0)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"event": "epo')
    assert [event["epoch"] for event in read_events(path)] == [0]
    with EventLog(path) as log:
        log.write("epoch", epoch=1)
    assert [event["epoch"] for event in read_events(path)] == [0, 1]


def test_a_torn_letter_is_passed_over(path: Path) -> None:
    with EventLog(path) as log:
        log.write("stage_started", class_names=["Käfer"])
    path.write_bytes(path.read_bytes() + '{"name": "ä'.encode()[:-1])
    assert read_events(path)[0]["class_names"] == ["Käfer"]


@pytest.mark.parametrize("line", ['{"event": "epo', "[1, 2]", '{"event": "epoch"}', ""])
def test_any_other_broken_line_is_an_error_with_its_number(path: Path, line: str) -> None:
    good = json.dumps({"event": "epoch", "time": "2026-01-01T00:00:00+00:00", "elapsed_seconds": 1.0})
    path.write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(ValueError, match=r"events\.jsonl, line 2"):
        read_events(path)
    with pytest.raises(ValueError, match=r"events\.jsonl, line 2"):
        EventLog(path)
