"""A recorded step is the step, bit for bit: with something that stands for a CUDA graph, and on a GPU with one."""

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from cil import recorded
from cil.learners.base import Learner
from cil.models.network import models
from cil.recorded import Recorder
from kd import DOT, Distiller, WeightedSum
from kd.feature.crd import CRD
from kd.logit.kd import KD
from tests.conftest import RunTiny, run_tiny_in
from tests.run_folders import assert_same_weights, results_of, weights_of

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


class Imitation:
    """Does what a CUDA graph does: records without doing, and does the same to the same memory again."""

    def __init__(self) -> None:
        self.learner: Learner | None = None
        self.recordings = self.replays = 0

    def suits(self, learner: Learner, *_: object) -> bool:
        self.learner = learner
        return learner.recordable

    def capture(self, compute: Callable[[], dict[str, Tensor]]) -> tuple[Callable[[], object], dict[str, Tensor]]:
        assert self.learner is not None
        self.recordings += 1
        kept = [(buffer, buffer.clone()) for buffer in self.learner.buffers()]
        losses = compute()
        for buffer, value in kept:
            buffer.copy_(value)
        parameters = list(self.learner.parameters())
        gradients = [parameter.grad for parameter in parameters]

        def replay() -> None:
            self.replays += 1
            again = compute()
            for name, loss in losses.items():
                loss.copy_(again[name])
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    assert parameter.grad is not None
                    gradient.copy_(parameter.grad)
                parameter.grad = gradient

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
        ("wa", ("model=resnet8", "model.width=4")),
        ("icarl", ("model=resnet8", "model.width=4")),
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


def test_what_cannot_be_recorded_is_said_and_done_step_by_step(
    run_tiny: RunTiny, tmp_path: Path, imitation: Imitation, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(compute: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    plain = run_tiny(report=False)
    with mock.patch.object(imitation, "capture", refused):
        found = run_recorded(tmp_path / "recorded", imitation)
    assert results_of(found) == results_of(plain)
    said = capsys.readouterr()
    assert "recorded as a CUDA graph (operation not permitted when stream is capturing); fast.cuda_graphs=false" in (
        said.out + said.err
    )


def test_a_profile_has_a_line_for_what_was_recorded(tmp_path: Path, imitation: Imitation) -> None:
    run = run_recorded(tmp_path, imitation, "profile=true", "optim.batch_size=16")
    table = (run / "profile" / "stage_001-training.txt").read_text()
    milliseconds = {words[0]: float(words[1]) for words in map(str.split, table.splitlines()) if len(words) == 3}
    assert milliseconds["recorded"] > milliseconds["data"] > 0


def test_memory_that_runs_out_while_recording_is_told_as_such(tmp_path: Path, imitation: Imitation) -> None:
    def full(compute: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with (
        mock.patch.object(Recorder, "suits", imitation.suits),
        mock.patch.object(recorded, "capture", full),
    ):
        run_tiny_in(tmp_path, report=False, code=1)


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
def test_a_graph_on_a_gpu_is_the_run(
    learner: str, overrides: tuple[str, ...], precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (*overrides, "device=cuda", f"precision={precision}", "optim.epochs=4")
    found = [
        run_tiny_in(tmp_path / switch, *words, f"fast.cuda_graphs={switch}", learner=learner, report=False)
        for switch in ("false", "true")
    ]
    assert "cannot be recorded" not in "".join(capsys.readouterr())
    assert results_of(found[0]) == results_of(found[1])
    assert_same_weights(*(weights_of(run) for run in found))
