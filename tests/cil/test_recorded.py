"""A recorded step is the step, bit for bit: with something that stands for a CUDA graph, and on a GPU with one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cil import recorded
from cil.learners.base import Learner
from cil.models.network import models
from cil.recorded import NotRecordable, Recorder
from kd import DOT, Distiller, WeightedSum
from kd.feature.crd import CRD
from kd.logit.kd import KD
from tests.conftest import RunTiny, run_tiny_in
from tests.run_folders import assert_same_weights, results_of, weights_of

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


class Tape(TorchDispatchMode):
    """Every operation on tensors that is done, with what it was given and what it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        self.done.append((function, args, kwargs or {}, found))
        return found

    def again(self) -> None:
        """The same operations on the same memory; nothing of Python is asked again."""
        with torch.no_grad():
            for function, args, kwargs, found in self.done:
                for old, new in zip(tree_leaves(found), tree_leaves(function(*args, **kwargs)), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Imitation:
    """Does what a CUDA graph does: records operations without a trace, and does them to the same memory again."""

    def __init__(self) -> None:
        self.learner: Learner | None = None
        self.recordings = self.replays = 0

    def suits(self, learner: Learner, *_: object) -> bool:
        self.learner = learner
        return learner.recordable

    def capture(
        self, compute: Callable[[], dict[str, Tensor]], pool: object
    ) -> tuple[Callable[[], object], dict[str, Tensor]]:
        assert self.learner is not None
        self.recordings += 1
        kept = [(buffer, buffer.clone()) for buffer in self.learner.buffers()]
        with Tape() as tape:
            losses = compute()
        for buffer, value in kept:
            buffer.copy_(value)

        def replay() -> None:
            self.replays += 1
            tape.again()

        return replay, losses


@pytest.fixture
def imitation() -> Imitation:
    return Imitation()


def run_recorded(folder: Path, imitation: Imitation, *overrides: str, learner: str = "dkt") -> Path:
    with (
        mock.patch.object(Recorder, "suits", imitation.suits),
        mock.patch.object(recorded, "capture", imitation.capture),
    ):
        return run_tiny_in(folder, *overrides, learner=learner, report=False)


@pytest.mark.parametrize(
    ("learner", "overrides"),
    [
        ("dkt", ("model.drop_path=0.5",)),
        ("dkt", ("learner.base_loss=balanced_cross_entropy", "optim.clip_norm=0.1", "optim.skip_nonfinite=true")),
        ("dkt", ("learner.finetune_views=1",)),
        ("dytox", ("model=dytox_tiny", "learner.finetune_epochs=1")),
        ("replay", ("model=resnet8", "model.width=4", "kd=reviewkd")),
        ("replay", ("model=resnet8", "model.width=4", "kd=[mld,cat_kd,sp]")),
        ("wa", ("model=resnet8", "model.width=4", "kd=kd", "kd.kd.warmup_epochs=2", "optim.epochs=3")),
        ("icarl", ("model=resnet8", "model.width=4")),
        ("lwf", ("model=resnet8", "model.width=4", "memory.size=0", "kd=[dkd,at,fitnet]")),
        ("finetune", ("model=resnet8", "model.width=4", "memory.size=0")),
        ("joint", ("model=resnet8", "model.width=4", "memory.size=0")),
    ],
)
def test_a_recorded_run_is_the_run(
    learner: str, overrides: tuple[str, ...], run_tiny: RunTiny, tmp_path: Path, imitation: Imitation
) -> None:
    plain = run_tiny(*overrides, learner=learner, report=False)
    found = run_recorded(tmp_path / "recorded", imitation, *overrides, learner=learner)
    assert imitation.replays > imitation.recordings > 2
    assert results_of(found) == results_of(plain)
    assert_same_weights(weights_of(found), weights_of(plain))


def test_what_cannot_be_recorded_is_said_and_the_run_goes_on_without(
    run_tiny: RunTiny, tmp_path: Path, imitation: Imitation, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(compute: object, pool: object) -> None:
        raise NotRecordable("operation not permitted when stream is capturing")

    plain = run_tiny(report=False)
    with mock.patch.object(Recorder, "suits", imitation.suits), mock.patch.object(recorded, "capture", refused):
        run_tiny_in(tmp_path, report=False, code=1)
    said = " ".join(capsys.readouterr().err.split())
    assert "stage 0, phase training, epoch 0, step 1: the step cannot be recorded as a CUDA graph (operation" in said
    assert "fast.cuda_graphs=false goes on from there" in said
    found = run_tiny_in(tmp_path, "fast.cuda_graphs=false", report=False)
    assert results_of(found) == results_of(plain)
    assert_same_weights(weights_of(found), weights_of(plain))


def test_a_profile_has_a_line_for_what_was_recorded(tmp_path: Path, imitation: Imitation) -> None:
    run = run_recorded(tmp_path, imitation, "profile=true", "optim.batch_size=16")
    table = (run / "profile" / "stage_001-training.txt").read_text()
    milliseconds = {words[0]: float(words[1]) for words in map(str.split, table.splitlines()) if len(words) == 3}
    assert milliseconds["recorded"] > milliseconds["data"] > 0


def test_memory_that_runs_out_while_recording_is_told_as_such(
    tmp_path: Path, imitation: Imitation, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(compute: object, pool: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with mock.patch.object(Recorder, "suits", imitation.suits), mock.patch.object(recorded, "capture", full):
        run_tiny_in(tmp_path, report=False, code=1)
    said = " ".join(capsys.readouterr().err.split())
    assert "out of memory (CUDA out of memory)" in said
    assert "A recorded step needs more than fast.cuda_graphs=false" in said


def test_only_functions_of_tensors_on_one_gpu_are_recorded() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    layer = torch.nn.Linear(2, 2)
    steps = torch.optim.SGD(layer.parameters(), lr=0.1)

    def learner(*terms: Distiller, recordable: bool = True) -> Learner:
        weighted = WeightedSum({str(number): (1.0, term) for number, term in enumerate(terms)})
        made = Learner(models["resnet_cifar"]((3, 32, 32), depth=8), weighted if terms else None)
        made.recordable = recordable
        return made

    assert Recorder.suits(learner(), steps, gpu)
    assert Recorder.suits(learner(KD(temperature=1.0)), steps, gpu)
    assert not Recorder.suits(learner(), steps, cpu)
    assert not Recorder.suits(learner(KD(temperature=1.0), CRD()), steps, gpu)
    assert not Recorder.suits(learner(recordable=False), steps, gpu)
    assert not Recorder.suits(learner(), DOT(layer.parameters(), lr=0.1), gpu)

    class Own(Learner):
        recordable = True

        def update(self, *arguments: Any) -> None:
            super().update(*arguments)

    assert not Recorder.suits(Own(models["resnet_cifar"]((3, 32, 32), depth=8), None), steps, gpu)


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("learner", "overrides"),
    [
        ("dkt", ("model.drop_path=0.5",)),
        ("dkt", ("optim.clip_norm=0.1",)),
        ("dytox", ("model=dytox_tiny", "learner.finetune_epochs=1")),
        ("replay", ("model=resnet8", "model.width=4", "kd=reviewkd")),
        ("icarl", ("model=resnet8", "model.width=4")),
    ],
)
def test_a_graph_on_a_gpu_is_the_run(learner: str, overrides: tuple[str, ...], precision: str, tmp_path: Path) -> None:
    words = (*overrides, "device=cuda", f"precision={precision}", "optim.epochs=4")
    found = [
        run_tiny_in(tmp_path / switch, *words, f"fast.cuda_graphs={switch}", learner=learner, report=False)
        for switch in ("false", "true")
    ]
    assert results_of(found[0]) == results_of(found[1])
    assert_same_weights(*(weights_of(run) for run in found))
