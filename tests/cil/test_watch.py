"""What is shown of a run from another terminal."""

import fcntl
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from cil.events import EventLog
from cil.lock import LOCK, holder
from cil.watch import follow, look, main, shown
from tests.cil.report.conftest import write_run

ROOT = Path(__file__).parents[2]

_HOLD = (
    "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); input()"
)


def hold(folder: Path) -> subprocess.Popen[str]:
    """A process that has the folder, as a run has."""
    command = [sys.executable, "-c", _HOLD, str(folder / LOCK)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def let_go(process: subprocess.Popen[str]) -> None:
    process.communicate("\n")


@pytest.fixture
def going_on(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A run in its third task whose process is there, and the number of that process."""
    run = write_run(tmp_path / "run", stages=2)
    process = hold(run)
    yield run, process.pid
    let_go(process)


def text_of(run: Path) -> str:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(shown(look(run)))
        return console.export_text()


def test_a_run_that_goes_on_is_shown_with_all_there_is_to_know(going_on: tuple[Path, int]) -> None:
    run, process = going_on
    (run / "stage_001").mkdir()
    (run / "stage_001" / "state.pt").touch()
    text = text_of(run)
    assert text.startswith("run\n")
    assert re.search(rf"status +running, process {process} *\n", text)
    assert re.search(r"task +3\b", text)
    assert re.search(r"phase +training, 4 of 8 epochs done", text)
    assert re.search(r"losses +bce 0\.\d+  kd 0\.\d+  cluster 0\.\d+", text)
    assert re.search(r"rate +0\.0\d+ learning rate, 345 images/s", text)
    assert re.search(r"accuracy +[▁-█]{2}  \d\d\.\d  \d\d\.\d %", text)
    assert re.search(r"average +\d\d\.\d %", text)
    assert re.search(r"saved +in stage 1, 0:0\d ago", text)
    assert re.search(r"time +\d:\d\d so far", text)


def test_time_and_share_left_are_those_of_the_images_at_the_pace_of_this_process(
    going_on: tuple[Path, int],
) -> None:
    run, _ = going_on
    (run / "events.jsonl").unlink()
    now = iter([0.0, 0.0, 10.0, 20.0, 30.0])
    with EventLog(run / "events.jsonl", clock=lambda: next(now)) as log:
        log.write("run_started", num_stages=5, total_images=1000)
        epoch = {"stage": 0, "phase_index": 0, "num_images": 100, "losses": {"ce": None}, "learning_rate": 0.1}
        log.write("epoch", epoch=0, images_per_second=10.0, **epoch)
        log.write("epoch", epoch=1, images_per_second=10.0, **epoch)
    state = look(run)
    assert state.share == 0.2
    assert state.seconds_left == pytest.approx(800 * 20 / 200, abs=5)  # less what has passed since
    text = text_of(run)
    assert re.search(r"task +1 of 5", text)
    assert "20%" in text
    assert "ce not finite" in text
    assert re.search(r"about 1:\d\d left", text)


def test_looking_takes_the_lock_from_nobody(going_on: tuple[Path, int]) -> None:
    run, process = going_on
    assert holder(run) == process
    assert look(run).status == "running"
    with (run / LOCK).open("w") as file, pytest.raises(BlockingIOError):
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert holder(run) == process


def test_nobody_has_a_folder_that_was_never_locked_or_was_let_go(tmp_path: Path) -> None:
    assert holder(tmp_path) is None
    (tmp_path / LOCK).touch()
    assert holder(tmp_path) is None


def test_once_prints_the_state_and_says_by_its_exit_code_what_became_of_the_run(
    tmp_path: Path, going_on: tuple[Path, int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(going_on[0]), "--once"]) == 0
    assert "running" in capsys.readouterr().out
    assert main([str(write_run(tmp_path / "whole")), "--once"]) == 0
    assert "finished" in capsys.readouterr().out
    assert main([str(write_run(tmp_path / "left", stages=1)), "--once"]) == 1
    assert "stopped: no process runs in the folder" in " ".join(capsys.readouterr().out.split())


def test_a_folder_without_a_run_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--once"]) == 2
    assert "is not a run folder: it has no config.yaml" in capsys.readouterr().err


def test_a_damaged_log_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", stages=1)
    (run / "events.jsonl").write_text("no event\n")
    assert main([str(run)]) == 2
    assert "line 1: not JSON" in capsys.readouterr().err


def test_a_run_that_has_not_begun_to_train_is_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", stages=0)
    (run / "events.jsonl").unlink()
    assert "it has not begun to train" in text_of(run)


def test_it_follows_events_that_a_resume_cuts_off_to_the_end(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", stages=2)
    whole = write_run(tmp_path / "whole")
    process = hold(run)
    console = Console(width=100, record=True, file=(tmp_path / "out").open("w"))
    seen = []

    def meanwhile(_: float) -> None:
        seen.append(len(look(run).events))
        if len(seen) == 1:  # a resume cuts off, and a line is being written
            lines = (run / "events.jsonl").read_text().splitlines(keepends=True)
            (run / "events.jsonl").write_text("".join(lines[:10]) + '{"event": "ep')
        elif len(seen) == 2:
            (run / "events.jsonl").write_bytes((whole / "events.jsonl").read_bytes())
            let_go(process)

    with console.file:
        state = follow(run, console, 0.0, meanwhile)
    assert (state.status, len(seen)) == ("finished", 2)
    assert seen[0] > seen[1] == 10


def test_following_ends_when_the_process_ends(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", stages=2)
    process = hold(run)
    with (tmp_path / "out").open("w") as file:
        state = follow(run, Console(file=file), 0.0, lambda _: let_go(process))
    assert state.status == "stopped"


def test_it_needs_no_torch(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    code = f"import sys; from cil.watch import main; main([{str(run)!r}, '--once']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "finished" in done.stdout
    assert json.loads((run / "metrics.json").read_text())["name"] == "run"
