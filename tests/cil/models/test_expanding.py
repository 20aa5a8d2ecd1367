import copy
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from cil.models.expanding import ExpandingNetwork
from cil.models.heads import GrowingLinear
from cil.models.network import BackboneNetwork, models
from kd import Taps
from kd.taps import Tapped

SHAPE = (1, 8, 8)
LAST_STAGE = "backbone.stages.2"
PARTS = ["backbone", LAST_STAGE]


def plain(**changed: object) -> BackboneNetwork:
    torch.manual_seed(0)
    network = models["resnet_cifar"](SHAPE, **{"depth": 8, "width": 2} | changed)
    assert isinstance(network, BackboneNetwork)
    return network


def disturb(network: nn.Module) -> None:
    """Make a network of a copy in which every parameter and statistic is its own."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in network.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(0.1 * torch.randn(buffer.shape, generator=generator))


def grown(*sizes: int, part: str = "backbone", **settings: object) -> ExpandingNetwork:
    """In evaluation mode, after tasks of `sizes` classes, each of which moved the weights."""
    network = ExpandingNetwork(plain(), part=part, **settings)  # type: ignore[arg-type]
    for num_new in sizes:
        network.grow(num_new)
        disturb(network)
    return network.eval()


def images(count: int = 3) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(2))


def alone(network: ExpandingNetwork) -> Iterator[BackboneNetwork]:
    """A network for each copy, which has that copy alone and no classes."""
    for module in network.copies.each:
        single = plain()
        if network.part == "backbone":
            single.backbone = copy.deepcopy(module)
        else:
            single.backbone = copy.deepcopy(network.backbone)
            single.set_submodule(network.part, copy.deepcopy(module))
        single.grow(1)
        yield single.eval()


@pytest.mark.parametrize("part", PARTS)
def test_in_the_first_task_it_is_the_network_that_it_is_made_of(part: str) -> None:
    expected, network = plain().eval(), ExpandingNetwork(plain(), part=part, auxiliary="all").eval()
    for one in (expected, network):
        torch.manual_seed(3)
        one.grow(4)
    found = network(images())
    assert found.logits.equal(expected(images()).logits)
    assert found.embedding.equal(expected(images()).embedding)
    count = sum(parameter.numel() for parameter in expected.parameters())
    assert sum(parameter.numel() for parameter in network.parameters()) == count


@pytest.mark.parametrize("part", PARTS)
def test_a_copy_starts_as_the_newest_and_the_old_block_of_the_head_stays(part: str) -> None:
    network = grown(2, 3, part=part)
    before = copy.deepcopy(network)
    network.grow(4)
    first, second, third = network.copies.each
    for name, value in second.state_dict().items():
        assert third.state_dict()[name].equal(value)
    assert not next(first.parameters()).equal(next(second.parameters()))
    width = before.embedding_width
    assert (width, network.embedding_width, network.head.in_features) == (16, 24, 24)
    assert network.head.weight[:5, :width].equal(before.head.weight)
    assert network.head.bias[:5].equal(before.head.bias)
    assert network.head.weight.requires_grad
    with torch.no_grad():
        network.head.weight[:5, width:] = 0
    torch.testing.assert_close(network(images()).logits[:, :5], before(images()).logits)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6))
@settings(max_examples=20)
def test_a_head_that_reads_more_keeps_what_it_has_learned(width: int, num_added: int, num_outputs: int) -> None:
    head = GrowingLinear(width).double()
    head.grow(num_outputs)
    weight, bias = head.weight.detach().clone(), head.bias.detach().clone()
    head.widen(num_added)
    assert head.weight.shape == (num_outputs, width + num_added)
    assert head.weight[:, :width].equal(weight)
    assert head.bias.equal(bias)
    fresh = head.weight.detach()[:, width:]
    assert fresh.dtype == torch.float64
    assert 0 < fresh.abs().max() <= (width + num_added) ** -0.5
    assert head(torch.ones(2, width + num_added, dtype=torch.float64)).shape == (2, num_outputs)


@pytest.mark.parametrize("part", PARTS)
def test_the_embedding_is_that_of_every_copy_one_behind_the_other(part: str) -> None:
    network = grown(2, 1, 3, part=part)
    expected = torch.cat([single(images()).embedding for single in alone(network)], dim=1)
    found = network(images())
    torch.testing.assert_close(found.embedding, expected)
    torch.testing.assert_close(found.logits, F.linear(expected, network.head.weight, network.head.bias))


@pytest.mark.parametrize("part", PARTS)
def test_maps_are_those_of_the_newest_copy_and_the_last_is_of_all(part: str) -> None:
    network = grown(2, 1, 3, part=part)
    without = network(images())
    singles = list(alone(network))
    names = singles[0].taps()
    assert network.taps() == names
    assert {"stem", "stage0.pre", "stage2.post", "last", "class_maps"} <= set(names)
    for single in singles:
        single.expose(names)
    network.expose(names)
    found, each = network(images()), [single(images()) for single in singles]
    for name in names:
        if name not in ("last", "class_maps"):
            torch.testing.assert_close(found.taps[name], each[-1].taps[name])
    torch.testing.assert_close(found.taps["last"], torch.cat([one.taps["last"] for one in each], dim=1))
    torch.testing.assert_close(found.taps["class_maps"].mean((2, 3)) + network.head.bias, found.logits)
    assert found.logits.equal(without.logits)
    assert found.embedding.equal(without.embedding)


@pytest.mark.parametrize("part", PARTS)
def test_taps_from_outside_give_the_same(part: str) -> None:
    network = grown(2, 3, part=part)
    paths = network.tap_paths()
    outputs = Tapped(network, paths.outputs, paths.inputs, head="head")(images())
    assert list(outputs.taps) == network.taps()
    torch.testing.assert_close(outputs.taps["class_maps"].mean((2, 3)) + network.head.bias, outputs.logits)
    with Taps(network, {"newest": paths.outputs["stage2.post"]}) as taps:
        network(images())
        torch.testing.assert_close(taps["newest"].mean((2, 3)), outputs.embedding[:, -network.copy_width :])


def test_a_network_of_timm_has_the_same_taps() -> None:
    torch.manual_seed(0)
    network = ExpandingNetwork(models["timm"]((3, 32, 32), architecture="test_resnet"))
    for num_new in (2, 3):
        network.grow(num_new)
        disturb(network)
    network.eval().expose(["stage3.post", "last", "class_maps"])
    outputs = network(torch.randn(2, 3, 32, 32))
    assert outputs.taps["last"].shape[1] == 2 * outputs.taps["stage3.post"].shape[1] == network.embedding_width
    torch.testing.assert_close(outputs.taps["class_maps"].mean((2, 3)) + network.head.bias, outputs.logits)


def test_a_network_without_maps_has_none() -> None:
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    network = ExpandingNetwork(BackboneNetwork(SHAPE, backbone, 5))
    for num_new in (2, 3):
        network.grow(num_new)
    assert network.taps() == []
    assert network(images()).embedding.shape == (3, 10)


@pytest.mark.parametrize("part", PARTS)
def test_no_gradient_reaches_old_copies_that_are_frozen(part: str) -> None:
    network = grown(2, 2, 2, part=part)
    for module in network.settled:
        module.requires_grad_(False)
    network(images()).logits.square().sum().backward()
    moved = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    assert moved == {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    shared = {name for name in moved if not name.startswith(f"{part}.each") and not name.startswith("head")}
    assert bool(shared) == (part == LAST_STAGE)
    assert all(name.startswith(f"{part}.each.2") for name in moved if f"{part}.each" in name)


@pytest.mark.parametrize(("tells", "outputs"), [("newest", [3, 5]), ("all", [4, 8]), (None, None)])
def test_the_auxiliary_head_is_fresh_in_every_task_but_the_first(tells: str | None, outputs: list[int] | None) -> None:
    network = grown(2, auxiliary=tells)
    assert network.auxiliary is None
    found = []
    for num_new in (2, 4):
        network.grow(num_new)
        if network.auxiliary is not None:
            found.append(network.auxiliary)
            said = network(images())
            expected = network.auxiliary(said.embedding[:, -8:])
            assert network.auxiliary_logits(said).equal(expected)
    assert [head.out_features for head in found] == (outputs or [])
    assert "auxiliary" in network.fresh_parts


def test_what_the_old_network_says_is_read_off_the_grown_one() -> None:
    old = grown(2, 3)
    later = copy.deepcopy(old)
    later.grow(4)
    disturb(later.copies.each[-1])
    found, expected = old.read_off(later.eval()(images())), old(images())
    assert found is not None
    assert found.logits.equal(expected.logits)
    assert found.embedding.equal(expected.embedding)
    assert not found.logits.requires_grad
    assert not found.embedding.requires_grad
    said = later(images())
    said.views = {"strong": said}
    assert old.read_off(said) is None
    old.expose(["last"])
    assert old.read_off(later(images())) is None


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("num_without", [1, 3])
def test_a_fresh_network_is_rebuilt(part: str, num_without: int) -> None:
    network = ExpandingNetwork(plain(), part=part, auxiliary="newest")
    for task in range(3):
        network.grow_head(2) if task < num_without else network.grow(2)
    disturb(network)
    structure = network.structure()
    assert structure == {"task_sizes": [2, 2, 2], "num_copies": 4 - num_without}
    other = ExpandingNetwork(plain(), part=part, auxiliary="newest")
    other.rebuild(structure)
    other.load_state_dict(network.state_dict())
    assert other.eval()(images()).logits.equal(network.eval()(images()).logits)
    assert other.structure() == structure
    with pytest.raises(ValueError, match=r"only a fresh network can be rebuilt, this one has tasks of \[2, 2, 2\]"):
        other.rebuild(structure)
