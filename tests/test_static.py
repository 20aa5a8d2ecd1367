"""Static distillation from the command line: methods, stages, resuming, teachers and what is kept of them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cil import checkpoint
from cil.build import Run
from cil.checking import check
from cil.cli import compose
from cil.cli import main as run_command
from cil.config import StaticConfig
from cil.engine import Engine
from cil.events import EventLog, SilentLog, read_events
from cil.loading import load
from cil.static import StaticRun
from kd import distillers

TINY = ["experiment=tiny_static", "student=resnet8", "model.width=4", "optim.epochs=2", "optim.schedule.milestones=[1]"]


def distill(*words: str) -> int:
    return run_command(list(words), program="distill.py", config_name="distill")


def metrics_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def weights_of(folder: Path, stage: int = 0) -> dict[str, torch.Tensor]:
    return checkpoint.load_network(checkpoint.stage_folder(folder, stage), torch.device("cpu"))


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained teacher, a ResNet-14."""
    folder = tmp_path_factory.mktemp("runs")
    assert distill(*TINY, "student=resnet14", f"runs_dir={folder}", "name=teacher") == 0
    return folder


@pytest.fixture
def student(runs: Path) -> Callable[..., Path]:
    def run(name: str, *words: str) -> Path:
        assert distill(*TINY, f"runs_dir={runs}", f"name={name}", *words) == 0
        return runs / name

    return run


def test_a_plain_network_is_trained_without_a_teacher(runs: Path) -> None:
    metrics = metrics_of(runs / "teacher")
    assert metrics["finished"]
    assert metrics["teacher"] is None
    assert metrics["networks"] == ["resnet14"]
    assert metrics["last_accuracy"] == metrics["accuracy_after"][0] > 0.2
    assert (runs / "teacher" / "report.html").is_file()


@pytest.mark.parametrize("method", sorted(distillers))
def test_every_method_runs_on_the_digits(method: str, student: Callable[..., Path]) -> None:
    folder = student(f"every-{method}", "teacher=teacher", f"++kd.{method}.weight=1", "data=digits_kd")
    metrics = metrics_of(folder)
    assert metrics["finished"]
    assert metrics["kd"] == [method]
    losses = [event["losses"] for event in read_events(folder / "events.jsonl") if event["event"] == "epoch"]
    assert all(method in epoch and "ce" in epoch for epoch in losses)
    assert not any(name.startswith(("distillation", "teacher")) for name in weights_of(folder))


def test_the_teacher_is_found_by_network_by_name_and_by_path(runs: Path, student: Callable[..., Path]) -> None:
    said = []
    for number, named in enumerate(["resnet14", "teacher", str(runs / "teacher")]):
        folder = student(f"named-{number}", f"teacher={named}", "kd=kd")
        said.append(metrics_of(folder)["teacher"])
    assert said[0] == said[1] == said[2]
    assert said[0]["accuracy"] == metrics_of(runs / "teacher")["last_accuracy"]


def test_an_unknown_teacher_is_refused_with_those_that_there_are(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill(*TINY, f"runs_dir={runs}", "name=nobody", "teacher=resnet110", "kd=kd") == 2
    message = capsys.readouterr().err
    assert "teacher=resnet110" in message
    assert "resnet14" in message
    assert not (runs / "nobody").exists()


def test_a_teacher_of_other_classes_is_refused(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["experiment=tiny", "learner=finetune", "model=resnet8", "optim.epochs=1", "scenario.task_sizes=[4]"]
    words += ["scenario.initial_increment=null", "scenario.increment=null", f"runs_dir={runs}", "name=four"]
    assert run_command(words) == 0
    assert distill(*TINY, f"runs_dir={runs}", "name=refused", "teacher=four", "kd=kd") == 2
    assert "class_labels" in capsys.readouterr().err


def test_a_damaged_teacher_knows_less_than_its_run_says(
    runs: Path, student: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = student("damaged")
    metrics = metrics_of(folder)
    halved = metrics | {"last_accuracy": metrics["last_accuracy"] / 2}
    checkpoint.write_json(folder / "metrics.json", halved, checked=True)
    assert distill(*TINY, f"runs_dir={runs}", "name=of_damaged", "teacher=damaged", "kd=kd") == 2
    assert "its run says" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["kd=kd"], "kd=kd has nobody to learn from"),
        (["teacher=teacher"], "teacher=teacher has no effect with kd=none"),
        (["generations=2"], "learn nothing from each other with kd=none"),
        (["teacher=teacher", "kd=mld2", "data=digits"], "data.strong"),
        (["model=resnet20"], "student="),
        (["student=reznet20"], "did you mean 'resnet20'"),
        (["assistants=[resnet8,resnet8]", "kd=kd"], "every network once"),
        (["++teacher_cache.folder=there"], "teacher_cache has no effect without a teacher"),
        (["optim.delta=0.1"], "optim.delta is about optimizer=dot"),
        (["learner=dkt"], "learner"),
    ],
)
def test_settings_without_sense_are_refused(
    words: list[str], said: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill(*TINY, f"runs_dir={runs}", "name=senseless", *words) == 2
    assert said in capsys.readouterr().err
    assert not (runs / "senseless").exists()


def test_dot_runs_beside_a_teacher_and_without_one(student: Callable[..., Path]) -> None:
    for name, words in {"dot": ["teacher=teacher", "kd=kd"], "dot-plain": []}.items():
        folder = student(name, *words, "optim=dot", "optim.epochs=2", "optim.schedule.milestones=[1]")
        assert metrics_of(folder)["finished"]


def test_generations_learn_from_each_other_and_answer_together(student: Callable[..., Path]) -> None:
    folder = student("generations", "kd=ban", "generations=3")
    metrics = metrics_of(folder)
    assert metrics["networks"] == ["resnet8"] * 3
    assert sorted(metrics["ensemble_accuracy"]) == ["2", "3"]
    assert not same(weights_of(folder, 0), weights_of(folder, 1))
    first, second = (
        event["losses"]
        for event in read_events(folder / "events.jsonl")
        if event["event"] == "epoch" and event["epoch"] == 0 and event["stage"] < 2
    )
    assert "ban" not in first  # nobody came before it
    assert "ban" in second
    middle = load(folder, stage=1)
    assert middle.network.num_classes == 10


def test_assistants_stand_between_teacher_and_student(student: Callable[..., Path]) -> None:
    folder = student("assistants", "teacher=teacher", "kd=takd", "assistants=[wrn_16_1]")
    assert metrics_of(folder)["networks"] == ["wrn_16_1", "resnet8"]
    assert type(load(folder, stage=0).network.backbone) is not type(load(folder, stage=1).network.backbone)


class Interrupted(Exception):
    """Stops a run in a test."""


def interrupted_after(num_epochs: int, words: list[str]) -> None:
    """Run until so many epochs are saved, then stop as a killed process would."""
    config = check(compose(words, "distill"))
    assert isinstance(config, StaticConfig)
    from cil.folder import open_folder

    run: Run = StaticRun.build(config)
    with open_folder(config):
        pass
    with EventLog(config.folder / "events.jsonl") as log:
        engine = Engine(run, log)
        trained = 0
        train_epoch = engine.train_epoch

        def counted(*arguments: Any) -> None:
            nonlocal trained
            if trained == num_epochs:
                raise Interrupted
            trained += 1
            train_epoch(*arguments)

        engine.train_epoch = counted  # type: ignore[method-assign]
        with pytest.raises(Interrupted):
            engine.run()


@pytest.mark.parametrize("num_epochs", [1, 2, 3])
@pytest.mark.parametrize("method", ["crd", "reviewkd"])
def test_a_resumed_run_of_two_stages_gives_the_same_bits(
    method: str, num_epochs: int, runs: Path, student: Callable[..., Path]
) -> None:
    words = ["teacher=teacher", f"++kd.{method}.weight=1", "assistants=[resnet14]", "optim=dot", *TINY[3:]]
    whole = runs / f"whole-{method}"
    if not whole.exists():
        student(whole.name, *words)
    name = f"resumed-{method}-{num_epochs}"
    interrupted_after(num_epochs, [*TINY, f"runs_dir={runs}", f"name={name}", *words])
    student(name, *words)
    for stage in range(2):
        assert same(weights_of(whole, stage), weights_of(runs / name, stage))
    known = {
        key: value
        for key, value in metrics_of(whole).items()
        if key not in ("name", "wall_seconds", "images_per_second")
    }
    assert known.items() <= metrics_of(runs / name).items()


def test_a_run_goes_on_with_the_teacher_that_it_began_with(
    runs: Path, student: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    student("first_teacher", "student=resnet20")
    words = [*TINY, f"runs_dir={runs}", "name=loyal", "teacher=resnet20", "kd=kd"]
    interrupted_after(1, words)
    student("second_teacher", "student=resnet20", "seed=1")
    assert distill(*words) == 0
    assert metrics_of(runs / "loyal")["teacher"]["name"] == "first_teacher"


@pytest.mark.parametrize("method", ["kd", "reviewkd", "mld", "crd"])
def test_what_is_kept_of_a_teacher_is_what_it_says(method: str, tmp_path: Path, student: Callable[..., Path]) -> None:
    words = [
        "teacher=teacher",
        f"++kd.{method}.weight=1",
        "data=digits_kd",
        "data_seed=3",
        "optim.sampling.epoch_parts=2",
    ]
    cache = f"++teacher_cache.folder={tmp_path / method}"
    asked = student(f"asked-{method}", *words)
    kept = student(f"kept-{method}", *words, cache)
    read = student(f"read-{method}", *words, cache)
    assert same(weights_of(asked), weights_of(kept))
    assert same(weights_of(asked), weights_of(read))
    assert list((tmp_path / method).glob("*/pass_*/logits/index.json"))
    other = student(f"other-{method}", *words, cache, "seed=1")
    assert not same(weights_of(asked), weights_of(other))
    assert len(list((tmp_path / method).glob("*"))) == 1  # the seed of the student is not in the key


def test_parts_of_a_pass_show_every_sample_once(runs: Path) -> None:
    words = [*TINY, "optim.sampling.epoch_parts=4", "optim.epochs=8", f"runs_dir={runs}", "name=parts"]
    config = check(compose(words, "distill"))
    run = StaticRun.build(config)
    engine = Engine(run, SilentLog())
    stage = run.stage(0)
    (phase,) = run.learner.phases(stage)
    ids = engine.batches.ids("new", stage)
    passes = [
        torch.cat(
            [
                some
                for epoch in range(4 * turn, 4 * turn + 4)
                for some, _ in engine.batches.plan(ids, stage, 0, phase, epoch)
            ]
        )
        for turn in range(2)
    ]
    assert all(shown.sort().values.equal(ids) for shown in passes)
    assert not passes[0].equal(passes[1])
    keys = [engine.batches.view_key(stage, 0, phase, epoch) for epoch in range(8)]
    assert len(set(keys[:4])) == len(set(keys[4:])) == 1
    assert keys[0] != keys[4]


def test_the_student_is_found_before_it_is_trained(runs: Path, student: Callable[..., Path]) -> None:
    small = ["search.num_evaluations=6", "search.population=4", "search.tournament=2", "search.batch_size=16"]
    words = ["kd=kd", "search=diswot", "search.num_seeds=3", *small, "search.max_parameters=200000"]
    teachers = ["student=resnet14", "model.width=16"]  # the embedding has to be as wide as that of the students
    student("wide", *teachers)
    folder = student("searched", *words, "teacher=wide")
    found = json.loads((folder / "search.json").read_text())
    assert len(found["candidates"]) == 6
    assert metrics_of(folder)["student"] == f"s1-{found['winner']['code']}"
    assert metrics_of(folder)["num_parameters"] <= 200000
    assert load(folder).network.num_classes == 10


def test_the_plan_of_a_run_counts_the_pass_of_the_teacher(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*TINY, f"runs_dir={runs}", "name=planned", "plan=true"]
    assert distill(*words) == 0
    alone = capsys.readouterr().out
    assert distill(*words, "teacher=teacher", "kd=kd") == 0
    beside = capsys.readouterr().out
    assert "resnet8" in alone
    assert alone != beside
    assert distill(*words, "kd=ban", "generations=2") == 2
    assert not (runs / "planned").exists()


def test_two_processes_distil_what_one_does(runs: Path) -> None:
    words = [*TINY, "student=resnet8", "precision=fp64", "optim.epochs=1", "optim.schedule.milestones=[]", "device=cpu"]
    words += [f"runs_dir={runs}", "kd=[kd,crd,cat_kd]", "optim=dot"]
    assert distill(*words, "name=fp64", "kd=none", "optim=crd") == 0
    for num_processes in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
        subprocess.run(
            [*command, "distill.py", *words, "teacher=fp64", f"name=processes-{num_processes}"],
            cwd=Path(__file__).parent.parent,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
        )
    one, two = (weights_of(runs / f"processes-{number}") for number in (1, 2))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-10)


def test_a_teacher_cache_is_for_one_process(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*TINY, f"runs_dir={runs}", "name=many", "teacher=teacher", "kd=kd"]
    config = check(compose([*words, f"++teacher_cache.folder={tmp_path}"], "distill"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="single process"):
        StaticRun.build(config)
