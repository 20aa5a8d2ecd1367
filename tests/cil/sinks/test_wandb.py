"""What Weights & Biases is given, by a package that only remembers it."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cil.events import EventLog
from cil.sinks import Sinks


class FakeRun:
    """What `wandb.init` returns."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.metrics: list[tuple[str, dict[str, Any]]] = []
        self.finished = False

    def define_metric(self, name: str, **settings: Any) -> None:
        self.metrics.append((name, settings))

    def log(self, numbers: dict[str, float], *, step: int) -> None:
        self.rows.append((step, numbers))

    def finish(self) -> None:
        self.finished = True


class FakeWandB(ModuleType):
    """The parts of the package that are used."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = sys.__spec__
        self.asked: list[dict[str, Any]] = []
        self.runs: list[FakeRun] = []

    def init(self, **settings: Any) -> FakeRun:
        self.asked.append(settings)
        self.runs.append(FakeRun())
        return self.runs[-1]

    @staticmethod
    def Settings(**settings: Any) -> dict[str, Any]:
        return settings


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandB:
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return fake


def epochs(log: EventLog, *numbers: int) -> None:
    for number in numbers:
        log.write("epoch", phase="training", epoch=number, learning_rate=0.1, losses={"ce": 1.0}, images_per_second=9.0)


def test_it_is_given_names_config_and_every_number_over_epochs(wandb: FakeWandB, tmp_path: Path) -> None:
    with (
        Sinks(["wandb"], tmp_path, {"name": "mine", "seed": 3}) as sinks,
        EventLog(tmp_path / "events.jsonl", listener=sinks) as log,
    ):
        log.write("run_started")
        log.write("phase_started")
        epochs(log, 0, 1)
    (asked,), (run,) = wandb.asked, wandb.runs
    assert (asked["name"], asked["project"], asked["dir"]) == ("mine", "dkt-incremental", str(tmp_path))
    assert (asked["config"], asked["resume"]) == ({"name": "mine", "seed": 3}, "allow")
    assert ("*", {"step_metric": "epochs"}) in run.metrics
    numbers = {"training/ce": 1.0, "training/learning_rate": 0.1, "training/images_per_second": 9.0}
    assert run.rows == [(1, numbers | {"epochs": 1}), (2, numbers | {"epochs": 2})]
    assert run.finished


def test_a_run_that_goes_on_goes_on_there_and_gives_nothing_twice(wandb: FakeWandB, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with Sinks(["wandb"], tmp_path, {"name": "run"}) as sinks, EventLog(path, listener=sinks) as log:
        log.write("run_started")
        epochs(log, 0)
        saved = log.position()
        epochs(log, 1, 2)
    with Sinks(["wandb"], tmp_path, {"name": "run"}) as sinks, EventLog(path, listener=sinks) as log:
        log.truncate(saved)
        log.write("run_started")
        epochs(log, 1, 2, 3)
    first, second = wandb.asked
    assert first["id"] == second["id"] == json.loads((tmp_path / "wandb.json").read_text())["id"]
    assert [step for run in wandb.runs for step, _ in run.rows] == [0, 1, 2, 3]


def test_a_sink_that_comes_later_is_given_what_was_kept(wandb: FakeWandB, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.write("run_started")
        epochs(log, 0, 1)
    with Sinks(["wandb"], tmp_path, {"name": "run"}) as sinks, EventLog(path, listener=sinks) as log:
        log.write("run_started")
        epochs(log, 2)
    assert [step for step, _ in wandb.runs[0].rows] == [0, 1, 2]


def test_the_project_of_the_environment_counts(
    wandb: FakeWandB, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "elsewhere")
    with Sinks(["wandb"], tmp_path, {"name": "run"}) as sinks, EventLog(tmp_path / "e", listener=sinks) as log:
        (tmp_path / "events.jsonl").touch()
        log.write("run_started")
    assert wandb.asked[0]["project"] == "elsewhere"


def test_a_connection_that_fails_leaves_the_run_alone(
    wandb: FakeWandB, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(**_: Any) -> FakeRun:
        raise RuntimeError("api_key not configured")

    monkeypatch.setattr(wandb, "init", fails)
    with Sinks(["wandb"], tmp_path, {"name": "r"}) as sinks, EventLog(tmp_path / "events.jsonl", listener=sinks) as log:
        log.write("run_started")
        epochs(log, 0)
    assert capsys.readouterr().err == (
        "log=wandb failed and is left out from here on, the run goes on: api_key not configured\n"
    )
