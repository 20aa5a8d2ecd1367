from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd import Batch, Outputs, distillers, frozen
from kd.feature.sp import SP, similarity
from tests.kd.processes import in_processes
from tests.kd.similarity_share import shared_loss
from tests.kd.tapped import images, mobilenet, resnet
from tests.parity.case import Case, read_cases
from tests.parity.runner import check

GOLDENS = Path(__file__).parents[1] / "goldens" / "kd.npz"


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def said(features: Tensor, tap: str = "stage2.post") -> Outputs:
    return Outputs(features.new_zeros(len(features), 1), taps={tap: features})


def batch_of(count: int) -> Batch:
    return Batch(torch.zeros(count, 1, 1, 1), torch.zeros(count, dtype=torch.int64), torch.arange(count))


def loss(student: Tensor, teacher: Tensor) -> Tensor:
    return SP()(said(student), said(teacher), batch_of(len(student)))


def golden() -> Case:
    (case,) = [case for case in read_cases(GOLDENS) if case.name.startswith("sp/")]
    return case


def test_is_found_by_its_name():
    assert distillers["sp"] is SP


def test_the_golden_case_passes():
    assert check(golden()).misses == []


def test_rows_of_length_1_in_the_sum_of_absolute_values_are_something_else():
    case = golden()
    grams = [case.tensor(f"in/{name}").flatten(1) for name in ("f_s", "f_t")]
    wrong = F.mse_loss(*(F.normalize(f @ f.T, p=1.0, dim=1) for f in grams))
    assert (loss(case.tensor("in/f_s"), case.tensor("in/f_t")) - wrong).abs() > 1e-6
    case.arrays["out/loss"][...] = wrong.item()
    assert check(case).misses


def test_two_samples_by_hand():
    alike, unlike = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.eye(2)
    torch.testing.assert_close(similarity(alike), torch.full((2, 2), 0.5**0.5))
    torch.testing.assert_close(similarity(unlike), torch.eye(2))
    expected = (2 * (1 - 0.5**0.5) ** 2 + 2 * 0.5) / 4
    torch.testing.assert_close(loss(alike.double(), unlike.double()).item(), expected, rtol=0, atol=1e-7)


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), scale=st.floats(1e-2, 1e2))
def test_turning_and_scaling_the_features_changes_nothing(seed, scale):
    student, teacher = maps(5, 3, 2, 2, seed=seed), maps(5, 2, 3, 3, seed=seed + 1)
    rotation, _ = torch.linalg.qr(maps(12, 12, seed=seed + 2))
    turned = (scale * student.flatten(1) @ rotation).view_as(student)
    plain = loss(student, teacher)
    torch.testing.assert_close(loss(turned, teacher), plain, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(loss(teacher, turned), plain, rtol=1e-9, atol=1e-12)
    assert plain.shape == ()
    assert loss(turned, student) < 1e-15


def test_no_gradient_reaches_the_teacher():
    student, teacher = maps(5, 3, 2, 2).requires_grad_(), maps(5, 2, 3, 3, seed=1).requires_grad_()
    loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sums_that_overflow_float16_are_finite(dtype):
    student, teacher = (120 * maps(4, 64, 8, 8)).to(dtype).requires_grad_(), (120 * maps(4, 64, 8, 8, seed=1)).to(dtype)
    with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        value = loss(student, teacher)
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert student.grad.isfinite().all()
    torch.testing.assert_close(value, loss(student.detach().float(), teacher.float()))


def test_the_deepest_stage_of_each_network_is_compared():
    x, y = maps(4, 3, 2, 2), maps(4, 5, 2, 2, seed=1)
    student = Outputs(x[:, :, 0, 0], taps={"stage9.post": y, "stage10.post": x, "last": y})
    assert torch.equal(SP()(student, said(y), batch_of(4)), loss(x, y))
    assert torch.equal(SP()(said(x, "last"), said(y), batch_of(4)), loss(x, y))
    assert torch.equal(SP(stage="stage9.post")(student, said(x, "stage9.post"), batch_of(4)), loss(y, x))
    assert SP()(mobilenet()(images()), frozen(resnet("resnet10t"))(images()), batch_of(2)).isfinite()


def test_a_missing_tap_is_refused():
    x = maps(4, 3, 2, 2)
    with pytest.raises(ValueError, match=r"sp, student: needs the tap 'last', found stem"):
        SP()(said(x, "stem"), said(x), batch_of(4))
    with pytest.raises(ValueError, match=r"sp, teacher: needs the tap 'stem', found stage2.post"):
        SP(stage="stem")(said(x, "stem"), said(x), batch_of(4))


def test_two_processes_see_the_pairs_of_both():
    alone = shared_loss()
    for found in in_processes(shared_loss):
        torch.testing.assert_close(found, alone)
