"""What sinks are given, and what becomes of a run whose sink fails."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from cil.checking import check
from cil.cli import compose, main
from cil.events import EventLog
from cil.sinks import Place, Sink, Sinks, scalars, sinks
from cil.watch import look
from tests.conftest import RunTiny
from tests.run_folders import facts_of


class Heard(Sink):
    """Remembers what it is given; class attributes, since a new one is made for every process."""

    package: ClassVar[str] = "json"
    events: ClassVar[list[tuple[Place, Mapping[str, Any]]]] = []
    closed: ClassVar[int] = 0
    fails_at: ClassVar[str | None] = None

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        Heard.events.clear()
        if self.fails_at == "open":
            raise OSError("no line\nto the other end")

    def write(self, event: Mapping[str, Any], place: Place) -> None:
        if self.fails_at == event["event"]:
            raise OSError("no line\nto the other end")
        Heard.events.append((place, event))

    def close(self) -> None:
        Heard.closed += 1


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Heard]]:
    """`log=heard`."""
    _ = len(sinks)
    monkeypatch.setitem(sinks._entries, "heard", Heard)
    yield Heard
    Heard.events, Heard.closed, Heard.fails_at = [], 0, None


def epoch(number: int, **losses: float) -> dict[str, Any]:
    return {"stage": 0, "phase": "training", "epoch": number, "learning_rate": 0.1, "losses": losses} | {
        "images_per_second": 50.0
    }


def test_events_are_given_with_their_place_and_starts_are_not(heard: type[Heard], tmp_path: Path) -> None:
    with Sinks(["heard"], tmp_path, {}) as given, EventLog(tmp_path / "events.jsonl", listener=given) as log:
        log.write("run_started")
        log.write("phase_started")
        log.write("epoch", **epoch(0, ce=2.0))
        log.write("epoch", **epoch(1, ce=1.0))
        log.write("evaluated", accuracy=0.5)
    assert [(place.number, place.epochs, event["event"]) for place, event in heard.events] == [
        (0, 0, "phase_started"),
        (1, 1, "epoch"),
        (2, 2, "epoch"),
        (3, 2, "evaluated"),
    ]
    assert heard.closed == 1


def test_a_run_that_goes_on_gives_what_was_kept_and_repeats_at_the_same_places(
    heard: type[Heard], tmp_path: Path
) -> None:
    with Sinks(["heard"], tmp_path, {}) as given, EventLog(tmp_path / "events.jsonl", listener=given) as log:
        log.write("run_started")
        log.write("epoch", **epoch(0, ce=2.0))
        saved = log.position()
        log.write("epoch", **epoch(1, ce=1.0))
    whole = [(place, event["epoch"]) for place, event in heard.events]
    with Sinks(["heard"], tmp_path, {}) as given, EventLog(tmp_path / "events.jsonl", listener=given) as log:
        log.truncate(saved)
        log.write("run_started")
        assert [event["epoch"] for _, event in heard.events] == [0]
        log.write("epoch", **epoch(1, ce=1.0))
    assert [(place, event["epoch"]) for place, event in heard.events] == whole


def test_a_run_gives_every_event_of_its_log_and_is_the_same_run_without(
    heard: type[Heard], run_tiny: RunTiny, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("scenario.classes=4", "optim.epochs=1")
    run = run_tiny(*words, "log=heard", learner="finetune", report=False)
    kinds = [event["event"] for event in facts_of(run)]
    assert [event["event"] for _, event in heard.events] == kinds
    assert [place.number for place, _ in heard.events] == list(range(len(kinds)))
    capsys.readouterr()
    run_tiny(*words, learner="finetune", report=False)
    assert "run is finished already" in capsys.readouterr().out
    state = look(run)
    assert (state.status, state.num_stages, state.share) == ("finished", 2, 1.0)


@pytest.mark.parametrize("fails_at", ["open", "epoch"])
def test_a_sink_that_fails_is_named_once_and_the_run_goes_on(
    heard: type[Heard], tmp_path: Path, capsys: pytest.CaptureFixture[str], fails_at: str
) -> None:
    heard.fails_at = fails_at
    with Sinks(["heard"], tmp_path, {}) as given, EventLog(tmp_path / "events.jsonl", listener=given) as log:
        for kind in ("run_started", "epoch", "epoch"):
            log.write(kind)
    assert capsys.readouterr().err == (
        "log=heard failed and is left out from here on, the run goes on: no line to the other end\n"
    )
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 3
    assert heard.closed == 0


def test_an_interrupt_is_no_failure_of_a_sink(heard: type[Heard], tmp_path: Path) -> None:
    def interrupted() -> None:
        with Sinks(["heard"], tmp_path, {}) as given:
            given({"event": "run_started"})
            raise KeyboardInterrupt

    (tmp_path / "events.jsonl").touch()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert heard.closed == 1


def test_numbers_get_names_and_what_is_null_is_left_out() -> None:
    found = scalars({"event": "epoch", **epoch(3, bce=0.5), "losses": {"bce": 0.5, "kd": None}})
    assert found == {"training/bce": 0.5, "training/learning_rate": 0.1, "training/images_per_second": 50.0}
    read = {"accuracy": 0.5, "top5": 1.0, "accuracy_old": None, "accuracy_new": 0.5, "per_task": [0.5]}
    read["accuracy_by"] = {"classifier": 0.5}
    assert scalars({"event": "evaluated", "when": "after", **read}) == {
        "accuracy/all": 0.5,
        "accuracy/top5": 1.0,
        "accuracy/new": 0.5,
        "accuracy/by_classifier": 0.5,
        "accuracy_of_task/000": 0.5,
    }
    during = scalars({"event": "evaluated", "when": "training epoch 3", **read})
    assert {name.split("/")[0] for name in during} == {"accuracy_during", "accuracy_during_of_task"}
    assert scalars({"event": "test_read", "num_images": 3}) == {}


@pytest.mark.parametrize(("word", "names"), [("log=tensorboard", ["tensorboard"]), ("log=[]", []), (None, [])])
def test_one_name_needs_no_brackets(word: str | None, names: list[str]) -> None:
    assert check(compose(["experiment=tiny", *([word] if word else [])])).log == names


def test_an_unknown_sink_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["experiment=tiny", "log=[tensorbord]"]) == 2
    assert "log=tensorbord: unknown sink 'tensorbord'; did you mean 'tensorboard'?" in capsys.readouterr().err


def test_a_missing_package_is_refused_with_the_extra(
    heard: type[Heard], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(heard, "package", "there_is_no_such_package")
    assert main(["experiment=tiny", "log=heard", f"runs_dir={tmp_path / 'runs'}"]) == 2
    assert capsys.readouterr().err == (
        "error: log=heard: the package there_is_no_such_package is not installed: pip install dkt-incremental[heard]\n"
    )
    assert not (tmp_path / "runs").exists()
