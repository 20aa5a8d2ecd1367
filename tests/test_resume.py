"""An interrupted run, started again with the same command, ends as if nothing had happened: bit by bit."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from cil import checkpoint
from cil.engine import Engine
from cil.events import EventLog, read_events
from tests.conftest import RunTiny, run_tiny_in, tiny_command
from tests.run_folders import assert_same_weights, content_of, facts_of, results_of, weights_of

INTERRUPTED = 130
ROOT = Path(__file__).parents[1]

#: How often `TINY` with `learner=dkt` saves: after 2 epochs of training, 2 of fine-tuning, and at the end of a stage.
NUM_SAVES = 3 + 5 + 5


@pytest.fixture
def run_tiny(tmp_path: Path) -> RunTiny:
    """As everywhere, without the report."""
    return partial(run_tiny_in, tmp_path / "runs", report=False)


def interrupt(
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    call: int,
    *,
    after: bool,
    what: type[BaseException] | BaseException,
) -> None:
    """Raise before or after the `call`-th call of a function, counted from 1."""
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def interrupting(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            raise what
        result = original(*args, **kwargs)
        if calls == call:
            raise what
        return result

    monkeypatch.setattr(owner, name, interrupting)


def assert_as_if_nothing_happened(run: Path, whole: Path) -> None:
    assert results_of(run) == results_of(whole)
    assert_same_weights(weights_of(run), weights_of(whole))
    assert facts_of(run) == facts_of(whole)
    assert content_of(run).keys() == content_of(whole).keys()
    assert snapshots_of(run) == snapshots_of(whole) != {}


def snapshots_of(run: Path) -> dict[str, bytes]:
    """What was kept for the report."""
    return {name: content for name, content in content_of(run).items() if "/report/" in name}


@pytest.mark.parametrize(
    ("owner", "name", "call", "after"),
    [
        pytest.param(Engine, "batch", 3, False, id="in the first epoch, nothing is saved yet"),
        pytest.param(checkpoint, "save_state", 1, False, id="before the first state is saved"),
        pytest.param(checkpoint, "save_stage", 1, False, id="before the first stage is saved"),
        pytest.param(checkpoint, "save_state", 3, False, id="between the weights of a stage and its state"),
        pytest.param(checkpoint, "save_stage", 1, True, id="after the first stage is saved"),
        pytest.param(Engine, "choose_exemplars", 2, True, id="after choosing exemplars"),
        pytest.param(checkpoint, "save_stage", 3, False, id="before the last stage is saved"),
        pytest.param(checkpoint, "save_stage", 3, True, id="after the last stage is saved"),
        pytest.param(checkpoint, "write_json", 6, False, id="before the results are written"),
    ],
)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    run_tiny: RunTiny,
    whole_run: RunTiny,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    owner: Any,
    name: str,
    call: int,
    after: bool,
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, owner, name, call, after=after, what=KeyboardInterrupt)
        run_tiny(code=INTERRUPTED)
    assert capsys.readouterr().err == "interrupted; the same command again goes on from the last checkpoint\n"
    assert_as_if_nothing_happened(run_tiny(), whole_run())


@pytest.mark.parametrize(
    ("learner", "overrides"),
    [
        ("dkt", ()),
        ("dkt", ("precision=bf16",)),
        pytest.param("dkt", ("precision=fp16",), marks=pytest.mark.slow),
        ("dkt", ("memory.when=after_finetuning", "evaluation.every_epochs=1", "optim.clip_norm=1")),
        ("dkt_official", ()),
        ("joint", ()),
        pytest.param(
            "joint", ("learner.start=continue", "optim.optimizer=sgd", "optim.momentum=0.9"), marks=pytest.mark.slow
        ),
        ("replay", ("model=resnet32", "model.depth=20", "model.width=4")),
        pytest.param("finetune", ("memory.size=0",), marks=pytest.mark.slow),
    ],
)
def test_a_run_interrupted_after_every_single_checkpoint_ends_as_an_uninterrupted_one(
    run_tiny: RunTiny, whole_run: RunTiny, monkeypatch: pytest.MonkeyPatch, learner: str, overrides: tuple[str, ...]
) -> None:
    whole = whole_run(*overrides, learner=learner)
    num_saves = sum(event["event"] in ("epoch", "stage_finished") for event in facts_of(whole))
    for _ in range(num_saves):
        with monkeypatch.context() as patch:
            interrupt(patch, checkpoint, "save_state", 1, after=True, what=KeyboardInterrupt)
            run = run_tiny(*overrides, learner=learner, code=INTERRUPTED)
    assert_as_if_nothing_happened(run_tiny(*overrides, learner=learner), whole)
    starts = [event["resumed_at"] for event in read_events(run / "events.jsonl") if event["event"] == "run_started"]
    assert starts[0] is None
    assert len(starts) == 1 + num_saves
    if learner == "dkt":
        assert num_saves == NUM_SAVES
        assert starts[6] == {"stage": 1, "phase": 1, "epoch": 1, "step": 0}


#: Learners whose steps leave something behind: sums over a phase, banks, two momenta, what an epoch begins with.
IN_THE_MIDDLE: dict[str, tuple[str, tuple[str, ...]]] = {
    "dkt": ("dkt", ()),
    "dkt in bf16": ("dkt", ("precision=bf16",)),
    "Muon and a balanced loss": (
        "dkt",
        ("optim.optimizer=muon", "learner.base_loss=balanced_cross_entropy"),
    ),
    "banks and two momenta": (
        "replay",
        (
            *("model=resnet8", "model.width=4", "kd=[kd,crd]", "kd.crd.num_negatives=16", "kd.kd.warmup_epochs=2"),
            *("optim.optimizer=dot", "optim.lr=0.02", "optim.lr_reference_batch=null", "optim.momentum=0.9"),
        ),
    ),
    "imprinting": ("lucir", ("model=resnet8", "model.width=4")),
    "Fisher information": ("ewc", ("model=resnet8", "model.width=4")),
    "boosting and compression": ("foster", ("model=resnet8", "model.width=4", "learner.align_boosted=true")),
}


@pytest.mark.parametrize("case", IN_THE_MIDDLE)
def test_a_run_interrupted_in_the_middle_of_epochs_ends_as_an_uninterrupted_one(
    run_tiny: RunTiny, whole_run: RunTiny, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    learner, overrides = IN_THE_MIDDLE[case]
    overrides = (*overrides, "scenario.classes=4", "optim.batch_size=32")
    often = ("checkpoint.every_steps=2", "checkpoint.every_epochs=null")
    whole = whole_run(*overrides, learner=learner)
    for call in (2, 4, 3, 5):
        with monkeypatch.context() as patch:
            interrupt(patch, checkpoint, "save_state", call, after=True, what=KeyboardInterrupt)
            run = run_tiny(*overrides, *often, learner=learner, code=INTERRUPTED)
    run_tiny(*overrides, *often, learner=learner)
    assert results_of(run) == results_of(whole)
    assert_same_weights(weights_of(run), weights_of(whole))
    assert facts_of(run) == facts_of(whole)
    starts = [event["resumed_at"] for event in read_events(run / "events.jsonl") if event["event"] == "run_started"]
    assert sum(start is not None and start["step"] > 0 for start in starts) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_run_interrupted_anywhere_any_number_of_times_ends_as_an_uninterrupted_one(
    run_tiny: RunTiny, whole_run: RunTiny, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    #: Where to interrupt, and by which call at the latest.
    places = [(Engine, "batch", 15), (Engine, "evaluate", 2), (Engine, "state", 3), (Engine, "fit", 1)]
    places += [(Engine, "begin", 1), (Engine, "choose_exemplars", 1), (Engine, "finish", 1), (EventLog, "write", 8)]
    places += [(checkpoint, "write_atomically", 4), (os, "replace", 4)]
    chance, num_interruptions = random.Random(seed), 0
    while True:
        owner, name, latest = chance.choice(places)
        with monkeypatch.context() as patch:
            call, after = chance.randint(1, latest), chance.random() < 0.5
            interrupt(patch, owner, name, call, after=after, what=KeyboardInterrupt)
            try:
                run_tiny(code=INTERRUPTED)
            except AssertionError:  # it came through
                break
        num_interruptions += 1
    assert num_interruptions > 5
    assert_as_if_nothing_happened(run_tiny(), whole_run())


def test_a_bug_leaves_a_run_that_goes_on(
    run_tiny: RunTiny, whole_run: RunTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, Engine, "batch", 20, after=True, what=ZeroDivisionError)
        with pytest.raises(ZeroDivisionError):
            run_tiny()
    assert_as_if_nothing_happened(run_tiny(), whole_run())


def test_a_torn_last_event_does_not_stop_a_resume(
    run_tiny: RunTiny, whole_run: RunTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, checkpoint, "save_state", 4, after=True, what=KeyboardInterrupt)
        run = run_tiny(code=INTERRUPTED)
    with (run / "events.jsonl").open("a") as file:
        file.write('{"event": "epoch", "ti')
    (run / "stage_001" / "state.pt.part").write_bytes(b"half a state")
    run_tiny()
    (run / "stage_001" / "state.pt.part").unlink(missing_ok=True)
    assert_as_if_nothing_happened(run, whole_run())


def test_a_finished_run_says_so_and_changes_nothing(run_tiny: RunTiny, capsys: pytest.CaptureFixture[str]) -> None:
    before = content_of(run_tiny("optim.epochs=1", learner="finetune"))
    capsys.readouterr()
    after = content_of(run_tiny("optim.epochs=1", learner="finetune"))
    assert "run is finished already; overwrite=true runs it again" in capsys.readouterr().out
    assert after == before


def test_another_config_in_the_same_folder_is_refused_naming_the_keys(
    run_tiny: RunTiny, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content_of(run_tiny("optim.epochs=1", learner="finetune"))
    capsys.readouterr()
    run = run_tiny("optim.epochs=1", "seed=3", "memory.selection=random", learner="finetune", code=2)
    message = capsys.readouterr().err
    assert "holds a run of another config" in message
    assert "memory.selection: 'herding' there, 'random' here" in message
    assert "seed: 0 there, 3 here" in message
    assert "overwrite=true" in message
    assert len(message.splitlines()) == 3
    assert content_of(run) == before


def test_overwriting_moves_the_old_folder_aside(run_tiny: RunTiny) -> None:
    first = content_of(run_tiny("optim.epochs=1", learner="finetune"))
    run = run_tiny("optim.epochs=1", "seed=3", "overwrite=true", learner="finetune")
    assert content_of(run.with_name("run.old-1")) == first
    assert results_of(run)["seed"] == 3
    run_tiny("optim.epochs=1", "seed=4", "overwrite=true", learner="finetune")
    assert content_of(run.with_name("run.old-1")) == first
    assert results_of(run.with_name("run.old-2"))["seed"] == 3
    assert results_of(run)["seed"] == 4


def test_a_folder_of_something_else_is_left_alone(run_tiny: RunTiny, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_tiny("optim.epochs=0", code=2)
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    capsys.readouterr()
    run_tiny(code=2)
    assert "holds no run (no config.yaml)" in capsys.readouterr().err
    assert content_of(folder) == {"notes.txt": b"mine"}


def test_a_damaged_state_is_named_and_the_run_goes_on_from_the_one_before(
    run_tiny: RunTiny, whole_run: RunTiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, checkpoint, "save_state", 4, after=True, what=KeyboardInterrupt)
        run = run_tiny(code=INTERRUPTED)
    state = run / "stage_001" / "state.pt"
    state.write_bytes(state.read_bytes()[:-200])
    capsys.readouterr()
    assert_as_if_nothing_happened(run_tiny(), whole_run())
    message = capsys.readouterr().err
    assert f"{state}: missing or damaged" in message
    assert "passed over for the checkpoint before it" in message
    assert len(message.splitlines()) == 1


def test_without_any_good_state_a_run_is_refused(
    run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, checkpoint, "save_state", 2, after=True, what=KeyboardInterrupt)
        run = run_tiny(code=INTERRUPTED)
    for state in run.glob("stage_*/state*.pt"):
        state.write_bytes(state.read_bytes()[:-200])
    capsys.readouterr()
    run_tiny(code=2)
    message = capsys.readouterr().err
    assert "there is no good checkpoint before it, overwrite=true begins again" in message
    assert len(message.splitlines()) == 1


def test_begin_stage_does_not_run_twice(run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from cil.learners.dkt import DKT

    begun: list[int] = []
    original = DKT.begin_stage

    def counting(self: DKT, stage: Any) -> None:
        begun.append(stage.index)
        original(self, stage)

    monkeypatch.setattr(DKT, "begin_stage", counting)
    for call in (1, 2, 2, 3):
        with monkeypatch.context() as patch:
            interrupt(patch, checkpoint, "save_state", call, after=True, what=KeyboardInterrupt)
            run_tiny("kd=none", code=INTERRUPTED)  # terms would be tried on a copy before
    run_tiny("kd=none")
    assert begun == [0, 1, 2]


def test_the_teacher_of_a_resumed_run_is_the_one_that_was_saved(
    run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, checkpoint, "save_state", 9, after=True, what=KeyboardInterrupt)  # in the third task
        run = run_tiny(code=INTERRUPTED)
    state = torch.load(run / "stage_002" / "state.pt", weights_only=True)
    before = weights_of(run)
    teacher = {
        name.removeprefix("teacher.network."): value
        for name, value in state["learner"].items()
        if name.startswith("teacher.network.")
    }
    expected = {name.removeprefix("stage_001/"): v for name, v in before.items() if name.startswith("stage_001/")}
    assert_same_weights(dict(sorted(teacher.items())), dict(sorted(expected.items())))
    assert state["structure"]["network"] == {"task_sizes": [2, 2, 2]}
    assert state["structure"]["teacher"] == {"task_sizes": [2, 2]}


@pytest.mark.slow
def test_a_killed_process_is_continued_by_the_same_command(tmp_path: Path, whole_run: RunTiny) -> None:
    command = [sys.executable, "train_incremental.py", *tiny_command(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums depend on it
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    state = tmp_path / "run" / "stage_001" / "state.pt"
    deadline = time.monotonic() + 120
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, check=True)
    assert_as_if_nothing_happened(tmp_path / "run", whole_run())


@pytest.mark.parametrize("call", [2, 3, 4, 6])
def test_the_momenta_of_dot_go_on_after_a_stop_in_any_stage(
    call: int, run_tiny: RunTiny, whole_run: RunTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("model=resnet8", "model.width=4", "kd=[kd,crd]", "kd.crd.num_negatives=16", "optim.optimizer=dot")
    words = (*words, "optim.lr=0.02", "optim.lr_reference_batch=null", "optim.momentum=0.9")
    whole = whole_run(*words, learner="replay")
    with monkeypatch.context() as patched:
        interrupt(patched, checkpoint, "save_state", call, after=True, what=KeyboardInterrupt)
        run_tiny(*words, learner="replay", code=INTERRUPTED)
    assert_as_if_nothing_happened(run_tiny(*words, learner="replay"), whole)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_step_and_has_its_own_exit_code(
    run_tiny: RunTiny,
    whole_run: RunTiny,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
    code: int,
) -> None:
    seldom = ("checkpoint.every_epochs=null",)
    with monkeypatch.context() as patch:
        original, calls = Engine.step, 0

        def signalled(self: Engine, *arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 4:
                os.kill(os.getpid(), number)
            return original(self, *arguments)

        patch.setattr(Engine, "step", signalled)
        run = run_tiny(*seldom, code=code)
    assert "stopping: the step is finished and saved first" in capsys.readouterr().err
    assert (run / "stage_000" / "state.pt").exists()
    run_tiny(*seldom)
    assert results_of(run) == results_of(whole_run())
    assert_same_weights(weights_of(run), weights_of(whole_run()))
    starts = [event["resumed_at"] for event in read_events(run / "events.jsonl") if event["event"] == "run_started"]
    assert starts == [None, {"stage": 0, "phase": 0, "epoch": 0, "step": 4}]


def test_a_second_signal_ends_a_run_at_once(
    run_tiny: RunTiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def signalled(self: Engine, *arguments: Any) -> Any:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("it went on")

    monkeypatch.setattr(Engine, "step", signalled)
    run = run_tiny(code=INTERRUPTED)
    assert not list(run.glob("stage_*/state.pt"))
    assert "interrupted; the same command again" in capsys.readouterr().err
