import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd import Batch, Outputs
from kd.distributed import all_reduce_sum, gather, gathered, rank, share_lengths, world_size
from tests.kd.processes import in_processes

LENGTHS = ([3, 3], [4, 2], [5, 0], [0, 1])


def whole(seed: int, rows: int, width: int = 4) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def share(rows: Tensor, lengths: list[int]) -> Tensor:
    return torch.split(rows, lengths)[rank()]


def pairing_loss(outputs: Outputs, labels: Tensor) -> Tensor:
    """A loss in which every sample meets every other."""
    assert outputs.embedding is not None
    gram = outputs.embedding @ outputs.embedding.T
    same = labels[:, None] == labels
    return ((gram - same.double()) ** 2).mean() + outputs.logits.logsumexp(0).mean() + outputs.taps["last"].std()


def pairing_gradients(lengths: list[int]) -> list[Tensor]:
    """The gradients of a linear network that sees a share of the batch, averaged as DistributedDataParallel does."""
    rows = sum(lengths)
    weight, bias = whole(7, 4, 5).requires_grad_(), whole(8, 1, 5).requires_grad_()
    batch = Batch(torch.zeros(rows, 1, 1, 1), torch.arange(rows) % 2, torch.arange(rows))
    images = whole(9, rows)
    if world_size() > 1:
        images = share(images, lengths)
        batch = Batch(share(batch.images, lengths), share(batch.labels, lengths), share(batch.ids, lengths))
    embedding = (images @ weight + bias).tanh()
    student = Outputs(embedding * 2, embedding, {"last": embedding[:, :, None, None] ** 2})
    outputs, _, everything = gathered(student, student.first(5), batch)
    gradients = torch.autograd.grad(pairing_loss(outputs, everything.labels), [weight, bias])
    return [all_reduce_sum(gradient) / world_size() for gradient in gradients]


def slope_of_the_slope(rows: Tensor) -> Tensor:
    (slope,) = torch.autograd.grad((gather(rows) ** 2).sum(0).prod(), [rows], create_graph=True)
    (second,) = torch.autograd.grad(slope.sum(), [rows])
    return second / world_size()


def gathering() -> dict[str, object]:
    """Everything that the tests below ask of one pair of processes."""
    found: dict[str, object] = {"rank": rank(), "world_size": world_size()}
    found["sum"] = all_reduce_sum(torch.tensor([float(rank()), 10.0]))
    for lengths in LENGTHS:
        name, rows = str(lengths), sum(lengths)
        mine = share(whole(0, rows), lengths)
        found[f"lengths {name}"] = share_lengths(len(mine), mine.device)
        found[f"rows {name}"] = gather(mine)
        found[f"labels {name}"] = gather(share(torch.arange(rows), lengths))
        found[f"flags {name}"] = gather(share(torch.arange(rows) % 3 == 0, lengths))
        found[f"narrow {name}"] = gather(share(whole(0, rows).half(), lengths))
        found[f"gradients {name}"] = pairing_gradients(lengths)
    outputs = Outputs(whole(rank(), 2), views={"strong": Outputs(whole(rank() + 2, 2), taps={"stem": whole(5, 2)})})
    batch = Batch(torch.full((2, 1, 1, 1), float(rank())), torch.arange(2), torch.arange(2) + 2 * rank())
    once = gathered(outputs, outputs, batch)
    twice = gathered(*once)
    found["once"] = once
    found["again is the same"] = all(first is second for first, second in zip(once, twice, strict=True))
    frozen, learning = whole(0, 2), whole(1, 2).requires_grad_()
    found["needs gradient"] = [gather(frozen).requires_grad, gather(learning).requires_grad]
    found["slope of the slope"] = slope_of_the_slope(learning)
    return found


@pytest.fixture(scope="module")
def processes():
    return in_processes(gathering)


def test_one_process_is_a_world_of_its_own():
    assert not dist.is_initialized()
    assert (rank(), world_size()) == (0, 1)
    rows = whole(0, 3)
    assert gather(rows) is rows
    assert all_reduce_sum(rows) is rows


def test_in_one_process_outputs_and_batch_come_back_as_they_are():
    student, teacher = Outputs(whole(0, 3)), Outputs(whole(1, 3))
    batch = Batch(torch.zeros(3, 1, 1, 1), torch.arange(3), torch.arange(3))
    assert all(a is b for a, b in zip(gathered(student, teacher, batch), (student, teacher, batch), strict=True))


def test_two_processes_know_their_places(processes):
    assert [(found["rank"], found["world_size"]) for found in processes] == [(0, 2), (1, 2)]


def test_the_sum_is_over_the_processes(processes):
    for found in processes:
        torch.testing.assert_close(found["sum"], torch.tensor([1.0, 20.0]))


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_every_process_gets_all_rows_in_order_however_they_are_shared(processes, lengths):
    rows = sum(lengths)
    for found in processes:
        assert found[f"lengths {lengths}"] == lengths
        torch.testing.assert_close(found[f"rows {lengths}"], whole(0, rows), rtol=0, atol=0)
        assert found[f"labels {lengths}"].tolist() == list(range(rows))
        assert found[f"flags {lengths}"].tolist() == [row % 3 == 0 for row in range(rows)]
        assert found[f"narrow {lengths}"].dtype == torch.float16
        torch.testing.assert_close(found[f"narrow {lengths}"], whole(0, rows).half(), rtol=0, atol=0)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_the_averaged_gradient_of_a_pairing_loss_is_that_of_one_process(processes, lengths):
    alone = pairing_gradients(lengths)
    for found in processes:
        for gradient, expected in zip(found[f"gradients {lengths}"], alone, strict=True):
            assert expected.abs().max() > 1e-3
            torch.testing.assert_close(gradient, expected, rtol=1e-13, atol=1e-13)


def test_everything_a_network_says_is_gathered_but_not_the_images(processes):
    for place, found in enumerate(processes):
        student, _, batch = found["once"]
        torch.testing.assert_close(student.logits, torch.cat([whole(0, 2), whole(1, 2)]))
        torch.testing.assert_close(student.views["strong"].logits, torch.cat([whole(2, 2), whole(3, 2)]))
        torch.testing.assert_close(student.views["strong"].taps["stem"], whole(5, 2).repeat(2, 1))
        assert student.embedding is None
        assert batch.labels.tolist() == [0, 1, 0, 1]
        assert batch.ids.tolist() == [0, 1, 2, 3]
        assert batch.gathered
        assert batch.images.flatten().tolist() == [place, place]


def test_what_is_gathered_is_not_gathered_again(processes):
    assert all(found["again is the same"] for found in processes)


def test_only_what_learns_asks_for_gradients(processes):
    assert all(found["needs gradient"] == [False, True] for found in processes)


def test_a_gradient_through_it_can_be_differentiated_again(processes):
    alone = slope_of_the_slope(torch.cat([whole(1, 2), whole(1, 2)]).requires_grad_())
    torch.testing.assert_close(torch.cat([found["slope of the slope"] for found in processes]), alone)


@settings(max_examples=20)
@given(rows=st.integers(0, 5), width=st.integers(1, 4))
def test_gathering_alone_changes_nothing(rows, width):
    torch.testing.assert_close(gather(whole(0, rows, width), [rows]), whole(0, rows, width))


def fails_in_the_second() -> None:
    if rank():
        raise ValueError("the second process fails")


def test_a_process_that_fails_is_reported():
    with pytest.raises(AssertionError, match="the second process fails"):
        in_processes(fails_in_the_second)
