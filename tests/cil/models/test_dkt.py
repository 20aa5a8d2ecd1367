import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cil.models.dkt import GKAB, DKTNetwork
from cil.models.network import InputShape, models
from cil.models.noise import DropPath
from cil.seeding import SampleNoise, sample_noise


def tiny(*task_sizes: int, shape: InputShape = (3, 16, 16), **settings: object) -> DKTNetwork:
    torch.manual_seed(0)
    arguments = {"width": 24, "num_heads": 3, "depth": 2, "mlp_ratio": 2, "stem_width": 8} | settings
    network = DKTNetwork(shape, **arguments)  # type: ignore[arg-type]
    for size in task_sizes:
        network.grow(size)
    return network


def images(count: int = 4, shape: InputShape = (3, 16, 16)) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_is_found_by_its_name():
    assert models["dkt"] is DKTNetwork


def test_parameters_are_as_many_as_in_the_paper_without_the_dead_projection():
    network = DKTNetwork((3, 32, 32))
    counts = []
    for _ in range(10):
        network.grow(10)
        counts.append(num_parameters(network))
    assert [counts[0], counts[1], counts[9]] == [10_836_298, 10_841_300, 10_875_172]
    assert num_parameters(network.encoder.patch_embedding) == 50_496
    assert {num_parameters(block) for block in [*network.encoder.blocks, network.skab]} == {1_796_736}


def test_the_imagenet_form_has_196_tokens():
    network = DKTNetwork((3, 224, 224), stem_kernel=7, stem_stride=2, stem_padding=2, patch_kernel=4)
    assert network.encoder.patch_embedding.grid(224, 224) == (14, 14)


def test_the_cost_of_an_image_hardly_depends_on_the_number_of_tasks():
    """Multiply-accumulates of the whole network: 611.5 million with one task, 614.2 million with ten."""
    counts = []
    with torch.device("meta"):
        for num_tasks in (1, 10):
            network = DKTNetwork((3, 32, 32)).eval()
            for _ in range(num_tasks):
                network.grow(1)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                network(torch.zeros(1, 3, 32, 32))
            counts.append(counter.get_total_flops() / 2e6)
    # the index counts nine depthwise taps of the decoder as well, and rounds
    assert counts == pytest.approx([590.8 + 20.7, 590.8 + 23.4], rel=2e-3)


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((1, 8, 8), {"pool_stride": 1}),
        ((4, 12, 20), {"depth": 1}),
        ((3, 9, 15), {"pool_stride": 1, "patch_kernel": 3, "mlp_ratio": 1}),
        ((2, 33, 33), {"stem_kernel": 7, "stem_stride": 2, "stem_padding": 2, "patch_kernel": 4}),
    ],
)
def test_any_size_and_number_of_channels_works(shape, settings):
    outputs = tiny(3, 1, 4, shape=shape, **settings)(images(2, shape))
    assert outputs.logits.shape == (2, 8)
    assert outputs.embedding is not None
    assert outputs.embedding.shape == (2, 24)


def test_images_of_another_size_than_announced_work_too():
    assert tiny(2)(images(2, (3, 24, 40))).logits.shape == (2, 2)


@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [
        ((3, 16, 16), {"num_heads": 5}, "width=24 and num_heads=5"),
        ((3, 2, 16), {}, "2x16 becomes a map of 1x8 .* patch_kernel=2"),
        ((3, 18, 18), {}, "18x18 becomes a map of 9x9"),
        ((3, 2, 2), {"stem_kernel": 7, "stem_padding": 0}, "2x2"),
    ],
)
def test_impossible_shapes_are_refused(shape, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(shape=shape, **settings)


def test_an_image_that_cannot_be_cut_is_refused_in_use():
    with pytest.raises(ValueError, match="18x16"):
        tiny(2)(images(2, (3, 18, 16)))


@pytest.mark.parametrize("num_new", [0, -1])
def test_a_task_without_classes_is_refused(num_new):
    with pytest.raises(ValueError, match=f"at least one class, found {num_new}"):
        tiny(2).grow(num_new)


def test_there_are_two_classifiers_from_the_second_task_on():
    network = tiny(4)
    assert network.plasticity is None
    sizes = []
    for num_new in (3, 2, 7):
        network.grow(num_new)
        assert network.plasticity is not None
        sizes.append((network.stability.head.out_features, network.plasticity.head.out_features))
    assert sizes == [(4, 3), (7, 2), (9, 7)]
    assert network.task_sizes == [4, 3, 2, 7]
    assert (network.num_tasks, network.num_classes) == (4, 16)


def test_growing_changes_no_old_score_of_an_embedding():
    network = tiny(5, 3).double()
    for parameter in [*network.stability.parameters(), *network.plasticity.parameters()]:  # type: ignore[union-attr]
        nn.init.normal_(parameter)
    embeddings = torch.randn(6, 24, dtype=torch.float64)
    for num_new in (2, 4):
        before = network.classify(embeddings)
        network.grow(num_new)
        torch.testing.assert_close(network.classify(embeddings)[:, : before.shape[1]], before, rtol=0, atol=1e-12)


def test_growing_the_way_of_the_release_changes_old_scores():
    network = tiny(5, 3, merge_norm=False, merge_bias=False)
    embeddings = torch.randn(6, 24)
    before = network.classify(embeddings)
    network.grow(2)
    assert (network.classify(embeddings)[:, :8] - before).abs().max() > 1e-3


def test_a_new_task_token_is_a_fresh_small_draw_in_the_format_of_the_network():
    network = tiny(2, 2).double()
    network.grow(2)
    tokens = network.token_pool.task_tokens
    assert [token.dtype for token in tokens] == [torch.float64] * 3
    assert not torch.equal(tokens[1], tokens[2])
    assert all(0.005 < token.std() < 0.04 for token in tokens)
    assert network.plasticity is not None
    assert network.plasticity.norm.weight.dtype == torch.float64


def test_the_decoder_starts_with_small_attention_and_the_encoder_with_torchs():
    network = DKTNetwork((3, 32, 32), width=96, num_heads=3, depth=1)
    for linear in (network.skab.attention.q, network.skab.attention.proj):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert not linear.bias.any()
    block = network.encoder.blocks[0]
    assert isinstance(block, GKAB)
    assert block.attention.q.weight.std().item() == pytest.approx((1 / 3 / 96) ** 0.5, rel=0.05)


def test_the_newest_token_asks_and_the_older_ones_answer_in_their_order():
    network = tiny(2, 2, 2)
    one, two, three = network.token_pool.task_tokens
    assert torch.equal(network.token_pool.newest_first(2)[1:], torch.cat([three, one, two], dim=1))


@pytest.mark.parametrize("name", ["token_pool.general_token", "token_pool.task_tokens.0", "token_pool.task_tokens.1"])
def test_every_token_counts(name):
    network = tiny(2, 2).eval()
    before = network(images()).logits
    with torch.no_grad():
        network.get_parameter(name).add_(1 + torch.arange(24))
    assert (network(images()).logits - before).abs().max() > 1e-4


def test_drop_path_grows_over_the_blocks_and_spares_the_decoder():
    network = tiny(2, depth=5, drop_path=0.1)
    rates = [[block.drop_attention.rate, block.drop_mlp.rate] for block in network.encoder.blocks]
    assert rates == [pytest.approx([0.1 * i / 5] * 2) for i in range(5)]
    assert network.skab.drop_attention.rate == network.skab.drop_mlp.rate == 0


def test_what_drops_for_a_sample_does_not_depend_on_its_place_in_the_batch():
    network = tiny(2, depth=3, drop_path=0.9).eval()  # BatchNorm of a training batch would tie the samples together
    for module in network.modules():
        if isinstance(module, DropPath):
            module.train()
    order = torch.tensor([5, 2, 0, 7, 1, 3, 6, 4])

    def logits(ids: torch.Tensor, key: int) -> torch.Tensor:
        with sample_noise(SampleNoise(key, ids, torch.zeros_like(ids))):
            return network(images(8)[ids]).logits

    there = logits(torch.arange(8), key=1)
    torch.testing.assert_close(logits(order, key=1), there[order])
    assert (logits(torch.arange(8), key=2) - there).abs().max() > 1e-4


def test_a_rebuilt_network_says_the_same_to_the_bit():
    network = tiny(3, 1, 2).eval()
    fresh = tiny().eval()
    fresh.rebuild(network.structure())
    fresh.load_state_dict(network.state_dict())
    assert torch.equal(fresh(images()).logits, network(images()).logits)
    assert fresh.structure() == {"task_sizes": [3, 1, 2]}


def test_only_a_fresh_network_can_be_rebuilt():
    with pytest.raises(ValueError, match=r"tasks of \[3\] classes"):
        tiny(3).rebuild({"task_sizes": [1]})


def test_a_teacher_is_left_alone_when_the_student_grows():
    network = tiny(2, 2).eval()
    teacher = copy.deepcopy(network)
    before = teacher(images()).logits
    network.grow(3)
    assert torch.equal(teacher(images()).logits, before)


def test_bfloat16_autocast_is_finite_and_leaves_parameters_in_float32():
    network = tiny(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = network(images())
    loss = outputs.logits.float().square().mean()
    loss.backward()
    assert loss.isfinite()
    gradients = [parameter.grad for parameter in network.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert outputs.embedding is not None
    wide = tiny(2, 2)(images()).embedding
    assert wide is not None
    torch.testing.assert_close(outputs.embedding.float(), wide, rtol=0.1, atol=0.1)


def test_a_few_steps_learn_a_batch_by_heart():
    network, labels = tiny(2, 2, drop_path=0.0), torch.tensor([0, 1, 2, 3])
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(network(images()).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_biases_in_front_of_a_batch_norm_rest_while_it_takes_their_mean_away() -> None:
    gradients = {}
    for still in (True, False):
        network = tiny(3, still_biases=still)
        torch.manual_seed(1)
        network(images()).logits.square().sum().backward()
        gradients[still] = {name: value.grad for name, value in network.named_parameters() if value.grad is not None}
    resting = {name for name, found in gradients[True].items() if not found.any()}
    expected = {"encoder.patch_embedding.stem.bias"}
    for block in ("encoder.blocks.0", "encoder.blocks.1", "skab"):
        expected |= {f"{block}.{part}.bias" for part in ("norm2", "mlp.expand", "mlp.depthwise", "mlp.reduce")}
    assert expected <= resting
    for name, found in gradients[False].items():
        torch.testing.assert_close(gradients[True][name], found, rtol=0, atol=1e-3 if name in expected else 0)

    network = tiny(3).eval()
    network(images()).logits.square().sum().backward()
    assert all(network.get_parameter(name).grad.any() for name in expected)


@pytest.mark.parametrize(
    "switches",
    [{"general_token": False}, {"task_tokens": False}, {"old_tokens": False}, {"duplex": False}],
    ids=lambda switches: next(iter(switches)),
)
def test_a_part_that_is_switched_off_is_not_there_and_the_rest_grows_on(switches):
    network = tiny(2, 3, 2, **switches).eval()
    logits = network(images()).logits
    assert logits.shape == (4, 7)
    names = dict(network.named_parameters())
    assert ("token_pool.general_token" in names) == ("general_token" not in switches)
    assert len(network.token_pool.task_tokens) == (1 if "task_tokens" in switches else 3)
    assert (network.plasticity is None) == ("duplex" in switches)
    fresh = tiny(**switches).eval()
    fresh.rebuild(network.structure())
    fresh.load_state_dict(network.state_dict())
    assert torch.equal(fresh(images()).logits, logits)


def test_without_old_tokens_in_the_decoder_they_do_not_count():
    network = tiny(2, 2, old_tokens=False).eval()
    before = network(images()).logits
    with torch.no_grad():
        network.token_pool.task_tokens[0].add_(1 + torch.arange(24))
    assert torch.equal(network(images()).logits, before)


def test_with_one_classifier_growing_leaves_the_old_rows_where_they_are():
    network = tiny(2, duplex=False)
    before = network.stability.head.weight.clone()
    network.grow(3)
    assert torch.equal(network.stability.head.weight[:2], before)
    assert network.classifiers() == [network.stability]


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"task_tokens": False, "old_tokens": False}, "old_tokens=false has no effect"),
        ({"duplex": False, "merge_norm": False}, "have no effect with model.duplex=false"),
    ],
)
def test_switches_on_parts_that_are_off_are_refused(switches, message):
    with pytest.raises(ValueError, match=message):
        tiny(**switches)
