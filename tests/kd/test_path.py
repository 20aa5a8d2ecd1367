from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd.path import best_path, direct, full_chain, one_assistant

SIZES = [110, 56, 32, 20]  # depths of CIFAR residual networks
#: Top-1 on CIFAR-100 without a teacher, and by KD where a pair is measured (README of RepDistiller).
ACCURACIES = {110: 74.31, 56: 72.34, 32: 71.14, 20: 69.06}
HOPS = {(110, 32): 73.08, (110, 20): 70.67, (56, 20): 70.66}


def test_the_direct_path_has_one_hop_and_the_full_chain_all():
    assert direct(SIZES) == (110, 20)
    assert full_chain(SIZES) == (110, 56, 32, 20)


def test_the_assistant_is_nearest_the_mean_accuracy_and_not_the_mean_size():
    # the mean accuracy of 110 and 20 is 71.685, which 32 misses by 0.545 and 56 by 0.655; the mean size is 65
    assert one_assistant(SIZES, ACCURACIES) == (110, 32, 20)


def test_of_two_assistants_as_near_the_larger_is_taken():
    assert one_assistant(["l", "m", "s", "xs"], {"l": 4.0, "m": 3.0, "s": 1.0, "xs": 0.0}) == ("l", "m", "xs")


def test_the_best_path_takes_only_measured_hops():
    assert best_path(SIZES, HOPS) == ((110, 20), 70.67)
    assert best_path(SIZES, HOPS | {(32, 20): 71.0}) == ((110, 32, 20), 71.0)


def test_the_best_path_to_a_size_starts_every_path_over_it():
    hops = {(4, 3): 60.0, (4, 2): 50.0, (3, 2): 55.0, (4, 1): 40.0, (3, 1): 41.0, (2, 1): 45.0}
    assert best_path([4, 3, 2, 1], hops) == ((4, 3, 2, 1), 45.0)
    assert best_path([4, 3, 2, 1], hops | {(4, 2): 56.0}) == ((4, 2, 1), 45.0)


def test_of_paths_as_good_the_shortest_is_taken():
    assert best_path([3, 2, 1], {(3, 2): 1.0, (3, 1): 1.0, (2, 1): 1.0}) == ((3, 1), 1.0)


@given(st.lists(st.integers(0, 20), min_size=6, max_size=6), st.lists(st.integers(1, 5), min_size=3, max_size=3))
def test_gains_over_training_alone_lead_along_the_path_of_accuracies(values, alone):
    sizes, accuracies = [4, 3, 2, 1], dict(zip([3, 2, 1], alone, strict=True))
    hops = {hop: float(value) for hop, value in zip(combinations(sizes, 2), values, strict=True)}
    gains = {hop: value - accuracies[hop[1]] for hop, value in hops.items()}
    assert best_path(sizes, hops)[0] == best_path(sizes, gains)[0]


def test_a_function_is_asked_once_for_every_hop_with_the_best_path_to_it():
    asked = []

    def train(path):
        asked.append(path)
        return float(len(path))  # the longer the better

    assert best_path(SIZES, train) == ((110, 56, 32, 20), 4.0)
    assert len(asked) == 6
    assert [path for path in asked if path[-1] == 20] == [(110, 20), (110, 56, 20), (110, 56, 32, 20)]


@given(st.lists(st.floats(0, 100), min_size=10, max_size=10))
def test_no_whole_path_is_better_where_hops_do_not_depend_on_what_came_before(values):
    sizes = ["a", "b", "c", "d", "e"]
    hops = dict(zip(combinations(sizes, 2), values, strict=True))
    path, found = best_path(sizes, hops)
    whole = [("a", *middle, "e") for count in range(4) for middle in combinations("bcd", count)]
    assert path in whole
    assert found == max(hops[one[-2:]] for one in whole) == hops[path[-2:]]


@pytest.mark.parametrize(
    "plan", [direct, full_chain, lambda sizes: one_assistant(sizes, {}), lambda sizes: best_path(sizes, {})]
)
@pytest.mark.parametrize("sizes", [[], [110], [110, 20, 110]])
def test_sizes_that_are_no_path_are_refused(plan, sizes):
    with pytest.raises(ValueError, match=r"teacher and a student, and every size once"):
        plan(sizes)


def test_an_assistant_needs_a_size_and_every_accuracy():
    with pytest.raises(ValueError, match="no assistant between 110 and 20"):
        one_assistant([110, 20], ACCURACIES)
    with pytest.raises(ValueError, match=r"every size, found none of 56, 32"):
        one_assistant(SIZES, {110: 74.31, 20: 69.06})


def test_hops_that_are_wrong_or_too_few_are_refused():
    with pytest.raises(ValueError, match=r"hop \(110, 21\) has 21, which is none of the sizes \[110, 56, 32, 20\]"):
        best_path(SIZES, {(110, 21): 1.0})
    with pytest.raises(ValueError, match="does not go down"):
        best_path(SIZES, {(20, 110): 1.0})
    with pytest.raises(ValueError, match=r"no path of measured hops leads from 110 to 20: measure \(110, 20\)"):
        best_path(SIZES, {(110, 56): 1.0, (32, 20): 1.0})
