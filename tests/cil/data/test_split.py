import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cil.data import validation_split


def test_a_tenth_of_every_class_is_for_validation():
    labels = torch.arange(10).repeat(50)
    train, validation = validation_split(labels, 0.1, seed=1)
    assert torch.bincount(labels[validation]).tolist() == [5] * 10
    assert torch.bincount(labels[train]).tolist() == [45] * 10


@settings(deadline=None)
@given(
    st.lists(st.integers(2, 30), min_size=1, max_size=6),
    st.floats(0.001, 0.999),
    st.integers(0, 2**31),
)
def test_the_parts_are_disjoint_complete_ascending_and_hold_every_class(counts, fraction, seed):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    train, validation = validation_split(labels, fraction, seed)
    assert sorted([*train.tolist(), *validation.tolist()]) == list(range(len(labels)))
    assert train.tolist() == sorted(train.tolist())
    assert validation.tolist() == sorted(validation.tolist())
    for label, count in enumerate(counts):
        held_out = int((labels[validation] == label).sum())
        assert 1 <= held_out < count
        assert held_out == min(max(round(fraction * count), 1), count - 1)


def test_the_seed_decides_and_nothing_else_does():
    labels = torch.zeros(100, dtype=torch.int64)
    again = [validation_split(labels, 0.2, seed)[1].tolist() for seed in (1, 1, 2)]
    assert again[0] == again[1] != again[2]


def test_no_fraction_keeps_everything_for_training():
    train, validation = validation_split(torch.tensor([0, 1, 1]), 0.0, seed=1)
    assert train.tolist() == [0, 1, 2]
    assert validation.tolist() == []


def test_a_class_of_one_image_cannot_be_parted():
    with pytest.raises(ValueError, match="class 7 has 1"):
        validation_split(torch.tensor([3, 3, 7]), 0.5, seed=1)


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        validation_split(torch.tensor([0, 0]), fraction, seed=1)
