"""Expected, measured, and whether the two agree; what is not the same protocol is not compared."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from cil.checking import check
from cil.cli import compose
from cil.config import Config
from cil.tasks import task_sequence
from cil.verify import Figure, figures, main

FIGURES = [pytest.param(figure, id=figure.command) for figure in figures()]
DKT = "experiment=cifar100_b0_inc10"
#: After each task, and before fine-tuning, of the release's log.
AFTER = [94.2, 86.95, 83.0, 77.53, 74.12, 74.05, 70.53, 67.9, 65.12, 63.45]
BEFORE = [None, 86.25, 81.8, 73.25, 70.88, 68.0, 64.8, 61.05, 58.19, 52.69]

Write = Callable[..., Path]


def tasks_of(config: Config, classes: int) -> Any:
    scenario = config.scenario.model_dump(exclude={"order_seed"})
    return task_sequence(classes, **scenario, seed=config.scenario.order_seed)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(*words, after=..., **metrics)`: what the run of a command leaves when it is done."""

    def made(*words: str, classes: int = 100, after: list[float] | None = None, **more: Any) -> Path:
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        config = check(compose([*words, f"name={folder.name}"]))
        assert isinstance(config, Config)
        tasks = tasks_of(config, classes)
        accuracies = AFTER if after is None else after
        metrics = {
            "finished": True,
            "class_order": list(tasks.class_order),
            "task_sizes": list(tasks.task_sizes),
            "accuracy_after": [value / 100 for value in accuracies],
            "accuracy_before_finetuning": [None] * len(accuracies),
        }
        folder.mkdir()
        (folder / "config.yaml").write_text(yaml.safe_dump({"config": config.model_dump(mode="json")}))
        (folder / "metrics.json").write_text(json.dumps(metrics | more))
        return folder

    return made


@pytest.fixture
def verdict(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, list[dict[str, Any]]]]:
    """The exit code and the JSON of some runs."""

    def verified(*runs: Path) -> tuple[int, list[dict[str, Any]]]:
        code = main([*map(str, runs), "--json"])
        return code, json.loads(capsys.readouterr().out)

    return verified


def fractions(values: list[float | None]) -> list[float | None]:
    return [value if value is None else value / 100 for value in values]


@pytest.mark.parametrize("figure", FIGURES)
def test_every_figure_has_a_command_that_composes_and_orders_of_its_tasks(figure: Figure) -> None:
    config = check(compose([f"experiment={figure.experiment}", *figure.words]))
    assert isinstance(config, Config)
    scenario = config.scenario.model_dump(exclude={"order_seed", "class_order"})
    for order in figure.orders:
        tasks = task_sequence(figure.classes, **scenario, class_order=order, seed=config.scenario.order_seed)
        assert not figure.after or len(figure.after) == tasks.num_tasks
    assert config.scenario.class_order == figure.orders[0]


@pytest.mark.parametrize("figure", FIGURES)
def test_every_figure_agrees_with_the_accuracies_that_it_is_made_of(figure: Figure) -> None:
    if figure.after:
        assert figure.average == pytest.approx(np.mean(figure.after), abs=0.006)
        assert figure.last == figure.after[-1]
    assert figure.expected()["average"][1] >= 1
    assert len(figure.source) > 10


def test_a_run_that_reached_the_figure_agrees(write: Write, verdict: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(DKT, "seed=3", "device=cpu", accuracy_before_finetuning=fractions(BEFORE))
    code, (found,) = verdict(run)
    assert (code, found["verdict"], found["reasons"]) == (0, "agrees", [])
    assert [(line["name"], line["expected"], line["verdict"]) for line in found["numbers"]] == [
        ("average", 75.69, "agrees"),
        ("last", 63.45, "agrees"),
        ("before fine-tuning, average", 71.11, "agrees"),
        ("before fine-tuning, last", 52.69, "agrees"),
    ]
    assert [line["difference"] for line in found["numbers"]] == pytest.approx([0, 0, 0, 0], abs=0.006)
    assert found["run_with_this_project"] is False
    assert main([str(run)]) == 0
    text = capsys.readouterr().out
    assert "agrees" in text
    assert "python train_incremental.py experiment=cifar100_b0_inc10" in text
    assert "no one has run it with this project" in text


@pytest.mark.parametrize(("points", "expected"), [(-3.0, "below"), (3.0, "above"), (-0.5, "agrees")])
def test_the_tolerance_parts_the_verdicts(write: Write, verdict: Any, points: float, expected: str) -> None:
    run = write(DKT, after=[value + points for value in AFTER])
    code, (found,) = verdict(run)
    assert (code, found["verdict"]) == (0 if expected == "agrees" else 1, expected)
    assert found["numbers"][0]["difference"] == pytest.approx(points, abs=0.006)


def test_repeats_with_other_seeds_are_averaged(write: Write, verdict: Any) -> None:
    runs = [write(DKT, f"seed={seed}", after=[v + d for v in AFTER]) for seed, d in enumerate([-3.0, 3.0])]
    code, (found,) = verdict(*runs)
    assert (code, found["runs"]) == (0, [str(run) for run in runs])


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["optim.epochs=100"], "optim.epochs is 100, and 500 for the figure"),
        (["memory.size=1000"], "memory.size is 1000, and 2000 for the figure"),
        (["memory=per_class"], "memory.budget is 'per_class', and 'total' for the figure"),
        (["model.depth=4"], "model.depth is 4, and 5 for the figure"),
        (["learner.finetune_shuffle=true"], "learner.finetune_shuffle is True, and False for the figure"),
        (["scenario.class_order=order2"], "learns the classes in another order than order1"),
        (["scenario.increment=20"], "the tasks have 5 x 20 classes, and 10 x 10 for the figure"),
        (["data.validation=0.1", "evaluate_on=validation"], "evaluate_on is 'validation', and 'test' for the figure"),
    ],
)
def test_another_protocol_is_not_compared(write: Write, verdict: Any, words: list[str], reason: str) -> None:
    code, (found,) = verdict(write(DKT, *words, after=AFTER[:5]))
    assert (code, found["verdict"]) == (1, "not comparable")
    assert any(reason in given for given in found["reasons"]), found["reasons"]
    assert {line["verdict"] for line in found["numbers"]} == {"not comparable"}
    assert found["numbers"][0]["difference"] is not None


def test_the_corrected_learner_is_not_the_published_one(write: Write, verdict: Any) -> None:
    _, (found,) = verdict(write(DKT, "learner=dkt"))
    assert any("learner.name is 'dkt', and 'dkt_official' for the figure" in reason for reason in found["reasons"])


def test_an_unfinished_run_is_not_compared(write: Write, verdict: Any) -> None:
    run = write(DKT, after=AFTER[:3], finished=False)
    _, (found,) = verdict(run)
    assert found["reasons"] == [f"{run.name} is not finished: 3 of 10 tasks"]
    assert found["numbers"][0]["measured"] is None
    (run / "metrics.json").unlink()
    _, (found,) = verdict(run)
    assert found["reasons"] == [f"{run.name} is not finished: its first task goes on"]


def test_a_mean_over_orders_needs_a_run_in_each(write: Write, verdict: Any) -> None:
    words = next(figure for figure in figures() if figure.words[:1] == ["learner=dytox"]).words
    after = [100.0] * 9 + [57.76]
    orders = [f"scenario.class_order=order{number}" for number in (1, 2, 3)]
    first, second, third = (write(DKT, *words, order, after=after) for order in orders)
    _, (found,) = verdict(first, third)
    assert found["reasons"] == ["the figure is a mean over the orders order1, order2, order3: give runs in order2 too"]
    _, (found,) = verdict(first, second, third)
    assert (found["verdict"], found["reasons"]) == ("above", [])
    assert found["numbers"][1]["difference"] == pytest.approx(0, abs=1e-9)


def test_a_figure_of_another_network_is_shown_and_not_compared(write: Write, verdict: Any) -> None:
    _, (found,) = verdict(write(DKT, "learner=icarl", "model=resnet32"))
    assert found["verdict"] == "not comparable"
    assert "ResNet-18 of 11.2 million parameters" in found["reasons"][0]
    assert found["numbers"][0]["expected"] == 65.27


def test_what_nobody_has_published_is_said(write: Write, verdict: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = write("experiment=tiny_imagenet_b0_inc20", classes=200)
    _, (found,) = verdict(run)
    assert found["reasons"][0].startswith("no figure is known for experiment=tiny_imagenet_b0_inc20")
    assert main([str(run)]) == 1
    assert "not comparable" in capsys.readouterr().out


def test_own_figures_are_those_of_the_project(write: Write, verdict: Any) -> None:
    after = [100.0, 96.6, 97.7, 96.2, 93.1]
    code, (found,) = verdict(write("experiment=demo", classes=10, after=after))
    assert (code, found["verdict"], found["run_with_this_project"]) == (0, "agrees", True)


def test_what_is_no_run_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err


def test_a_static_run_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = check(compose(["experiment=tiny_static"], "distill")).model_dump(mode="json")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"config": tree}))
    assert main([str(tmp_path)]) == 2
    assert "static distillation" in capsys.readouterr().err
