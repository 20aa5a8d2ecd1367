"""The files that docs/adding.md tells people to write, put where it says, make a run."""

import importlib
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from cil.cli import config_folder, groups
from cil.data import data_sets
from cil.events import read_events
from cil.learners.base import learners
from cil.models.network import models
from kd import distillers
from kd.registry import Registry
from tests.conftest import RunTiny
from tests.kd import test_every_distiller as every
from tests.run_folders import metrics_of
from tests.test_configs import test_every_file_opens_with_what_it_is_its_source_and_its_cost as assert_opening

GUIDE = (Path(__file__).parents[1] / "docs" / "adding.md").read_text()
FILES = dict(re.findall(r"`([\w/]+\.(?:py|yaml))`:\n```(?:python|yaml)\n(.*?)```", GUIDE, re.DOTALL))
REGISTRIES: dict[str, Registry] = {
    "kd.logit": distillers,
    "cil.learners": learners,
    "cil.models.backbones": models,
    "cil.data": data_sets,
}


@pytest.fixture
def added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The files, on the paths of their packages and in a copy of the configs; gone again afterwards."""
    root = tmp_path / "added"
    shutil.copytree(config_folder(), root / "configs")
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    monkeypatch.setattr("cil.cli.config_folder", lambda: root / "configs")
    for package, registry in REGISTRIES.items():
        _ = len(registry)
        module = importlib.import_module(package)
        monkeypatch.setattr(module, "__path__", [*module.__path__, str(root / package.replace(".", "/"))])
        monkeypatch.setattr(registry, "_entries", dict(registry))
        monkeypatch.setattr(registry, "_filled", False)
    yield root
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(root)):
            del sys.modules[name]


def test_every_example_has_a_file_and_a_config() -> None:
    assert set(FILES) == {
        *("kd/logit/logit_matching.py", "configs/kd/logit_matching.yaml"),
        *("cil/learners/smoothed.py", "configs/learner/smoothed.yaml"),
        *("cil/models/backbones/two_convolutions.py", "configs/model/two_convolutions.yaml"),
        *("cil/data/table.py", "configs/data/table.yaml"),
    }


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".yaml")])
def test_every_config_opens_as_it_must(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(FILES[name])
    assert_opening(tmp_path / "config.yaml")


def write_pictures(folder: Path) -> Path:
    """Four classes of plain colours, as a table."""
    rows = ["file,class,part"]
    colours = {"red": (200, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 200), "grey": (120, 120, 120)}
    generator = np.random.default_rng(0)
    for name, colour in colours.items():
        for number in range(12):
            pixels = np.clip(np.array(colour) + generator.integers(-20, 20, (9, 7, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}{number}.png")
            rows.append(f"{name}{number}.png,{name},{'test' if number > 8 else 'train'}")
    (folder / "mine.csv").write_text("\n".join(rows))
    return folder / "mine.csv"


def test_data_network_learner_and_method_of_ones_own_make_a_run(added: Path, run_tiny: RunTiny, tmp_path: Path) -> None:
    table = write_pictures(tmp_path)
    (command,) = re.findall(r"train_incremental.py (data=table .*)", GUIDE)
    words = [word for word in command.replace("mine.csv", str(table)).split() if not word.startswith("learner=")]
    assert "smoothed" in groups()["learner"]
    run = run_tiny(
        *words,
        *("scenario.classes=4", "memory.size=8", "data.image_size=8", "optim.epochs=1", "kd.logit_matching.scale=2"),
        learner="smoothed",
        report=False,
    )
    assert metrics_of(run)["task_sizes"] == [2, 2]
    losses = [event["losses"] for event in read_events(run / "events.jsonl") if event["event"] == "epoch"]
    assert [set(terms) for terms in losses] == [{"ce"}, {"ce", "logit_matching"}]
    config = yaml.safe_load((run / "config.yaml").read_text())["config"]
    assert config["learner"] == {"name": "smoothed", "smoothing": 0.1}
    assert config["model"] == {"name": "two_convolutions", "width": 16}


def test_the_method_holds_what_every_method_holds(added: Path) -> None:
    every.test_hyper_parameters_are_keyword_only_with_a_default_and_a_type("logit_matching")
    every.test_the_loss_is_one_number_that_teaches_the_student_and_not_the_teacher("logit_matching")
    every.test_certain_logits_and_loud_features_give_a_finite_loss_and_gradient("logit_matching", "float16")


def test_feature_methods_read_the_network_of_ones_own(added: Path) -> None:
    network = models["two_convolutions"]((3, 8, 8), width=4)
    network.grow(2)
    network.expose(["stage0.post", "stage1.pre", "last", "class_maps"])
    taps = network.eval()(torch.rand(2, 3, 8, 8)).taps
    assert {name: tuple(tap.shape) for name, tap in taps.items()} == {
        "stage0.post": (2, 4, 8, 8),
        "stage1.pre": (2, 8, 4, 4),
        "last": (2, 8, 4, 4),
        "class_maps": (2, 2, 4, 4),
    }
