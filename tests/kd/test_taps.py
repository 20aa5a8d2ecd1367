import copy

import pytest
import timm
import torch
from torch import nn

from kd import frozen
from kd.taps import Taps


def in_place_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))


IMAGES = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


def test_features_have_the_names_they_were_given():
    network = in_place_network()
    with Taps(network, {"hidden": "0", "logits": "2"}) as taps:
        logits = network(IMAGES)
        assert list(taps) == ["hidden", "logits"]
        assert torch.equal(taps["logits"], logits)


def test_an_in_place_activation_does_not_overwrite_what_was_tapped_before_it():
    network = in_place_network()
    with Taps(network, {"pre": "0", "post": "1"}, inputs={"pre_too": "1"}) as taps:
        network(IMAGES)
        assert (taps["pre"] < 0).any()
        assert torch.equal(taps["pre"], taps["pre_too"])
        assert torch.equal(taps["post"], taps["pre"].relu())


def test_gradients_pass_through_a_tap():
    network = in_place_network()
    with Taps(network, {"hidden": "0"}) as taps:
        network(IMAGES)
        taps["hidden"].sum().backward()
    assert network[0].weight.grad is not None
    assert network[2].weight.grad is None


def test_removed_taps_leave_nothing_behind():
    network = in_place_network()
    taps = Taps(network, {"hidden": "0"})
    network(IMAGES)
    taps.remove()
    assert not network[0]._forward_hooks
    with pytest.raises(ValueError, match="seen nothing yet"):
        taps["hidden"]


def test_a_copy_of_a_tapped_network_reports_to_nobody():
    network = in_place_network()
    with Taps(network, {"hidden": "0"}) as taps:
        network(IMAGES)
        before = taps["hidden"].clone()
        teacher = frozen(network).network
        teacher(10 * IMAGES)
        copy.deepcopy(teacher)(10 * IMAGES)
        assert torch.equal(taps["hidden"], before)
        with Taps(teacher, {"hidden": "0"}) as own:
            teacher(10 * IMAGES)
            assert not torch.equal(own["hidden"], before)


def test_timm_models_can_be_tapped():
    network = timm.create_model("resnet10t", num_classes=3).eval()
    with Taps(network, {"stage1": "layer1", "stage4": "layer4"}, inputs={"stage1.pre": "layer1.0.act2"}) as taps:
        network(torch.zeros(2, 3, 32, 32))
        assert taps["stage1"].shape == taps["stage1.pre"].shape == (2, 64, 8, 8)
        assert torch.equal(taps["stage1"], taps["stage1.pre"].relu())
        assert taps["stage4"].shape == (2, 512, 1, 1)


def test_the_first_of_several_outputs_is_taken():
    network = nn.Sequential(nn.LSTM(4, 2))
    with Taps(network, {"states": "0"}) as taps:
        states, _ = network(IMAGES)
        assert torch.equal(taps["states"], states)


def test_an_unknown_path_is_refused_with_the_nearest_one():
    with pytest.raises(ValueError, match="unknown module 'layer'; did you mean 'layer1'"):
        Taps(nn.ModuleDict({"layer1": nn.Linear(1, 1), "head": nn.Linear(1, 1)}), {"a": "layer"})


def test_an_unknown_tap_is_refused_with_the_nearest_one():
    with Taps(in_place_network(), {"hidden": "0"}) as taps, pytest.raises(ValueError, match="did you mean 'hidden'"):
        taps["hiden"]


def test_one_name_for_two_taps_is_refused():
    with pytest.raises(ValueError, match="found twice: a"):
        Taps(in_place_network(), {"a": "0"}, inputs={"a": "1"})


def test_a_module_that_passes_no_tensor_is_refused():
    class Says(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"x": x}

    network = Says()
    with Taps(network, {"a": ""}), pytest.raises(ValueError, match="passes dict"):
        network(IMAGES)
