from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kd.cam import CAM, class_maps, normalised, overlay
from kd.taps import Tapped
from kd.teacher import frozen
from tests.parity.case import Case, read_cases
from tests.parity.runner import check

GOLDENS = Path(__file__).parents[1] / "goldens" / "kd.npz"


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    network: nn.Module = timm.create_model("resnet18", num_classes=7).eval()
    return network


class Pooled(nn.Module):
    """A convolution, a change of its pooled maps, a head."""

    def __init__(self, between: Callable[[Tensor], Tensor], head: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.between = between
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.head(self.between(self.conv(images).mean((2, 3))))
        return scores


class CosineHead(nn.Module):
    def __init__(self, width: int, num_classes: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_classes, width))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * nn.functional.normalize(x) @ nn.functional.normalize(self.weight).T


def unchanged(pooled: Tensor) -> Tensor:
    return pooled


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return [case for case in read_cases(GOLDENS) if case.name.startswith("cam/")]


def test_the_golden_cases_pass(cases):
    assert cases
    for case in cases:
        assert check(case).misses == []


def test_one_channel_and_two_classes_by_hand():
    features = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    maps = class_maps(features, torch.tensor([[2.0], [-1.0]]))
    assert maps.tolist() == [[[[2, 4], [6, 8]], [[-1, -2], [-3, -4]]]]


@settings(max_examples=20)
@given(height=st.integers(1, 9), width=st.integers(1, 9), seed=st.integers(0, 1000))
def test_the_mean_of_a_map_and_the_bias_is_the_score(height, width, seed):
    head = nn.Linear(5, 4).double()
    features = random(3, 5, height, width, seed=seed)
    maps = class_maps(features, head.weight)
    torch.testing.assert_close(maps.mean((2, 3)) + head.bias, head(features.mean((2, 3))))


def test_the_maps_of_a_timm_network_add_up_to_its_logits(resnet18):
    images = random(2, 3, 64, 96, dtype=torch.float32)
    maps, logits = CAM(resnet18, maps="layer4", head="fc")(images)
    assert maps.shape == (2, 7, 2, 3)
    torch.testing.assert_close(logits, resnet18(images))
    torch.testing.assert_close(maps.mean((2, 3)) + resnet18.fc.bias, logits)


def test_a_call_leaves_no_hooks_and_keeps_the_mode(resnet18):
    CAM(resnet18, maps="layer4", head="fc")(random(1, 3, 32, 32, dtype=torch.float32))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in resnet18.modules())
    assert not resnet18.training


def test_a_frozen_network_is_explained_by_its_inner_paths(resnet18):
    images = random(1, 3, 32, 32, dtype=torch.float32)
    maps, _ = CAM(frozen(Tapped(resnet18)), maps="network.network.layer4", head="network.network.fc")(images)
    torch.testing.assert_close(maps, CAM(resnet18, maps="layer4", head="fc")(images)[0])
    assert not maps.requires_grad


def test_the_weight_is_read_at_every_call():
    network = Pooled(unchanged, nn.Linear(6, 2))
    cam, images = CAM(network, maps="conv", head="head"), random(1, 3, 5, 5, dtype=torch.float32)
    before, _ = cam(images)
    with torch.no_grad():
        network.head.weight *= 2
    torch.testing.assert_close(cam(images)[0], 2 * before)
    network.head = nn.Linear(6, 9)
    assert cam(images)[0].shape[1] == 9


def test_gradients_reach_the_features_and_the_head():
    network = Pooled(unchanged, nn.Linear(6, 2))
    maps, _ = CAM(network, maps="conv", head="head")(random(1, 3, 5, 5, dtype=torch.float32))
    maps.square().sum().backward()
    assert network.conv.weight.grad is not None
    assert network.head.weight.grad is not None


def test_a_cosine_head_is_read_with_rows_of_length_one():
    network, images = Pooled(unchanged, CosineHead(6, 4, scale=10.0)).double(), random(3, 3, 8, 8)
    maps, scores = CAM(network, maps="conv", head="head", cosine=True)(images)
    means = maps.mean((2, 3))
    factors = scores / means
    assert (factors > 0).all()
    torch.testing.assert_close(factors, factors[:, :1].expand_as(factors))


def test_a_cosine_head_that_is_not_named_as_one_is_refused():
    network = Pooled(unchanged, CosineHead(6, 4, scale=10.0))
    with pytest.raises(ValueError, match=r"CosineHead.*not linear.*cosine=True"):
        CAM(network, maps="conv", head="head")(random(2, 3, 8, 8, dtype=torch.float32))


def test_a_norm_between_the_maps_and_the_head_is_refused_unless_wanted():
    network, images = Pooled(nn.LayerNorm(6), nn.Linear(6, 4)), random(2, 3, 8, 8, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"does not read the mean of 'conv'.*verify=False"):
        CAM(network, maps="conv", head="head")(images)
    maps, _ = CAM(network, maps="conv", head="head", verify=False)(images)
    assert maps.shape == (2, 4, 6, 6)


def test_the_wrong_maps_are_refused_with_both_widths(resnet18):
    with pytest.raises(ValueError, match=r"256 channels and the head reads 512"):
        CAM(resnet18, maps="layer3", head="fc")(random(1, 3, 32, 32, dtype=torch.float32))


@pytest.mark.parametrize("head", [nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), nn.LayerNorm(6)])
def test_a_head_that_is_not_linear_is_refused(head):
    with pytest.raises(ValueError, match=rf"a linear head .* is needed, found a {type(head).__name__} with"):
        CAM(Pooled(unchanged, head), maps="conv", head="head")(random(1, 3, 8, 8, dtype=torch.float32))


def test_vectors_are_no_maps(resnet18):
    with pytest.raises(ValueError, match=r"'global_pool' gives no maps .*\(1, 512\)"):
        CAM(resnet18, maps="global_pool", head="fc")(random(1, 3, 32, 32, dtype=torch.float32))


def test_an_unknown_path_is_refused_at_once(resnet18):
    with pytest.raises(ValueError, match=r"unknown module 'layer5'"):
        CAM(resnet18, maps="layer5", head="fc")


def test_maps_for_display_go_from_zero_to_one():
    shown = normalised(random(2, 3, 5, 4))
    assert torch.equal(shown.amin((2, 3)), torch.zeros(2, 3))
    assert torch.equal(shown.amax((2, 3)), torch.ones(2, 3))


def test_a_constant_map_is_shown_as_zero():
    assert torch.equal(normalised(torch.full((1, 2, 3, 3), 7.0)), torch.zeros(1, 2, 3, 3))


def test_an_overlay_has_the_size_of_the_image():
    laid = overlay(random(1, 2, 3, 4), (24, 40))
    assert laid.shape == (1, 2, 24, 40)
    assert laid.min() >= 0
    assert laid.max() <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_maps_of_narrow_features_are_summed_in_float32(dtype):
    features = torch.full((1, 3, 2, 2), 300.0, dtype=dtype)  # the products overflow float16
    with torch.autocast("cpu", dtype=dtype):
        maps = class_maps(features, torch.full((2, 3), 300.0))
    assert maps.dtype == torch.float32
    assert torch.equal(maps, torch.full((1, 2, 2, 2), 270000.0))
