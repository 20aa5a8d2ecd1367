"""Checks of distillation losses: cases that name an operation in `hp/op` (groups hp, in, param, out, grad, after)."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kd import Batch, Distiller, Outputs
from kd.logit.kd import KD
from tests.parity.case import Array, Case, Comparison

SCALED_TOLERANCE = 1e-10
SINGLE_TOLERANCE = 1e-6  # of arrays that the file has in float32
DIFFERENT = 1e-6  # a negative control must be this far off


@dataclass
class Problem:
    """What an operation is given: hyper-parameters, inputs and parameters; floating-point ones take gradients."""

    hp: dict[str, Array]
    inputs: dict[str, Tensor]
    params: dict[str, Tensor]

    def number(self, name: str) -> float:
        return float(self.hp[name])


@dataclass
class Answer:
    """What an operation gives back; `leaves` are the tensors to differentiate by where they are not those given."""

    out: dict[str, Tensor]
    after: dict[str, Tensor] = field(default_factory=dict)
    leaves: dict[str, Tensor] = field(default_factory=dict)


operations: dict[str, Callable[[Problem], Answer]] = {}


def operation(name: str) -> Callable[[Callable[[Problem], Answer]], Callable[[Problem], Answer]]:
    def enter(function: Callable[[Problem], Answer]) -> Callable[[Problem], Answer]:
        operations[name] = function
        return function

    return enter


def on_logits(distiller: Distiller, problem: Problem) -> Tensor:
    """The loss of a distiller that reads logits, and labels where there are any."""
    student, teacher = Outputs(problem.inputs["student"]), Outputs(problem.inputs["teacher"])
    count = len(student.logits)
    labels = problem.inputs.get("target", torch.zeros(count, dtype=torch.int64))
    images = torch.zeros(count, 1, 1, 1, dtype=student.logits.dtype)
    loss: Tensor = distiller(student, teacher, Batch(images, labels, torch.arange(count)))
    return loss


@operation("kd.loss")
def kd_loss(problem: Problem) -> Answer:
    return Answer({"loss": on_logits(KD(temperature=problem.number("temperature")), problem)})


@operation("kd.mix")
def kd_mix(problem: Problem) -> Answer:
    alpha = problem.number("alpha")
    distance = on_logits(KD(temperature=problem.number("temperature")), problem)
    ce = F.cross_entropy(problem.inputs["student"], problem.inputs["target"])
    return Answer({"loss": alpha * ce + (1 - alpha) * distance})


def check_operation(case: Case, comparison: Comparison) -> None:
    name, expect = str(case["hp/op"]), str(case["hp/expect"])
    if name not in operations:
        message = f"the operation {name!r} is unknown; known: {', '.join(operations)}"
        (comparison.excused if expect == "optional" else comparison.misses).append(message)
        return
    exact = expect != "finite"  # computed in float64, whatever the file has
    problem = Problem(
        {key: case[f"hp/{key}"] for key in case.names("hp/")},
        {key: _leaf(value, exact) for key, value in case.group("in/").items()},
        {key: _leaf(value, exact) for key, value in case.group("param/").items()},
    )
    answer = operations[name](problem)
    leaves = problem.params | problem.inputs | answer.leaves
    if expect == "differ":
        distance = abs(answer.out["loss"].item() - float(case["out/loss"]))
        comparison.true(f"differs from out/loss by more than {DIFFERENT}", distance > DIFFERENT)
        case.ignore(*case.arrays)
    elif expect == "finite":
        (gradient,) = torch.autograd.grad(answer.out["loss"], [leaves["student"]])
        comparison.true("loss is finite", bool(answer.out["loss"].isfinite()))
        comparison.true("gradient is finite", bool(gradient.isfinite().all()))
    elif expect in ("equal", "optional"):
        _compare(case, comparison, answer, leaves)
    else:
        raise LookupError(f"hp/expect must be equal, finite, differ or optional, found {expect!r}")


def _leaf(value: Tensor, exact: bool) -> Tensor:
    if exact and value.is_floating_point():
        value = value.double()
    return value.requires_grad_(value.is_floating_point())


def _compare(case: Case, comparison: Comparison, answer: Answer, leaves: dict[str, Tensor]) -> None:
    for group, found in (("out", answer.out), ("after", answer.after)):
        for name in case.names(f"{group}/"):
            if name in found:
                _scaled(case, comparison, f"{group}/{name}", found[name])
            else:
                comparison.misses.append(f"{group}/{name}: this operation has none, known: {', '.join(found)}")
    for group in sorted({key.split("/")[0] for key in case.arrays if key.startswith("grad")}):
        scalar = answer.out[group.removeprefix("grad").removeprefix("_") or "loss"]
        for name in case.names(f"{group}/"):
            _scaled(case, comparison, f"{group}/{name}", _gradient(scalar, leaves[name]))
    # no loss sends a gradient to its teacher
    if "teacher" in leaves and "grad/teacher" not in case and answer.out["loss"].requires_grad:
        comparison.true("the teacher gets no gradient", not _gradient(answer.out["loss"], leaves["teacher"]).any())


def _scaled(case: Case, comparison: Comparison, key: str, found: Tensor) -> None:
    golden = case[key]
    tolerance = SINGLE_TOLERANCE if golden.dtype == np.float32 else SCALED_TOLERANCE
    comparison.scaled(key, found, golden, tolerance)


def _gradient(scalar: Tensor, leaf: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(scalar, [leaf], retain_graph=True, allow_unused=True)
    return torch.zeros_like(leaf) if gradient is None else gradient
