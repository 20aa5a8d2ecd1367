import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cil.models.bias_correction import BiasCorrectedLinear
from cil.models.heads import GrowingLinear
from cil.models.network import BackboneNetwork, models
from kd.cam import CAM

WIDTH = 7


def head_of(*sizes: int) -> BiasCorrectedLinear:
    """Every correction has values of its own."""
    torch.manual_seed(0)
    head = BiasCorrectedLinear(WIDTH)
    for size in sizes:
        head.grow(size)
    with torch.no_grad():
        for number, (scale, shift) in enumerate(zip(head.scales, head.shifts, strict=True)):
            scale.fill_(0.5 - 0.2 * number)
            shift.fill_(number - 0.75)
    return head


@given(st.lists(st.integers(1, 4), max_size=4))
@settings(max_examples=15)
def test_a_head_that_has_not_learned_a_correction_is_a_linear_layer_to_the_bit(sizes: list[int]) -> None:
    torch.manual_seed(0)
    corrected, plain = BiasCorrectedLinear(WIDTH), GrowingLinear(WIDTH)
    for size in sizes:
        state = torch.get_rng_state()
        corrected.grow(size)
        torch.set_rng_state(state)
        plain.grow(size)
    x = torch.randn(5, WIDTH)
    assert corrected(x).equal(plain(x))
    assert corrected.weight.equal(plain.weight)
    assert corrected.bias.equal(plain.bias)
    assert corrected.out_features == plain.out_features == sum(sizes)
    assert len(corrected.scales) == len(corrected.shifts) == max(len(sizes) - 1, 0)


def test_the_scores_of_every_task_but_the_first_are_scaled_and_shifted() -> None:
    head, x = head_of(3, 2, 1), torch.randn(5, WIDTH)
    z = head.linear(x)
    corrected = torch.cat([z[:, :3], 0.5 * z[:, 3:5] - 0.75, 0.3 * z[:, 5:] + 0.25], dim=1)
    torch.testing.assert_close(head(x), corrected)
    torch.testing.assert_close(x @ head.weight.T + head.bias, corrected)
    assert head.map_weight.equal(head.weight)


def test_corrections_stay_when_the_head_grows() -> None:
    head, x = head_of(3, 2), torch.randn(5, WIDTH)
    before = head(x)
    head.grow(4)
    assert head(x)[:, :5].equal(before)
    assert [float(value.detach()) for value in (*head.scales, *head.shifts)] == [0.5, 1, -0.75, 0]
    assert all(value.requires_grad for value in (*head.scales, *head.shifts))


def test_a_copy_and_a_saved_head_are_the_same_head() -> None:
    head, x = head_of(3, 2, 1).double(), torch.randn(5, WIDTH, dtype=torch.float64)
    head.grow(2)
    fresh = BiasCorrectedLinear(WIDTH).double()
    for size in (3, 2, 1, 2):
        fresh.grow(size)
    fresh.load_state_dict(head.state_dict())
    assert fresh(x).equal(head(x))
    assert copy.deepcopy(head)(x).equal(head(x))
    assert {value.dtype for value in head.state_dict().values()} == {torch.float64}


@pytest.mark.parametrize("by_library", [False, True])
def test_the_means_of_class_maps_are_the_corrected_scores(by_library: bool) -> None:
    network = models["resnet_cifar"]((1, 8, 8), depth=8, width=4).eval()
    assert isinstance(network, BackboneNetwork)
    torch.manual_seed(0)
    head = BiasCorrectedLinear(network.embedding_width)
    network.add_module("head", head)
    for size in (3, 2):
        network.grow(size)
    with torch.no_grad():
        head.scales[0].fill_(0.5)
        head.shifts[0].fill_(-2)
    images = torch.randn(4, 1, 8, 8)
    network.expose(["class_maps"])
    outputs = network(images)
    maps: Tensor = outputs.taps["class_maps"]
    if by_library:
        network.expose([])
        path = network.tap_paths().outputs["last"]
        maps, _ = CAM(Logits(network), maps=f"network.{path}", head="network.head")(images)
    torch.testing.assert_close(maps.mean((2, 3)) + head.bias, outputs.logits)


class Logits(torch.nn.Module):
    """A network as others write it."""

    def __init__(self, network: BackboneNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images).logits
        return logits
