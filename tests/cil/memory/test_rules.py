from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cil.memory import herding, herding_residual, selection_rules

GOLDENS = Path(__file__).parents[2] / "goldens" / "dkt.npz"
CASES = sorted({name.split("/")[1] for name in np.load(GOLDENS).files if name.startswith("herding/")})


@pytest.fixture(scope="module")
def goldens():
    with np.load(GOLDENS) as archive:
        return {name: archive[name] for name in archive.files if name.startswith("herding/")}


def features(count: int, width: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("case", CASES)
def test_the_residual_rule_picks_what_the_release_picks(goldens, case):
    rows, order, wanted, picked, comparable, iterations = (
        goldens[f"herding/{case}/{name}"] for name in ("features", "order", "m", "picked", "comparable", "iterations")
    )
    found = herding_residual(torch.from_numpy(rows), int(wanted))
    assert found.picked == picked
    assert found.iterations == iterations
    head = found.order.numpy()[:comparable]
    np.testing.assert_array_equal(rows[head], rows[order[:comparable]])
    if not case.startswith("dup"):  # which of two equal rows wins is a matter of rounding
        np.testing.assert_array_equal(head, order[:comparable])
    assert len(set(found.order.tolist())) == len(order) == min(int(wanted), len(rows))


def test_the_residual_rule_fills_up_with_the_lowest_rows_that_never_won():
    rows = torch.eye(3).repeat(4, 1)
    found = herding_residual(rows, 6)
    assert found.picked == 3
    assert found.iterations == 1000
    assert found.order.tolist() == [0, 1, 2, 3, 4, 5]
    assert herding_residual(rows, 6, max_iterations=1).order.tolist() == [0, 1, 2, 3, 4, 5]


def brute_force_herding(rows: np.ndarray, count: int) -> list[int]:
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    chosen: list[int] = []
    for _ in range(count):
        distances = {
            i: float(np.linalg.norm(unit.mean(axis=0) - unit[[*chosen, i]].mean(axis=0)))
            for i in range(len(rows))
            if i not in chosen
        }
        chosen.append(min(distances, key=distances.__getitem__))
    return chosen


@pytest.mark.parametrize("seed", range(5))
def test_herding_is_the_greedy_approximation_of_the_mean(seed):
    rows = features(15, seed=seed).double()
    assert herding(rows, 10).tolist() == brute_force_herding(rows.numpy(), 10)


def test_herding_does_not_see_the_length_of_a_row():
    rows = features(20)
    scales = torch.linspace(0.1, 10, 20)[:, None]
    assert torch.equal(herding(rows, 8), herding(rows * scales, 8))


def test_a_shorter_herding_is_the_start_of_a_longer_one():
    rows = features(30)
    assert herding(rows, 20).tolist()[:7] == herding(rows, 7).tolist()


def test_equal_rows_are_taken_lowest_first():
    assert herding(torch.ones(4, 3), 4).tolist() == [0, 1, 2, 3]
    assert selection_rules["closest"](torch.ones(4, 3), 2, seed_key=0).tolist() == [0, 1]


def test_the_closest_rows_come_nearest_first():
    rows = torch.tensor([[0.0, 1.0], [1.0, 0.1], [1.0, 0.0], [1.0, -0.2]])
    unit = rows / rows.norm(dim=1, keepdim=True)
    distances = (unit - unit.mean(dim=0)).norm(dim=1)
    found = selection_rules["closest"](rows, 4, seed_key=0)
    assert found.tolist() == distances.argsort().tolist()


def test_a_random_choice_is_a_function_of_its_key():
    rule = selection_rules["random"]
    rows = features(50)
    assert torch.equal(rule(rows, 10, seed_key=3), rule(rows, 10, seed_key=3))
    assert not torch.equal(rule(rows, 10, seed_key=3), rule(rows, 10, seed_key=4))
    assert torch.equal(rule(rows, 10, seed_key=3), rule(features(50, seed=9), 10, seed_key=3))


def test_every_rule_is_registered():
    assert set(selection_rules) == {"herding", "herding_residual", "random", "closest"}


@pytest.mark.parametrize("name", ["herding", "herding_residual", "random", "closest"])
@settings(deadline=None, max_examples=25)
@given(st.integers(1, 12), st.integers(0, 15), st.integers(1, 4), st.booleans(), st.integers(0, 10**6))
def test_every_rule_gives_different_rows_as_many_as_there_can_be(name, rows, count, width, flat, seed):
    values = torch.zeros(rows, width) if flat else features(rows, width, seed)
    order = selection_rules[name](values, count, seed_key=seed).tolist()
    assert len(order) == len(set(order)) == min(rows, count)
    assert set(order) <= set(range(rows))


@pytest.mark.parametrize("name", ["herding", "herding_residual", "random", "closest"])
def test_a_class_without_images_is_refused(name):
    with pytest.raises(ValueError, match="without images"):
        selection_rules[name](torch.empty(0, 4), 3, seed_key=0)


@pytest.mark.parametrize("name", ["herding", "herding_residual", "closest"])
def test_half_precision_features_that_require_a_gradient_are_welcome(name):
    rows = features(10).bfloat16()
    expected = selection_rules[name](rows.double(), 5, seed_key=0)
    assert torch.equal(selection_rules[name](rows.requires_grad_(), 5, seed_key=0), expected)
