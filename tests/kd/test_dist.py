import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd import Batch, Outputs, distillers
from kd.logit.dist import DIST, correlation


def logits(seed: int, shape: tuple[int, int] = (6, 5)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss(dist: DIST, student: Tensor, teacher: Tensor) -> Tensor:
    count = len(student)
    batch = Batch(torch.zeros(count, 1, 1, 1), torch.zeros(count, dtype=torch.int64), torch.arange(count))
    return dist(Outputs(student), Outputs(teacher), batch)


def by_numpy(student: Tensor, teacher: Tensor, beta: float, gamma: float, temperature: float) -> float:
    """The formula with NumPy's correlation matrices."""
    p, q = (np.exp(z.numpy() / temperature) for z in (student, teacher))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    inter = np.mean([np.corrcoef(p[row], q[row])[0, 1] for row in range(p.shape[0])])
    intra = np.mean([np.corrcoef(p[:, column], q[:, column])[0, 1] for column in range(p.shape[1])])
    return float(temperature**2 * (beta * (1 - inter) + gamma * (1 - intra)))


def test_is_found_by_its_name():
    assert distillers["dist"] is DIST


def test_two_samples_of_three_classes_by_hand():
    """Intra-class correlations of two samples are signs; the inter-class ones are those of (3, 2, 1) with (3, 1, 2)
    and with itself: 1/2 and 1."""
    student = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]], dtype=torch.float64).log()
    teacher = torch.tensor([[3.0, 1.0, 2.0], [1.0, 2.0, 3.0]], dtype=torch.float64).log()
    inter = 1 - (1 / 2 + 1) / 2
    intra = 1 - (1 + 0 + 1) / 3  # the second class is as likely in both samples of the student
    found = loss(DIST(beta=2.0, gamma=3.0, temperature=1.0), student, teacher)
    assert found.item() == pytest.approx(2 * inter + 3 * intra, abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), beta=st.floats(0, 5), gamma=st.floats(0, 5), temperature=st.floats(0.5, 10))
def test_is_what_numpy_computes(seed, beta, gamma, temperature):
    student, teacher = logits(seed), logits(seed + 1)
    dist = DIST(beta=beta, gamma=gamma, temperature=temperature)
    expected = by_numpy(student, teacher, beta, gamma, temperature)
    assert loss(dist, student, teacher).item() == pytest.approx(expected, rel=1e-9, abs=1e-11)


def test_the_gradient_is_that_of_finite_differences():
    student = logits(0).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(DIST(), z, logits(1)), student)


def test_a_student_that_agrees_has_no_loss_and_no_gradient():
    student = logits(0).requires_grad_()
    value = loss(DIST(), student, logits(0))
    value.backward()
    assert student.grad is not None
    assert value.abs() < 1e-12
    assert student.grad.abs().max() < 1e-12


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(0.1, 10), shift=st.floats(-5, 5))
def test_probabilities_on_any_scale_agree(seed, scale, shift):
    """What sets DIST apart from KD: a correlation does not see scale and place, so an exact match is not asked for."""
    rows, other = logits(seed), logits(seed + 1)
    torch.testing.assert_close(correlation(scale * rows + shift, other), correlation(rows, other))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), order=st.permutations(range(6)))
def test_the_order_of_the_samples_makes_no_difference_and_the_loss_is_bounded(seed, order):
    student, teacher = logits(seed), logits(seed + 1)
    value = loss(DIST(temperature=1.0), student, teacher)
    torch.testing.assert_close(loss(DIST(temperature=1.0), student[list(order)], teacher[list(order)]), value)
    assert 0 <= value <= 2 * (2 + 2)  # every correlation is at least -1


def test_beta_and_gamma_weight_the_two_parts():
    student, teacher = logits(0), logits(1)
    parts = [loss(DIST(beta=b, gamma=g), student, teacher) for b, g in ((1.0, 0.0), (0.0, 1.0))]
    torch.testing.assert_close(loss(DIST(beta=3.0, gamma=5.0), student, teacher), 3 * parts[0] + 5 * parts[1])


def test_the_temperature_divides_logits_and_its_square_multiplies_the_loss():
    warm = loss(DIST(temperature=3.0), logits(0), logits(1))
    cold = loss(DIST(temperature=1.0), logits(0) / 3, logits(1) / 3)
    torch.testing.assert_close(warm, 9 * cold)


@pytest.mark.parametrize("shape", [(6, 1), (1, 5), (1, 1)])
def test_what_has_no_spread_correlates_with_nothing_and_sends_no_gradient(shape):
    """A single class has neither relation; a single sample has no intra-class one."""
    student = logits(0, shape).requires_grad_()
    value = loss(DIST(beta=0.0 if shape[1] > 1 else 2.0, temperature=1.0), student, logits(1, shape))
    value.backward()
    assert value.item() == pytest.approx(2.0 if shape[1] > 1 else 4.0)
    assert student.grad is not None
    assert not student.grad.any()


def test_no_gradient_reaches_the_teacher():
    student, teacher = logits(0).requires_grad_(), logits(1).requires_grad_()
    value = loss(DIST(), student, teacher)
    value.backward()
    assert value.shape == ()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("margin", [20.0, 120.0, 1000.0])
def test_certain_logits_give_a_finite_loss_and_gradient(dtype, margin):
    student = torch.tensor([[margin, 0.0, -margin], [0.0, margin, 0.0]], dtype=dtype).requires_grad_()
    teacher = torch.tensor([[-margin, margin, 0.0], [0.0, margin, 0.0]], dtype=dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not torch.float32):
        value = loss(DIST(temperature=1.0), student, teacher)
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_labels_are_not_read():
    batch = Batch(torch.zeros(6, 1, 1, 1), torch.full((6,), 99), torch.arange(6))
    found = DIST()(Outputs(logits(0)), Outputs(logits(1)), batch)
    torch.testing.assert_close(found, loss(DIST(), logits(0), logits(1)))


@pytest.mark.parametrize("parameter", ["beta", "gamma"])
@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_a_weight_that_is_negative_is_refused(parameter, value):
    with pytest.raises(ValueError, match=rf"dist\.{parameter} must not be negative"):
        DIST(**{parameter: value})


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match=r"dist\.temperature must be above 0"):
        DIST(temperature=temperature)


def test_different_numbers_of_classes_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"dist compares.*\(6, 5\).*\(6, 3\).*first"):
        loss(DIST(), logits(0), logits(1, (6, 3)))
