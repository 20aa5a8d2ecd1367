from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kd import Batch, Outputs, distillers
from kd.cam import class_maps
from kd.feature.cat_kd import CATKD, binarized, without_bias
from tests.parity.case import Case, read_cases
from tests.parity.runner import check

GOLDENS = Path(__file__).parents[1] / "goldens" / "kd.npz"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss(cat: CATKD, student: Tensor, teacher: Tensor, logits: Tensor | None = None) -> Tensor:
    count = len(student)
    batch = Batch(torch.zeros(count, 1, 1, 1), torch.zeros(count, dtype=torch.int64), torch.arange(count))
    teacher_logits = teacher.mean((2, 3)) if logits is None else logits
    said = Outputs(student.mean((2, 3)), taps={"class_maps": student})
    return cat(said, Outputs(teacher_logits, taps={"class_maps": teacher}), batch)


def test_is_found_by_its_name():
    assert distillers["cat_kd"] is CATKD


def test_the_golden_cases_pass():
    cases = [case for case in read_cases(GOLDENS) if case.name.startswith("catkd/")]
    assert len(cases) == 3
    for case in cases:
        assert check(case).misses == []


def test_one_field_by_hand():
    student = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]], dtype=torch.float64)  # mean 3
    assert loss(CATKD(resolution=1), student, torch.ones_like(student)).item() == 4


def test_the_same_maps_have_no_loss():
    assert loss(CATKD(normalize=True), random(3, 4, 5, 5), random(3, 4, 5, 5)) == 0


@settings(max_examples=20)
@given(
    sizes=st.tuples(*[st.integers(1, 7)] * 4),
    resolution=st.integers(1, 4),
    seed=st.integers(0, 99),
    scale=st.floats(1, 9),
)
def test_the_size_of_the_maps_is_free_and_normalised_maps_have_no_scale(sizes, resolution, seed, scale):
    student, teacher = random(2, 3, *sizes[:2], seed=seed), random(2, 3, *sizes[2:], seed=seed + 1)
    cat = CATKD(resolution=resolution, normalize=True)
    value = loss(cat, student, teacher)
    assert value.ndim == 0
    assert value <= 4 / resolution**2 + 1e-12
    torch.testing.assert_close(loss(cat, scale * student, teacher), value)


def test_only_the_classes_of_the_teacher_are_compared():
    student, teacher = random(2, 7, 4, 4), random(2, 5, 4, 4, seed=1)
    torch.testing.assert_close(loss(CATKD(), student, teacher), loss(CATKD(), student[:, :5], teacher))


def test_a_binarized_map_is_one_above_its_mean_absolute_value():
    maps = torch.tensor([[[[-4.0, 1.0], [2.0, 3.0]]]])  # the mean absolute value is 2.5
    assert binarized(maps).tolist() == [[[[0, 0], [0, 1]]]]


def test_all_classes_kept_is_the_plain_loss():
    student, teacher = random(3, 5, 4, 4), random(3, 5, 4, 4, seed=1)
    torch.testing.assert_close(loss(CATKD(keep=5), student, teacher), loss(CATKD(), student, teacher))


@pytest.mark.parametrize(("strategy", "classes"), [("top", [[3, 1], [0, 4]]), ("bottom", [[0, 2], [2, 3]])])
def test_exactly_the_kept_classes_are_compared(strategy, classes):
    student, teacher = random(2, 5, 4, 4), random(2, 5, 4, 4, seed=1)
    logits = torch.tensor([[0.0, 4, 1, 5, 2], [9, 2, 0, 1, 8]], dtype=torch.float64)
    rows = torch.arange(2)[:, None]
    picked = [maps[rows, torch.tensor(classes)] for maps in (student, teacher)]
    expected = loss(CATKD(), picked[0], picked[1])
    torch.testing.assert_close(loss(CATKD(keep=2, strategy=strategy), student, teacher, logits), expected)


def by_the_release(student: Tensor, teacher: Tensor, logits: Tensor, keep: int, strategy: str) -> Tensor:
    """Maps in class order, counted sample by sample as the release's description says."""
    kept = []
    for scores in logits:
        falling = sorted(scores.tolist(), reverse=True)
        if strategy == "top":
            kept.append([k for k, score in enumerate(scores.tolist()) if score > falling[keep - 1]])
        else:
            kept.append([k for k, score in enumerate(scores.tolist()) if score <= falling[99 - keep]])
    if len({len(classes) for classes in kept}) > 1:
        kept = [list(range(logits.shape[1]))] * len(logits)
    s, t = (torch.stack([m[k] for m, k in zip(maps, kept, strict=True)]) for maps in (student, teacher))
    return F.mse_loss(F.adaptive_avg_pool2d(s, 2), F.adaptive_avg_pool2d(t, 2))


@pytest.mark.parametrize("strategy", ["top", "bottom"])
@pytest.mark.parametrize("keep", [2, 10, 99])
def test_the_released_selection_keeps_one_less_at_the_top_and_one_more_at_the_bottom(strategy, keep):
    student, teacher, logits = random(3, 100, 3, 3), random(3, 100, 3, 3, seed=1), random(3, 100, seed=2)
    cat = CATKD(keep=keep, strategy=strategy, variant="released")
    assert cat.kept(logits).sum(1).tolist() == [keep - 1 if strategy == "top" else keep + 1] * 3
    expected = by_the_release(student, teacher, logits, keep, strategy)
    torch.testing.assert_close(loss(cat, student, teacher, logits), expected)


def test_the_released_selection_keeps_all_maps_when_ties_leave_uneven_numbers():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0], [3.0, 2.0, 2.0, 0.0]])  # above the third: two and one
    assert CATKD(keep=3, variant="released").kept(logits).all()
    assert CATKD(keep=2, variant="released").kept(torch.zeros(2, 4)).all()
    assert CATKD(keep=3).kept(logits).sum(1).tolist() == [3, 3]


@pytest.mark.parametrize("strategy", ["top", "bottom"])
def test_the_parity_runner_checks_partial_transfer_as_released(strategy):
    student, teacher, logits = (
        random(3, 100, 3, 4).requires_grad_(),
        random(3, 100, 3, 4, seed=1),
        random(3, 100, seed=2),
    )
    value = by_the_release(student.requires_grad_(), teacher, logits, 7, strategy)
    (gradient,) = torch.autograd.grad(value, [student])
    arrays: dict[str, Any] = {
        "hp/op": np.asarray("catkd.partial_released"), "hp/expect": np.asarray("equal"), "hp/n": np.asarray(7),
        "hp/strategy": np.asarray(strategy), "hp/resolution": np.asarray(2), "hp/normalize": np.asarray(False),
        "in/cam_s": student.detach().numpy(), "in/cam_t": teacher.numpy(), "in/logits_t": logits.numpy(),
        "out/loss": np.asarray(value.item()), "grad/cam_s": gradient.numpy(),
    }  # fmt: skip
    assert check(Case("catkd/partial", arrays)).misses == []


def test_no_gradient_reaches_the_teacher():
    student, teacher = random(2, 4, 4, 4).requires_grad_(), random(2, 4, 4, 4, seed=1).requires_grad_()
    loss(CATKD(normalize=True, keep=2), student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_the_gradient_reaches_the_weight_of_the_student_but_not_its_bias():
    head = nn.Linear(3, 4).double()
    loss(CATKD(), class_maps(random(2, 3, 4, 4), head.weight), random(2, 4, 4, 4, seed=1)).backward()
    assert head.weight.grad is not None
    assert head.bias.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalize", [False, True])
def test_large_narrow_and_empty_maps_give_a_finite_loss_and_gradient(dtype, normalize):
    student = (6e4 * random(2, 3, 4, 4).clamp(-1, 1)).to(dtype)
    student[0] = 0
    student.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16 if dtype == torch.float32 else dtype):
        value = loss(CATKD(normalize=normalize), student, -student.detach() - 120)
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_a_head_without_bias_shares_the_weight():
    head = nn.Linear(6, 3)
    bare = without_bias(head)
    assert bare.weight is head.weight
    assert bare.bias is None
    x = torch.randn(2, 6)
    torch.testing.assert_close(bare(x), head(x) - head.bias)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"resolution": 0}, "resolution must be at least 1"),
        ({"keep": 0}, "keep must be at least 1"),
        ({"strategy": "bottom"}, r"strategy=bottom has no effect without cat_kd\.keep"),
        ({"variant": "released"}, r"variant=released has no effect without cat_kd\.keep"),
        ({"keep": 1, "variant": "released"}, "keeps no map"),
        ({"keep": 100, "variant": "released", "strategy": "bottom"}, "keep must be below 100"),
    ],
)
def test_settings_that_cannot_work_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        CATKD(**wrong)


def test_an_unknown_strategy_is_refused():
    with pytest.raises((ValueError, TypeError), match="strategy"):
        CATKD(strategy="middle", keep=2)  # type: ignore[arg-type]


def test_missing_class_maps_are_refused_with_the_way_to_get_them():
    cat, batch = CATKD(), Batch(torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.int64), torch.arange(1))
    maps = torch.zeros(1, 2, 3, 3)
    student, teacher = (
        Outputs(torch.zeros(1, 2), taps={"class_maps": maps}),
        Outputs(torch.zeros(1, 2), taps={"last": maps}),
    )
    with pytest.raises(ValueError, match=r"teacher gives none \(taps: last\).*Tapped.*kd\.cam\.class_maps"):
        cat(student, teacher, batch)


def test_too_few_classes_are_refused():
    with pytest.raises(ValueError, match=r"maps of 5 classes and 5 logits of the teacher, maps of 3"):
        loss(CATKD(), random(2, 3, 4, 4), random(2, 5, 4, 4))
    with pytest.raises(ValueError, match=r"keep=6 .* at least 6 classes of the teacher, found 5"):
        loss(CATKD(keep=6), random(2, 5, 4, 4), random(2, 5, 4, 4))
    with pytest.raises(ValueError, match=r"keep=6 .*released.* at least 94 classes of the teacher, found 5"):
        loss(CATKD(keep=6, strategy="bottom", variant="released"), random(2, 5, 4, 4), random(2, 5, 4, 4))
