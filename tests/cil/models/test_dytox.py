import pytest
import torch
from einops import rearrange, repeat
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cil.models.dytox import GPSA, DyToxNetwork, relative_positions
from cil.models.network import InputShape


def tiny(*task_sizes: int, shape: InputShape = (3, 16, 16), **settings: object) -> DyToxNetwork:
    torch.manual_seed(0)
    arguments = {"width": 24, "num_heads": 4, "depth": 2, "mlp_ratio": 2} | settings
    network = DyToxNetwork(shape, **arguments)  # type: ignore[arg-type]
    for size in task_sizes:
        network.grow(size)
    return network


def images(count: int = 4, shape: InputShape = (3, 16, 16)) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))


def test_every_task_has_a_token_a_classifier_and_an_answer():
    network = tiny(4, 1, 3).eval()
    outputs, answers = network(images()), network.decode(network.encode(images()))
    assert outputs.logits.shape == (4, 8)
    assert answers.shape == (4, 3, 24)
    assert outputs.embedding is not None
    assert torch.equal(outputs.embedding, answers[:, -1])
    assert outputs.taps == {}


@pytest.mark.parametrize("decoder_depth", [1, 2])
def test_decoding_all_tasks_at_once_is_decoding_each_alone_over_one_sequence(decoder_depth):
    """As published: a pass for each task over [token, patches], in which the token asks, layer by layer."""
    network = tiny(2, 2, 2, decoder_depth=decoder_depth).double().eval()
    maps = network.encode(images().double())
    patches = rearrange(maps, "b d h w -> b (h w) d")
    expected = []
    for token in network.task_tokens:
        answer = repeat(token, "1 1 d -> b 1 d", b=len(patches))
        for block in network.decoder:
            sequence = block.norm1(torch.cat([answer, patches], dim=1))
            q, k, v = (
                rearrange(layer(x), "b n (head d) -> b head n d", head=4)
                for layer, x in (
                    (block.attention.q, sequence[:, :1]),
                    (block.attention.k, sequence),
                    (block.attention.v, sequence),
                )
            )
            asked = rearrange(nn.functional.scaled_dot_product_attention(q, k, v), "b head n d -> b n (head d)")
            answer = answer + block.attention.proj(asked)
            answer = answer + block.mlp(block.norm2(answer))
        expected.append(answer)
    torch.testing.assert_close(network.decode(maps), torch.cat(expected, dim=1), rtol=0, atol=1e-12)


def test_no_task_token_sees_another():
    network = tiny(2, 2, 2, decoder_depth=2).eval()
    maps = network.encode(images())
    before = network.decode(maps)
    with torch.no_grad():
        network.task_tokens[1].add_(1 + torch.arange(24))
    after = network.decode(maps)
    assert torch.equal(after[:, [0, 2]], before[:, [0, 2]])
    assert (after[:, 1] - before[:, 1]).abs().max() > 1e-2


def test_the_divergence_head_tells_old_from_each_new_class_and_begins_anew_with_every_task():
    assert tiny(4).divergence is None
    network = tiny(4, 1)
    first = network.divergence
    network.grow(3)
    assert network.divergence is not first
    assert network.divergence(torch.randn(4, 24)).shape == (4, 1 + 3)
    assert [name for name, _ in network.named_parameters() if name.startswith(network.fresh_parts)] == [
        f"divergence.{name}" for name in ("norm.weight", "norm.bias", "head.weight", "head.bias")
    ]


def test_the_cost_of_the_decoder_grows_with_the_tokens_and_not_with_the_patches_of_every_task():
    """Multiply-adds beside the encoder: 20.7 million for one task, 37 for ten, as with a cache of keys and values."""
    counts = []
    with torch.device("meta"):
        for num_tasks in (1, 10):
            network = DyToxNetwork((3, 32, 32)).eval()
            for _ in range(num_tasks):
                network.grow(1)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                network.decode(torch.zeros(1, 384, 8, 8))
            counts.append(counter.get_total_flops() / 2e6)
    assert counts == pytest.approx([20.7, 37], rel=0.02)


def test_parameters_are_as_many_as_in_the_paper():
    """10.73 million after ten tasks of ten classes, without the divergence head, which only trains."""
    network = DyToxNetwork((3, 32, 32))
    for _ in range(10):
        network.grow(10)
    count = sum(p.numel() for name, p in network.named_parameters() if not name.startswith("divergence."))
    assert count == pytest.approx(10.73e6, rel=2e-3)


def test_growing_changes_no_old_score():
    network = tiny(4, 2).eval()
    before = network(images()).logits
    network.grow(3)
    torch.testing.assert_close(network(images()).logits[:, :6], before)


def test_any_grid_and_number_of_channels_works():
    assert tiny(2, shape=(1, 8, 12), decoder_depth=2, depth=1)(images(2, (1, 8, 12))).logits.shape == (2, 2)


def test_relative_positions_point_from_the_query_to_the_key():
    positions = relative_positions(2, 3)
    assert positions.shape == (6, 6, 3)
    assert positions[0, 5].tolist() == [2.0, 1.0, 5.0]  # from (x 0, y 0) to (x 2, y 1)
    assert positions[4, 0].tolist() == [-1.0, -1.0, 2.0]


def test_heads_start_by_looking_at_one_neighbour_each():
    attention = GPSA(18, num_heads=9, locality=1.0)
    attention.look_around()
    by_place = attention.position(relative_positions(5, 5)).softmax(dim=1)
    middle = 12
    assert by_place[middle].argmax(dim=0).tolist() == [6, 7, 8, 11, 12, 13, 16, 17, 18]


def test_an_even_square_of_heads_looks_between_neighbours_and_to_all_sides_alike():
    attention = GPSA(8, num_heads=4, locality=1.0)
    attention.look_around()
    by_place = attention.position(relative_positions(5, 5)).softmax(dim=1)[12].reshape(5, 5, 4)
    corners = [by_place[1:3, 1:3, 0], by_place[1:3, 2:4, 1], by_place[2:4, 1:3, 2], by_place[2:4, 2:4, 3]]
    for corner in corners:
        torch.testing.assert_close(corner, corner[0, 0].expand(2, 2))
        assert corner[0, 0] > by_place[0, 0].max()


def test_linear_layers_start_small_and_the_values_of_the_encoder_as_they_are():
    network = tiny()
    linears = [module for module in network.modules() if isinstance(module, nn.Linear)]
    assert all(not linear.bias.any() for linear in linears if linear.bias is not None and linear.out_features != 4)
    block = network.encoder[0]
    assert torch.equal(block.attention.v.weight, torch.eye(block.attention.v.in_features))
    assert block.mlp.fc1.weight.std() < 0.03


def test_a_rebuilt_network_says_the_same_to_the_bit():
    network, fresh = tiny(3, 1).eval(), tiny().eval()
    fresh.rebuild(network.structure())
    fresh.load_state_dict(network.state_dict())
    assert torch.equal(fresh(images()).logits, network(images()).logits)


def test_bfloat16_autocast_is_finite():
    network = tiny(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(images()).logits
    logits.float().sum().backward()
    assert logits.isfinite().all()
    assert network.position.grad is not None
    assert network.position.grad.isfinite().all()


@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [((3, 16, 16), {"num_heads": 5}, "num_heads=5"), ((3, 18, 16), {}, "patch_size=4, found 18x16")],
)
def test_impossible_shapes_are_refused(shape, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny(shape=shape, **settings)
