import pytest
import torch

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


def test_every_task_has_a_token_a_classifier_and_an_embedding():
    outputs = tiny(4, 1, 3)(images())
    assert outputs.logits.shape == (4, 8)
    assert outputs.taps["task_embeddings"].shape == (3, 4, 24)
    assert outputs.embedding is not None
    assert torch.equal(outputs.embedding, outputs.taps["task_embeddings"][-1])


def test_the_divergence_head_tells_old_from_each_new_class():
    assert "divergence" not in tiny(4)(images()).taps
    assert tiny(4, 1, 3)(images()).taps["divergence"].shape == (4, 1 + 3)


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
    by_place = attention.position(relative_positions(5, 5)).softmax(dim=1)
    middle = 12
    assert by_place[middle].argmax(dim=0).tolist() == [6, 7, 8, 11, 12, 13, 16, 17, 18]


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
