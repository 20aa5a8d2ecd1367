"""A run is a function of its config: repeated, it gives the same bits; each seed moves what it is for, and no more."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cil.checking import check
from cil.cli import compose, main
from cil.engine import Engine
from cil.events import SilentLog
from cil.seeding import SampleNoise
from cil.static import build
from tests.cil.data.pictures import write_pictures
from tests.conftest import RunTiny, run_tiny_in
from tests.run_folders import assert_same_weights, content_of, facts_of, results_of, weights_of

RESNET = ("model=resnet8", "model.width=4")


#: Pictures of the parts of a small `.npz` file.
SIZES = {"train": 120, "test": 30}


@pytest.fixture
def run_tiny(tmp_path: Path) -> RunTiny:
    """As everywhere, without the report."""
    return partial(run_tiny_in, tmp_path / "runs", report=False)


def assert_same_bits(one: Path, other: Path) -> None:
    assert results_of(one) == results_of(other)
    assert facts_of(one) == facts_of(other)
    assert_same_weights(weights_of(one), weights_of(other))
    kept, again = content_of(one), content_of(other)
    assert kept.keys() == again.keys()
    for name in kept:  # weights as they lie on the disk, means of the classes, exemplars, structure
        assert kept[name] == again[name] or not name.endswith((".safetensors", "stage.json")), name


REPEATED: dict[str, tuple[str, tuple[str, ...]]] = {
    "dkt": ("dkt", ()),
    "dkt in bf16": ("dkt", ("precision=bf16",)),
    "a convolutional learner, random exemplars": ("icarl", (*RESNET, "memory.selection=random")),
}


@pytest.mark.parametrize("case", REPEATED)
def test_the_same_command_twice_gives_the_same_bits(run_tiny: RunTiny, whole_run: RunTiny, case: str) -> None:
    learner, overrides = REPEATED[case]
    assert_same_bits(run_tiny(*overrides, learner=learner), whole_run(*overrides, learner=learner))


def test_static_distillation_twice_gives_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["experiment=tiny_static", *RESNET[1:], "generations=2", "kd=[kd,crd]", "kd.crd.num_negatives=64"]
    words += ["optim.epochs=2", "optim.schedule.milestones=[1]", "name=run"]
    monkeypatch.setattr("cil.report.write_report", lambda folder: folder / "report.html")
    for runs_dir in (tmp_path / "one", tmp_path / "other"):
        assert main([*words, f"runs_dir={runs_dir}"], program="distill.py", config_name="distill") == 0
    assert_same_bits(tmp_path / "one" / "run", tmp_path / "other" / "run")


def test_any_number_of_workers_trains_the_same_network(tmp_path: Path) -> None:
    for part, per_class in {"train": 12, "val": 3}.items():
        write_pictures(tmp_path / "pictures" / part, list("abcd"), per_class)
    words = ["data=image_folder", f"data.path={tmp_path / 'pictures'}", "data.image_size=12", *RESNET]
    words += ["scenario.classes=4", "memory.size=8", "optim.batch_size=8"]
    runs = [
        run_tiny_in(tmp_path / str(number), *words, f"data.num_workers={number}", learner="icarl", report=False)
        for number in (0, 1, 2)
    ]
    for run in runs[1:]:
        assert_same_bits(runs[0], run)


def test_the_class_order_is_nothing_but_an_order(tmp_path: Path) -> None:
    """The same pictures under other labels, with the order that leads back: not a bit of the networks differs."""
    order = [4, 2, 0, 5, 1, 3]
    generator = np.random.default_rng(0)
    images = {part: generator.integers(0, 256, (count, 8, 8), dtype=np.uint8) for part, count in SIZES.items()}
    labels = {part: np.arange(count) % 6 for part, count in SIZES.items()}
    runs = []
    for name, relabel, given in (("listed", order, order), ("natural", range(6), "natural")):
        arrays = {f"x_{part}": images[part] for part in SIZES}
        arrays |= {f"y_{part}": np.array(relabel)[labels[part]] for part in SIZES}
        np.savez(tmp_path / f"{name}.npz", **arrays)
        words = ["data=npz", f"data.path={tmp_path / name}.npz", f"scenario.class_order={given}"]
        words += ["data.validation=0.1", "data.augment={crop: {padding: 1}}", "memory.selection=random"]
        runs.append(run_tiny_in(tmp_path / name, *words, report=False))
    assert_same_weights(weights_of(runs[0]), weights_of(runs[1]))
    listed, natural = map(results_of, runs)
    assert {key for key in listed if listed[key] != natural[key]} == {"class_order", "protocol"}


def drawn(*overrides: str) -> dict[str, Any]:
    """Everything that is random in a run. Samples are named by their place among those of their task, or class."""
    words = ["experiment=tiny", "learner=replay", *RESNET, "kd=fitnet", "memory.selection=random", "memory.size=30"]
    words += ["data=synthetic", "data.num_classes=6", "data.images_per_class=20", "data.image_size=8"]
    words += ["data.augment={crop: {padding: 1}}", "data.validation=0.1", "scenario.classes=null"]
    words += ["scenario.initial_increment=null", "scenario.increment=3", "scenario.class_order=seeded"]
    run = build(check(compose([*words, *overrides])))
    engine, stage = Engine(run, SilentLog()), run.stage(0)
    engine.begin(stage)
    (phase,) = run.learner.phases(stage)
    ids = engine.batches.of_phase(phase, stage)
    key = engine.batches.key(stage, 0, 0)
    view_key = engine.batches.view_key(stage, 0, phase, 0)
    some = torch.arange(8)
    views = engine.batch(SampleNoise(view_key, some, some), some, run.samples.images.fetch(some))
    found: dict[str, Any] = {
        "class order": run.tasks.class_order,
        "pictures": run.samples.images.fetch(some),
        "held-out pictures": run.samples.labels < 0,
        "batches": [torch.searchsorted(ids, batch) for batch, _ in engine.batches.plan(ids, stage, 0, phase, 0)],
        "augmentation": SampleNoise(view_key, some, some).uniform("crop"),
        "views": views.images,
        "noise in the network": SampleNoise(key, some, some).uniform("drop path"),
    }
    engine.choose_exemplars(stage)
    places = []
    for label, chosen in run.memory.state_dict()["exemplars"]:
        of_class = torch.nonzero(run.samples.labels == label).flatten()
        places.append(torch.searchsorted(of_class, torch.tensor(chosen)))
    found["exemplars"] = places
    engine.begin(run.stage(1))
    weights = run.learner.state_dict()
    found["first weights"] = [value for name, value in weights.items() if name.startswith("network.backbone")]
    found["new weights of a task"] = [value for name, value in weights.items() if name.startswith("network.head")]
    found["adapters"] = [value for name, value in weights.items() if name.startswith("distillation")]
    assert all(found[name] for name in ("first weights", "new weights of a task", "adapters"))
    return found


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.equal(other)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


_OF_THE_DATA_SEED = {"held-out pictures", "augmentation", "views"}
_OF_THE_RUN = {"batches", "noise in the network", "exemplars", "first weights", "new weights of a task", "adapters"}
#: Everything that a key moves: nothing is missing here, and nothing more moves.
MOVES: dict[str, set[str]] = {
    "seed=1": _OF_THE_RUN | _OF_THE_DATA_SEED,
    "data_seed=1": _OF_THE_DATA_SEED,
    "scenario.order_seed=1": {"class order"},
    "scenario.class_order=[5,4,3,2,1,0]": {"class order"},
    "data.seed=1": {"pictures", "views"},
    "name=other": set(),
}


@pytest.mark.parametrize("key", MOVES)
def test_a_seed_moves_what_it_is_for_and_nothing_else(key: str) -> None:
    before, after = drawn(), drawn(key)
    assert {name for name in before if not same(before[name], after[name])} == MOVES[key]
    assert set().union(*MOVES.values()) == before.keys()


def test_with_a_data_seed_runs_of_several_seeds_see_the_same_views() -> None:
    one, other = drawn("data_seed=5"), drawn("data_seed=5", "seed=1")
    assert {name for name in one if not same(one[name], other[name])} == _OF_THE_RUN
