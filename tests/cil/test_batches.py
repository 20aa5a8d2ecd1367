from typing import Any

import pytest
import torch

from cil.batches import Batches
from cil.build import Run
from cil.checking import check
from cil.cli import compose
from cil.optim import Recipe, Sampling
from cil.stages import Phase, Source, Stage


@pytest.fixture(scope="module")
def run() -> Run:
    """Digits in tasks of 4, 3 and 3 classes; the memory holds 5 of each class."""
    overrides = ["learner=replay", "memory.size=5", "memory.budget=per_class", "data.validation=0.1"]
    run = Run.build(check(compose(["experiment=tiny", *overrides])))
    labels = run.samples.labels
    chosen = {label: torch.nonzero(labels == label).flatten()[:5].tolist() for label in range(10)}
    run.memory.update(chosen, 10, 10)
    return run


def stage_of(run: Run, index: int) -> Stage:
    return Stage(index, run.tasks.labels(index), run.config.optim, has_memory=True)


def phase_of(source: Source = "new", **recipe: Any) -> Phase:
    sampling = Sampling(**recipe.pop("sampling", {}))
    return Phase("training", source, Recipe(sampling=sampling, **recipe))


@pytest.mark.parametrize(
    ("source", "of_new", "of_old"), [("new", None, 0), ("new+memory", None, 5), ("memory", 5, 5), ("seen", None, None)]
)
def test_a_phase_gets_the_samples_it_asks_for(run: Run, source: Source, of_new: int, of_old: int) -> None:
    ids = Batches(run).ids(source, stage_of(run, 1))
    labels = run.samples.labels
    assert len(set(ids.tolist())) == len(ids)
    counts = torch.bincount(labels[ids], minlength=10).tolist()
    everything = torch.bincount(labels[labels >= 0], minlength=10).tolist()
    if source == "memory":  # the memory of this fixture holds the classes to come as well
        assert counts == [5] * 10
        return
    assert counts[:4] == (everything[:4] if of_old is None else [of_old] * 4)
    assert counts[4:7] == everything[4:7]
    assert counts[7:] == [0] * 3


def test_images_held_out_are_never_trained_on(run: Run) -> None:
    held_out = set(torch.nonzero(run.samples.labels < 0).flatten().tolist())
    assert len(held_out) > 100
    for source in ("new", "new+memory", "seen", "memory"):
        assert not held_out & set(Batches(run).ids(source, stage_of(run, 2)).tolist())


def test_every_epoch_has_an_order_of_its_own_that_does_not_depend_on_the_past(run: Run) -> None:
    batches, stage, phase = Batches(run), stage_of(run, 1), phase_of(batch_size=32)
    ids = batches.ids("new", stage)

    def order(number: int, epoch: int) -> list[int]:
        return torch.cat([some for some, _ in batches.plan(ids, stage, number, phase, epoch)]).tolist()

    orders = [order(number, epoch) for number in range(2) for epoch in range(3)]
    assert len({tuple(found) for found in orders}) == 6
    assert all(sorted(found) == sorted(ids.tolist()) for found in orders)
    assert order(0, 2) == orders[2]


def test_the_loader_may_take_another_batch_size_than_the_rate(run: Run) -> None:
    batches, stage = Batches(run), stage_of(run, 1)
    phase = Phase("training", "new", Recipe(batch_size=128), loader_batch_size=50)
    plan = batches.plan(batches.ids("new", stage), stage, 0, phase, epoch=0)
    assert len(plan[0][0]) == 50


def test_without_a_launcher_the_release_shows_half_of_an_epoch_in_one_order_for_ever(run: Run) -> None:
    batches, stage = Batches(run), stage_of(run, 1)
    phase = phase_of(sampling={"emulate_missing_launcher": True}, batch_size=32)
    ids = batches.ids("new", stage)
    first, second = (torch.cat([some for some, _ in batches.plan(ids, stage, 0, phase, epoch)]) for epoch in (0, 1))
    assert first.equal(second)
    assert len(first) == len(ids) // 2


def test_the_tail_that_the_release_drops_in_fine_tuning_holds_the_newest_classes(run: Run) -> None:
    """R4: the memory is read in class order, and what fills no whole batch is left out."""
    batches, stage = Batches(run), stage_of(run, 2)
    phase = phase_of("memory", sampling={"shuffle": False, "drop_last": True}, batch_size=16)
    plan = batches.plan(batches.ids("memory", stage), stage, 1, phase, epoch=0)
    shown = [run.samples.labels[some].tolist() for some, _ in plan]
    assert [label for batch in shown for label in batch] == sorted(list(range(10)) * 5)[:48]
    assert len(set(shown[0])) == 4


@pytest.mark.parametrize(
    "phase",
    [
        phase_of("new", epochs=3),
        phase_of("new+memory", epochs=2),
        phase_of("seen", epochs=1),
        phase_of("new", epochs=2, sampling={"round_to": 256, "views": 3}),
        phase_of("new", epochs=2, sampling={"emulate_missing_launcher": True}),
    ],
)
def test_the_number_of_images_is_known_beforehand(run: Run, phase: Phase) -> None:
    batches, stage = Batches(run), stage_of(run, 1)
    plan = batches.plan(batches.ids(phase.source, stage), stage, 0, phase, epoch=0)
    assert batches.num_images(stage, phase) == phase.recipe.epochs * sum(len(some) for some, _ in plan)


def test_the_first_task_has_no_memory_to_count(run: Run) -> None:
    phase = phase_of("new+memory", epochs=1)
    assert Batches(run).num_images(stage_of(run, 0), phase) == len(Batches(run).ids("new", stage_of(run, 0)))
