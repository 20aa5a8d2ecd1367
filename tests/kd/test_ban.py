from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd import Batch, Distiller, Outputs, distillers
from kd.logit.ban import BAN, CWTM, DKPP, ensemble, permuted, soft_cross_entropy
from kd.logit.kd import KD
from tests.parity.case import Case, read_cases
from tests.parity.runner import check

GOLDENS = [
    case for case in read_cases(Path(__file__).parents[1] / "goldens" / "kd.npz") if case.name.startswith("ban/")
]
LABELS = torch.tensor([0, 1, 2, 3, 4, 4])
METHODS = {"ban": BAN, "cwtm": CWTM, "dkpp": DKPP}


def logits(seed: int, num_classes: int = 5) -> Tensor:
    return torch.randn(6, num_classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss(distiller: Distiller, student: Tensor, teacher: Tensor, labels: Tensor = LABELS) -> Tensor:
    batch = Batch(torch.zeros(len(labels), 1, 1, 1), labels, torch.arange(len(labels)))
    return distiller(Outputs(student), Outputs(teacher), batch)


@pytest.mark.parametrize("name", METHODS)
def test_is_found_by_its_name(name):
    assert distillers[name] is METHODS[name]


@pytest.mark.parametrize("case", GOLDENS, ids=lambda case: case.name)
def test_is_what_the_golden_file_says(case: Case):
    assert check(case).misses == []


def test_born_again_is_kd_at_temperature_1_and_the_entropy_of_the_teacher():
    student, teacher = logits(0).requires_grad_(), logits(1)
    p = F.softmax(teacher, dim=1)
    ban, kd = loss(BAN(), student, teacher), loss(KD(temperature=1.0), student, teacher)
    torch.testing.assert_close(ban, kd - (p * p.log()).sum(dim=1).mean())
    torch.testing.assert_close(torch.autograd.grad(ban, student), torch.autograd.grad(kd, student))


def test_a_teacher_that_is_as_sure_of_every_sample_gives_the_label_loss():
    teacher = torch.eye(5, dtype=torch.float64)[[0, 0, 3, 2, 1, 4]]
    torch.testing.assert_close(loss(CWTM(), logits(0), teacher), F.cross_entropy(logits(0), LABELS))


def test_samples_weigh_what_the_teacher_is_sure_of_them():
    student, teacher = logits(0), logits(1)
    confidence = F.softmax(teacher, dim=1).amax(dim=1)
    expected = (confidence * F.cross_entropy(student, LABELS, reduction="none")).sum() / confidence.sum()
    torch.testing.assert_close(loss(CWTM(), student, teacher), expected)


def test_samples_of_classes_new_to_the_teacher_are_left_out_of_the_weights():
    labels = torch.tensor([0, 7, 2, 9, 4, 5])
    known = labels < 5
    expected = loss(CWTM(), logits(0)[known], logits(1)[known], labels[known])
    torch.testing.assert_close(loss(CWTM(), logits(0), logits(1), labels), expected)


def test_a_batch_of_new_classes_has_no_loss_and_no_gradient():
    student = logits(0).requires_grad_()
    value = loss(CWTM(), student, logits(1), torch.full((6,), 5))
    value.backward()
    assert value == 0
    assert student.grad is not None
    assert not student.grad.any()


def test_the_permutation_counts_the_classes_but_the_largest():
    probabilities = torch.tensor([[0.1, 0.2, 0.4, 0.3], [0.7, 0.0, 0.1, 0.2]])
    found = permuted(probabilities, torch.tensor([[2, 0, 1], [1, 2, 0]]))
    torch.testing.assert_close(found, torch.tensor([[0.3, 0.1, 0.4, 0.2], [0.7, 0.1, 0.2, 0.0]]))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), permutation=st.permutations(range(4)))
def test_a_permutation_keeps_the_largest_and_the_numbers(seed, permutation):
    before = F.softmax(logits(seed), dim=1)
    after = permuted(before, torch.tensor([permutation] * 6))
    assert torch.equal(after.argmax(dim=1), before.argmax(dim=1))
    assert torch.equal(after.amax(dim=1), before.amax(dim=1))
    assert torch.equal(after.sort(dim=1).values, before.sort(dim=1).values)


def test_the_permutation_that_changes_nothing_gives_born_again():
    probabilities = permuted(F.softmax(logits(1), dim=1), torch.arange(4).expand(6, 4))
    torch.testing.assert_close(soft_cross_entropy(logits(0), probabilities), loss(BAN(), logits(0), logits(1)))


def test_permutations_come_from_torch_and_differ_between_samples():
    student, teacher = torch.arange(20.0)[None].expand(64, 20), torch.arange(20.0)[None].expand(64, 20) / 10
    labels = torch.zeros(64, dtype=torch.int64)
    torch.manual_seed(0)
    first, second = loss(DKPP(), student, teacher, labels), loss(DKPP(), student, teacher, labels)
    torch.manual_seed(0)
    assert torch.equal(loss(DKPP(), student, teacher, labels), first)
    assert not torch.equal(first, second)
    one_for_all = loss(DKPP(), student[:1], teacher[:1], labels[:1])
    assert not torch.isclose(one_for_all, first)


def test_an_ensemble_is_the_mean_of_probabilities_and_not_of_logits():
    members = [torch.tensor([[100.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
    mean = torch.stack([member.softmax(dim=1) for member in members]).mean(dim=0)
    torch.testing.assert_close(ensemble(members), mean)
    assert ensemble(members)[0, 0] < 0.99 < torch.stack(members).mean(dim=0).softmax(dim=1)[0, 0]
    torch.testing.assert_close(ensemble(members[:1]), members[0].softmax(dim=1))


def test_an_ensemble_of_nobody_is_refused():
    with pytest.raises(ValueError, match="at least one member"):
        ensemble([])


@pytest.mark.parametrize("method", METHODS.values())
def test_no_gradient_reaches_the_teacher(method):
    student, teacher = logits(0).requires_grad_(), logits(1).requires_grad_()
    value = loss(method(), student, teacher)
    value.backward()
    assert value.shape == ()
    assert teacher.grad is None
    assert student.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS.values())
def test_certain_logits_give_a_finite_loss_in_float32(method, dtype):
    student = torch.tensor([[120.0, -120.0, 0.0], [0.0, 500.0, 0.0]], dtype=dtype).requires_grad_()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not torch.float32):
        value = loss(method(), student, -student.detach(), torch.tensor([1, 0]))
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", METHODS)
def test_different_numbers_of_classes_are_refused_with_the_way_out(name):
    with pytest.raises(ValueError, match=rf"{name} compares.*\(6, 5\).*\(6, 3\).*first"):
        loss(METHODS[name](), logits(0), logits(1, 3))
