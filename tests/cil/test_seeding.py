import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cil.models.noise import Dropout, DropPath
from cil.seeding import SampleNoise, current_noise, derive, sample_noise, seeded


def noise_of(ids: list[int], views: list[int] | None = None, key: int = 7) -> SampleNoise:
    return SampleNoise(key, torch.tensor(ids), torch.tensor(views or [0] * len(ids)))


def draw_from_all() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002


def test_keys_are_those_of_every_other_machine() -> None:
    assert derive(0) == 2631537505891389924
    assert derive(0, "epoch", 1, 2, 3) == derive(0, "epoch", 1, 2, 3)
    assert derive(0, "epoch", 1, 2, 3) != derive(0, "epoch", 1, 3, 2)


@given(st.integers(0, 2**63 - 1), st.lists(st.integers() | st.text(), max_size=4))
def test_keys_fit_into_a_signed_word(seed: int, place: list[int | str]) -> None:
    assert 0 <= derive(seed, *place) < 2**63


def test_places_that_look_alike_have_different_keys() -> None:
    places: list[tuple[int | str, ...]] = [(), (1,), ("1",), (1, 1), (11,), ("1", "1"), ("11",), ("1, 1",), (-1,)]
    assert len({derive(3, *place) for place in places}) == len(places)
    assert derive(3, 1) != derive(31)


def test_a_seeded_block_repeats_and_leaves_every_global_generator_as_it_was() -> None:
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    expected = draw_from_all()
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    with seeded(5, "network"):
        inside = draw_from_all()
    assert draw_from_all() == expected
    with seeded(5, "network"):
        assert draw_from_all() == inside
    with seeded(5, "learner"):
        assert draw_from_all() != inside


def test_a_seeded_block_that_fails_restores_the_generators_too() -> None:
    torch.manual_seed(1)
    random.seed(1)
    state, words = torch.get_rng_state(), random.getstate()
    with pytest.raises(ZeroDivisionError), seeded(5):
        float(torch.rand(())) / 0
    assert torch.get_rng_state().equal(state)
    assert random.getstate() == words


def test_seeded_blocks_can_be_nested() -> None:
    with seeded(1):
        first = draw_from_all()
    with seeded(1):
        with seeded(2):
            draw_from_all()
        assert draw_from_all() == first


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_the_noise_of_a_sample_does_not_depend_on_its_batch(kind: str) -> None:
    whole = getattr(noise_of([3, 14, 15, 92, 65]), kind)("crop", 6)
    part = getattr(noise_of([92, 3]), kind)("crop", 6)
    assert part.equal(whole[[3, 0]])


def test_noise_differs_by_key_sample_view_and_purpose() -> None:
    rows = torch.cat(
        [
            noise_of([3]).uniform("crop", 8),
            noise_of([4]).uniform("crop", 8),
            noise_of([3], [1]).uniform("crop", 8),
            noise_of([3], key=8).uniform("crop", 8),
            noise_of([3]).uniform("flip", 8),
        ]
    )
    assert len({tuple(row) for row in rows.tolist()}) == len(rows)


def test_more_numbers_of_a_purpose_begin_with_the_same_ones() -> None:
    assert noise_of([3, 4]).uniform("crop", 9)[:, :4].equal(noise_of([3, 4]).uniform("crop", 4))


def test_uniform_noise_is_uniform_and_its_samples_are_not_correlated() -> None:
    drawn = noise_of(list(range(4000))).uniform("crop", 16).double()
    assert 0 <= float(drawn.min()) < 1e-3
    assert 1 - 1e-3 < float(drawn.max()) < 1
    shares = torch.histc(drawn, bins=10, min=0, max=1) / drawn.numel()
    assert torch.allclose(shares, torch.full((10,), 0.1, dtype=torch.float64), atol=5e-3)
    correlation = torch.corrcoef(drawn.T) - torch.eye(16)
    assert float(correlation.abs().max()) < 0.08  # 5 standard deviations
    neighbours = torch.corrcoef(torch.stack([drawn[:-1].flatten(), drawn[1:].flatten()]))[0, 1]
    assert abs(float(neighbours)) < 0.02


def test_normal_noise_is_normal() -> None:
    drawn = noise_of(list(range(4000))).normal("colour", 16)
    assert torch.isfinite(drawn).all()
    assert abs(float(drawn.mean())) < 0.02
    assert abs(float(drawn.std()) - 1) < 0.02
    assert abs(float((drawn.abs() < 1).double().mean()) - 0.6827) < 0.01


@given(st.integers(1, 1000), st.lists(st.integers(0, 2**40), min_size=1, max_size=5))
def test_whole_numbers_lie_below_their_limit(high: int, ids: list[int]) -> None:
    drawn = noise_of(ids).integers("operation", high, 3)
    assert drawn.dtype == torch.int64
    assert drawn.shape == (len(ids), 3)
    assert 0 <= int(drawn.min()) <= int(drawn.max()) < high


def test_every_whole_number_comes_up_equally_often() -> None:
    counts = torch.bincount(noise_of(list(range(3000))).integers("operation", 6, 4).flatten(), minlength=6)
    assert torch.allclose(counts / counts.sum(), torch.full((6,), 1 / 6), atol=0.012)


def test_noise_is_current_only_within_its_block() -> None:
    outer, inner = noise_of([1]), noise_of([2])
    assert current_noise() is None
    with sample_noise(outer):
        assert current_noise() is outer
        with sample_noise(inner):
            assert current_noise() is inner
        assert current_noise() is outer
        with pytest.raises(ZeroDivisionError), sample_noise(inner):
            float(inner.uniform("crop")[0]) / 0
        assert current_noise() is outer
    assert current_noise() is None


@pytest.mark.parametrize("kind", [DropPath, Dropout])
def test_what_a_layer_drops_of_a_sample_does_not_depend_on_its_batch(kind: type[DropPath] | type[Dropout]) -> None:
    layer = kind(0.5, "block1").train()
    x = torch.ones(6, 5, 4)
    with sample_noise(noise_of([10, 11, 12, 13, 14, 15])):
        whole = layer(x)
    with sample_noise(noise_of([14, 11])):
        part = layer(x[:2])
    assert part.equal(whole[[4, 1]])
    assert 0 < float((whole == 0).double().mean()) < 1
