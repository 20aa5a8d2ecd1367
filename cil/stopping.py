"""Signals that end a run: between two steps it is saved first; a second signal ends it at once."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

#: Exit code of a process that a signal ended, as shells count.
_SIGNALLED = 128


class Terminated(BaseException):
    """The run was asked to end by SIGTERM; as `KeyboardInterrupt`, it is no error of the program."""


class Signals:
    """Listens to SIGINT and SIGTERM while it is entered, in the main thread; elsewhere it hears nothing.

    Args:
        patient: Whether to wait for others at the first signal, as processes do that do not save.
    """

    def __init__(self, *, patient: bool = False) -> None:
        self.patient = patient
        #: The first signal that came while it was deferred.
        self.pending: int | None = None
        self._deferring = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A block that asks `pending` itself, where it can be left."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def raise_pending(self) -> None:
        """End the run if a signal came.

        Raises:
            KeyboardInterrupt: After SIGINT.
            Terminated: After SIGTERM.
        """
        if self.pending is not None and not self.patient:
            raise exception_of(self.pending)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.pending is None and (self._deferring or self.patient):
            self.pending = number
            if not self.patient:
                print("stopping: the step is finished and saved first; once more ends at once", file=sys.stderr)
            return
        raise exception_of(number)


def exception_of(number: int) -> BaseException:
    """What a signal raises."""
    return KeyboardInterrupt() if number == signal.SIGINT else Terminated()


def exit_code(error: BaseException) -> int:
    """The exit code of a run that was ended by a signal."""
    return _SIGNALLED + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)
