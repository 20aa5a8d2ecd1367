from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kd import Batch, Outputs, distillers
from kd.connect import probe
from kd.feature.fitnet import FitNet, guided_parameters
from kd.taps import Tapped
from tests.kd.tapped import images, mobilenet, resnet
from tests.parity.case import read_cases
from tests.parity.runner import check

GOLDENS = Path(__file__).parents[1] / "goldens" / "kd.npz"


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def said(features: Tensor, tap: str = "stage1.post") -> Outputs:
    return Outputs(features.new_zeros(len(features), 1), taps={tap: features})


def loss(fitnet: FitNet, student: Tensor, teacher: Tensor) -> Tensor:
    count = len(student)
    batch = Batch(torch.zeros(count, 1, 1, 1), torch.zeros(count, dtype=torch.int64), torch.arange(count))
    return fitnet(said(student), said(teacher), batch)


def connected(student: Tensor, teacher: Tensor, **settings: object) -> FitNet:
    fitnet = FitNet(**settings)
    fitnet.connect(said(student), said(teacher))
    return fitnet


def test_is_found_by_its_name():
    assert distillers["fitnet"] is FitNet


def test_the_golden_cases_pass():
    cases = [case for case in read_cases(GOLDENS) if case.name.startswith("fitnet/")]
    assert len(cases) == 2
    for case in cases:
        assert check(case).misses == []


def test_networks_of_one_architecture_start_without_loss():
    x = maps(4, 3, 5, 5)
    value = loss(connected(x, x, init="identity"), x, x)
    assert value.shape == ()
    assert value == 0


def test_both_variants_by_hand():
    student, teacher = maps(4, 3, 5, 6), maps(4, 3, 5, 6, seed=1)
    code, paper = (
        loss(connected(student, teacher, init="identity", variant=v), student, teacher) for v in ("code", "paper")
    )
    torch.testing.assert_close(code, (student - teacher).square().mean())
    torch.testing.assert_close(paper, code * 3 * 5 * 6 / 2)


@settings(max_examples=10)
@given(seed=st.integers(0, 100), scale=st.floats(0.1, 10))
def test_the_scale_of_the_student_does_not_matter_behind_batchnorm(seed, scale):
    student, teacher = maps(4, 3, 8, 8, seed=seed), maps(4, 5, 4, 4, seed=seed + 1)
    fitnet = connected(student, teacher)
    nn.init.zeros_(fitnet.regressor.conv.bias)
    fitnet.regressor.bn.eps = 1e-20
    torch.testing.assert_close(loss(fitnet, scale * student, teacher), loss(fitnet, student, teacher))


def test_the_regressor_learns_and_the_teacher_does_not():
    student, teacher = maps(4, 3, 8, 8).requires_grad_(), maps(4, 5, 4, 4, seed=1).requires_grad_()
    fitnet = connected(student, teacher)
    loss(fitnet, student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None
    parameters = fitnet.auxiliary_parameters()
    assert len(parameters) == 4
    assert all(parameter.grad is not None for parameter in parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["code", "paper"])
def test_large_features_give_a_finite_loss_in_any_format(dtype, variant):
    student, teacher = 120 * maps(4, 3, 8, 8).to(dtype), 120 * maps(4, 5, 4, 4).to(dtype)
    fitnet = connected(student, teacher, variant=variant)
    student.requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        value = loss(fitnet, student, teacher)
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert student.grad.isfinite().all()


def test_two_networks_are_connected_from_a_probe():
    student, teacher = mobilenet(), resnet("resnet10t")
    fitnet = FitNet(hint="stage1.post", teacher_hint="stage2.post")
    pictures = images(2, 64, 96)
    fitnet.connect(probe(student, pictures), probe(teacher, pictures))
    assert fitnet.regressor.conv.kernel_size == (3, 3)  # 8x12 to 4x6
    batch = Batch(pictures, torch.tensor([0, 1]), torch.arange(2))
    fitnet(student(pictures), teacher(pictures), batch).backward()
    assert next(student.parameters()).grad is not None


def test_stage_one_trains_what_the_hint_depends_on():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.LazyLinear(2)
    )
    network(images(2, 8, 8))
    tapped = Tapped(network, {"stage1.post": "2"})
    tapped.network[0].bias.requires_grad_(False)
    before = tapped.network[1].running_mean.clone()
    found = guided_parameters(tapped, "stage1.post", images(2, 8, 8))
    assert list(found) == ["network.0.weight", "network.1.weight", "network.1.bias"]
    assert found["network.0.weight"] is network[0].weight
    assert network[0].weight.grad is None
    assert tapped.training
    assert torch.equal(tapped.network[1].running_mean, before)
    with pytest.raises(ValueError, match="depends on no trainable parameter"):
        guided_parameters(tapped.requires_grad_(False), "stage1.post", images(2, 8, 8))


def test_stage_one_lowers_the_hint_loss_alone():
    torch.manual_seed(0)
    student, teacher = (
        Tapped(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2)), {"stage1.post": "1"})
        for _ in range(2)
    )
    batch = Batch(images(4, 8, 8), torch.zeros(4, dtype=torch.int64), torch.arange(4))
    fitnet = FitNet(variant="paper")
    fitnet.connect(probe(student, batch.images), probe(teacher, batch.images))
    guided = guided_parameters(student, "stage1.post", batch.images)
    head = student.network[3].weight.clone()
    optimizer = torch.optim.Adam([*guided.values(), *fitnet.auxiliary_parameters()], lr=0.01)
    values = []
    for _ in range(20):
        value = fitnet(student(batch.images), teacher(batch.images), batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < values[0] / 2
    assert torch.equal(student.network[3].weight, head)


def test_what_cannot_be_compared_is_refused():
    x = maps(4, 3, 8, 8)
    with pytest.raises(ValueError, match="call connect"):
        loss(FitNet(), x, x)
    with pytest.raises(ValueError, match=r"fitnet, student: needs the tap 'stage1.post', found stem"):
        FitNet().connect(said(x, "stem"), said(x))
    with pytest.raises(ValueError, match=r"maps \[batch.*found \(4, 192\) of the student"):
        FitNet().connect(said(x.flatten(1)), said(x))
    with pytest.raises(ValueError, match=r"gives \(4, 3, 8, 8\) but the hint is \(4, 3, 4, 4\)"):
        loss(connected(x, x), x, F.avg_pool2d(x, 2))
    with pytest.raises((ValueError, TypeError), match="variant"):
        FitNet(variant="joint")  # type: ignore[arg-type]
