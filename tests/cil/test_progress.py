import io
import re

import pytest
from rich.console import Console

from cil.metrics import AccuracyMatrix
from cil.progress import MOST_TASKS_IN_TABLE, Progress, duration

WIDTH = 80


class Clock:
    """A clock that stands still until it is moved."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def plain(
    *, total_images: int = 1000, num_stages: int = 2, done_images: int = 0
) -> tuple[Progress, Clock, io.StringIO]:
    clock, out = Clock(), io.StringIO()
    console = Console(file=out, width=WIDTH)
    progress = Progress(
        total_images=total_images, num_stages=num_stages, done_images=done_images, console=console, clock=clock
    )
    return progress, clock, out


def run_epochs(progress: Progress, clock: Clock, *, epochs: int, steps: int = 5, seconds: float = 1.0) -> None:
    """Steps of 10 images, each `seconds` long."""
    for epoch in range(epochs):
        for step in range(steps):
            clock.now += seconds
            progress.step(epoch, step, {"bce": 0.25, "kd": 1.5} if progress.wants_losses() else None, images=10)


def test_plain_output_has_task_phase_epoch_losses_rate_and_time_left() -> None:
    progress, clock, out = plain()
    with progress:
        progress.stage(1)
        progress.phase("training", epochs=20, steps=5)
        run_epochs(progress, clock, epochs=1)
    assert out.getvalue() == "task 2/2  training  epoch 1/20  bce 0.25  kd 1.5  10 images/s  1:35 left\n"


def test_plain_output_is_at_most_a_line_an_epoch_and_one_in_five_seconds() -> None:
    progress, clock, out = plain(total_images=100_000)
    with progress:
        progress.phase("training", epochs=20, steps=5)
        run_epochs(progress, clock, epochs=4, seconds=2.0)
        assert out.getvalue().count("\n") == 4
        run_epochs(progress, clock, epochs=15, seconds=0.1)
        assert out.getvalue().count("\n") == 5
    assert max(map(len, out.getvalue().splitlines())) <= WIDTH


def test_losses_are_wanted_at_once_and_then_twice_a_second() -> None:
    progress, clock, _ = plain()
    progress.phase("training", epochs=1, steps=100)
    asked = 0
    for step in range(100):
        clock.now += 0.1
        wanted = progress.wants_losses()
        assert wanted or step > 0
        asked += wanted
        progress.step(0, step, {"bce": 1.0} if wanted else None, images=1)
    assert asked == 100 * 0.1 / 0.5


def test_time_left_of_a_resumed_run_counts_only_its_own_pace() -> None:
    progress, clock, _ = plain(total_images=1000, done_images=600)
    with progress:
        assert progress.seconds_left() is None
        progress.phase("training", epochs=1, steps=10)
        run_epochs(progress, clock, epochs=1, steps=10)  # 100 images in 10 seconds
        assert progress.seconds_left() == pytest.approx(30.0)
        clock.now += 10.0  # an evaluation: slower on the whole, not while training
        assert progress.seconds_left() == pytest.approx(60.0)
        assert progress.images_per_second() == pytest.approx(10.0)


def test_images_per_second_is_that_of_the_last_seconds() -> None:
    progress, clock, _ = plain()
    progress.phase("training", epochs=2, steps=100)
    assert progress.images_per_second() == 0.0
    run_epochs(progress, clock, epochs=1, steps=100, seconds=1.0)
    run_epochs(progress, clock, epochs=1, steps=150, seconds=0.1)
    assert progress.images_per_second() == pytest.approx(100.0)


def test_the_table_has_every_accuracy_and_the_derived_numbers() -> None:
    progress, _, out = plain()
    matrix = AccuracyMatrix.from_counts([[9, -1], [4, 24]], [10, 30])
    progress.table(matrix, 1)
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert lines[0] == ["accuracy", "(%)", "after", "task", "2", "of", "2"]
    assert lines[1] == ["after", "all", "t1", "t2"]
    assert lines[3:5] == [["t1", "90.0", "90.0"], ["t2", "70.0", "40.0", "80.0"]]
    assert lines[5] == ["average", "80.0", "last", "70.0", "forgetting", "50.0", "backward", "transfer", "-50.0"]


def test_after_the_first_task_the_table_says_nothing_of_forgetting() -> None:
    progress, _, out = plain()
    progress.table(AccuracyMatrix.from_counts([[9, -1], [-1, -1]], [10, 30]), 0)
    assert "average 90.0  last 90.0\n" in out.getvalue()
    assert "forgetting" not in out.getvalue()


@pytest.mark.parametrize("num_tasks", [MOST_TASKS_IN_TABLE, MOST_TASKS_IN_TABLE + 1, 50])
def test_the_table_fits_80_columns_with_any_number_of_tasks(num_tasks: int) -> None:
    progress, _, out = plain(num_stages=num_tasks)
    matrix = AccuracyMatrix([100] * num_tasks)
    for stage in range(num_tasks):
        matrix.record(stage, [100] * (stage + 1))
    progress.table(matrix, num_tasks - 1)
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert "…" not in out.getvalue()
    assert ("..." in out.getvalue()) == (num_tasks > MOST_TASKS_IN_TABLE)
    assert lines[1].split()[:4] == ["after", "all", "t1", "t2"]
    assert lines[1].split()[-1] == f"t{num_tasks}"
    shown = num_tasks if num_tasks <= MOST_TASKS_IN_TABLE else MOST_TASKS_IN_TABLE - 1
    assert lines[-3].split() == [f"t{num_tasks}", *(1 + shown) * ["100.0"]]


def test_lines_are_said_as_they_are() -> None:
    progress, _, out = plain()
    line = "runs/[demo]/report.html " + 10 * "long "
    progress.say(line)
    assert out.getvalue() == f"{line}\n"


def test_quiet_shows_nothing_and_never_waits_for_the_device(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(total_images=10, num_stages=1, quiet=True) as progress:
        progress.phase("training", epochs=1, steps=1)
        assert not progress.wants_losses()
        progress.step(0, 0, None, images=10)
        progress.say("nothing")
        progress.table(AccuracyMatrix.from_counts([[1]], [1]), 0)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_that_cannot_draw_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    progress, clock, out = terminal()
    with progress:
        progress.phase("training", epochs=1, steps=5)
        run_epochs(progress, clock, epochs=1)
    assert out.getvalue().startswith("task 1/12  training  epoch 1/1")
    assert out.getvalue().count("\n") == 1


def terminal(width: int = WIDTH) -> tuple[Progress, Clock, io.StringIO]:
    clock, out = Clock(), io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system=None)
    return Progress(total_images=1000, num_stages=12, console=console, clock=clock), clock, out


@pytest.mark.parametrize("width", [20, 40, WIDTH])
def test_the_bar_stays_within_the_terminal(width: int) -> None:
    progress, clock, out = terminal(width)
    with progress:
        progress.stage(9)
        progress.phase("balanced_finetuning", epochs=500, steps=5)
        run_epochs(progress, clock, epochs=1)
    shown = re.sub(r"\x1b\[[0-9?;]*[A-Za-z]", "\n", out.getvalue())
    assert max(map(len, shown.splitlines())) <= width


def test_the_bar_has_task_phase_epoch_losses_rate_and_time_left() -> None:
    progress, clock, out = terminal()
    with progress:
        progress.stage(9)
        progress.phase("training", epochs=20, steps=5)
        run_epochs(progress, clock, epochs=1)
    for part in ("5%", "task 10/12  training  epoch 1/20", "bce 0.25  kd 1.5  10 images/s  1:35 left"):
        assert part in out.getvalue()


def test_the_bar_is_full_when_more_was_trained_than_planned() -> None:
    progress, clock, out = terminal()
    with progress:
        progress.phase("training", epochs=30, steps=5)
        run_epochs(progress, clock, epochs=30)
        progress.phase("evaluation")
    assert "100%  task 1/12  evaluation" in out.getvalue()
    assert "0:00 left" in out.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (754.0, "12:34"), (3723.0, "1:02:03")])
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text
