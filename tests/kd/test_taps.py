import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from kd import Frozen, Outputs, frozen
from kd.taps import Tapped, Taps, read_tap, stage_taps
from tests.kd.tapped import NETWORKS, images, resnet


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


def test_logits_are_computed_from_the_taps():
    network = in_place_network()
    with Taps(network, {"pre": "0", "post": "1"}, inputs={"pre_too": "1"}) as taps:
        logits = network(IMAGES)
        by_post, by_pre, by_pre_too = torch.autograd.grad(logits.sum(), [taps["post"], taps["pre"], taps["pre_too"]])
        torch.testing.assert_close(by_post, network[2].weight.sum(0).expand_as(by_post))
        torch.testing.assert_close(by_pre, by_post * (taps["pre"] > 0))
        assert torch.equal(by_pre, by_pre_too)


def test_a_tensor_that_its_module_was_given_is_safe_from_the_caller():
    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.same = nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = 2 * x
            y = self.same(x)
            x.zero_()
            return y

    network = Overwrites()
    with Taps(network, {"after": "same"}, inputs={"before": "same"}) as taps:
        network(IMAGES)
        assert torch.equal(taps["before"], 2 * IMAGES)
        assert torch.equal(taps["after"], 2 * IMAGES)


def test_the_other_outputs_are_handed_on():
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.split = nn.MaxPool1d(2, return_indices=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            values, places = self.split(x)
            return values + places

    network = Sums()
    plain = network(IMAGES)
    with Taps(network, {"values": "split"}):
        assert torch.equal(network(IMAGES), plain)


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


@pytest.mark.parametrize("name", NETWORKS)
def test_a_tapped_network_computes_what_it_computed(name):
    tapped = NETWORKS[name]()
    tapped.eval()
    said = tapped(images())
    assert torch.equal(said.logits, tapped.network(images()))
    gradients = torch.autograd.grad(said.logits.sum(), list(said.taps.values())[:-1], retain_graph=True)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert said.embedding is not None
    (gradient,) = torch.autograd.grad(said.logits.sum(), [said.embedding], allow_unused=True)
    assert gradient is not None


@pytest.mark.parametrize("name", ["resnet", "vgg"])
def test_pre_is_before_and_post_after_the_last_activation(name):
    said = NETWORKS[name]().eval()(images())
    for before, after in zip(stage_taps(said, "pre"), stage_taps(said, "post"), strict=True):
        assert (said.taps[before] < 0).any()
        assert torch.equal(said.taps[after], said.taps[before].relu())


def test_class_maps_add_up_to_the_logits():
    tapped = resnet("resnet10t")
    tapped.eval()
    said = tapped(images())
    logits = said.taps["class_maps"].mean((2, 3)) + tapped.network.fc.bias
    torch.testing.assert_close(logits, said.logits, rtol=1e-4, atol=1e-5)
    said.taps["class_maps"].sum().backward()
    assert tapped.network.fc.weight.grad is not None


def test_a_tapped_network_has_the_parameters_of_the_network_and_nothing_more():
    network = in_place_network()
    tapped = Tapped(network, {"hidden": "0"}, embedding="2")
    assert list(tapped.state_dict()) == [f"network.{key}" for key in network.state_dict()]
    tapped(IMAGES)
    assert not [module for module in tapped.modules() if module._forward_hooks or module._forward_pre_hooks]
    tapped.eval()
    assert not network.training


def test_a_frozen_copy_of_a_tapped_network_has_its_own_taps():
    student = Tapped(in_place_network(), {"hidden": "0"}, embedding="2")
    teacher = frozen(student)
    ours, theirs = student(IMAGES), teacher(2 * IMAGES)
    assert not torch.equal(ours.taps["hidden"], theirs.taps["hidden"])
    assert ours.taps["hidden"].requires_grad
    assert not theirs.taps["hidden"].requires_grad
    assert torch.equal(theirs.taps["hidden"].relu(), theirs.embedding)


def test_what_a_network_says_of_itself_stays():
    class Says(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> Outputs:
            return Outputs(self.layer(x), x, {"own": x})

    said = Tapped(Says(), {"layer": "layer"})(IMAGES)
    assert list(said.taps) == ["own", "layer"]
    assert torch.equal(said.embedding, IMAGES)
    assert Tapped(Says(), {"layer": "layer"}, embedding="layer")(IMAGES).embedding is not None


def test_one_place_per_channel_is_a_vector():
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 2, 1), nn.Flatten())
    assert Tapped(network, embedding="1")(images()).embedding.shape == (2, 3)
    with pytest.raises(ValueError, match=r"one vector per image, found \(2, 3, 64, 64\) at '0'"):
        Tapped(network, embedding="0")(images())


@pytest.mark.parametrize("side", ["embedding", "head"])
def test_an_unknown_head_is_refused(side):
    with pytest.raises(ValueError, match="unknown module 'fc'"):
        Tapped(in_place_network(), {"last": "0"}, **{side: "fc"})


def test_a_head_without_a_map_to_weight_is_refused():
    with pytest.raises(ValueError, match="tap it as 'last', found the taps hidden"):
        Tapped(in_place_network(), {"hidden": "0"}, head="2")


def test_a_head_that_is_not_linear_is_refused():
    tapped = Tapped(nn.Sequential(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), {"last": "0"}, head="2")
    with pytest.raises(ValueError, match="linear head"):
        tapped(images())


def test_a_module_that_takes_no_part_is_named():
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    with pytest.raises(ValueError, match=r"'a' has seen nothing yet.*calls in this mode"):
        Tapped(Lazy(), {"a": "unused"})(IMAGES)


def test_stages_are_counted_not_spelled():
    said = Outputs(IMAGES, taps={f"stage{i}.post": IMAGES for i in (10, 9, 2)} | {"stage1.pre": IMAGES, "stem": IMAGES})
    assert stage_taps(said, "post") == ["stage2.post", "stage9.post", "stage10.post"]
    assert stage_taps(said, "pre") == ["stage1.pre"]


def test_a_missing_tap_is_refused_with_the_way_to_make_it():
    said = Outputs(IMAGES, taps={"stem": IMAGES})
    assert read_tap(said, "stem", "at, student") is IMAGES
    with pytest.raises(ValueError, match=r"at, student: needs the tap 'last', found stem; kd.taps.Tapped\(.*'last'"):
        read_tap(said, "last", "at, student")
    with pytest.raises(ValueError, match="found no taps"):
        read_tap(Outputs(IMAGES), "last", "at, student")


def test_a_teacher_with_a_graph_gives_gradients_at_its_taps_and_none_to_itself():
    teacher = frozen(Tapped(in_place_network(), {"hidden": "0"}), keep_graph=True)
    said = teacher.train()(IMAGES)
    (gradient,) = torch.autograd.grad(F.cross_entropy(said.logits, torch.tensor([0, 1, 0])), [said.taps["hidden"]])
    assert gradient.abs().sum() > 0
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not IMAGES.requires_grad
    with torch.no_grad():
        assert teacher(IMAGES).logits.requires_grad, "a teacher is often asked inside no_grad"
    assert not Frozen(teacher.network)(IMAGES).logits.requires_grad


def test_class_maps_of_a_cosine_head_are_made_of_directions():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2, bias=False))
    said = Tapped(network, {"last": "0"}, head="3", cosine=True)(images())
    lengths = network[3].weight.norm(dim=1)
    torch.testing.assert_close(said.taps["class_maps"].mean((2, 3)) * lengths, said.logits)
    with pytest.raises(ValueError, match="cosine=True is about the head, found none"):
        Tapped(network, {"last": "0"}, cosine=True)


def test_a_frozen_network_evaluates_whatever_its_own_train_does():
    class KeepsTraining(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def train(self, mode: bool = True) -> "KeepsTraining":
            super().train(mode)
            self.norm.train()
            return self

        def forward(self, x: torch.Tensor) -> Outputs:
            return Outputs(self.norm(x))

    teacher = frozen(KeepsTraining()).train()
    teacher(IMAGES + 5)
    assert not teacher.network.norm.training
    assert not teacher.network.norm.running_mean.any()
