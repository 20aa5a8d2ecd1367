"""What every test stands on: shapes checked at every call, and one way to run the command line in process."""

import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

install_import_hook(["kd", "cil"], "beartype.beartype")  # before anything imports them

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
    torch.set_num_threads(1)

settings.register_profile("house", deadline=None, max_examples=50)
settings.load_profile("house")

#: `experiment=tiny`, cut down to what a test can wait for: 3 tasks of 2 digits, one narrow block, 2 epochs.
TINY = (
    "experiment=tiny",
    "scenario.classes=6",
    "scenario.initial_increment=2",
    "scenario.increment=2",
    "memory.size=24",
    "optim.epochs=2",
    "precision=fp32",
    "checkpoint.every_epochs=1",
    "checkpoint.every_seconds=null",
)
#: A network and tasks of two digits in which forgetting is seen, with the heads that the bounds were set for.
SMALL_RESNET = (
    *("model=resnet32", "model.head_init=torch", "model.depth=20", "model.width=8"),
    *("scenario.classes=4", "optim.epochs=10"),
)
SMALL_DKT = ("model.width=16", "model.num_heads=2", "model.depth=1", "model.mlp_ratio=1", "model.stem_width=8")

#: Overrides of a run of two tasks, as short and small as they come; with `learner=finetune`.
SHORT = ("optim.epochs=1", "scenario.classes=4", "model=resnet8", "model.width=4", "memory.size=0")

RunTiny = Callable[..., Path]


def tiny_command(runs_dir: Path, *overrides: str, learner: str = "dkt") -> list[str]:
    """The words of a small run; later overrides win, and `dkt` fine-tunes for 2 epochs."""
    finetuning = ["learner.finetune_epochs=2"] if learner == "dkt" else []
    model = [] if any(word.startswith("model=") for word in overrides) else SMALL_DKT
    return [*TINY, *model, f"learner={learner}", *finetuning, f"runs_dir={runs_dir}", "name=run", *overrides]


def run_tiny_in(runs_dir: Path, *overrides: str, learner: str = "dkt", code: int = 0, report: bool = True) -> Path:
    """Run the command line in process; returns the run folder.

    Args:
        runs_dir: Folder of runs.
        overrides: As on the command line, behind those of `TINY`.
        learner: Choice of the group.
        code: The exit code that is expected.
        report: Write the page, which takes as long as the training; otherwise an empty file stands for it.
    """
    from cil.cli import main

    def empty_page(folder: Path) -> Path:
        (folder / "report.html").touch()
        return folder / "report.html"

    words = tiny_command(runs_dir, *overrides, learner=learner)
    with nullcontext() if report else mock.patch("cil.report.write_report", empty_page):
        assert main(words) == code
    return runs_dir / [word.removeprefix("name=") for word in words if word.startswith("name=")][-1]


@pytest.fixture
def run_tiny(tmp_path: Path) -> RunTiny:
    """`run_tiny(*overrides, learner=..., code=...)` runs below a folder of this test."""
    return lambda *overrides, **expected: run_tiny_in(tmp_path / "runs", *overrides, **expected)


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> RunTiny:
    """`whole_run(*overrides, learner=...)` is an uninterrupted run, made once for all tests, which only read it."""

    @cache
    def run(*overrides: str, learner: str = "dkt") -> Path:
        return run_tiny_in(tmp_path_factory.mktemp("whole"), *overrides, learner=learner)

    return run


@pytest.fixture(scope="session")
def short_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of `SHORT`, `run`, without its page; only to be read."""
    folder = tmp_path_factory.mktemp("short")
    run_tiny_in(folder, *SHORT, learner="finetune", report=False)
    return folder


@pytest.fixture(scope="session")
def stopped_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of `SHORT` that was stopped in its second task, `run`; only to be read."""
    from cil import checkpoint

    folder, save_state, calls = tmp_path_factory.mktemp("stopped"), checkpoint.save_state, count(1)

    def stopping(*arguments: Any) -> None:
        save_state(*arguments)
        if next(calls) == 3:  # the first epoch, the end of the first task, the first epoch of the second
            raise KeyboardInterrupt

    with mock.patch.object(checkpoint, "save_state", stopping):
        run_tiny_in(folder, *SHORT, learner="finetune", code=130, report=False)
    return folder


@pytest.fixture(scope="session")
def cil_data() -> Path:
    """The folder of real data sets, with `cifar100.npz` in it."""
    root = os.environ.get("CIL_DATA")
    if not root:
        pytest.skip("CIL_DATA is not set: it names the folder that holds cifar100.npz")
    if not (Path(root) / "cifar100.npz").is_file():
        pytest.skip(f"CIL_DATA={root} holds no cifar100.npz")
    return Path(root)
