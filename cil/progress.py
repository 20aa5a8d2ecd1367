"""What a person sees while a run is going on: a bar in a terminal, a few plain lines anywhere else."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cil.metrics import AccuracyMatrix

LOSSES_EVERY_SECONDS = 0.5  # reading a loss waits for the device, so it is not done each step
LINE_EVERY_SECONDS = 5.0  # without a terminal
RATE_OVER_SECONDS = 10.0
MOST_TASKS_IN_TABLE = 9  # what fits into 80 columns; of more tasks the first and the last are shown
WIDEST_BAR = 24


class Progress:
    """Shows where a run is: task, phase, epoch, losses by name, images per second, time left for the whole run.

    The time left is that of the images still to be trained at the mean pace of this process, pauses for evaluation and
    exemplars included. Rank 0 alone shows anything; the others pass `quiet=True`.

    Args:
        total_images: Training images of the whole run, each counted as often as it is seen.
        num_stages: Tasks of the whole run.
        done_images: How many of the images an interrupted run has behind it.
        quiet: Show nothing.
        console: Where to; standard output if None.
        clock: Seconds from any start, for tests.
    """

    def __init__(
        self,
        *,
        total_images: int,
        num_stages: int,
        done_images: int = 0,
        quiet: bool = False,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total_images = total_images
        self.num_stages = num_stages
        self.done_images = done_images
        self.console = console or Console(quiet=quiet)
        self._quiet = quiet
        self._animated = self.console.is_terminal and not self.console.is_dumb_terminal
        self._clock = clock
        self._began, self._done_at_start = clock(), done_images
        self._losses_at = self._line_at = -float("inf")
        self._recent: deque[tuple[float, int]] = deque([(self._began, done_images)])  # (when, images done)
        self._stage, self._phase, self._epochs, self._steps, self._epoch = 0, "starting", 0, 0, 0
        self._losses: dict[str, float] = {}
        self._live: Live | None = None

    def __enter__(self) -> "Progress":
        self._began, self._done_at_start = self._clock(), self.done_images
        self._recent = deque([(self._began, self.done_images)])
        if self._animated and not self._quiet:
            self._live = Live(get_renderable=self._render, console=self.console, transient=True, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def stage(self, stage: int) -> None:
        """A stage begins (counted from 0)."""
        self._stage = stage

    def phase(self, name: str, epochs: int = 0, steps: int = 0) -> None:
        """A part of the stage begins.

        Args:
            name: What is being done: a phase of training, or "evaluation", "exemplars", ...
            epochs: Its epochs; 0 if it is no training.
            steps: Steps of an epoch.
        """
        self._phase, self._epochs, self._steps, self._epoch, self._losses = name, epochs, steps, 0, {}
        self._recent = deque([(self._clock(), self.done_images)])  # the pace of one phase says nothing about another's
        self._losses_at = -float("inf")

    def wants_losses(self) -> bool:
        """Whether the next `step` should be given the losses, which means waiting for the device."""
        return not self._quiet and self._clock() - self._losses_at >= LOSSES_EVERY_SECONDS

    def step(self, epoch: int, step: int, losses: Mapping[str, float] | None, images: int) -> None:
        """A step is done.

        Args:
            epoch: Its epoch, from 0.
            step: Its number in the epoch, from 0.
            losses: Terms of the loss by name if `wants_losses()` said so, otherwise None.
            images: Images of this step.
        """
        now = self._clock()
        self.done_images += images
        self._epoch = epoch
        self._recent.append((now, self.done_images))
        while len(self._recent) > 2 and now - self._recent[1][0] >= RATE_OVER_SECONDS:
            self._recent.popleft()
        if losses is not None:
            self._losses, self._losses_at = dict(losses), now
        ends_epoch = step == self._steps - 1
        if ends_epoch and not self._animated and now - self._line_at >= LINE_EVERY_SECONDS:
            self._line_at = now
            self.say(f"{self._where()}  {self._how()}")

    def say(self, line: str) -> None:
        """One line that stays."""
        self.console.print(Text(line), soft_wrap=True)

    def table(self, matrix: AccuracyMatrix, stage: int) -> None:
        """The accuracies in percent, a row for each finished stage.

        Args:
            matrix: What has been recorded so far, `stage` included.
            stage: The stage that has just ended.
        """
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
        tasks = _shown(stage + 1)
        for name in ("after", "all", *("..." if task is None else f"t{task + 1}" for task in tasks)):
            table.add_column(name, justify="right", no_wrap=True)
        values, seen = 100 * matrix.values, 100 * matrix.accuracy_after()
        for row in tasks:
            if row is None:
                table.add_row("...")
                continue
            cells = ["" if task is None or task > row else f"{values[row, task]:.1f}" for task in tasks]
            table.add_row(f"t{row + 1}", Text(f"{seen[row]:.1f}", style="bold"), *cells)
        self.say(f"accuracy (%) after task {stage + 1} of {self.num_stages}")
        self.console.print(table)
        numbers = f"average {100 * matrix.average_incremental_accuracy():.1f}  last {100 * matrix.last_accuracy():.1f}"
        if stage:
            numbers += f"  forgetting {100 * matrix.forgetting():.1f}"
            numbers += f"  backward transfer {100 * matrix.backward_transfer():.1f}"
        self.say(f"{numbers}\n")

    def images_per_second(self) -> float:
        """The pace of the last seconds of this phase; 0 before its first step."""
        (first, done_first), (last, done_last) = self._recent[0], self._recent[-1]
        return (done_last - done_first) / (last - first) if last > first else 0.0

    def seconds_left(self) -> float | None:
        """Time left for the whole run; None before the first step."""
        done, spent = self.done_images - self._done_at_start, self._clock() - self._began
        return max(self.total_images - self.done_images, 0) * spent / done if done else None

    def _where(self) -> str:
        where = f"task {self._stage + 1}/{self.num_stages}  {self._phase}"
        return f"{where}  epoch {self._epoch + 1}/{self._epochs}" if self._epochs else where

    def _how(self) -> str:
        losses = [f"{name} {value:.4g}" for name, value in self._losses.items()]
        left = self.seconds_left()
        pace = [f"{self.images_per_second():.0f} images/s"] if self._epochs else []
        return "  ".join([*losses, *pace, *([] if left is None else [f"{duration(left)} left"])])

    def _render(self) -> Group:
        fraction = self.done_images / self.total_images if self.total_images else 1.0
        bar = ProgressBar(total=1.0, completed=min(fraction, 1.0), width=min(WIDEST_BAR, self.console.width // 3))
        first = Table.grid(padding=(0, 2))
        first.add_column(no_wrap=True)
        first.add_column(no_wrap=True, overflow="ellipsis")
        first.add_row(bar, Text(f"{min(fraction, 1.0):4.0%}  {self._where()}", style="bold"))
        return Group(first, Text(self._how(), no_wrap=True, overflow="ellipsis"))


def duration(seconds: int | float) -> str:
    """Hours, minutes and seconds, as "1:02:03" or "2:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _shown(num_tasks: int) -> list[int | None]:
    """The tasks of the table; None stands for those left out."""
    if num_tasks <= MOST_TASKS_IN_TABLE:
        return list(range(num_tasks))
    first = 2
    return [*range(first), None, *range(num_tasks - (MOST_TASKS_IN_TABLE - first - 1), num_tasks)]
