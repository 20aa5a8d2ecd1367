"""Samples set apart from the others of a phase: as many of every class, by one phase shown and by the other not."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cil.batches import Batches
from cil.build import Run
from cil.checking import check
from cil.cli import compose
from cil.stages import Phase, SetApart, Source, Stage
from tests.conftest import run_tiny_in
from tests.run_folders import facts_of

SIZE = 120
FRACTION = 0.2


@pytest.fixture(scope="module")
def run() -> Run:
    """Digits in tasks of 4, 3 and 3 classes, before the third: the memory of 120 holds 17 of each of 7 old classes."""
    run = Run.build(check(compose(["experiment=tiny", "learner=replay", f"memory.size={SIZE}"])))
    remember(run)
    return run


def remember(run: Run) -> None:
    labels = run.samples.labels
    chosen = {label: torch.nonzero(labels == label).flatten()[3:20].tolist() for label in range(7)}
    run.memory.update(chosen, 7, 10)


def third(run: Run) -> Stage:
    return Stage(2, run.tasks.labels(2), run.config.optim, has_memory=True)


def ids_of(run: Run, *, shown: bool, fraction: float = FRACTION, source: Source = "new+memory") -> torch.Tensor:
    phase = Phase("training", source, run.config.optim, set_apart=SetApart(fraction, shown=shown))
    return Batches(run).of_phase(phase, third(run))


@given(st.floats(0.06, 0.99))
@settings(max_examples=10)
def test_as_many_of_every_class_are_set_apart_old_or_new(run: Run, fraction: float) -> None:
    counts = torch.bincount(run.samples.labels[ids_of(run, shown=True, fraction=fraction)], minlength=10)
    assert counts.tolist() == [int(fraction * (SIZE // 7))] * 10


def test_the_two_phases_share_no_sample_and_show_them_all(run: Run) -> None:
    apart, others = (ids_of(run, shown=shown).tolist() for shown in (True, False))
    everything = Batches(run).ids("new+memory", third(run)).tolist()
    assert not set(apart) & set(others)
    assert sorted(apart + others) == sorted(everything)
    assert len(set(everything)) == len(everything)
    assert set(apart) & set(run.memory.ids().tolist())


def test_old_samples_are_exemplars_as_they_were_before_the_task(run: Run) -> None:
    labels = run.samples.labels
    remembered = set(run.memory.ids().tolist())
    for shown in (True, False):
        ids = ids_of(run, shown=shown)
        assert set(ids[labels[ids] < 7].tolist()) <= remembered


def test_they_are_a_function_of_seed_and_task_and_not_of_what_was_drawn_before(run: Run) -> None:
    first = ids_of(run, shown=True)
    torch.rand(10)
    again = Run.build(run.config)  # as after a resume
    again.memory.load_state_dict(run.memory.state_dict())
    assert ids_of(run, shown=True).equal(first)
    assert ids_of(again, shown=True).equal(first)
    other = replace(run, config=run.config.model_copy(update={"seed": 1}))
    assert not ids_of(other, shown=True).equal(first)


def test_they_are_drawn_and_not_the_first_of_a_class(run: Run) -> None:
    ids = ids_of(run, shown=True)
    places = [run.memory.ids().tolist().index(sample) for sample in ids[run.samples.labels[ids] < 7].tolist()]
    assert len({place % (SIZE // 7) for place in places}) > int(FRACTION * (SIZE // 7))


def test_a_class_of_few_images_bounds_how_many_are_set_apart() -> None:
    """A tenth of what an old class may have could be more than it has, and nothing would be left to train on."""
    run = Run.build(check(compose(["experiment=tiny", "learner=replay", "memory.size=10000"])))
    labels = run.samples.labels
    sizes = torch.bincount(labels[labels >= 0])
    run.memory.update({label: torch.nonzero(labels == label).flatten().tolist() for label in range(7)}, 7, 10)
    apart, others = (torch.bincount(labels[ids_of(run, shown=shown)]) for shown in (True, False))
    assert apart.tolist() == [int(FRACTION * int(sizes.min()))] * 10
    assert (apart + others).equal(sizes)


@pytest.mark.parametrize("shown", [True, False])
def test_the_number_of_images_is_known_beforehand(run: Run, shown: bool) -> None:
    phase = Phase("training", "new+memory", run.config.optim, set_apart=SetApart(FRACTION, shown=shown))
    expected = len(ids_of(run, shown=shown)) * run.config.optim.epochs
    assert Batches(run).num_images(third(run), phase) == expected


def test_a_fraction_of_less_than_one_exemplar_is_refused(run: Run) -> None:
    with pytest.raises(
        ValueError, match=r"0 of the 17 samples of the smallest class would be set apart \(a fraction of"
    ):
        ids_of(run, shown=True, fraction=0.05)


def test_a_memory_that_is_too_small_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("model=resnet32", "model.depth=20", "model.width=4", "memory.size=24")
    run = run_tiny_in(tmp_path, *settings, learner="bic", code=2, report=False)
    error = "error: 0 of the 6 samples of the smallest class would be set apart (a fraction of 0.1), and at least one"
    assert error in capsys.readouterr().err
    assert [event["event"] for event in facts_of(run)] == []
