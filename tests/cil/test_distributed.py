"""What can be said of several processes in one; tests/test_distributed.py starts real ones."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNormAct2d
from torch import nn

from cil import distributed


@given(length=st.integers(0, 40), count=st.integers(1, 7))
def test_shares_neither_overlap_nor_pad(length: int, count: int) -> None:
    rows = torch.arange(length)
    shares = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "world_size", lambda: count)
        for number in range(count):
            patch.setattr(distributed, "rank", lambda number=number: number)
            shares.append(distributed.share(rows))
            with distributed.sharing(length):
                assert distributed._lengths.get()[number] == len(shares[-1])
    assert torch.cat(shares).equal(rows)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_speaks_decides_and_holds_everything() -> None:
    module = nn.Sequential(nn.BatchNorm1d(2))
    assert distributed.num_launched() == 1
    assert distributed.first_to_speak()
    assert distributed.broadcast({3: [1]}) == {3: [1]}
    assert distributed.wrap(module) is module
    distributed.agree(None)
    with pytest.raises(ValueError, match="no data"):
        distributed.agree("no data")
    distributed.stop()


def test_every_batch_norm_keeps_its_parameters_and_names() -> None:
    network = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm2d(3), nn.BatchNorm3d(4), BatchNormAct2d(5))
    before = {name: id(value) for name, value in network.state_dict(keep_vars=True).items()}
    x = torch.randn(6, 5, 2, 2)
    expected = BatchNormAct2d(5).train()(x)
    distributed.synchronise_batch_norm(network)
    distributed.synchronise_batch_norm(network)
    assert all(type(layer).__name__.startswith("_Synchronised") for layer in network)
    assert {name: id(value) for name, value in network.state_dict(keep_vars=True).items()} == before
    assert network[3].train()(x).equal(expected)


def test_a_batch_norm_of_an_unknown_kind_is_refused() -> None:
    class Own(nn.BatchNorm2d):
        pass

    with pytest.raises(ValueError, match=r"1 is a Own, which several processes cannot compute as one; known: Batch"):
        distributed.synchronise_batch_norm(nn.Sequential(nn.ReLU(), Own(2)))
    distributed.synchronise_batch_norm(FrozenBatchNormAct2d(3))  # is none: its statistics never move


def test_other_errors_are_not_taken_for_a_lost_process() -> None:
    assert not distributed.is_lost_connection(RuntimeError("gloo: Connection closed by peer"))  # there is no other
