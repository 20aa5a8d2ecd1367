import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kd import Outputs, frozen
from kd.connect import ABF, Regressor, held_still, probe
from tests.kd.tapped import images, resnet

SIZES = [
    ((8, 8), (4, 4), (3, 3)),
    ((8, 6), (4, 3), (3, 3)),
    ((7, 7), (4, 4), (4, 4)),
    ((8, 7), (4, 4), (3, 3)),
    ((4, 4), (8, 8), (4, 4)),
    ((3, 5), (6, 10), (4, 4)),
    ((8, 8), (8, 8), (1, 1)),
    ((9, 7), (4, 6), (6, 2)),
    ((8, 8), (4, 8), (5, 1)),
    ((8, 8), (6, 4), (3, 5)),
]


def maps(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Noisy(nn.Module):
    """Keeps BatchNorm in training mode whatever it is told, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.dropout = nn.Dropout()
        self.calls, self.replaced = nn.Buffer(torch.zeros(1)), nn.Buffer(torch.zeros(1))

    def train(self, mode: bool = True) -> "Noisy":
        super().train(mode)
        self.bn.train()
        return self

    def forward(self, x: torch.Tensor) -> Outputs:
        self.calls += 1
        self.replaced = self.replaced + 1
        return Outputs(self.dropout(self.bn(x)).mean((2, 3)))


@pytest.mark.parametrize("network", [resnet("resnet10t"), Noisy()], ids=["resnet", "a network that does not evaluate"])
def test_a_probe_leaves_no_trace(network):
    network.train()
    next(network.children()).eval()
    modes = [module.training for module in network.modules()]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    said = probe(network, images())
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not said.logits.requires_grad
    assert torch.equal(said.logits, probe(network, images()).logits)


def test_a_probe_of_a_teacher_is_what_it_says():
    teacher = frozen(resnet("resnet10t"), keep_graph=True)
    torch.testing.assert_close(probe(teacher, images()).logits, teacher(images()).logits)


def test_modes_come_back_after_an_error():
    network = Noisy()
    with pytest.raises(RuntimeError), held_still(network):
        raise RuntimeError
    assert network.training


def test_a_network_that_gives_logits_only_cannot_be_connected():
    with pytest.raises(ValueError, match=r"Flatten returns Tensor.*Tapped"):
        probe(nn.Flatten(), images())


@pytest.mark.parametrize(("ours", "theirs", "kernel"), SIZES)
def test_a_regressor_gives_the_teachers_shape(ours, theirs, kernel):
    regressor = Regressor((3, *ours), (5, *theirs))
    assert regressor.conv.kernel_size == kernel
    regressed = regressor(maps(2, 3, *ours))
    assert regressed.shape == (2, 5, *theirs)
    assert (regressed >= 0).all()
    assert {name.split(".")[0] for name in regressor.state_dict()} == {"conv", "bn"}


@pytest.mark.parametrize(("ours", "theirs"), [((4, 4), (9, 9)), ((4, 4), (6, 4)), ((4, 8), (8, 8)), ((4, 4), (8, 7))])
def test_sizes_without_a_relation_are_refused(ours, theirs):
    with pytest.raises(ValueError, match=f"a map of {ours[0]}x{ours[1]} .* not into {theirs[0]}x{theirs[1]}"):
        Regressor((3, *ours), (5, *theirs))


def test_a_regressor_can_start_as_the_identity():
    x = maps(2, 3, 4, 4)
    assert torch.equal(Regressor((3, 4, 4), (3, 4, 4), init="identity")(x), x)
    with pytest.raises(ValueError, match="only maps of one shape"):
        Regressor((3, 4, 4), (5, 4, 4), init="identity")
    with pytest.raises((ValueError, TypeError), match="init"):
        Regressor((3, 4, 4), (3, 4, 4), init="zero")  # type: ignore[arg-type]


@given(
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    deeper=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    out_size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
@settings(max_examples=20)
def test_fusion_takes_any_sizes(size, deeper, out_size):
    abf = ABF(3, 4, 5, fuse=True)
    out, fused = abf(maps(2, 3, *size), maps(2, 4, *deeper), out_size)
    assert out.shape == (2, 5, *out_size)
    assert fused.shape == (2, 4, *out_size)


def test_attention_says_what_counts():
    """With attention 1 for x and 0 for y the deeper level is not seen."""
    abf = ABF(3, 4, 5, fuse=True).eval()
    nn.init.zeros_(abf.att_conv[0].weight)
    with torch.no_grad():
        abf.att_conv[0].bias.copy_(torch.tensor([100.0, -100.0]))
    x = maps(2, 3, 4, 4)
    _, fused = abf(x, maps(2, 4, 2, 2, seed=1), (4, 4))
    torch.testing.assert_close(fused, abf.conv1(x))


def test_fusion_has_the_names_of_the_release():
    names = {name.rpartition(".")[0] for name in ABF(3, 4, 5, fuse=True).state_dict()}
    assert names == {"conv1.0", "conv1.1", "conv2.0", "conv2.1", "att_conv.0"}
    assert not [name for name in ABF(3, 4, 5, fuse=False).state_dict() if name.startswith("att_conv")]
