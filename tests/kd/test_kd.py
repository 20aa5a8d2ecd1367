import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd import Batch, Outputs, distillers
from kd.logit.kd import KD


def batch_of(count: int) -> Batch:
    labels = torch.zeros(count, dtype=torch.int64)
    return Batch(torch.zeros(count, 1, 1, 1), labels, torch.arange(count))


def loss(kd: KD, student: Tensor, teacher: Tensor) -> Tensor:
    return kd(Outputs(student), Outputs(teacher), batch_of(len(student)))


def logits(seed: int, shape: tuple[int, int] = (6, 5)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_is_found_by_its_name():
    assert distillers["kd"] is KD


def test_two_classes_by_hand():
    student = torch.zeros(1, 2, dtype=torch.float64)
    teacher = torch.tensor([[math.log(3), 0.0]], dtype=torch.float64)  # 3/4 and 1/4
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    torch.testing.assert_close(loss(KD(temperature=1.0), student, teacher).item(), expected, rtol=0, atol=1e-15)


def test_the_temperature_divides_logits_and_its_square_multiplies_the_loss():
    warm = loss(KD(temperature=3.0), logits(0), logits(1))
    cold = loss(KD(temperature=1.0), logits(0) / 3, logits(1) / 3)
    torch.testing.assert_close(warm, 9 * cold)


def test_mean_is_batchmean_over_the_number_of_classes():
    batchmean = loss(KD(), logits(0), logits(1))
    torch.testing.assert_close(loss(KD(reduction="mean"), logits(0), logits(1)), batchmean / 5)


def test_a_student_that_agrees_has_no_loss_and_no_gradient():
    student = logits(0).requires_grad_()
    value = loss(KD(), student, logits(0))
    value.backward()
    assert value.abs() < 1e-15
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-15


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    shift=st.lists(st.floats(-50, 50), min_size=6, max_size=6),
    temperature=st.floats(0.5, 20),
)
def test_a_constant_added_to_all_logits_of_a_sample_changes_nothing(seed, shift, temperature):
    kd, by_sample = KD(temperature=temperature), torch.tensor(shift, dtype=torch.float64)[:, None]
    plain = loss(kd, logits(seed), logits(seed + 1))
    torch.testing.assert_close(loss(kd, logits(seed) + by_sample, logits(seed + 1)), plain, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(loss(kd, logits(seed), logits(seed + 1) + by_sample), plain, rtol=1e-9, atol=1e-11)
    assert plain >= 0


def test_no_gradient_reaches_the_teacher():
    student, teacher = logits(0).requires_grad_(), logits(1).requires_grad_()
    loss(KD(), student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_are_compared_in_float32(dtype):
    value = loss(KD(), logits(0).to(dtype), logits(1).to(dtype))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(KD(), logits(0).to(dtype).float(), logits(1).to(dtype).float()))


def test_certain_logits_give_a_finite_loss():
    student = torch.tensor([[120.0, -120.0]]).requires_grad_()
    value = loss(KD(temperature=1.0), student, torch.tensor([[-120.0, 120.0]]))
    value.backward()
    assert value.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature must be above 0"):
        KD(temperature=temperature)


def test_an_unknown_reduction_is_refused():
    with pytest.raises((ValueError, TypeError), match="reduction"):
        KD(reduction="sum")  # type: ignore[arg-type]


def test_different_numbers_of_classes_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"\(6, 5\).*\(6, 3\).*first"):
        loss(KD(), logits(0), logits(1, (6, 3)))
