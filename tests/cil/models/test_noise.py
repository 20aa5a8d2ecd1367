import pytest
import timm
import torch
from torch import nn

from cil.models.noise import Dropout, DropPath, key_by_sample
from cil.seeding import SampleNoise, sample_noise

ORDER = torch.tensor([3, 0, 2, 5, 1, 4])


def noise(ids: torch.Tensor, key: int = 0, view: int = 0) -> SampleNoise:
    return SampleNoise(key, ids, torch.full_like(ids, view))


def drop(layer: nn.Module, x: torch.Tensor, ids: torch.Tensor, **place: int) -> torch.Tensor:
    with sample_noise(noise(ids, **place)):
        dropped: torch.Tensor = layer(x)
    return dropped


@pytest.mark.parametrize("layer", [DropPath(0.5, "a"), Dropout(0.5, "a")])
def test_the_same_sample_drops_the_same_in_any_batch(layer):
    x = torch.randn(6, 3, 4)
    there = drop(layer, x, torch.arange(6))
    assert torch.equal(drop(layer, x[ORDER], ORDER), there[ORDER])
    assert torch.equal(drop(layer, x[2:3], torch.tensor([2])), there[2:3])


@pytest.mark.parametrize("kind", [DropPath, Dropout])
def test_another_key_view_or_name_drops_something_else(kind):
    x, ids = torch.ones(64, 8), torch.arange(64)
    here = drop(kind(0.5, "a"), x, ids)
    assert not torch.equal(drop(kind(0.5, "a"), x, ids, key=1), here)
    assert not torch.equal(drop(kind(0.5, "a"), x, ids, view=1), here)
    assert not torch.equal(drop(kind(0.5, "b"), x, ids), here)


@pytest.mark.parametrize("kind", [DropPath, Dropout])
def test_the_rate_is_kept_and_the_mean_stays(kind):
    dropped = drop(kind(0.25, "a"), torch.ones(4000, 4), torch.arange(4000))
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.03)


def test_a_path_is_dropped_as_a_whole_and_a_dropout_is_not():
    x, ids = torch.ones(50, 20), torch.arange(50)
    by_path, by_number = drop(DropPath(0.5, "a"), x, ids), drop(Dropout(0.5, "a"), x, ids)
    assert (by_path == by_path[:, :1]).all()
    assert not (by_number == by_number[:, :1]).all(dim=1).any()


def test_rows_of_one_sample_share_the_fate_of_a_path():
    dropped = drop(DropPath(0.5, "a"), torch.ones(18, 2), torch.arange(6)).view(6, 3, 2)
    assert torch.equal(dropped, dropped[:, :1].expand_as(dropped))
    assert 0 < dropped.count_nonzero() < dropped.numel()


def test_rows_that_belong_to_no_sample_are_refused():
    with pytest.raises(ValueError, match="found 7 rows for 6 samples"):
        drop(DropPath(0.5, "a"), torch.ones(7, 2), torch.arange(6))


@pytest.mark.parametrize("layer", [DropPath(0.5, "a"), Dropout(0.5, "a")])
def test_evaluation_drops_nothing(layer):
    x = torch.randn(6, 3)
    assert torch.equal(layer.eval()(x), x)
    layer.train()


@pytest.mark.parametrize("layer", [DropPath(0.0, "a"), Dropout(0.0, "a")])
def test_a_rate_of_zero_drops_nothing(layer):
    x = torch.randn(6, 3)
    assert layer(x) is x


@pytest.mark.parametrize("kind", [DropPath, Dropout])
def test_torchs_generator_serves_outside_a_training_step(kind):
    layer, x = kind(0.5, "a"), torch.ones(32, 4)
    torch.manual_seed(0)
    first = layer(x)
    assert not torch.equal(layer(x), first)
    torch.manual_seed(0)
    assert torch.equal(layer(x), first)


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_an_impossible_rate_is_refused(rate):
    with pytest.raises(ValueError, match=f"drop rate of a must lie in .* found {rate}"):
        DropPath(rate, "a")


VIT = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 3}
SWIN = {"img_size": 32, "embed_dim": 8, "depths": (2, 1), "num_heads": (2, 2), "window_size": 4, "num_classes": 3}


@pytest.mark.parametrize(
    ("name", "settings", "side"), [("vit_tiny_patch16_224", VIT, 16), ("swin_tiny_patch4_window7_224", SWIN, 32)]
)
def test_timms_transformers_drop_by_sample(name, settings, side):
    torch.manual_seed(0)
    rates = {"drop_path_rate": 0.3, "proj_drop_rate": 0.2, "attn_drop_rate": 0.2, "drop_rate": 0.2}
    network = key_by_sample(timm.create_model(name, **settings, **rates))
    dropping = [m for m in network.modules() if isinstance(m, DropPath | Dropout)]
    assert {type(layer) for layer in dropping} == {DropPath, Dropout}
    assert len({layer.name for layer in dropping}) == len(dropping)
    x = torch.randn(6, 3, side, side)
    there = drop(network, x, torch.arange(6))
    torch.testing.assert_close(drop(network, x[ORDER], ORDER), there[ORDER])
    assert not torch.allclose(drop(network, x, torch.arange(6), key=1), there)


def test_layers_that_never_drop_are_left_alone():
    network = nn.Sequential(nn.Dropout(0.0), nn.Dropout(0.5))
    key_by_sample(network)
    assert isinstance(network[0], nn.Dropout)
    assert isinstance(network[1], Dropout)


def test_a_random_layer_that_cannot_be_keyed_is_refused():
    with pytest.raises(ValueError, match="1 is a Dropout2d"):
        key_by_sample(nn.Sequential(nn.Identity(), nn.Dropout2d(0.1)))
