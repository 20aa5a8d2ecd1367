"""What a row of `make bench` is, and how two ways to do one thing are compared."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from cil.fast import PLAIN, Fast
from cil.precision import Precision, repeat_exactly

_UNCOUNTED = 2  # the first calls load what they need, and record what can be recorded

_device = torch.device("cpu")


def device() -> torch.device:
    """Where rows about networks and images compute."""
    return _device


def measure_on(chosen: torch.device) -> None:
    """Let the rows to come compute there."""
    global _device
    _device = chosen


@dataclass
class Measured:
    """One row: ours, what it is compared with, and how many times better ours is."""

    value: float
    unit: str
    baseline: float
    ratio: float


rows: dict[str, Callable[[], Measured]] = {}


def row(function: Callable[[], Measured]) -> Callable[[], Measured]:
    """Decorator that enters a measurement under the name of its function."""
    rows[function.__name__] = function
    return function


def seconds_of(*sides: Callable[[], object], repetitions: int) -> list[float]:
    """Median seconds of functions that are called in turn, after two calls each that do not count."""
    taken: list[list[float]] = [[] for _ in sides]
    for repetition in range(-_UNCOUNTED, repetitions):
        for side, own in zip(sides, taken, strict=True):
            start = time.perf_counter()
            side()
            if _device.type == "cuda":  # which is given work and goes on with it alone
                torch.cuda.synchronize()
            if repetition >= 0:
                own.append(time.perf_counter() - start)
    return [statistics.median(own) for own in taken]


def side_by_side(ours: Callable[[], object], baseline: Callable[[], object], repetitions: int = 15) -> Measured:
    """Median milliseconds of two functions."""
    value, other = (1000 * seconds for seconds in seconds_of(ours, baseline, repetitions=repetitions))
    return Measured(value, "ms", other, other / value)


def rate(images: int, ours: Callable[[], object], baseline: Callable[[], object], repetitions: int = 5) -> Measured:
    """Images a second of two functions that read so many images a call."""
    value, other = (images / seconds for seconds in seconds_of(ours, baseline, repetitions=repetitions))
    return Measured(value, "images/s", other, value / other)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads of torch, for a block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def way(*, plain: bool) -> tuple[Fast, Precision]:
    """How one side computes: `fast=off precision=fp32`, or by default."""
    repeat_exactly(_device)  # as runs do
    return (PLAIN, Precision("fp32", _device)) if plain else (Fast(), Precision.resolve("auto", _device))
