from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd import Batch, Outputs, distillers, frozen
from kd.connect import probe
from kd.feature.reviewkd import ReviewKD, hcl
from tests.kd.tapped import NETWORKS, images, resnet
from tests.parity.case import read_cases
from tests.parity.runner import check

GOLDENS = Path(__file__).parents[1] / "goldens" / "kd.npz"


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def said(
    side: str, widths: list[int], sizes: list[tuple[int, int]], pooled: int, seed: int = 0, count: int = 3
) -> Outputs:
    """Stages from the shallowest."""
    stages = {
        f"stage{i}.{side}": maps(count, width, *size, seed=seed + i)
        for i, (width, size) in enumerate(zip(widths, sizes, strict=True))
    }
    return Outputs(torch.zeros(count, 2, dtype=torch.float64), maps(count, pooled, seed=seed + 9), stages)


STUDENT = said("post", [3, 4, 6], [(8, 8), (4, 4), (2, 2)], pooled=7)
TEACHER = said("pre", [5, 6, 8], [(16, 16), (8, 8), (4, 4)], pooled=9, seed=20)


def connected(student: Outputs, teacher: Outputs, **settings: object) -> ReviewKD:
    torch.manual_seed(0)
    reviewkd = ReviewKD(**settings)
    reviewkd.connect(student, teacher)
    return reviewkd


def loss(reviewkd: ReviewKD, student: Outputs, teacher: Outputs) -> Tensor:
    count = len(student.logits)
    batch = Batch(torch.zeros(count, 1, 1, 1), torch.zeros(count, dtype=torch.int64), torch.arange(count))
    return reviewkd(student, teacher, batch)


def widths(reviewkd: ReviewKD) -> list[tuple[int, int, int]]:
    return [(abf.conv1[0].in_channels, abf.conv1[0].out_channels, abf.conv2[0].out_channels) for abf in reviewkd.abfs]


def test_is_found_by_its_name():
    assert distillers["reviewkd"] is ReviewKD


def test_the_golden_cases_pass():
    cases = [case for case in read_cases(GOLDENS) if case.name.startswith("reviewkd/")]
    assert len(cases) == 4
    for case in cases:
        assert check(case).misses == []


def test_context_by_hand():
    """A difference of 1 everywhere is 1 at every size; one that averages out is seen at full size only."""
    teacher = maps(2, 3, 8, 8)
    torch.testing.assert_close(hcl(teacher + 1, teacher).item(), 1.0)
    checkerboard = (-1.0) ** (torch.arange(8)[:, None] + torch.arange(8)).double()
    torch.testing.assert_close(hcl(teacher + checkerboard, teacher).item(), 1 / (1 + 1 / 2 + 1 / 4 + 1 / 8))


@given(height=st.integers(1, 6), width=st.integers(1, 6), seed=st.integers(0, 100))
@settings(max_examples=25)
def test_the_context_loss_is_a_weighted_mean_of_squared_differences(height, width, seed):
    student, teacher = maps(2, 3, height, width, seed=seed), maps(2, 3, height, width, seed=seed + 1)
    value = hcl(student, teacher)
    assert value.shape == ()
    assert 0 < value <= F.mse_loss(student, teacher) + 1e-12
    torch.testing.assert_close(hcl(3 * student, 3 * teacher), 9 * value)
    assert hcl(teacher, teacher) == 0


def test_the_context_loss_works_under_functional_transforms():
    student, teacher = maps(2, 3, 4, 4), maps(2, 3, 4, 4, seed=1)
    leaf = student.clone().requires_grad_()
    hcl(leaf, teacher).backward()
    torch.testing.assert_close(torch.func.grad(hcl)(student, teacher), leaf.grad)


def test_widths_come_from_the_probe():
    reviewkd = connected(STUDENT, TEACHER)
    assert widths(reviewkd) == [(7, 7, 9), (6, 7, 8), (4, 7, 6), (3, 7, 5)]
    assert [abf.att_conv is not None for abf in reviewkd.abfs] == [False, True, True, True]
    assert widths(connected(STUDENT, TEACHER, max_mid_channels=2))[1] == (6, 2, 8)
    assert loss(reviewkd, STUDENT, TEACHER).dtype == torch.float64


def test_stages_are_paired_from_the_deepest():
    longer = said("pre", [2, 5, 6, 8], [(32, 32), (16, 16), (8, 8), (4, 4)], pooled=9, seed=20)
    reviewkd = connected(STUDENT, longer)
    assert widths(reviewkd) == widths(connected(STUDENT, TEACHER))
    assert loss(reviewkd, STUDENT, longer).isfinite()


@pytest.mark.parametrize(("student", "teacher"), list(product(NETWORKS, ["resnet", "vgg", "shufflenet"])))
def test_networks_of_all_families_are_connected_from_a_probe(student, teacher):
    ours, theirs = NETWORKS[student](), frozen(NETWORKS[teacher]())
    pictures = images(2, 64, 96)
    side = "post" if teacher == "shufflenet" else "pre"
    reviewkd = ReviewKD(teacher_side=side, max_mid_channels=16)
    reviewkd.connect(probe(ours, pictures), probe(theirs, pictures))
    found = ours(pictures)
    assert widths(reviewkd)[0][0] == found.embedding.shape[1]
    assert len(reviewkd.abfs) == (4 if "shufflenet" in (student, teacher) else 5)
    value = loss(reviewkd, found, theirs(pictures))
    value.backward()
    assert value.isfinite()
    assert all(parameter.grad is not None for parameter in reviewkd.auxiliary_parameters())
    assert next(ours.parameters()).grad is not None


def test_the_image_size_may_change_after_connecting():
    student, teacher = resnet("resnet10t"), frozen(resnet("resnet10t"))
    reviewkd = ReviewKD()
    reviewkd.connect(probe(student, images()), probe(teacher, images()))
    for height, width in ((32, 32), (96, 64)):
        pictures = images(2, height, width)
        assert loss(reviewkd, student(pictures), teacher(pictures)).isfinite()


def test_sides_are_switches():
    pre, post = said("pre", [3, 4], [(4, 4), (2, 2)], 5), said("post", [3, 4], [(4, 4), (2, 2)], 5)
    assert loss(connected(pre, post, student_side="pre", teacher_side="post"), pre, post).isfinite()
    with pytest.raises(ValueError, match=r"reviewkd, student: needs the tap 'stage0.post', found stage0.pre"):
        connected(pre, post)


def test_every_deeper_level_reaches_the_first():
    """The fused maps flow to the first stage: there every stage of the student counts."""
    leaves = {name: tap.clone().requires_grad_() for name, tap in STUDENT.taps.items()}
    embedding = STUDENT.embedding.clone().requires_grad_()
    reviewkd = connected(STUDENT, TEACHER)
    fused = None
    for abf, x in zip(reviewkd.abfs, [embedding[:, :, None, None], *reversed(leaves.values())], strict=True):
        compared, fused = abf(x, fused, (8, 8))
    compared.square().sum().backward()
    assert all(leaf.grad.abs().sum() > 0 for leaf in [embedding, *leaves.values()])


def test_no_gradient_reaches_the_teacher():
    student, teacher = (
        Outputs(
            said_.logits,
            said_.embedding.clone().requires_grad_(),
            {name: tap.clone().requires_grad_() for name, tap in said_.taps.items()},
        )
        for said_ in (STUDENT, TEACHER)
    )
    value = loss(connected(student, teacher), student, teacher)
    value.backward()
    assert value.shape == ()
    assert all(leaf.grad is None for leaf in [teacher.embedding, *teacher.taps.values()])
    assert all(leaf.grad is not None for leaf in [student.embedding, *student.taps.values()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_features_give_a_finite_loss_in_any_format(dtype):
    def narrow(outputs: Outputs) -> Outputs:
        taps = {name: (120 * tap).to(dtype).requires_grad_() for name, tap in outputs.taps.items()}
        return Outputs(outputs.logits, (120 * outputs.embedding).to(dtype), taps)

    student, teacher = narrow(STUDENT), narrow(TEACHER)
    reviewkd = connected(student, teacher)
    with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        value = loss(reviewkd, student, teacher)
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert all(tap.grad.isfinite().all() for tap in student.taps.values())


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match=r"fusion modules for 0 levels but there are 4: call connect"):
        loss(ReviewKD(), STUDENT, TEACHER)
    with pytest.raises(ValueError, match=r"reviewkd, teacher: needs the embedding, found none; .*Tapped"):
        connected(STUDENT, Outputs(TEACHER.logits, taps=TEACHER.taps))
    with pytest.raises(ValueError, match=r"reviewkd, teacher: needs the tap 'stage0.pre', found stage0.post"):
        connected(STUDENT, STUDENT)
    with pytest.raises(ValueError, match="max_mid_channels must be at least 1, found 0"):
        ReviewKD(max_mid_channels=0)
    with pytest.raises((ValueError, TypeError), match="teacher_side"):
        ReviewKD(teacher_side="middle")  # type: ignore[arg-type]
