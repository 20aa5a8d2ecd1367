import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cil.memory import ExemplarMemory, selection_rules

BUDGETS = ["total", "per_class", "fixed_total"]


def ids_of(label: int, count: int) -> list[int]:
    """Sample ids that tell their class and place."""
    return [1000 * label + place for place in range(count)]


def fill(memory: ExemplarMemory, sizes: list[int], images: list[int]) -> list[int]:
    """Run through a sequence; the length of the memory after each task."""
    lengths, seen = [], 0
    for size in sizes:
        new = {label: ids_of(label, images[label]) for label in range(seen, seen + size)}
        seen += size
        memory.update(new, seen, sum(sizes))
        lengths.append(len(memory))
    return lengths


def test_a_total_budget_is_shared_by_the_classes_seen():
    memory = ExemplarMemory(size=20)
    assert [memory.quota(seen, 10) for seen in (2, 3, 7, 10)] == [10, 6, 2, 2]


def test_a_budget_per_class_stays_the_same():
    memory = ExemplarMemory(size=20, budget="per_class")
    assert [memory.quota(seen, 10) for seen in (2, 10)] == [20, 20]


def test_a_fixed_total_is_shared_by_the_final_classes_from_the_start():
    memory = ExemplarMemory(size=20, budget="fixed_total")
    assert [memory.quota(seen, 10) for seen in (2, 10)] == [2, 2]


def test_the_budget_is_rounded_down():
    memory = ExemplarMemory(size=2000)
    assert memory.quota(30, 100) == 66
    assert fill(memory, [10, 10, 10], [500] * 30) == [2000, 2000, 1980]


def test_old_classes_are_cut_from_the_end_of_their_order():
    memory = ExemplarMemory(size=12)
    memory.update({0: [5, 3, 9, 1, 7, 2, 8], 1: [15, 13, 19, 11, 17, 12, 18]}, 2, 4)
    assert memory.ids().tolist() == [5, 3, 9, 1, 7, 2, 15, 13, 19, 11, 17, 12]
    memory.update({2: [25, 23, 29, 21], 3: [31, 32, 33, 34]}, 4, 4)
    assert memory.ids().tolist() == [5, 3, 9, 15, 13, 19, 25, 23, 29, 31, 32, 33]
    assert memory.labels().tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert memory.per_class() == {0: 3, 1: 3, 2: 3, 3: 3}


def test_ids_come_by_label_whatever_the_order_of_the_update():
    memory = ExemplarMemory(size=4)
    memory.update({1: [10, 11], 0: [1, 2]}, 2, 2)
    assert memory.labels().tolist() == [0, 0, 1, 1]
    assert memory.ids().tolist() == [1, 2, 10, 11]


def test_a_short_class_keeps_all_it_has_and_gives_nothing_away():
    memory = ExemplarMemory(size=10)
    memory.update({0: [1, 2], 1: ids_of(1, 50)}, 2, 2)
    assert memory.per_class() == {0: 2, 1: 5}


def test_a_second_choice_replaces_the_first():
    memory = ExemplarMemory(size=4)
    memory.update({0: [1, 2], 1: [11, 12]}, 2, 2)
    memory.update({1: [14, 11]}, 2, 2)
    assert memory.ids().tolist() == [1, 2, 14, 11]


@settings(deadline=None)
@given(
    st.sampled_from(BUDGETS),
    st.lists(st.integers(1, 12), min_size=1, max_size=8),
    st.integers(1, 300),
    st.data(),
)
def test_the_budget_is_never_exceeded(budget, sizes, size, data):
    num_classes = sum(sizes)
    images = data.draw(st.lists(st.integers(1, 40), min_size=num_classes, max_size=num_classes))
    memory = ExemplarMemory(size=size, budget=budget)
    if budget != "per_class" and size < num_classes:
        with pytest.raises(ValueError, match="less than one exemplar"):
            fill(memory, sizes, images)
        return
    lengths = fill(memory, sizes, images)
    seen = [sum(sizes[: k + 1]) for k in range(len(sizes))]
    limits = [size * count if budget == "per_class" else size for count in seen]
    assert all(length <= limit for length, limit in zip(lengths, limits, strict=True))
    final = memory.quota(num_classes, num_classes)
    assert memory.per_class() == {label: min(images[label], final) for label in range(num_classes)}
    assert len(set(memory.ids().tolist())) == len(memory)


@settings(deadline=None)
@given(st.sampled_from(BUDGETS), st.lists(st.integers(1, 12), min_size=1, max_size=8), st.integers(0, 300), st.data())
def test_after_every_task_all_classes_have_the_same_share_as_large_as_the_budget_allows(budget, sizes, spare, data):
    num_classes = sum(sizes)
    images = data.draw(st.lists(st.integers(1, 40), min_size=num_classes, max_size=num_classes))
    size = spare + (1 if budget == "per_class" else num_classes)
    memory, seen = ExemplarMemory(size=size, budget=budget), 0
    for task_size in sizes:
        new = {label: ids_of(label, images[label]) for label in range(seen, seen + task_size)}
        seen += task_size
        memory.update(new, seen, num_classes)
        share = {"total": size // seen, "per_class": size, "fixed_total": size // num_classes}[budget]
        assert memory.per_class() == {label: min(images[label], share) for label in range(seen)}
        assert memory.ids().tolist() == [
            sample for label in range(seen) for sample in ids_of(label, images[label])[:share]
        ]


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(BUDGETS), st.sampled_from(list(selection_rules)), st.integers(1, 8), st.integers(8, 60))
def test_what_any_rule_selects_fits_the_budget(budget, selection, classes, size):
    memory = ExemplarMemory(size=size, budget=budget, selection=selection)
    for label in range(classes):
        quota = memory.quota(label + 1, classes)
        rows = torch.randn(20, 5, generator=torch.Generator().manual_seed(label))
        order = memory.select(rows, quota, seed_key=label)
        memory.update({label: [1000 * label + row for row in order.tolist()]}, label + 1, classes)
        assert len(memory) <= (size * (label + 1) if budget == "per_class" else size)


def test_no_size_is_no_memory():
    memory = ExemplarMemory(size=0)
    assert fill(memory, [2, 2], [50] * 4) == [0, 0]
    assert memory.ids().tolist() == memory.labels().tolist() == []
    assert memory.ids().dtype == memory.labels().dtype == torch.int64
    assert memory.quota(2, 4) == 0


@pytest.mark.parametrize("budget", ["total", "fixed_total"])
def test_a_memory_smaller_than_the_classes_is_refused(budget):
    memory = ExemplarMemory(size=5, budget=budget)
    with pytest.raises(ValueError, match=r"memory\.size=5 .* use at least 10, or 0"):
        memory.quota(10, 10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": -1}, "memory.size must be at least 0, found -1"),
        ({"size": 10, "selection": "herdin"}, "unknown selection rule 'herdin'; did you mean 'herding'"),
    ],
)
def test_mistakes_in_the_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ExemplarMemory(**settings)


def test_a_sample_cannot_be_remembered_twice():
    with pytest.raises(AssertionError, match="twice"):
        ExemplarMemory(size=10).update({0: [1, 2], 1: [2, 3]}, 2, 2)


def test_a_label_not_seen_cannot_be_remembered():
    with pytest.raises(AssertionError, match="with 2 classes seen"):
        ExemplarMemory(size=10).update({2: [1, 2]}, 2, 4)


def test_the_state_survives_json():
    memory = ExemplarMemory(size=12)
    fill(memory, [2, 1], [50] * 3)
    other = ExemplarMemory(size=12)
    other.load_state_dict(json.loads(json.dumps(memory.state_dict())))
    assert other.ids().tolist() == memory.ids().tolist()
    assert other.per_class() == memory.per_class()


def test_exemplars_cost_the_bytes_of_their_pixels():
    memory = ExemplarMemory(size=4)
    fill(memory, [2], [50, 50])
    assert memory.exemplar_bytes(3 * 32 * 32) == 4 * 3072
