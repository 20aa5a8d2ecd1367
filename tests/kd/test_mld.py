import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd import Batch, Outputs, distillers
from kd.logit.kd import KD
from kd.logit.mld import MLD, batch_level, class_level, instance_level, rare_classes, uncertain_samples
from tests.parity.case import Case, read_cases
from tests.parity.runner import check

GOLDENS = [
    case for case in read_cases(Path(__file__).parents[1] / "goldens" / "kd.npz") if case.name.startswith("mld/")
]
BATCH = Batch(torch.zeros(6, 1, 1, 1), torch.zeros(6, dtype=torch.int64), torch.arange(6))


def logits(seed: int, num_classes: int = 5) -> Tensor:
    return torch.randn(6, num_classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def two_views(weak: int, strong: int) -> Outputs:
    return Outputs(logits(weak), views={"strong": Outputs(logits(strong))})


def test_is_found_by_its_name():
    assert distillers["mld"] is MLD


@pytest.mark.parametrize("case", GOLDENS, ids=lambda case: case.name)
def test_is_what_the_golden_file_says(case: Case):
    assert check(case).misses == []


def test_two_samples_of_two_classes_by_hand():
    student = torch.zeros(2, 2, dtype=torch.float64)
    teacher = torch.tensor([[3.0, 1.0], [1.0, 3.0]], dtype=torch.float64).log()  # 3/4 and 1/4
    same, other = 10 / 16, 6 / 16  # of the teacher's products, of samples as of classes; the student's are all 1/2
    expected = (2 * (same - 0.5) ** 2 + 2 * (other - 0.5) ** 2) / 2
    assert batch_level(student, teacher, 1.0).item() == pytest.approx(expected, abs=1e-15)
    assert class_level(student, teacher, 1.0).item() == pytest.approx(expected, abs=1e-15)


def test_the_instance_level_is_plain_kd():
    student, teacher = logits(0), logits(1)
    expected = KD(temperature=3.0)(Outputs(student), Outputs(teacher), BATCH)
    torch.testing.assert_close(instance_level(student, teacher, 3.0), expected)


def test_the_paper_sums_all_levels_over_temperatures_and_views():
    mld = MLD(temperatures=(2.0, 5.0))
    student, teacher = two_views(0, 1), two_views(2, 3)
    pairs = [(logits(0), logits(2)), (logits(1), logits(3))]
    levels = (instance_level, class_level, batch_level)
    expected = sum(level(*pair, T) for level in levels for pair in pairs for T in (2.0, 5.0))
    torch.testing.assert_close(mld(student, teacher, BATCH), expected)


def test_the_weak_view_alone_is_the_sum_over_temperatures():
    mld = MLD(temperatures=(2.0, 5.0), views="weak")
    assert mld.needs == {"logits"}
    terms = mld.terms(two_views(0, 1), two_views(2, 3))
    torch.testing.assert_close(
        terms["cc"], class_level(logits(0), logits(2), 2.0) + class_level(logits(0), logits(2), 5.0)
    )
    assert MLD().needs == {"logits", "strong"}


def test_the_release_counts_weak_terms_in_the_place_of_strong_ones():
    student, teacher = two_views(0, 1), two_views(2, 3)
    terms = MLD(variant="released").terms(student, teacher)
    weak, strong = (logits(0), logits(2)), (logits(1), logits(3))
    every = (4.0, 3.0, 5.0, 2.0, 6.0)
    half = 0.5  # of 6 samples 3 are at most as sure as the median
    expected = half * sum(instance_level(*weak, T) for T in every)
    expected = expected + sum(instance_level(*strong, T) for T in every[:3])
    expected = expected + sum(instance_level(*weak, T) for T in every[3:])
    torch.testing.assert_close(terms["kd"], expected)
    torch.testing.assert_close(terms["bc"], half * sum(batch_level(*weak, T) for T in every))
    torch.testing.assert_close(terms["cc"], 3 / 5 * sum(class_level(*weak, T) for T in every))


def test_the_uncertain_samples_and_rare_classes_are_those_up_to_the_median():
    teacher = torch.tensor([[4.0, 0.0, 0.0], [3.0, 0.0, 0.0], [1.0, 0.0, -1.0], [0.0, 2.0, 0.0]])
    assert uncertain_samples(teacher).tolist() == [False, False, True, True]
    assert rare_classes(teacher).tolist() == [False, True, True]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), temperature=st.floats(0.5, 10), permutation=st.permutations(range(6)))
def test_the_order_of_samples_changes_nothing(seed, temperature, permutation):
    for variant in ("paper", "released"):
        mld = MLD(temperatures=(temperature, 3.0, 5.0, 2.0, 6.0), variant=variant, views="weak")
        before = mld(Outputs(logits(seed)), Outputs(logits(seed + 1)), BATCH)
        after = mld(Outputs(logits(seed)[permutation]), Outputs(logits(seed + 1)[permutation]), BATCH)
        torch.testing.assert_close(after, before)


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_a_student_that_agrees_has_no_loss_and_no_gradient(variant):
    student = logits(0).requires_grad_()
    value = MLD(variant=variant)(Outputs(student, views={"strong": Outputs(student)}), two_views(0, 0), BATCH)
    value.backward()
    assert student.grad is not None
    assert value.abs() < 1e-14
    assert student.grad.abs().max() < 1e-14


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_no_gradient_reaches_the_teacher(variant):
    s, t = (
        [logits(0).requires_grad_(), logits(1).requires_grad_()],
        [logits(2).requires_grad_(), logits(3).requires_grad_()],
    )
    student, teacher = (Outputs(weak, views={"strong": Outputs(strong)}) for weak, strong in (s, t))
    value = MLD(variant=variant)(student, teacher, BATCH)
    value.backward()
    assert value.shape == ()
    assert all(leaf.grad is not None for leaf in s)
    assert all(leaf.grad is None for leaf in t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_certain_logits_give_a_finite_loss_in_float32(dtype, variant):
    leaf = torch.tensor([[120.0, -120.0, 0.0], [0.0, 500.0, 0.0]], dtype=dtype).requires_grad_()
    student = Outputs(leaf, views={"strong": Outputs(leaf)})
    teacher = Outputs(-leaf.detach(), views={"strong": Outputs(leaf.detach())})
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not torch.float32):
        value = MLD(temperatures=(1.0, 3.0, 5.0, 2.0, 6.0), variant=variant)(student, teacher, BATCH)
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("level", [class_level, batch_level])
def test_products_are_not_narrowed_by_autocast(level):
    student, teacher = logits(0).float(), logits(1).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = level(student, teacher, 2.0)
    assert torch.equal(inside, level(student, teacher, 2.0))


def test_a_missing_view_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r'no view "strong" of the student.*views=weak'):
        MLD()(Outputs(logits(0)), two_views(1, 2), BATCH)
    with pytest.raises(ValueError, match=r'no view "strong" of the teacher'):
        MLD()(two_views(1, 2), Outputs(logits(0)), BATCH)


@pytest.mark.parametrize("temperatures", [(), (4.0, 0.0), (-1.0,), (math.nan,)])
def test_temperatures_that_are_not_positive_are_refused(temperatures):
    with pytest.raises(ValueError, match=r"mld\.temperatures must be numbers above 0"):
        MLD(temperatures=temperatures)


def test_the_release_has_five_temperatures():
    with pytest.raises(ValueError, match=r"mld\.temperatures must be 5 numbers for variant=released"):
        MLD(temperatures=(4.0, 2.0), variant="released")


@pytest.mark.parametrize("parameter", ["variant", "views"])
def test_an_unknown_choice_is_refused(parameter):
    with pytest.raises((ValueError, TypeError), match=parameter):
        MLD(**{parameter: "both"})


def test_different_numbers_of_classes_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"mld compares.*\(6, 5\).*\(6, 3\).*first"):
        MLD(views="weak")(Outputs(logits(0)), Outputs(logits(1, 3)), BATCH)
