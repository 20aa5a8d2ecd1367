import pytest
import torch

from cil.models.network import models


def build(name: str, shape: tuple[int, int, int] = (3, 32, 32), **settings: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return models[name](shape, **settings)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("depth", "expected"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962)]
)
def test_residual_networks_have_the_published_number_of_parameters(depth, expected):
    """0.27, 0.46, 0.66, 0.85 and 1.7 million with 10 classes (He et al., table 6)."""
    network = build("resnet_cifar", depth=depth)
    network.grow(10)
    assert sum(parameter.numel() for parameter in network.parameters()) == expected


@pytest.mark.parametrize(
    ("name", "shape", "settings", "width"),
    [
        ("resnet_cifar", (1, 8, 8), {"depth": 20, "width": 4}, 16),
        ("resnet_cifar", (5, 9, 7), {"depth": 20, "width": 5}, 20),
        ("timm", (1, 32, 32), {"architecture": "resnet10t"}, 512),
        ("timm", (3, 32, 48), {"architecture": "mobilenetv3_small_050"}, 1024),
        ("timm", (3, 32, 32), {"architecture": "vit_tiny_patch16_224", "drop_path_rate": 0.1}, 192),
    ],
)
def test_backbones_grow_and_keep_old_scores(name, shape, settings, width):
    network = build(name, shape, **settings).eval()
    images = torch.randn(2, *shape)
    network.grow(3)
    before = network(images)
    network.grow(2)
    after = network(images)
    assert before.embedding.shape == (2, network.embedding_width) == (2, width)
    assert after.logits.shape == (2, 5)
    torch.testing.assert_close(after.logits[:, :3], before.logits)


def test_a_rebuilt_network_says_the_same_to_the_bit():
    network, fresh = build("resnet_cifar", depth=20).eval(), build("resnet_cifar", depth=20).eval()
    network.grow(4)
    network.grow(1)
    fresh.rebuild(network.structure())
    fresh.load_state_dict(network.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(fresh(images).logits, network(images).logits)


def test_old_biases_of_a_head_are_drawn_anew_on_demand():
    network = build("resnet_cifar", depth=20, keep_bias=False)
    network.grow(4)
    before = network.head.bias.clone()
    network.grow(1)
    assert not torch.equal(network.head.bias[:4], before)


def test_an_unknown_architecture_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="unknown timm architecture 'resnet19'; did you mean 'resnet1"):
        build("timm", architecture="resnet19")


def test_images_that_an_architecture_cannot_take_are_refused():
    with pytest.raises(ValueError, match="timm cannot make vit_tiny_patch16_224 for images of shape \\(3, 8, 8\\)"):
        build("timm", (3, 8, 8), architecture="vit_tiny_patch16_224")


def test_a_setting_that_an_architecture_does_not_have_is_refused():
    with pytest.raises(ValueError, match="drop_path_rate"):
        build("timm", architecture="vgg11", drop_path_rate=0.1)
