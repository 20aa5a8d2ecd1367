"""Whole runs through the command line: what a run folder holds, and what a repeat reproduces."""

import json
import re
import struct
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
import yaml

import cil
from cil import checkpoint
from cil.build import Run, open_data
from cil.checking import check
from cil.engine import Engine
from cil.events import EventLog, read_events
from tests.conftest import RunTiny
from tests.run_folders import assert_same_weights, content_of, facts_of, metrics_of, results_of, weights_of

LEARNERS = [
    *("bic", "der", "dkt", "dkt_official", "dytox", "ewc", "finetune", "foster", "icarl", "joint", "lucir", "lwf"),
    *("memo", "podnet", "replay", "wa"),
]
FINETUNING = {"dkt", "dkt_official", "dytox", "podnet"}
RESNET = ("model=resnet32", "model.depth=20", "model.width=4")
#: What a learner needs beside itself.
COMPANIONS = {
    "bic": (*RESNET, "memory.size=40"),
    **dict.fromkeys(("der", "ewc", "foster", "lucir", "memo", "wa"), RESNET),
    "podnet": (*RESNET, "learner.finetune_epochs=2"),
    "dytox": ("model=dytox_tiny", "learner.finetune_epochs=2"),
}
KEYS_OF_SCRIPTS = {
    "name",
    "wall_seconds",
    "images_per_second",
    "accuracy_matrix",
    "accuracy_after",
    "accuracy_before_finetuning",
    "average_incremental_accuracy",
    "last_accuracy",
    "forgetting",
    "backward_transfer",
    "forward_transfer",
    "num_parameters",
    "exemplars",
    "seed",
    "protocol",
}


def config_of(run: Path) -> cil.config.Config:
    return check(yaml.safe_load((run / "config.yaml").read_text())["config"])


@pytest.fixture(params=LEARNERS)
def learner(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def finished(whole_run: RunTiny, learner: str) -> Path:
    """A run of the learner."""
    return whole_run(*COMPANIONS.get(learner, ()), learner=learner)


def test_metrics_have_every_key_that_scripts_rely_on(finished: Path, learner: str) -> None:
    metrics = metrics_of(finished)
    assert metrics.keys() >= KEYS_OF_SCRIPTS
    assert (metrics["name"], metrics["seed"], metrics["data_set"]) == ("run", 0, "digits")
    assert metrics["learner"] == learner
    assert metrics["class_order"] == list(range(6))
    assert metrics["task_sizes"] == [2, 2, 2]
    assert re.fullmatch("[0-9a-f]{16}", metrics["protocol"])
    assert metrics["wall_seconds"] > 0
    assert metrics["images_per_second"] > 0
    assert metrics["forward_transfer"] is None
    assert metrics["num_parameters"] == metrics["num_parameters_after"][-1] > 0
    assert ("continuum" in metrics) == (learner == "dkt_official")


def test_the_accuracy_matrix_is_null_where_a_task_is_not_seen_yet(finished: Path) -> None:
    matrix = metrics_of(finished)["accuracy_matrix"]
    assert [[value is None for value in row] for row in matrix] == [
        [False, True, True],
        [False, False, True],
        [False, False, False],
    ]
    assert all(0 <= value <= 1 for row in matrix for value in row if value is not None)


def test_every_number_follows_from_the_matrix_and_the_number_of_images(finished: Path) -> None:
    metrics = metrics_of(finished)
    matrix = np.array(metrics["accuracy_matrix"], dtype=float)
    images = np.array(metrics["num_test_images"])
    assert images.tolist() == [73, 73, 74]
    after = [np.average(matrix[task, : task + 1], weights=images[: task + 1]) for task in range(3)]
    assert metrics["accuracy_after"] == pytest.approx(after)
    assert metrics["average_incremental_accuracy"] == pytest.approx(np.mean(after))
    assert metrics["last_accuracy"] == pytest.approx(after[-1])
    forgetting = [matrix[0, 0], matrix[1, 1]] if matrix[0, 0] >= matrix[1, 0] else [matrix[1, 0], matrix[1, 1]]
    assert metrics["forgetting"] == pytest.approx(np.mean(forgetting - matrix[2, :2]))
    assert metrics["backward_transfer"] == pytest.approx(np.mean(matrix[2, :2] - matrix.diagonal()[:2]))


def test_accuracies_before_fine_tuning_stand_where_there_is_fine_tuning(finished: Path, learner: str) -> None:
    before = metrics_of(finished)["accuracy_before_finetuning"]
    assert [value is None for value in before] == [True, learner not in FINETUNING, learner not in FINETUNING]
    read = [e["accuracy"] for e in facts_of(finished) if e["event"] == "evaluated" and e["when"] == "before_finetuning"]
    assert read == [value for value in before if value is not None]


def test_the_memory_never_exceeds_its_size(finished: Path, learner: str) -> None:
    updates = [event for event in facts_of(finished) if event["event"] == "memory_updated"]
    if learner in ("ewc", "finetune", "joint", "lwf"):  # they train on no exemplars, so none are chosen
        assert metrics_of(finished)["exemplars"] == [0, 0, 0]
        assert updates == []
        return
    size = config_of(finished).memory.size
    quotas = [size // 2, size // 4, size // 6]
    kept = [2 * quotas[0], 4 * quotas[1], 6 * quotas[2]]
    assert metrics_of(finished)["exemplars"] == kept
    assert [(event["num_exemplars"], event["per_class"]) for event in updates] == list(zip(kept, quotas, strict=True))
    for stage in range(3):
        exemplars = json.loads((finished / f"stage_{stage:03}" / "stage.json").read_text())["exemplars"]["exemplars"]
        assert [label for label, _ in exemplars] == list(range(2 * stage + 2))
        assert len({sample for _, ids in exemplars for sample in ids}) == kept[stage]


def test_a_memory_that_does_not_divide_stays_below_its_size(run_tiny: RunTiny) -> None:
    metrics = metrics_of(run_tiny("memory.size=7", "optim.epochs=1", learner="replay"))
    assert metrics["exemplars"] == [6, 4, 6]


def test_a_run_folder_holds_what_it_should_and_nothing_else(finished: Path, learner: str) -> None:
    means = ["class_means.safetensors"] if learner == "icarl" else []
    files = ("network.safetensors", "stage.json", "checksums.json", "report/arrays.npz", "report/facts.json", *means)
    stages = [f"stage_{stage:03}/{file}" for stage in range(3) for file in files]
    states = [f"stage_{stage:03}/state.pt" for stage in range(3)]
    assert sorted(content_of(finished)) == sorted(
        [".lock", "checksums.json", "config.yaml", "events.jsonl", "metrics.json", "report.html", *stages, *states]
    )


def test_the_config_is_stored_resolved_with_versions_and_git_state(whole_run: RunTiny) -> None:
    record = yaml.safe_load((whole_run() / "config.yaml").read_text())
    assert record.keys() == {"config", "versions", "git"}
    assert record["versions"]["torch"] == version("torch")
    assert record["config"]["optim"]["epochs"] == 2
    assert "${" not in (whole_run() / "config.yaml").read_text()
    assert check(record["config"]).model_dump(mode="json") == record["config"]


def test_the_report_is_one_page_that_loads_nothing(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert page.count("<svg") >= 4
    assert not re.findall(r"<(?:script|img|iframe)[^>]*\ssrc\s*=(?!\"data:)", page)
    assert not re.findall(r"<link\b|@import|url\((?!#)", page)


def test_the_events_tell_the_run_in_order(whole_run: RunTiny) -> None:
    kinds = [event["event"] for event in read_events(whole_run() / "events.jsonl")]
    training = ["phase_started", "epoch", "epoch"]
    reading = ["test_read", "evaluated"]
    first = ["stage_started", *training, "memory_updated", *reading, "stage_finished"]
    later = ["stage_started", *training, *reading, "memory_updated", *training, *reading, "stage_finished"]
    assert kinds == ["run_started", *first, *later, *later, "run_finished"]
    assert metrics_of(whole_run())["test_reads"] == kinds.count("test_read") == 5


def test_losses_are_logged_by_name(whole_run: RunTiny) -> None:
    epochs = [event for event in facts_of(whole_run()) if event["event"] == "epoch"]
    names = {(event["stage"], event["phase"]): set(event["losses"]) for event in epochs}
    assert names == {
        (0, "training"): {"bce"},
        (1, "training"): {"bce", "dkt", "separation"},
        (1, "finetuning"): {"bce"},
        (2, "training"): {"bce", "dkt", "separation"},
        (2, "finetuning"): {"bce"},
    }


def test_states_are_loadable_without_running_code(whole_run: RunTiny) -> None:
    for stage in range(3):
        state = torch.load(whole_run() / f"stage_{stage:03}" / "state.pt", weights_only=True)
        assert state["position"] == {"stage": stage + 1, "begun": False, "phase": 0, "epoch": 0, "step": 0}


def test_weights_carry_no_name_date_or_path(whole_run: RunTiny, run_tiny: RunTiny) -> None:
    header = (whole_run() / "stage_002" / "network.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", header[:8])
    entries = json.loads(header[8 : 8 + length])
    assert entries.pop("__metadata__", {}) == {}
    assert all(set(entry) == {"dtype", "shape", "data_offsets"} for entry in entries.values())
    other = content_of(run_tiny("name=another_name"))
    same = [name for name in other if name.endswith((".safetensors", "stage.json"))]
    assert len(same) == 6
    assert {name: other[name] for name in same} == {name: content_of(whole_run())[name] for name in same}


def test_the_same_seed_gives_the_same_bits(finished: Path, run_tiny: RunTiny, learner: str) -> None:
    again = run_tiny("name=again", *COMPANIONS.get(learner, ()), learner=learner)
    assert results_of(again) == results_of(finished)
    assert_same_weights(weights_of(again), weights_of(finished))
    assert facts_of(again) == facts_of(finished)


def test_another_seed_gives_other_weights_and_the_same_classes(whole_run: RunTiny, run_tiny: RunTiny) -> None:
    other = run_tiny("seed=1", "optim.epochs=1", "learner.finetune_epochs=1")
    weights, expected = weights_of(other), weights_of(whole_run())
    assert not weights["stage_000/skab.attention.q.weight"].equal(expected["stage_000/skab.attention.q.weight"])
    for key in ("class_order", "task_sizes", "protocol", "num_test_images", "num_parameters"):
        assert metrics_of(other)[key] == metrics_of(whole_run())[key]


def test_the_results_do_not_depend_on_the_batch_size_of_evaluation(whole_run: RunTiny, run_tiny: RunTiny) -> None:
    assert results_of(run_tiny("evaluation.batch_size=7")) == results_of(whole_run())


def test_reading_the_test_set_between_epochs_changes_no_result(whole_run: RunTiny, run_tiny: RunTiny) -> None:
    run = run_tiny("evaluation.every_epochs=1")
    assert_same_weights(weights_of(run), weights_of(whole_run()))
    assert metrics_of(run)["test_reads"] == metrics_of(whole_run())["test_reads"] + 5
    results = [results_of(folder) | {"test_reads": 0} for folder in (run, whole_run())]
    assert results[0] == results[1]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp64"])
def test_every_number_format_learns(run_tiny: RunTiny, precision: str) -> None:
    run = run_tiny(f"precision={precision}", "optim.epochs=8", "scenario.classes=2")
    assert read_events(run / "events.jsonl")[0]["precision"] == precision
    kind = torch.float64 if precision == "fp64" else torch.float32
    assert {value.dtype for value in weights_of(run).values() if value.is_floating_point()} == {kind}
    assert metrics_of(run)["last_accuracy"] > 0.8


def test_held_out_images_are_evaluated_and_not_trained_on(run_tiny: RunTiny) -> None:
    run = run_tiny("data.validation=0.25", "evaluate_on=validation", "optim.epochs=1", learner="joint")
    metrics, events = metrics_of(run), facts_of(run)
    assert metrics["test_reads"] == 0
    assert {event["split"] for event in events if event["event"] == "test_read"} == {"validation"}
    new = [event["num_new_samples"] for event in events if event["event"] == "stage_started"]
    # of the digits 0 to 5 there are 142, 145, 141, 146, 144 and 145 training images
    assert [sum(pair) for pair in zip(new, metrics["num_test_images"], strict=True)] == [287, 287, 289]
    assert metrics["num_test_images"] == [72, 71, 72]


def test_uneven_tasks_are_learned_and_weighted_right(run_tiny: RunTiny) -> None:
    run = run_tiny(
        "scenario.task_sizes=[3,1,2]", "scenario.initial_increment=null", "scenario.increment=null", "optim.epochs=1"
    )
    metrics = metrics_of(run)
    matrix = np.array(metrics["accuracy_matrix"], dtype=float)
    assert metrics["task_sizes"] == [3, 1, 2]
    assert metrics["last_accuracy"] == pytest.approx(np.average(matrix[2], weights=metrics["num_test_images"]))
    assert list(cil.load(run).class_names) == list("012345")


def test_classes_keep_their_names_in_any_order(run_tiny: RunTiny) -> None:
    order = [7, 3, 9, 0, 1, 2, 4, 5, 6, 8]
    run = run_tiny(f"scenario.class_order={order}", "scenario.classes=4", "optim.epochs=1", learner="replay")
    model = cil.load(run)
    assert (model.class_names, model.class_labels) == (("7", "3", "9", "0"), (7, 3, 9, 0))
    started = [event["class_names"] for event in facts_of(run) if event["event"] == "stage_started"]
    assert started == [["7", "3"], ["9", "0"]]


def test_a_loaded_run_scores_as_the_run_did(finished: Path) -> None:
    metrics = metrics_of(finished)
    test = open_data(config_of(finished)).test
    for stage in (0, 1, None):
        model = cil.load(finished, stage)
        row = metrics["accuracy_matrix"][2 if stage is None else stage]
        num_tasks = len(model.class_names) // 2
        assert model.class_names == tuple("012345")[: 2 * num_tasks]
        for task in range(num_tasks):
            of_task = test.labels // 2 == task
            right = np.array(model.predict(test.images[of_task])) == test.labels[of_task].numpy().astype(str)
            assert right.mean() == row[task]


def test_a_loaded_run_gives_the_logits_of_the_run_to_the_bit(whole_run: RunTiny, tmp_path: Path) -> None:
    run = whole_run()
    images = open_data(config_of(run)).test.images[:16]
    engine = Engine(Run.build(config_of(run)), EventLog(tmp_path / "events.jsonl"))
    state = checkpoint.load_state(run, torch.device("cpu"))
    assert state is not None
    engine.learner.rebuild(state["structure"])
    engine.learner.load_state_dict(state["learner"])
    with torch.inference_mode():
        expected = engine.learner.eval().predict(engine.samples.transform.test(images))
    assert cil.load(run).logits(images).equal(expected)
    engine.log.close()


def test_a_real_data_set_runs_from_the_folder_that_the_environment_names(cil_data: Path, run_tiny: RunTiny) -> None:
    run = run_tiny(
        "experiment=cifar100_c50", "model.pool_stride=2", "optim.epochs=1", "memory.size=50", "scenario.classes=4"
    )
    metrics = metrics_of(run)
    assert metrics["data_set"] == "cifar100"
    assert metrics["num_test_images"] == [200, 200]
    assert len(metrics["class_order"]) == 4


@pytest.mark.slow
def test_the_demo_reaches_what_it_promises(tmp_path: Path) -> None:
    from cil.cli import main

    found = []
    for seed in range(3):
        assert main(["experiment=demo", f"seed={seed}", f"runs_dir={tmp_path / str(seed)}"]) == 0
        found.append(metrics_of(tmp_path / str(seed) / "demo"))
        assert found[-1]["wall_seconds"] < 300
    assert median(metrics["average_incremental_accuracy"] for metrics in found) >= 0.96
    assert median(metrics["last_accuracy"] for metrics in found) >= 0.92
