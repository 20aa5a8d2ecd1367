from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torchvision
import yaml
from torch import nn
from torch.nn import functional as F

from cil.cli import config_folder
from cil.models.backbones.resnet_cifar import PaddedShortcut
from cil.models.dkt import DKTNetwork
from cil.models.network import BackboneNetwork, InputShape, Network, models
from kd import Batch, distillers
from kd.connect import probe
from kd.taps import Tapped

CIFAR: InputShape = (3, 32, 32)
DIGITS: InputShape = (1, 8, 8)

RESNET = "16@32", ["16@32", "32@16", "64@8"], "64@8"
RESNET_X4 = "32@32", ["64@32", "128@16", "256@8"], "256@8"
VGG = "64@32", ["128@16", "256@8", "512@4", "512@4"], "512@4"
#: Config to parameters with 100 classes, as published; then stem, stages and the map that is pooled at 32 x 32.
ZOO = {
    "resnet8": (83_892, *RESNET),
    "resnet14": (181_108, *RESNET),
    "resnet20": (278_324, *RESNET),
    "resnet32": (470_004, *RESNET),
    "resnet_s1": (620_724, *RESNET),
    "resnet32_conv": (472_756, *RESNET),
    "resnet44": (667_188, *RESNET),
    "resnet56": (861_620, *RESNET),
    "resnet110": (1_736_564, *RESNET),
    "resnet8x4": (1_233_540, *RESNET_X4),
    "resnet32x4": (7_433_860, *RESNET_X4),
    "resnet50": (23_705_252, "64@32", ["256@32", "512@16", "1024@8", "2048@4"], "2048@4"),
    "wrn_16_1": (180_916, *RESNET),
    "wrn_40_1": (569_780, *RESNET),
    "wrn_16_2": (703_284, "16@32", ["32@32", "64@16", "128@8"], "128@8"),
    "wrn_40_2": (2_255_156, "16@32", ["32@32", "64@16", "128@8"], "128@8"),
    "vgg8": (3_965_028, *VGG),
    "vgg13": (9_462_180, *VGG),
    "mobilenetv2": (812_836, "16@16", ["12@16", "16@8", "48@4", "160@2"], "1280@2"),
    "shufflenetv1": (949_258, "24@32", ["240@16", "480@8", "960@4"], "960@4"),
    "shufflenetv2": (1_355_528, "24@32", ["116@16", "232@8", "464@4"], "1024@4"),
}
#: One of each kind, and small.
KINDS = ["resnet8", "resnet8x4", "resnet32", "wrn_16_1", "vgg8", "mobilenetv2", "shufflenetv1", "shufflenetv2"]


def build(choice: str, shape: InputShape = DIGITS, num_classes: int = 5, **changed: object) -> BackboneNetwork:
    values = yaml.safe_load((config_folder() / "model" / f"{choice}.yaml").read_text()) | changed
    torch.manual_seed(0)
    network = models[values.pop("name")](shape, **values)
    assert isinstance(network, BackboneNetwork)
    network.grow(num_classes)
    return network


def tapped(network: Network, head: str | None = "head") -> Tapped:
    paths = network.tap_paths()
    return Tapped(network, paths.outputs, paths.inputs, head=head)


def images(shape: InputShape = DIGITS, count: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


@contextmanager
def no_state_moves(network: nn.Module) -> Iterator[None]:
    before = {name: value.clone() for name, value in network.state_dict().items()}
    yield
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("choice", ZOO)
def test_networks_have_the_published_parameters_and_maps(choice):
    parameters, stem, stages, last = ZOO[choice]
    with torch.device("meta"):
        network = build(choice, CIFAR, num_classes=100)
        outputs = tapped(network, head=None)(torch.zeros(2, *CIFAR))
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    expected = {"stem": stem, "last": last}
    for i, stage in enumerate(stages):
        expected[f"stage{i}.post"] = stage
        if choice != "mobilenetv2":  # whose stages end in a linear layer
            expected[f"stage{i}.pre"] = stage
    assert {name: f"{tap.shape[1]}@{tap.shape[2]}" for name, tap in outputs.taps.items()} == expected
    assert outputs.embedding is not None
    assert outputs.embedding.shape == (2, network.embedding_width) == (2, int(last.partition("@")[0]))


@pytest.mark.parametrize("shape", [DIGITS, (2, 9, 13)])
@pytest.mark.parametrize("choice", KINDS)
def test_any_image_gives_class_maps_whose_means_are_the_logits(choice, shape):
    network = build(choice, shape).double()  # in training mode, where nothing is tiny or huge
    outputs = tapped(network)(images(shape, dtype=torch.float64))
    assert outputs.embedding is not None
    torch.testing.assert_close(outputs.taps["last"].mean((2, 3)), outputs.embedding)
    torch.testing.assert_close(outputs.taps["class_maps"].mean((2, 3)) + network.head.bias, outputs.logits)


@pytest.mark.parametrize("choice", KINDS)
def test_logits_depend_on_every_parameter_and_every_tap(choice):
    network = build(choice, CIFAR)
    outputs = tapped(network)(images(CIFAR))
    taps = [tap for name, tap in outputs.taps.items() if name != "class_maps"]
    loss = outputs.logits.square().sum()
    assert all(gradient.any() for gradient in torch.autograd.grad(loss, [*taps, *network.parameters()]))


@pytest.mark.parametrize("choice", KINDS)
def test_taps_change_nothing(choice):
    network = build(choice).eval()
    with no_state_moves(network):
        outputs = network(images())
        assert not outputs.taps
        assert torch.equal(tapped(network)(images()).logits, outputs.logits)


@pytest.mark.parametrize("choice", [choice for choice in KINDS if choice not in ("wrn_16_1", "mobilenetv2")])
def test_a_stage_gives_what_its_last_activation_makes(choice):
    taps = tapped(build(choice))(images()).taps
    for i in range(len(ZOO[choice][2])):
        assert taps[f"stage{i}.pre"].min() < 0
        assert torch.equal(F.relu(taps[f"stage{i}.pre"]), taps[f"stage{i}.post"])


def test_stages_of_a_wide_residual_network_are_sums_and_the_last_is_activated_once_more():
    network = build("wrn_16_1")
    taps = tapped(network)(images()).taps
    assert all(taps[name].min() < 0 for name in ("stem", "stage0.post", "stage1.post", "stage2.post"))
    assert torch.equal(F.relu(taps["stage2.pre"]), taps["last"])
    norm = network.get_submodule("backbone.stages.1.0.bn1")  # in training mode it takes the statistics of the batch
    torch.testing.assert_close(norm(taps["stage0.post"]), taps["stage0.pre"])


@pytest.mark.parametrize("choice", KINDS)
def test_a_seed_says_how_a_network_starts(choice):
    one, same = build(choice).state_dict(), build(choice).state_dict()
    assert all(torch.equal(value, same[name]) for name, value in one.items())


@pytest.mark.parametrize(
    ("depth", "size"),
    [(20, 15677.150541), (32, 26787.675844), (44, 37904.109093), (56, 49045.567413), (110, 99227.649937)],
)
def test_residual_networks_with_padded_shortcuts_start_as_they_always_did(depth, size):
    """What runs of before shortcut and head were choices have stored: names, and sums over all initial values."""
    state = build("resnet32", CIFAR, 10, depth=depth, head_init="torch").state_dict()
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    names = ["backbone.conv.weight", *(f"backbone.bn.{name}" for name in norm)]
    for stage in range(3):
        for block in range((depth - 2) // 6):
            for i in (1, 2):
                place = f"backbone.stages.{stage}.{block}"
                names += [f"{place}.conv{i}.weight", *(f"{place}.bn{i}.{name}" for name in norm)]
    assert list(state) == [*names, "head.weight", "head.bias"]
    assert sum(value.double().abs().sum().item() for value in state.values()) == pytest.approx(size, rel=1e-5)


def test_equal_blocks_are_the_network_of_that_depth():
    by_depth, by_blocks = build("resnet20").state_dict(), build("resnet_s1", blocks=[3, 3, 3]).state_dict()
    assert list(by_depth) == list(by_blocks)
    assert all(torch.equal(value, by_blocks[name]) for name, value in by_depth.items())


def test_stages_have_the_blocks_that_are_asked_for_and_taps_at_their_ends():
    network = build("resnet_s1", blocks=[1, 5, 3])
    assert [len(stage) for stage in network.get_submodule("backbone.stages").children()] == [1, 5, 3]
    taps = tapped(network)(images()).taps
    for i in range(3):
        assert torch.equal(F.relu(taps[f"stage{i}.pre"]), taps[f"stage{i}.post"])


def test_depth_and_blocks_exclude_each_other():
    with pytest.raises(ValueError, match=r"depth=20 and blocks=\[5, 5, 7\] both"):
        build("resnet20", blocks=[5, 5, 7])


def test_a_padded_shortcut_puts_the_channels_in_the_middle():
    shortcut = PaddedShortcut(2, 5, 2)(torch.arange(1.0, 33.0).view(1, 2, 4, 4))
    assert shortcut[0, 1].tolist() == [[1, 3], [9, 11]]
    assert shortcut[0, 2].tolist() == [[17, 19], [25, 27]]
    assert not shortcut[0, [0, 3, 4]].any()


def small_image_resnet50() -> nn.Module:
    network = torchvision.models.resnet50(num_classes=5)
    network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return network


def small_image_vgg8() -> nn.Module:
    layers = torchvision.models.vgg.make_layers([64, "M", 128, "M", 256, "M", 512, 512], batch_norm=True)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 5))


def small_image_shufflenetv2() -> nn.Module:
    network = torchvision.models.shufflenet_v2_x1_0(num_classes=5)
    network.conv1[0], network.maxpool = nn.Conv2d(3, 24, 1, bias=False), nn.Identity()
    return network


@pytest.mark.parametrize(
    ("choice", "reference"),
    [
        ("resnet50", small_image_resnet50),
        ("vgg8", small_image_vgg8),
        ("shufflenetv2", small_image_shufflenetv2),
    ],
)
def test_networks_compute_what_torchvisions_do_with_a_stem_for_small_images(choice, reference):
    network, other = build(choice, (3, 16, 16)).double(), reference().double()
    pairs = zip(other.state_dict().values(), network.state_dict().values(), strict=True)
    for there, here in pairs:
        there.copy_(here)
    batch = images((3, 16, 16), 4, torch.float64)
    torch.testing.assert_close(network(batch).logits, other(batch))


def test_vgg_pools_once_more_from_64_pixels_on():
    with torch.device("meta"):
        for side, places in ((48, 6), (64, 4)):
            network = tapped(build("vgg8", (3, side, side)), head=None)
            assert network(torch.zeros(1, 3, side, side)).taps["last"].shape[2:] == (places, places)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("resnet_cifar", {"width": 8, "stem_width": 16}, "at most width=8, found 16; shortcut=conv"),
        ("mobilenetv2", {"width_factor": 0.05}, "at least 1/16, .* found 0.05"),
    ],
)
def test_impossible_widths_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        models[name](DIGITS, **settings)


@pytest.mark.parametrize(
    ("student", "teacher"), [("mobilenetv2", "vgg8"), ("shufflenetv2", "resnet8x4"), ("resnet8", "wrn_16_1")]
)
@pytest.mark.parametrize("method", ["fitnet", "at", "sp", "reviewkd", "cat_kd"])
def test_pairs_of_the_literature_distil(student, teacher, method):
    one, other = tapped(build(student, CIFAR)), tapped(build(teacher, CIFAR))
    batch = Batch(images(CIFAR), torch.tensor([0, 1, 4]), torch.arange(3))
    distiller = distillers[method]()
    distiller.connect(probe(one, batch.images), probe(other, batch.images))
    with torch.no_grad():
        taught = other(batch.images)
    loss = distiller(one(batch.images), taught, batch)
    loss.backward()
    assert loss.isfinite()
    first = next(one.parameters())
    assert first.grad is not None
    assert first.grad.isfinite().all()


@pytest.mark.parametrize(
    ("architecture", "stages", "has_stem", "has_last"),
    [
        ("resnet10t", [64, 128, 256, 512], True, True),
        ("mobilenetv3_small_050", [8, 16, 24, 288], True, False),  # a layer is behind the pool
        ("convnext_atto", [40, 80, 160, 320], False, False),  # a norm is
        ("vit_tiny_patch16_224", [], False, False),
    ],
)
def test_taps_of_timm_are_its_levels_and_the_pooled_map(architecture, stages, has_stem, has_last):
    network = build("timm", CIFAR, architecture=architecture).eval()
    state = torch.get_rng_state()
    with no_state_moves(network):
        network.tap_paths()
    assert torch.equal(torch.get_rng_state(), state)
    assert not network.training
    outputs = tapped(network, "head" if has_last else None)(images(CIFAR))
    assert [outputs.taps[f"stage{i}.post"].shape[1] for i in range(len(stages))] == stages
    assert ("stem" in outputs.taps, "last" in outputs.taps) == (has_stem, has_last)
    assert torch.equal(outputs.logits, network(images(CIFAR)).logits)
    if has_last:
        torch.testing.assert_close(outputs.taps["class_maps"].mean((2, 3)) + network.head.bias, outputs.logits)


def test_taps_of_timm_are_those_of_before_a_layer_writes_into_them():
    network = build("timm", CIFAR, architecture="resnet10t").eval()
    overwritten = tapped(network)(images(CIFAR)).taps
    for module in network.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    for name, tap in tapped(network)(images(CIFAR)).taps.items():
        assert torch.equal(overwritten[name], tap)


def test_a_network_of_tokens_names_no_taps():
    network = DKTNetwork(DIGITS, width=8, num_heads=2, depth=1, pool_stride=1)
    network.grow(2)
    assert not {"stem", "last"} & tapped(network, head=None)(images()).taps.keys()
