"""What holds for every registered distillation method, whatever it compares."""

import inspect
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kd import Batch, Distiller, Outputs, distillers
from kd.cam import class_maps
from kd.connect import probe

NUM_CLASSES = 5
COUNT = 8
FORMATS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Speaking(nn.Module):
    """A small network that says everything a distiller may ask for.

    Args:
        widths: Channels of the three stages.
        favourite: The class that it is certain of, by `margin` of its logit.
        margin: Added to that logit.
        loudness: Factor of the first maps, and thereby of all features.
    """

    def __init__(
        self, widths: tuple[int, int, int], favourite: int, margin: float = 0.0, loudness: float = 1.0
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        befores = (widths[0], *widths[:2])
        self.stages = nn.ModuleList(nn.Conv2d(a, b, 3, 2, padding=1) for a, b in zip(befores, widths, strict=True))
        self.head = nn.Linear(widths[2], NUM_CLASSES)
        self.loudness = loudness
        with torch.no_grad():
            self.head.bias[favourite] += margin

    def say(self, images: Tensor) -> Outputs:
        maps = torch.relu(self.stem(images)) * self.loudness
        taps = {"stem": maps}
        for number, stage in enumerate(self.stages):
            taps[f"stage{number}.pre"] = stage(maps)
            maps = taps[f"stage{number}.post"] = torch.relu(taps[f"stage{number}.pre"])
        embedding = maps.mean((2, 3))
        taps |= {"last": maps, "class_maps": class_maps(maps, self.head.weight)}
        return Outputs(self.head(embedding), embedding, taps)

    def forward(self, images: Tensor) -> Outputs:
        said = self.say(images)
        said.views["strong"] = self.say(images.flip(3) + 0.1)
        return said


def pair(margin: float = 0.0, loudness: float = 1.0) -> tuple[Speaking, Speaking]:
    """A student and a wider teacher; the teacher could learn, so that a gradient that reaches it is seen."""
    torch.manual_seed(0)
    student = Speaking((4, 8, 16), favourite=0, margin=margin, loudness=loudness)
    return student, Speaking((6, 12, 16), favourite=1, margin=margin, loudness=loudness)


def batch() -> Batch:
    images = torch.randn(COUNT, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return Batch(images, torch.arange(COUNT) % NUM_CLASSES, 3 * torch.arange(COUNT))


def made(name: str, student: nn.Module, teacher: nn.Module) -> Distiller:
    distiller = distillers[name]()
    distiller.connect(probe(student, batch().images), probe(teacher, batch().images))
    distiller.remember(torch.arange(40), torch.arange(40) // 3 % NUM_CLASSES)
    distiller.remember(batch().ids, batch().labels)
    return distiller


def everything(outputs: Outputs) -> Iterator[Tensor]:
    yield outputs.logits
    if outputs.embedding is not None:
        yield outputs.embedding
    yield from outputs.taps.values()
    for view in outputs.views.values():
        yield from everything(view)


def autocast(name: str) -> AbstractContextManager[None]:
    dtype = FORMATS[name]
    return nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)


@pytest.fixture(params=list(distillers))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_hyper_parameters_are_keyword_only_with_a_default_and_a_type(name):
    constructor = distillers[name].__init__
    if constructor is nn.Module.__init__:
        return  # it has none
    for parameter in list(inspect.signature(constructor).parameters.values())[1:]:
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert parameter.default is not inspect.Parameter.empty
        assert parameter.annotation is not inspect.Parameter.empty


def test_the_loss_is_one_number_that_teaches_the_student_and_not_the_teacher(name):
    student, teacher = pair()
    distiller = made(name, student, teacher)
    loss = distiller(student(batch().images), teacher(batch().images), batch())
    assert loss.shape == ()
    loss.backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("number_format", list(FORMATS))
def test_certain_logits_and_loud_features_give_a_finite_loss_and_gradient(name, number_format):
    student, teacher = pair(margin=400.0, loudness=200.0)
    distiller = made(name, student, teacher)
    with autocast(number_format):
        ours, theirs = student(batch().images), teacher(batch().images)
        for outputs in (ours, theirs):
            best, second = outputs.logits.float().topk(2).values.unbind(1)
            assert (best - second > 120).all()
        loss = distiller(ours, theirs, batch())
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    tensors = [tensor for tensor in everything(ours) if tensor.requires_grad]
    for gradient in torch.autograd.grad(loss, tensors, allow_unused=True):
        assert gradient is None or gradient.isfinite().all()


def test_what_it_needs_is_said_in_known_words(name):
    known = {"logits", "embedding", "labels", "ids", "class_maps", "strong", "taps", "teacher_graph"}
    assert distillers[name]().needs <= known


def test_parameters_of_adapters_are_those_that_it_reports(name):
    distiller = made(name, *pair())
    reported = {id(parameter) for parameter in distiller.auxiliary_parameters()}
    assert reported == {id(parameter) for parameter in distiller.parameters()}
    assert all(parameter.requires_grad for parameter in distiller.auxiliary_parameters())


def test_a_stored_distiller_goes_on_where_it_was(name, tmp_path):
    student, teacher = pair()
    first, second = made(name, student, teacher), made(name, student, teacher)
    outputs = student(batch().images), teacher(batch().images)
    first(*outputs, batch())
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    losses = []
    for distiller in (first, second):
        torch.manual_seed(7)
        losses.append(distiller(*outputs, batch()).item())
    assert losses[0] == losses[1]


def test_feature_maps_that_it_does_not_read_are_not_sent_between_processes(name, monkeypatch):
    student, teacher = pair()
    distiller = made(name, student, teacher)
    sent: list[Outputs] = []

    def gathered(*said: Any) -> Any:
        sent.extend(said[:2])
        return said

    monkeypatch.setattr(sys.modules[type(distiller).__module__], "gathered", gathered, raising=False)
    distiller(student(batch().images), teacher(batch().images), batch())
    for outputs in sent:
        views = [outputs, *outputs.views.values()]
        assert sum(len(view.taps) for view in views) <= int(bool(distiller.needs & {"taps", "class_maps"}))
        assert "embedding" in distiller.needs or all(view.embedding is None for view in views)
