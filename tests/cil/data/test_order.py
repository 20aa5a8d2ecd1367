import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cil.data import epoch_plan


def entries(plan):
    return [pair for ids, views in plan for pair in zip(ids.tolist(), views.tolist(), strict=True)]


def sizes(plan):
    return [len(ids) for ids, _ in plan]


def test_an_epoch_shows_every_sample_once():
    plan = epoch_plan(torch.arange(100, 150), key=1, batch_size=16)
    assert sorted(entries(plan)) == [(sample, 0) for sample in range(100, 150)]
    assert sizes(plan) == [16, 16, 16, 2]


def test_the_order_is_a_function_of_the_key():
    ids = torch.arange(50)
    assert entries(epoch_plan(ids, key=1, batch_size=8)) == entries(epoch_plan(ids, key=1, batch_size=8))
    assert entries(epoch_plan(ids, key=1, batch_size=8)) != entries(epoch_plan(ids, key=2, batch_size=8))


def test_without_shuffling_samples_come_as_given():
    plan = epoch_plan(torch.tensor([5, 3, 9]), key=1, batch_size=3, shuffle=False)
    assert entries(plan) == [(5, 0), (3, 0), (9, 0)]


def test_a_tail_of_one_joins_the_batch_before_it():
    assert sizes(epoch_plan(torch.arange(9), key=1, batch_size=4)) == [4, 5]
    assert sizes(epoch_plan(torch.arange(10), key=1, batch_size=4)) == [4, 4, 2]


def test_dropping_the_tail_never_drops_the_only_batch():
    assert sizes(epoch_plan(torch.arange(11), key=1, batch_size=4, drop_last=True)) == [4, 4]
    assert sizes(epoch_plan(torch.arange(9), key=1, batch_size=4, drop_last=True)) == [4, 4]
    assert sizes(epoch_plan(torch.arange(3), key=1, batch_size=4, drop_last=True)) == [3]


@pytest.mark.parametrize(("samples", "entries_left", "steps"), [(5000, 4864, 9), (7000, 6912, 13)])
def test_repeated_augmentation_has_the_steps_of_the_release(samples, entries_left, steps):
    ids = torch.arange(samples)
    plan = epoch_plan(ids, key=1, batch_size=512, views=3, round_to=256)
    assert sum(sizes(plan)) == entries_left
    dropped = epoch_plan(ids, key=1, batch_size=512, views=3, round_to=256, drop_last=True)
    assert sizes(dropped) == [512] * steps
    assert len({sample for sample, _ in entries(plan)}) == -(-entries_left // 3)


def test_the_views_of_a_sample_follow_each_other():
    plan = epoch_plan(torch.arange(12), key=1, batch_size=100, views=3)
    pairs = entries(plan)
    assert len(pairs) == 12
    assert [view for _, view in pairs] == [0, 1, 2] * 4
    assert all(len({sample for sample, _ in pairs[k : k + 3]}) == 1 for k in range(0, 12, 3))


@pytest.mark.parametrize("views", [1, 3])
def test_one_of_two_shares_is_every_second_entry_of_the_same_order(views):
    ids = torch.arange(20)
    whole = entries(epoch_plan(ids, key=1, batch_size=8, views=views))
    share = entries(epoch_plan(ids, key=1, batch_size=8, views=views, num_shares=2))
    assert len(share) == 10
    # the whole epoch is cut at 20 entries, so with more views it shows only the start of what the share steps through
    assert share[: len(whole[::2])] == whole[::2]


def test_a_share_of_one_is_the_whole_epoch():
    ids = torch.arange(20)
    whole, share = (entries(epoch_plan(ids, key=1, batch_size=8, views=3, **more)) for more in ({}, {"num_shares": 1}))
    assert share == whole


@settings(deadline=None)
@given(
    count=st.integers(1, 60),
    batch_size=st.integers(1, 20),
    views=st.integers(1, 4),
    round_to=st.integers(1, 8),
    drop_last=st.booleans(),
    shuffle=st.booleans(),
)
def test_every_plan_keeps_its_promises(count, batch_size, views, round_to, drop_last, shuffle):
    if count < round_to:
        with pytest.raises(ValueError, match="is empty"):
            epoch_plan(torch.arange(count), key=1, batch_size=batch_size, round_to=round_to)
        return
    plan = epoch_plan(
        torch.arange(count),
        key=1,
        batch_size=batch_size,
        views=views,
        round_to=round_to,
        drop_last=drop_last,
        shuffle=shuffle,
    )
    pairs = entries(plan)
    length = count // round_to * round_to
    assert len(set(pairs)) == len(pairs)
    assert len(pairs) <= length
    assert len(pairs) > length - batch_size
    if not drop_last:
        assert len(pairs) == length
    assert max(sizes(plan)) <= batch_size + 1
    assert batch_size == 1 or length == 1 or min(sizes(plan)) > 1


@pytest.mark.parametrize("name", ["batch_size", "views", "round_to", "num_shares"])
def test_a_count_below_one_is_refused(name):
    settings = {"batch_size": 4} | {name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, found 0"):
        epoch_plan(torch.arange(4), key=1, **settings)


def test_an_epoch_of_nothing_is_refused():
    with pytest.raises(ValueError, match="an epoch of 0 samples"):
        epoch_plan(torch.arange(0), key=1, batch_size=4)
