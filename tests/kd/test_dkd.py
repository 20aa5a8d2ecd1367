import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd import Batch, Outputs, distillers
from kd.logit.dkd import DKD
from kd.logit.kd import KD
from tests.parity.case import Case, read_cases
from tests.parity.runner import check

GOLDENS = [
    case for case in read_cases(Path(__file__).parents[1] / "goldens" / "kd.npz") if case.name.startswith("dkd/")
]
NUM_CLASSES = 5


def logits(seed: int, num_classes: int = NUM_CLASSES) -> Tensor:
    return torch.randn(6, num_classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels_of(seed: int, num_classes: int = NUM_CLASSES) -> Tensor:
    return torch.randint(num_classes, (6,), generator=torch.Generator().manual_seed(seed))


def batch_of(labels: Tensor) -> Batch:
    return Batch(torch.zeros(len(labels), 1, 1, 1), labels, torch.arange(len(labels)))


def loss(dkd: DKD, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return dkd(Outputs(student), Outputs(teacher), batch_of(labels))


def plain(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    kd = KD(temperature=temperature)
    return kd(Outputs(student), Outputs(teacher), batch_of(torch.zeros(len(student), dtype=torch.int64)))


def test_is_found_by_its_name():
    assert distillers["dkd"] is DKD


@pytest.mark.parametrize("case", GOLDENS, ids=lambda case: case.name)
def test_is_what_the_golden_file_says(case: Case):
    assert check(case).misses == []


def test_three_classes_by_hand():
    student = torch.zeros(1, 3, dtype=torch.float64)
    teacher = torch.tensor([[2.0, 3.0, 1.0]], dtype=torch.float64).log()  # 1/3, 1/2, 1/6 at temperature 1
    target = 1 / 3 * math.log(1 / 3 / (1 / 3)) + 2 / 3 * math.log(2 / 3 / (2 / 3))
    others = 3 / 4 * math.log(3 / 4 / (1 / 2)) + 1 / 4 * math.log(1 / 4 / (1 / 2))
    found = loss(DKD(alpha=1.0, beta=2.0, temperature=1.0), student, teacher, torch.tensor([0]))
    assert found.item() == pytest.approx(target + 2 * others, abs=1e-15)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), temperature=st.floats(0.5, 10))
def test_is_plain_kd_when_the_teacher_weights_the_parts(seed, temperature):
    """KD = TCKD + (1 - p_target) NCKD, sample by sample."""
    student, teacher, labels = logits(seed), logits(seed + 1), labels_of(seed)
    for row in range(6):
        one = slice(row, row + 1)
        beta = 1 - F.softmax(teacher[row] / temperature, dim=0)[labels[row]].item()
        dkd = DKD(alpha=1.0, beta=beta, temperature=temperature)
        expected = plain(student[one], teacher[one], temperature)
        torch.testing.assert_close(loss(dkd, student[one], teacher[one], labels[one]), expected, rtol=1e-9, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), shift=st.lists(st.floats(-50, 50), min_size=6, max_size=6))
def test_a_constant_added_to_all_logits_of_a_sample_changes_nothing(seed, shift):
    student, teacher, labels = logits(seed), logits(seed + 1), labels_of(seed)
    by_sample = torch.tensor(shift, dtype=torch.float64)[:, None]
    expected = loss(DKD(), student, teacher, labels)
    torch.testing.assert_close(loss(DKD(), student + by_sample, teacher - by_sample, labels), expected)
    assert expected >= 0


def test_a_student_that_agrees_has_no_loss_and_no_gradient():
    student = logits(0).requires_grad_()
    value = loss(DKD(), student, logits(0), labels_of(0))
    value.backward()
    assert student.grad is not None
    assert value.abs() < 1e-14
    assert student.grad.abs().max() < 1e-14


def test_with_two_classes_nothing_is_left_for_the_others():
    student, teacher, labels = logits(0, 2), logits(1, 2), labels_of(0, 2)
    both = loss(DKD(alpha=1.0, beta=8.0), student, teacher, labels)
    torch.testing.assert_close(both, loss(DKD(alpha=1.0, beta=0.0), student, teacher, labels))
    torch.testing.assert_close(both, plain(student, teacher))


def test_with_one_class_there_is_nothing_to_learn():
    student = logits(0, 1).requires_grad_()
    value = loss(DKD(), student, logits(1, 1), torch.tensor([0, 0, 1, 0, 2, 0]))
    value.backward()
    assert value == 0
    assert student.grad is not None
    assert not student.grad.any()


def test_a_class_new_to_the_teacher_has_no_target_part_and_plain_kd_for_the_others():
    student, teacher, new = logits(0), logits(1), torch.full((6,), NUM_CLASSES)
    assert loss(DKD(alpha=1.0, beta=0.0), student, teacher, new) == 0
    torch.testing.assert_close(loss(DKD(alpha=1.0, beta=3.0), student, teacher, new), 3 * plain(student, teacher))


def test_known_and_new_classes_are_averaged_over_the_whole_batch():
    student, teacher = logits(0), logits(1)
    labels = torch.tensor([0, 4, 7, 2, 9, 5])
    is_new = labels >= NUM_CLASSES
    apart = sum(
        mask.sum() * loss(DKD(), student[mask], teacher[mask], labels[mask]) / len(labels) for mask in (is_new, ~is_new)
    )
    torch.testing.assert_close(loss(DKD(), student, teacher, labels), apart)


def test_no_gradient_reaches_the_teacher():
    student, teacher = logits(0).requires_grad_(), logits(1).requires_grad_()
    value = loss(DKD(), student, teacher, torch.tensor([0, 1, 2, 3, 4, 5]))
    value.backward()
    assert value.shape == ()
    assert teacher.grad is None
    assert student.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("margin", [20.0, 120.0, 1000.0])
@pytest.mark.parametrize("label", [0, 1, 3])
def test_certain_logits_give_a_finite_loss_and_gradient(dtype, margin, label):
    student = torch.tensor([[margin, 0.0, -margin], [0.0, margin, 0.0]], dtype=dtype).requires_grad_()
    teacher = torch.tensor([[-margin, margin, 0.0], [0.0, margin, 0.0]], dtype=dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not torch.float32):
        value = loss(DKD(temperature=1.0), student, teacher, torch.tensor([label, label]))
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("parameter", ["alpha", "beta"])
@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_a_weight_that_is_negative_is_refused(parameter, value):
    with pytest.raises(ValueError, match=rf"dkd\.{parameter} must not be negative"):
        DKD(**{parameter: value})


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match=r"dkd\.temperature must be above 0"):
        DKD(temperature=temperature)


@pytest.mark.parametrize("soft", [torch.full((6, 5), 0.2), torch.full((6,), 0.5), torch.zeros(6, 5, dtype=torch.int64)])
def test_soft_labels_are_refused(soft):
    batch = batch_of(labels_of(0))
    batch.labels = soft
    with pytest.raises(ValueError, match=r"soft labels.*mixup"):
        DKD()(Outputs(logits(0)), Outputs(logits(1)), batch)


def test_different_numbers_of_classes_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"dkd compares.*\(6, 5\).*\(6, 3\).*first"):
        loss(DKD(), logits(0), logits(1, 3), labels_of(0))
