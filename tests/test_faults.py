"""Disks that are full or cannot be written, and memory that runs out: a message, and nothing is lost."""

import os
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from cil.engine import Engine
from cil.evaluation import Reader
from cil.learners.dkt import DKT
from cil.room import is_out_of_memory, largest_that_fits
from kd import Batch
from tests.conftest import RunTiny, run_tiny_in
from tests.run_folders import content_of, metrics_of
from tests.test_resume import assert_as_if_nothing_happened, interrupt


class Disk:
    """A small disk in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = partial(run_tiny_in, folder / "runs", report=False)

    def mount(self, options: str) -> None:
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"mounting a disk in memory is not allowed here ({done.stderr.strip()})")

    def fill(self, free: int) -> None:
        """Leave so many bytes."""
        found = os.statvfs(self.folder)
        (self.folder / "filler").write_bytes(bytes(max(found.f_bavail * found.f_frsize - free, 0)))

    def empty(self) -> None:
        (self.folder / "filler").unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    made = Disk(folder)
    made.mount("size=16m")
    try:
        yield made
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def size_of(run: Path) -> int:
    return sum(len(content) for content in content_of(run).values())


@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, pytest.param(0.7, marks=pytest.mark.slow), 0.95])
def test_a_full_disk_is_said_in_one_line_and_leaves_a_run_that_goes_on(
    disk: Disk, whole_run: RunTiny, capsys: pytest.CaptureFixture[str], share: float
) -> None:
    disk.fill(int(share * size_of(whole_run())))
    capsys.readouterr()
    run = disk.run(code=1 if share else 2)  # not even the folder can be made: nothing has begun
    message = capsys.readouterr().err
    assert message.startswith(f"error: {run}")
    assert "No space left on device" in message
    assert message.count("\n") == 1
    disk.empty()
    disk.run()
    assert_as_if_nothing_happened(run, whole_run())
    assert not list(run.rglob("*.part"))


def test_a_folder_that_cannot_be_written_is_refused_and_stays_as_it_is(
    disk: Disk, whole_run: RunTiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, Engine, "train_epoch", 4, after=True, what=KeyboardInterrupt)
        run = disk.run(code=130)
    before = content_of(run)
    disk.mount("remount,ro")
    capsys.readouterr()
    disk.run(code=2)
    message = capsys.readouterr().err
    assert "Read-only file system" in message
    assert str(run) in message
    assert message.count("\n") == 1
    assert content_of(run) == before
    disk.mount("remount,rw")
    disk.run()
    assert_as_if_nothing_happened(run, whole_run())


def test_a_disk_that_fails_while_events_are_written_leaves_a_run_that_goes_on(
    run_tiny: RunTiny, whole_run: RunTiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, os, "fsync", 9, after=False, what=OSError(5, "Input/output error"))
        run = run_tiny(code=1)
    message = capsys.readouterr().err
    assert message.startswith(f"error: {run}")
    assert "Input/output error; mend that, and the same command goes on from the last checkpoint" in message
    assert_as_if_nothing_happened(run_tiny(), whole_run())


def limit(monkeypatch: pytest.MonkeyPatch, num_images: int) -> None:
    """Let the network run out of memory with more images than so many, as torch's allocator does."""
    original = DKT.forward

    def limited(self: DKT, batch: Batch) -> dict[str, torch.Tensor]:
        if len(batch.images) > num_images:
            torch.empty(2**60, dtype=torch.uint8)
        return original(self, batch)

    monkeypatch.setattr(DKT, "forward", limited)


@pytest.mark.parametrize(
    ("num_images", "advice"),
    [
        (40, "Of the 64 images of a batch 32 fit: optim.batch_size=32 in another run"),
        (0, "Not even one image fits: a smaller model"),
    ],
)
def test_memory_that_runs_out_is_said_with_what_would_fit(
    run_tiny: RunTiny,
    whole_run: RunTiny,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    num_images: int,
    advice: str,
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, Engine, "train_epoch", 4, after=True, what=KeyboardInterrupt)
        run_tiny(code=130)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        limit(patch, num_images)
        run_tiny(code=1)
    message = capsys.readouterr().err
    assert message.startswith("error: stage 1, phase training, epoch 1, step 0: out of memory (")
    assert "can't allocate memory" in message
    assert advice in message
    assert "kept is the state of stage 1, phase 0, epoch 1, step 0" in message
    assert message.count("\n") == 1
    assert_as_if_nothing_happened(run_tiny(), whole_run())


def test_memory_that_runs_out_in_evaluation_names_its_batch_size(
    run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt(monkeypatch, Reader, "count", 1, after=False, what=MemoryError)
    run = run_tiny(code=1)
    message = capsys.readouterr().err
    assert (
        message
        == "error: out of memory; outside of training evaluation.batch_size=256 counts: a smaller one needs less\n"
    )
    assert not (run / "metrics.json").exists() or not metrics_of(run)["finished"]


def test_what_fits_is_found_by_halving() -> None:
    tried: list[int] = []

    def attempt(count: int) -> None:
        tried.append(count)
        if count > 10:
            raise MemoryError

    assert largest_that_fits(attempt, 96) == 6
    assert tried == [48, 24, 12, 6]
    assert largest_that_fits(attempt, 1) is None


def test_another_error_is_not_taken_for_memory() -> None:
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="size mismatch"):
        largest_that_fits(lambda count: torch.ones(2, count) @ torch.ones(3), 8)
