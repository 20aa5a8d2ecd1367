"""Every fast path computes what the plain one does, up to the rounding of its number format."""

import subprocess
import sys
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from cil.build import Run
from cil.checking import check
from cil.cli import compose
from cil.config import ConfigError
from cil.fast import PLAIN, Fast
from cil.learners.base import Learner, learners
from cil.models.dkt import BeforeNorm
from cil.models.network import models
from cil.optim import Recipe, make_optimizer
from cil.stages import Stage
from kd import Batch, WeightedSum, distillers
from tests.conftest import RunTiny, run_tiny_in, tiny_command
from tests.run_folders import metrics_of, results_of

ROOT = Path(__file__).parents[2]
SMALL = {"width": 24, "num_heads": 2, "depth": 2, "stem_width": 8, "drop_path": 0.0}


def in_second_task(name: str, fast: Fast, dtype: torch.dtype) -> Learner:
    torch.manual_seed(0)
    network = models[name]((3, 16, 16), **SMALL)
    learner = learners["dkt"](network, WeightedSum({"kd": (1.0, distillers["kd"](temperature=2.0))}))
    for index in range(2):
        learner.begin_stage(Stage(index, range(2 * index, 2 * index + 2), Recipe(), has_memory=True))
    learner.to(torch.float64 if dtype == torch.float64 else torch.float32)
    fast.apply(learner)
    return learner.train()


def numbers(learner: Learner, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Losses, gradients and running statistics of a step."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(8, 3, 16, 16, generator=generator)
    images = images.double() if dtype == torch.float64 else images
    batch = Batch(images, torch.arange(8) % 4, torch.arange(8))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        losses = learner(batch)
    sum(losses.values()).backward()
    yield from ((name, loss.detach()) for name, loss in losses.items())
    for name, parameter in learner.network.named_parameters():
        if parameter.grad is not None:
            yield f"gradient of {name}", parameter.grad
    for name, buffer in learner.network.named_buffers():
        yield name, buffer.double()


def distance(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Of all numbers of a step from the exact ones, relative to their length."""
    assert found.keys() == exact.keys()
    apart, whole = (
        torch.cat([value.double().flatten() for value in values])
        for values in ([found[name] - exact[name] for name in exact], exact.values())
    )
    return float(apart.norm() / whole.norm())


@pytest.mark.parametrize("switch", ["channels_last", "recompute", "all"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_step_of_dkt_on_the_fast_paths_is_as_near_to_the_exact_one_as_the_plain_one(
    switch: str, dtype: torch.dtype
) -> None:
    fast = Fast() if switch == "all" else PLAIN.model_copy(update={switch: True})
    exact = dict(numbers(in_second_task("dkt", PLAIN, torch.float64), torch.float64))
    plain, found = (distance(dict(numbers(in_second_task("dkt", path, dtype), dtype)), exact) for path in (PLAIN, fast))
    assert found <= max(1.5 * plain, 1e-13)


def test_what_norm_and_gelu_gave_is_not_kept() -> None:
    kept = {}
    for recompute in (False, True):
        learner = in_second_task("dkt", PLAIN.model_copy(update={"recompute": recompute}), torch.float32)
        sizes: dict[int, int] = {}

        def count(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            network = learner.network
            network(torch.randn(8, 3, 16, 16))
        kept[recompute] = sum(sizes.values())
    hidden = 8 * 16 * 4 * SMALL["width"] * 4  # bytes of a map inside the MLP of an encoder block
    assert kept[False] - kept[True] >= 4 * hidden * SMALL["depth"] * 0.9


def test_a_gradient_of_a_gradient_is_the_plain_one() -> None:
    """Attention by gradients (`kd=at_gradient`) differentiates the gradient of a loss by a map of the student."""
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        network = models["dkt"]((3, 16, 16), **SMALL).double()
        network.grow(3)
        PLAIN.model_copy(update={"recompute": recompute}).apply(Learner(network, None))
        images = torch.randn(4, 3, 16, 16, dtype=torch.float64, requires_grad=True)
        (by_image,) = torch.autograd.grad(network(images).logits.square().sum(), images, create_graph=True)
        by_image.square().sum().backward()
        found.append([by_image.detach(), *(p.grad for p in network.parameters() if p.grad is not None)])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-10 * float(plain.abs().max()) + 1e-12)


def test_nothing_of_a_step_is_kept_after_it(run_tiny: RunTiny) -> None:
    alive: list[weakref.ref[Tensor]] = []
    left: list[int] = []
    convolve = BeforeNorm.linear

    def convolving(module: BeforeNorm, *arguments: Any) -> Tensor:
        maps = convolve(module, *arguments)
        if maps.requires_grad:
            alive.append(weakref.ref(maps))
        return maps

    def beginning(learner: Learner, batch: Batch) -> dict[str, Tensor]:
        left.append(sum(reference() is not None for reference in alive))
        alive.clear()
        return forward(learner, batch)

    forward = learners["dkt"].forward
    with mock.patch.object(BeforeNorm, "linear", convolving), mock.patch.object(learners["dkt"], "forward", beginning):
        run_tiny()
    assert len(left) > 10
    assert set(left) == {0}


@pytest.mark.parametrize("name", ["resnet_cifar", "vgg", "wrn"])
def test_a_convolutional_network_answers_the_same_in_both_layouts(name: str) -> None:
    torch.manual_seed(0)
    network = models[name]((3, 32, 32)).double().eval()
    network.grow(3)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    answers = []
    for fast in (PLAIN, Fast()):
        fast.apply(Learner(network, None))
        answers.append(network(images).logits)
    torch.testing.assert_close(*answers, rtol=0, atol=1e-10)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_fused_step_is_the_plain_one(optimizer: str) -> None:
    moved = []
    for fused in (False, True):
        torch.manual_seed(0)
        layer = torch.nn.Linear(5, 3)
        steps = make_optimizer(layer, Recipe(optimizer=optimizer, lr=0.1, weight_decay=0.1), fused=fused)
        for _ in range(3):
            steps.zero_grad()
            layer(torch.ones(2, 5)).square().sum().backward()
            steps.step()
        moved.append(layer.weight.detach())
    torch.testing.assert_close(*moved, rtol=1e-5, atol=1e-6)


def test_fast_off_reaches_every_network_of_a_run(run_tiny: RunTiny) -> None:
    run = Run.build(check(compose(tiny_command(run_tiny("fast=off").parent, "fast=off"))))
    run.learner.begin_stage(run.stage(0))
    run.learner.begin_stage(run.stage(1))
    run.config.fast.apply(run.learner)
    switched = [module for module in run.learner.modules() if hasattr(module, "channels_last")]
    assert len(switched) > 8
    assert {(module.channels_last, getattr(module, "recompute", False)) for module in switched} == {(False, False)}
    assert metrics_of(run.config.folder)["finished"]


def test_both_ways_learn_alike(run_tiny: RunTiny, run_again: RunTiny) -> None:
    found = [metrics_of(run)["average_incremental_accuracy"] for run in (run_tiny(), run_again("fast=off"))]
    assert abs(found[0] - found[1]) < 0.1


@pytest.fixture
def run_again(tmp_path_factory: pytest.TempPathFactory) -> RunTiny:
    """Another folder of runs."""
    return partial(run_tiny_in, tmp_path_factory.mktemp("again"), report=False)


def test_an_unknown_switch_is_refused() -> None:
    with pytest.raises(ConfigError, match="compile_teacher"):
        check(compose(["fast.compile_teachers=true"]))
    with pytest.raises(ConfigError, match=r"fast=fsat|Known: off, on"):
        compose(["fast=fsat"])


@pytest.mark.slow
def test_a_compiled_teacher_says_the_same(run_tiny: RunTiny, tmp_path: Path) -> None:
    plain = results_of(run_tiny("precision=fp32"))
    # in a process without the checks of shapes and warnings of the tests, which the compiler would compile too
    words = tiny_command(tmp_path / "compiled", "precision=fp32", "fast.compile_teacher=true")
    subprocess.run([sys.executable, "train_incremental.py", *words], check=True, cwd=ROOT, capture_output=True)
    compiled = results_of(tmp_path / "compiled" / "run")
    assert compiled["finished"]
    assert abs(plain["average_incremental_accuracy"] - compiled["average_incremental_accuracy"]) < 0.1
