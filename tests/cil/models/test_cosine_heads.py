import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cil.models.cosine_heads import CosineHead, ProxyHead, give_head
from cil.models.network import BackboneNetwork, models
from kd.cam import class_maps
from tests.run_folders import assert_same_weights

WIDTH = 6
FEATURES = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))
HEADS = [CosineHead, ProxyHead, partial(ProxyHead, num_proxies=3)]

#: Every network whose last activation has a name, in a small form.
ACTIVATED = [
    ("resnet_cifar", {"depth": 8, "width": 4}),
    ("resnet_cifar", {"blocks": [1, 2, 1], "width": 4, "shortcut": "conv"}),
    ("resnet", {"depth": 18}),
    ("resnet", {"depth": 50}),
    ("wrn", {"depth": 10, "widening": 1}),
    ("vgg", {"depth": 8}),
    ("shufflenetv1", {}),
    ("shufflenetv2", {}),
    ("mobilenetv2", {"width_factor": 0.1}),
    ("timm", {"architecture": "resnet10t"}),
    ("timm", {"architecture": "resnet26"}),
]


def grown(head: CosineHead | ProxyHead, *sizes: int) -> CosineHead | ProxyHead:
    torch.manual_seed(0)
    for size in sizes:
        head.grow(size)
    return head


@pytest.mark.parametrize("make", HEADS)
def test_a_head_without_classes_scores_nothing(make) -> None:
    head = make(WIDTH)
    assert head(FEATURES).shape == (5, 0)
    assert (head.out_features, head.old) == (0, [])


def test_scores_are_the_scale_times_the_cosine() -> None:
    head = CosineHead(2)
    head.grow(2)
    with torch.no_grad():
        head.weights[0].copy_(torch.tensor([[3.0, 4.0], [0.0, -2.0]]))
        head.eta.fill_(10)
    torch.testing.assert_close(
        head(torch.tensor([[5.0, 0.0], [1.0, 1.0]])), torch.tensor([[6, 0], [7 * 2**0.5, -5 * 2**0.5]])
    )


def test_the_scores_of_proxies_are_their_cosines_weighted_by_their_softmax() -> None:
    head = ProxyHead(2, num_proxies=2)
    head.grow(1)
    with torch.no_grad():
        head.weights[0].copy_(torch.tensor([[[2.0, 0.0], [0.0, 5.0]]]))
        head.eta.fill_(3)
    # cosines 0.6 and 0.8
    expected = 3 * (0.6 * math.exp(0.6) + 0.8 * math.exp(0.8)) / (math.exp(0.6) + math.exp(0.8))
    assert float(head(torch.tensor([[3.0, 4.0]])).detach()) == pytest.approx(expected, rel=1e-6)


def test_one_proxy_is_a_cosine_head() -> None:
    one, head = grown(ProxyHead(WIDTH, num_proxies=1), 3, 2), grown(CosineHead(WIDTH), 3, 2)
    torch.testing.assert_close(one(FEATURES), head(FEATURES))


@pytest.mark.parametrize("make", HEADS)
@given(factor=st.floats(0.01, 100))
@settings(max_examples=10)
def test_lengths_do_not_count(make, factor: float) -> None:
    head = grown(make(WIDTH), 3, 2)
    before = head(FEATURES).detach()
    torch.testing.assert_close(head(factor * FEATURES), before)
    with torch.no_grad():
        head.weights[1].mul_(factor)
    torch.testing.assert_close(head(FEATURES), before)
    assert before.abs().max() <= 1


@pytest.mark.parametrize("make", HEADS)
def test_vectors_of_a_task_stay_their_own_parameter_when_the_head_grows(make) -> None:
    head = grown(make(WIDTH).double().requires_grad_(False), 3)
    first, before = head.weights[0], head(FEATURES.double())
    head.grow(2)
    assert head.old == [first]
    assert head.out_features == 5
    torch.testing.assert_close(head(FEATURES.double())[:, :3], before)
    assert head.weights[1].dtype == torch.float64
    assert head.weights[1].requires_grad
    assert head.weights[1].abs().max() <= WIDTH**-0.5
    assert list(head.state_dict()) == ["eta", "weights.0", "weights.1"]


@pytest.mark.parametrize("make", HEADS)
def test_scores_are_as_precise_under_autocast(make) -> None:
    head = grown(make(WIDTH), 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert head(FEATURES).equal(head(FEATURES.clone()))
        found = head(FEATURES)
    assert found.equal(head(FEATURES))


def network_of(make=None, *, signed_features: bool = True) -> BackboneNetwork:
    torch.manual_seed(0)
    network = models["resnet_cifar"]((1, 8, 8), depth=8, width=4)
    if make is not None:
        give_head(network, make, learner="lucir", signed_features=signed_features)
    network.grow(3)
    return network.eval()


def test_class_maps_of_a_cosine_head_are_made_with_directions() -> None:
    network = network_of(CosineHead)
    assert "class_maps" in network.taps()
    network.expose(["last", "class_maps"])
    said = network(torch.rand(2, 1, 8, 8))
    maps = said.taps["class_maps"]
    torch.testing.assert_close(maps, class_maps(said.taps["last"], F.normalize(network.head.weight)))
    # their means are the scores, up to the length of the feature
    torch.testing.assert_close(maps.mean((2, 3)) / said.embedding.norm(dim=1, keepdim=True), said.logits)


def test_a_head_of_proxies_has_no_class_maps() -> None:
    network = network_of(ProxyHead)
    assert "class_maps" not in network.taps()
    with pytest.raises(ValueError, match="unknown tap 'class_maps'"):
        network.expose(["class_maps"])


@pytest.mark.parametrize("make", [None, *HEADS])
def test_a_network_with_another_head_is_rebuilt_to_the_bit(make) -> None:
    network, fresh = network_of(make), network_of(make)
    network.grow(2)
    again = models["resnet_cifar"]((1, 8, 8), depth=8, width=4)
    if make is not None:
        give_head(again, make, learner="lucir", signed_features=True)
    again.rebuild(network.structure())
    again.load_state_dict(network.state_dict())
    assert_same_weights(again.state_dict(), network.state_dict())
    assert fresh.structure() == {"task_sizes": [3]}
    images = torch.rand(2, 1, 8, 8)
    assert again.eval()(images).logits.equal(network(images).logits)


@pytest.mark.parametrize(("name", "parameters"), ACTIVATED)
def test_features_have_both_signs_without_the_last_activation(name: str, parameters: dict[str, object]) -> None:
    torch.manual_seed(0)
    network = models[name]((3, 32, 32), **parameters)
    network.grow(2)
    for parameter in network.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter)  # some layers begin at zero
    network.expose(["last"])
    images = torch.rand(2, 3, 32, 32)
    before = network(images).taps["last"]
    names = list(network.state_dict())
    network.drop_last_activation()
    after = network(images)
    assert before.min() == 0
    assert after.taps["last"].min() < 0
    assert after.taps["last"].relu().equal(before)
    torch.testing.assert_close(after.taps["last"].mean((2, 3)), after.embedding)
    assert list(network.state_dict()) == names
    network.expose(network.taps())
    network(images)


def test_a_network_without_such_an_activation_stays_as_it_is() -> None:
    torch.manual_seed(0)
    network = models["timm"]((3, 32, 32), architecture="vit_tiny_patch16_224").eval()
    images = torch.rand(1, 3, 32, 32)
    before = network(images).embedding
    network.drop_last_activation()
    assert network(images).embedding.equal(before)


def test_only_a_fresh_backbone_with_a_plain_head_is_given_one() -> None:
    give = partial(give_head, make=CosineHead, learner="lucir", signed_features=False)
    with pytest.raises(ValueError, match=r"learner=lucir puts a cosine head behind a backbone.*found DKTNetwork: use"):
        give(models["dkt"]((1, 8, 8)))
    with pytest.raises(ValueError, match=r"begins with a network without classes, found tasks of \[3\]"):
        give(network_of())
    with pytest.raises(ValueError, match=r"model\.keep_bias=false has no effect with learner=lucir"):
        give(models["resnet_cifar"]((1, 8, 8), depth=8, width=4, keep_bias=False))
    network = network_of(CosineHead, signed_features=False)
    assert network(torch.rand(2, 1, 8, 8)).embedding.min() >= 0
