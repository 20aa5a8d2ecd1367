import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cil.tasks import TaskSequence, imagenet100_classes, named_orders, task_sequence


def test_b0_has_tasks_of_equal_size():
    assert task_sequence(100, increment=10).task_sizes == (10,) * 10


def test_b50_counts_the_base_task_as_a_task():
    assert task_sequence(100, initial_increment=50, increment=10).task_sizes == (50, 10, 10, 10, 10, 10)


def test_explicit_sizes_may_leave_classes_unused():
    sequence = task_sequence(100, task_sizes=[50, 10, 7])
    assert sequence.task_sizes == (50, 10, 7)
    assert sequence.num_classes == 67
    assert sequence.class_order == tuple(range(67))
    assert "33 classes are not used" in sequence.describe()


def test_tasks_are_contiguous_ranges_of_labels():
    sequence = task_sequence(10, task_sizes=[5, 2, 3])
    assert [sequence.labels(task) for task in range(3)] == [range(0, 5), range(5, 7), range(7, 10)]
    assert [sequence.seen(task) for task in range(-1, 3)] == [0, 5, 7, 10]


@pytest.mark.parametrize(("remainder", "sizes"), [("last_small", (30, 30, 30, 10)), ("merge_last", (30, 30, 40))])
def test_the_remainder_policy_is_followed_and_said_aloud(remainder, sizes):
    sequence = task_sequence(100, increment=30, remainder=remainder)
    assert sequence.task_sizes == sizes
    assert f"remainder={remainder}" in sequence.describe()
    assert "remainder of 10 classes" in sequence.describe()


def test_a_remainder_is_refused_when_asked_to():
    with pytest.raises(ValueError, match=r"100 classes do not divide .* increment=30: 10 remain.*last_small"):
        task_sequence(100, increment=30, remainder="error")


def test_a_remainder_after_the_base_task_joins_it_when_there_is_no_other():
    assert task_sequence(10, initial_increment=8, increment=5, remainder="merge_last").task_sizes == (10,)
    assert task_sequence(10, initial_increment=8, increment=5).task_sizes == (8, 2)


def test_an_increment_above_the_classes_makes_one_task_and_says_so():
    sequence = task_sequence(10, increment=20)
    assert sequence.task_sizes == (10,)
    assert "fewer than increment=20" in sequence.describe()


def test_an_increment_without_effect_is_said_aloud():
    assert "increment=5 has no effect" in task_sequence(10, initial_increment=10, increment=5).describe()


def test_only_the_first_classes_of_the_order_are_used():
    sequence = task_sequence(100, increment=10, classes=50, class_order="order1")
    assert sequence.num_tasks == 5
    assert sequence.class_order == named_orders()["cifar100_dytox_order1"][:50]
    assert sequence.class_order[:4] == (87, 0, 52, 58)
    assert "the first 50 of 100" in sequence.describe()


def test_the_seeded_order_is_the_icarl_convention():
    assert task_sequence(100, increment=10, class_order="seeded").class_order == named_orders()["seed1993_100"]
    assert task_sequence(1000, increment=100, class_order="seeded").class_order == named_orders()["seed1993_1000"]
    assert task_sequence(100, increment=10, class_order=1993) == task_sequence(100, increment=10, class_order="seeded")
    np.random.seed(7)  # noqa: NPY002 - the convention is the legacy generator
    expected = np.random.permutation(20).tolist()  # noqa: NPY002
    assert list(task_sequence(20, increment=5, class_order="seeded", seed=7).class_order) == expected


def test_classes_are_cut_after_the_whole_data_set_is_permuted():
    sequence = task_sequence(100, increment=5, classes=10, class_order="seeded")
    assert sequence.class_order == (68, 56, 78, 8, 23, 84, 90, 65, 74, 76)


def test_the_three_named_orders_are_different_permutations():
    orders = [named_orders()[f"order{i}"] for i in (1, 2, 3)]
    assert len(set(orders)) == 3
    assert all(sorted(order) == list(range(100)) for order in orders)


@pytest.mark.parametrize("text", ["2 0 1", "2,0,1", "2\n0\n1\n", "[2, 0, 1]"])
def test_an_order_is_read_from_a_file(tmp_path, text):
    path = tmp_path / "order.txt"
    path.write_text(text)
    assert task_sequence(3, increment=1, class_order=str(path)).class_order == (2, 0, 1)


@pytest.mark.parametrize("text", ["2 zero 1", "[2, 0", "[2, [0], 1]", "[2, 0.5, 1]"])
def test_a_file_that_is_no_order_is_refused_by_name(tmp_path, text):
    path = tmp_path / "order.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"order\.txt is no class order"):
        task_sequence(3, increment=1, class_order=str(path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"increment": 0}, "at least 1"),
        ({"initial_increment": 0, "increment": 2}, "at least 1"),
        ({"initial_increment": 11, "increment": 2}, "at most 10"),
        ({"initial_increment": 5}, "give increment"),
        ({}, "give increment"),
        ({"task_sizes": []}, "at least 1, found"),
        ({"task_sizes": [5, 0]}, "at least 1, found"),
        ({"task_sizes": [5, 6]}, "sum to 11; they must sum to at most 10"),
        ({"task_sizes": [5, 2], "classes": 8}, "sum to 7; they must sum to 8"),
        ({"task_sizes": [5, 5], "increment": 5}, "leave out increment"),
        ({"task_sizes": [5, 5], "remainder": "error"}, "leave out"),
        ({"increment": 2, "classes": 11}, "classes must be between 1 and the 10 classes"),
        ({"increment": 2, "classes": 0}, "classes must be between 1"),
        ({"increment": 2, "class_order": "order1"}, "class_order=order1 must name each of the 10 classes.*100 entries"),
        ({"increment": 2, "class_order": "sedeed"}, "did you mean 'seeded'"),
        ({"increment": 2, "class_order": list(range(9))}, "it has 9 entries"),
        ({"increment": 2, "class_order": [0, 0, *range(2, 10)]}, "0 more than once, 1 is missing"),
        ({"increment": 2, "class_order": [*range(1, 11)]}, "10 is no label of the data set, 0 is missing"),
        ({"increment": 2, "class_order": 3, "seed": 4}, "contradicts seed=4"),
        ({"increment": 2, "class_order": "seeded", "seed": -1}, "must be between 0"),
    ],
)
def test_mistakes_are_named_with_what_would_be_right(settings, message):
    with pytest.raises(ValueError, match=message):
        task_sequence(10, **settings)


def test_labels_go_there_and_back():
    sequence = task_sequence(5, increment=2, class_order=[3, 1, 4, 0, 2], classes=3)
    assert sequence.learned(torch.tensor([0, 1, 2, 3, 4])).tolist() == [-1, 1, -1, 0, 2]
    assert [sequence.original(label) for label in range(3)] == [3, 1, 4]
    assert sequence.learned(torch.empty(0, dtype=torch.int64)).tolist() == []


@settings(deadline=None)
@given(st.data())
def test_every_class_is_learned_once_and_every_label_comes_back(data):
    num_classes = data.draw(st.integers(1, 40))
    order = data.draw(st.permutations(range(num_classes)))
    initial = data.draw(st.none() | st.integers(1, num_classes))
    sequence = task_sequence(
        num_classes,
        initial_increment=initial,
        increment=data.draw(st.integers(1, 50)),
        class_order=order,
        remainder=data.draw(st.sampled_from(["last_small", "merge_last"])),
    )
    assert sum(sequence.task_sizes) == num_classes
    assert min(sequence.task_sizes) >= 1
    labels = [label for task in range(sequence.num_tasks) for label in sequence.labels(task)]
    assert labels == list(range(num_classes))
    assert sequence.learned(torch.tensor([sequence.original(label) for label in labels])).tolist() == labels
    if initial is not None and sequence.num_tasks > 1:
        assert sequence.task_sizes[0] == initial


@settings(deadline=None)
@given(st.lists(st.integers(1, 10), min_size=1, max_size=8), st.integers(0, 20))
def test_explicit_sizes_are_kept_whatever_is_left_over(sizes, spare):
    sequence = task_sequence(sum(sizes) + spare, task_sizes=sizes, class_order="seeded")
    assert list(sequence.task_sizes) == sizes
    used = sequence.learned(torch.arange(sum(sizes) + spare))
    assert int((used >= 0).sum()) == sum(sizes)
    assert sorted(used[used >= 0].tolist()) == list(range(sum(sizes)))


@settings(deadline=None)
@given(
    st.integers(1, 40),
    st.none() | st.integers(-1, 45),
    st.none() | st.integers(-1, 45),
    st.none() | st.integers(-1, 45),
    st.none() | st.lists(st.integers(-1, 20), max_size=5),
    st.sampled_from(["last_small", "merge_last", "error"]),
)
def test_any_scenario_is_refused_or_divides_the_classes_it_says_it_uses(
    num_classes, initial, increment, classes, sizes, remainder
):
    try:
        sequence = task_sequence(
            num_classes,
            task_sizes=sizes,
            initial_increment=initial,
            increment=increment,
            classes=classes,
            remainder=remainder,
        )
    except ValueError:
        return
    used = sum(sizes) if sizes is not None else num_classes if classes is None else classes
    assert sum(sequence.task_sizes) == sequence.num_classes == used
    assert min(sequence.task_sizes) >= 1
    if remainder == "error":
        assert set(sequence.task_sizes[1:]) <= {increment}


def test_the_description_shortens_runs_of_equal_tasks():
    assert (
        task_sequence(100, initial_increment=50, increment=10)
        .describe()
        .startswith("6 tasks, 50 + 5 x 10 = 100 classes; natural class order; no remainder")
    )


def test_notes_do_not_make_sequences_differ():
    assert TaskSequence((0, 1), (2,), ("listed",)) == TaskSequence((0, 1), (2,))


def test_the_two_imagenet100_lists_share_nine_classes():
    first, seeded = imagenet100_classes("first100"), imagenet100_classes("seed1993")
    assert len(set(first)) == len(set(seeded)) == 100
    assert list(first) == sorted(first)
    assert list(seeded) == sorted(seeded)
    assert len(set(first) & set(seeded)) == 9
