"""The diary of a run: `events.jsonl`, one fact a line, never changed except that a resume cuts off undone work.

Every event has `event` (its kind), `time` (UTC, ISO 8601) and `elapsed_seconds`, the time the run has taken so far in
all its processes together. JSON knows no NaN and no infinity: they are written as null, also inside lists.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np


class EventLog:
    """Appends events to a file; each is on its way to the disk when `write` returns.

    Opening goes on where the file ends: a last line that was torn by a kill is cut off, and `elapsed_seconds` counts
    on from the last event, so work that a resume repeats is counted as often as it was done. Rank 0 alone writes.

    Args:
        path: The file; made if there is none.
        listener: Called with every event behind its writing (`cil.sinks`).
        clock: Seconds from any start, for tests.

    Raises:
        ValueError: If the file holds a line that is no event (other than a torn last one).
    """

    def __init__(
        self,
        path: Path,
        *,
        listener: Callable[[dict[str, Any]], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = path
        self._listener = listener
        self._clock = clock
        self._start = clock()
        self._elapsed_before = 0.0
        whole = 0
        if path.exists():
            whole = path.read_bytes().rfind(b"\n") + 1
            events = read_events(path)
            self._elapsed_before = float(events[-1]["elapsed_seconds"]) if events else 0.0
        self._file = path.open("ab")
        self._file.truncate(whole)

    @property
    def elapsed_seconds(self) -> float:
        """Time the run has taken so far, resumes included."""
        return self._elapsed_before + self._clock() - self._start

    def write(self, event: str, /, **fields: Any) -> None:
        """Append one event.

        Args:
            event: Its kind.
            **fields: Its facts: numbers, strings, None, and mappings or sequences of these; NumPy numbers as well.

        Raises:
            ValueError: If a field has the name of one that every event has.
            TypeError: If a field cannot be written as JSON.
        """
        fixed = {
            "event": event,
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "elapsed_seconds": round(self.elapsed_seconds, 3),
        }
        if taken := fixed.keys() & fields.keys():
            raise ValueError(f"event {event!r}: {sorted(taken)} is written by the log itself, use another field name")
        whole = fixed | _plain(fields)
        line = json.dumps(whole, allow_nan=False, ensure_ascii=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        if self._listener is not None:
            self._listener(whole)

    def position(self) -> int:
        """Where the next event will start, in bytes; everything before it is safely on the disk when this returns."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.seek(0, os.SEEK_END)

    def truncate(self, position: int) -> None:
        """Forget the events from `position` on, which a resume will repeat.

        Raises:
            ValueError: If the file is shorter than that, or no event starts there.
        """
        written = self.path.read_bytes()
        if position > len(written) or (position > 0 and written[position - 1 : position] != b"\n") or position < 0:
            raise ValueError(
                f"{self.path}: no event can start at byte {position} of {len(written)}; "
                "the log does not belong to this checkpoint"
            )
        self._file.truncate(position)
        self._file.seek(position)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()

    def __enter__(self) -> "EventLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class SilentLog(EventLog):
    """A log that writes nothing, for the processes that are not rank 0.

    Args:
        clock: As for `EventLog`.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start = clock()
        self._elapsed_before = 0.0

    def write(self, event: str, /, **fields: Any) -> None:
        """Nothing."""

    def position(self) -> int:
        """Nothing has been written."""
        return 0

    def truncate(self, position: int) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def read_events(path: Path) -> list[dict[str, Any]]:
    """All whole events of a file; a last line without its end, left by a kill, is passed over.

    Raises:
        ValueError: If any other line is no event.
    """
    events = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last line end is empty or torn
        try:
            event = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        if (
            not isinstance(event, dict)
            or not {"event", "time", "elapsed_seconds"} <= event.keys()
            or not isinstance(event["elapsed_seconds"], int | float)
        ):
            raise ValueError(
                f"{path}, line {number}: an event has event, time and elapsed_seconds, found {event!r:.80}"
            )
        events.append(event)
    return events


def _plain(value: Any) -> Any:
    """`value` in the types that JSON knows, null for numbers that are not finite."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    return value
