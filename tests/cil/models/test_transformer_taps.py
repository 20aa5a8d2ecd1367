"""What transformers say inside: patch tokens as maps (a variant of this project)."""

from typing import TypeVar

import pytest
import torch

from cil.models.dkt import DKTNetwork
from cil.models.dytox import DyToxNetwork
from cil.models.network import Network, models
from cil.models.patches import folded_weight
from kd import Batch, frozen
from kd.feature.at import ATGradient
from kd.taps import Taps

SHAPE = (3, 16, 24)
#: Rows and columns of patches.
GRID = (4, 6)
SIDES = ["post", "pre"]

N = TypeVar("N", bound=Network)


def dkt(*task_sizes: int) -> DKTNetwork:
    torch.manual_seed(0)
    return grown(DKTNetwork(SHAPE, width=24, num_heads=3, depth=3, mlp_ratio=2, stem_width=8), *task_sizes)


def dytox(*task_sizes: int) -> DyToxNetwork:
    torch.manual_seed(0)
    return grown(DyToxNetwork(SHAPE, width=24, num_heads=4, depth=3, mlp_ratio=2), *task_sizes)


def grown(network: N, *task_sizes: int) -> N:
    """With every parameter, those of norms too, moved at random."""
    for size in task_sizes:
        network.grow(size)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(1))


BOTH = pytest.mark.parametrize("make", [dkt, dytox])


@BOTH
def test_every_block_and_every_class_has_maps_of_the_grid_of_patches(make):
    network = make(4, 1, 3)
    assert network.taps() == [
        *(f"stage{i}.{side}" for side in SIDES for i in range(3)),
        "last",
        "class_maps",
    ]
    network.expose(network.taps())
    taps = network(images()).taps
    assert list(taps) == network.taps()
    assert taps.pop("class_maps").shape == (3, 8, *GRID)
    assert {tap.shape for tap in taps.values()} == {(3, 24, *GRID)}
    assert all(taps[f"stage{i}.pre"] is taps[f"stage{i}.post"] for i in range(3))
    assert taps["last"] is taps["stage2.post"]


@BOTH
def test_maps_are_the_tokens_behind_the_blocks_row_by_row(make):
    network = make(2, 2).eval()
    blocks = {str(i): f"encoder.blocks.{i}" if make is dkt else f"encoder.{i}" for i in range(3)}
    with Taps(network, blocks) as tokens:
        network(images())
        network_tokens = dict(tokens)
    network.expose([f"stage{i}.post" for i in range(3)])
    for i in range(3):
        found = network(images()).taps[f"stage{i}.post"]
        expected = network_tokens[str(i)]
        for row, column in ((0, 0), (1, 4), (3, 5)):
            assert torch.equal(found[:, :, row, column], expected[:, GRID[1] * row + column])


@BOTH
@pytest.mark.parametrize("training", [False, True])
def test_what_is_exposed_changes_no_bit_of_anything_else(make, training):
    given = {}
    for exposed in ([], ["stage1.pre"], ["class_maps"], make(1).taps()):
        network = make(3, 1, 2).train(training)
        network.expose(exposed)
        torch.manual_seed(5)  # of what drops
        outputs = network(images())
        assert list(outputs.taps) == list(exposed)
        outputs.logits.square().sum().backward()
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        given[tuple(exposed)] = [outputs.logits, outputs.embedding, *gradients, *network.buffers()]
    plain = given.pop(())
    for found in given.values():
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, plain, strict=True))


@BOTH
def test_exposing_nothing_makes_nothing(make, monkeypatch):
    monkeypatch.setattr("cil.models.patches.PatchMaps.__init__", lambda *_: pytest.fail("asked"))
    assert make(2, 2)(images()).taps == {}


@BOTH
def test_the_mean_of_class_maps_is_the_folded_head_on_the_mean_of_the_patches(make):
    network = make(4, 1, 3).double().eval()
    network.expose(["last", "class_maps"])
    taps = network(images().double()).taps
    heads = [network.stability, network.plasticity] if make is dkt else list(network.heads)
    rows = [head.head.weight[k] * head.norm.weight for head in heads for k in range(head.head.out_features)]
    expected = taps["last"].mean((2, 3)) @ torch.stack(rows).T
    torch.testing.assert_close(taps["class_maps"].mean((2, 3)), expected, rtol=0, atol=1e-12)
    assert torch.equal(folded_weight(network.classifiers()), torch.stack(rows))


@BOTH
def test_growing_changes_no_map_of_an_old_class(make):
    """The head merge of DKT folds the norm into the weight, as the maps do."""
    network = make(4, 2).double().eval()
    network.expose(["class_maps"])
    before = network(images().double()).taps["class_maps"]
    network.grow(3)
    torch.testing.assert_close(network(images().double()).taps["class_maps"][:, :6], before, rtol=0, atol=1e-12)


@BOTH
def test_logits_are_computed_from_every_map(make):
    network = make(2, 2)
    stages = [f"stage{i}.post" for i in range(3)]
    network.expose([*stages, "class_maps"])
    outputs = network(images())
    gradients = torch.autograd.grad(
        outputs.logits.square().sum(), [outputs.taps[name] for name in stages], retain_graph=True
    )
    assert all(gradient.any() for gradient in gradients)
    outputs.taps["class_maps"].square().sum().backward()
    assert all(classifier.norm.weight.grad.any() for classifier in network.classifiers())


@BOTH
def test_a_method_that_reads_gradients_inside_both_networks_runs(make):
    student = make(2, 2)
    teacher = frozen(make(2, 2), keep_graph=True)
    for network in (student, teacher.network):
        network.expose([f"stage{i}.post" for i in range(3)])
    batch = Batch(images(), torch.tensor([0, 3, 2]), torch.arange(3))
    loss = ATGradient()(student(batch.images), teacher(batch.images), batch)
    loss.backward()
    first = next(student.parameters())
    assert loss > 0
    assert first.grad.any()


@BOTH
def test_a_tap_that_is_not_there_is_refused_with_those_that_are(make):
    with pytest.raises(ValueError, match=r"unknown tap 'stage3.post'; did you mean 'stage.\.post'\?"):
        make(2).expose(["stage3.post"])


@BOTH
def test_autocast_gives_finite_maps(make):
    network = make(2, 2)
    network.expose(network.taps())
    with torch.autocast("cpu", torch.bfloat16):
        taps = network(images()).taps
    assert all(tap.isfinite().all() for tap in taps.values())
    assert taps["class_maps"].dtype is torch.float32  # computed in full precision (kd.cam)


def timm(architecture: str, shape: tuple[int, int, int] = (3, 32, 48), **settings: object) -> Network:
    torch.manual_seed(0)
    network = models["timm"](shape, architecture=architecture, **settings)  # type: ignore[call-arg]
    network.grow(3)
    return network.eval()


@pytest.mark.parametrize(
    ("architecture", "num_before"),
    [("test_vit", 1), ("deit_tiny_distilled_patch16_224", 2)],
)
def test_blocks_of_a_vision_transformer_of_timm_are_maps_without_the_tokens_before(architecture, num_before):
    network = timm(architecture)
    pictures = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    depth = len(network.backbone.blocks)
    assert network.taps() == [*(f"stage{i}.{side}" for side in SIDES for i in range(depth)), "last"]
    plain = network(pictures)
    network.expose(network.taps())
    outputs = network(pictures)
    assert torch.equal(outputs.logits, plain.logits)
    assert list(outputs.taps) == network.taps()
    with Taps(network, {"tokens": f"backbone.blocks.{depth - 1}"}) as taps:
        network(pictures)
        tokens = taps["tokens"]
    assert {tap.shape for tap in outputs.taps.values()} == {(2, tokens.shape[2], 2, 3)}
    assert torch.equal(outputs.taps["last"][:, :, 1, 2], tokens[:, num_before + 5])
    read = [outputs.taps[f"stage{i}.post"] for i in range(depth - 1)]  # behind the last block its first token alone is
    assert all(gradient.any() for gradient in torch.autograd.grad(outputs.logits.sum(), read))
    assert not any(block._forward_hooks for block in network.backbone.blocks)


def test_other_transformers_of_timm_have_no_maps_of_blocks():
    assert not [name for name in timm("xcit_nano_12_p16_224", (3, 32, 32)).taps() if name.startswith("stage")]
