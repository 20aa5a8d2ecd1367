"""What a person sees who makes a mistake: exit code 2, at most 12 lines on standard error, no traceback."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cil.cli import MAX_LINES, compose, config_folder, main
from tests.conftest import RunTiny
from tests.run_folders import metrics_of

ROOT = Path(__file__).parents[2]

Refuse = Callable[..., str]


@pytest.fixture
def refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Run some overrides, which must be refused; returns the message."""

    def refused(*overrides: str, runs_dir: Path | None = None) -> str:
        code = main([*overrides, f"runs_dir={runs_dir or tmp_path / 'runs'}"])
        out, err = capsys.readouterr()
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") <= MAX_LINES
        assert "Traceback" not in err
        assert not (tmp_path / "runs").exists(), "nothing may be written before the request is known to be right"
        return err

    return refused


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seeed=1", "seeed: unknown key 'seeed'; did you mean 'seed'?"),
        ("optim.epoch=3", "optim.epoch: unknown key 'epoch'; did you mean 'epochs'?"),
        ("optim.schedule.warmup=3", "optim.schedule.warmup: unknown key 'warmup'; did you mean 'warmup_lr'?"),
        ("optim.sampling.view=3", "optim.sampling.view: unknown key 'view'; did you mean 'views'?"),
        ("model.wdth=64", "model.wdth: unknown key 'wdth'; did you mean 'width'?"),
        ("data.rot=x", "data.rot: unknown key 'rot'; did you mean 'root'?"),
        ("data.augment.crop.paddin=2", "data.augment.crop.paddin: unknown key 'paddin'; did you mean 'padding'?"),
        ("kd.dkt.temprature=2", "kd.dkt.temprature: unknown key 'temprature'; did you mean 'temperature'?"),
        ("learner.finetune_epoch=2", "learner.finetune_epoch: unknown key"),
        ("zzz.like.this=1", "zzz: unknown key 'zzz'. Known: checkpoint, data, data_seed, device, "),
        ("learner=dtk", "learner=dtk: unknown learner 'dtk'; did you mean 'dkt'?"),
        ("data=cifar1000", "data=cifar1000: unknown data 'cifar1000'; did you mean 'cifar100'?"),
        ("kd=[dkt,kdd]", "kd=kdd: unknown kd 'kdd'; did you mean 'kd'?"),
        ("experiment=demoo", "experiment=demoo: unknown experiment 'demoo'; did you mean 'demo'?"),
        ("learner.name=dkt_offical", "unknown learner 'dkt_offical'; did you mean 'dkt_official'?"),
        ("model.name=resnet_cifra", "unknown model 'resnet_cifra'; did you mean 'resnet_cifar'?"),
        ("memory.selection=herdin", "memory.selection=herdin: unknown selection rule 'herdin'; did you mean 'herding'"),
        ("data.augment.flipp={}", "data.augment.flipp=flipp: unknown augmentation 'flipp'; did you mean 'flip'?"),
        (
            "kd.ofd.weight=1",
            "kd.ofd.method=ofd: unknown distillation method 'ofd'. Known: at, at_gradient, ban, cat_kd",
        ),
        ("kd=mld2", "kd.mld2 reads a second view of every image: set data.strong"),
        ("kd=null", "kd=null: unknown kd 'null'"),
        ("kd=", "kd=: unknown kd ''"),
        (
            "learner=[dkt,replay]",
            "learner=[dkt,replay]: one choice is needed; -m runs every one, only kd takes several",
        ),
        ("learner=dkt,replay", "learner=dkt,replay: one choice is needed; -m runs every one, only kd takes several"),
        ("seed=1,2", "'seed=1,2': -m runs every value, key=[1,2] is a list"),
        ("seed=range(3)", "'seed=range(3)': -m runs every value, key=[1,2] is a list"),
        ("hydra.run.dir=x", "hydra.run.dir=x: has no effect without -m"),
        ("optim.optimizer=adamww", "unknown optimizer 'adamww'; did you mean 'adamw'?"),
        ("optim.schedule.name=cosin", "optim.schedule.name: input should be 'constant', 'cosine', 'multistep'"),
        ("scenario.class_order=order9", "class_order=order9: there is no such file"),
    ],
)
def test_an_unknown_name_or_choice_is_refused_with_the_nearest_known_one(
    refuse: Refuse, override: str, expected: str
) -> None:
    assert expected in refuse("experiment=tiny", override)


@pytest.mark.parametrize(
    "override", ["foo", "a=[1,", "seed=", "=3", "seed 3", "optim.lr={", "~nothing", "++", "a..b=1"]
)
def test_a_malformed_override_is_refused(refuse: Refuse, override: str) -> None:
    message = refuse("experiment=tiny", override)
    assert len(message) < 600
    assert override.strip("~=3") in message


@pytest.mark.parametrize("word", ["--bogus", "--config-name=x"])
def test_an_unknown_option_is_refused(refuse: Refuse, word: str) -> None:
    assert f"{word!r} is no option" in refuse("experiment=tiny", word)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.epochs=many", "optim.epochs: input should be a valid integer"),
        ("optim.epochs=0", "optim.epochs: input should be greater than 0, found 0"),
        ("optim.epochs=1.5", "optim.epochs: input should be a valid integer"),
        ("optim.lr=-1", "optim.lr: input should be greater than 0, found -1"),
        ("optim.betas=[0.9]", "optim.betas"),
        ("seed=-1", "seed: input should be greater than or equal to 0, found -1"),
        ("memory.size=-1", "memory.size: input should be greater than or equal to 0"),
        ("memory.budget=some", "memory.budget: input should be 'total', 'per_class' or 'fixed_total', found 'some'"),
        ("precision=fp8", "precision: input should be 'auto', 'fp32', 'bf16', 'fp16' or 'fp64', found 'fp8'"),
        ("scenario.increment=0", "scenario.increment: input should be greater than 0, found 0"),
        ("scenario.increment=two", "scenario.increment: input should be a valid integer"),
        ("data.validation=1", "data.validation: input should be less than 1, found 1"),
        ("overwrite=perhaps", "overwrite: input should be a valid boolean"),
        ("model.width=-8", "model.width: input should be greater than 0, found -8"),
        ("model.drop_path=1", "model.drop_path: input should be less than 1, found 1"),
        ("learner.finetune_epochs=few", "learner.finetune_epochs"),
        ("learner.finetune_epochs=[1,-1]", "learner.finetune_epochs.1: input should be greater than or equal to 0"),
        ("kd.dkt.temperature=hot", "kd.dkt.temperature: input should be a valid number"),
        ("kd.dkt.temperature=0", "kd.dkt: kd.temperature must be above 0, found 0"),
        ("kd.dkt.weight=-1", "kd.dkt.weight: must be a number of 0 or more, found -1"),
        ("kd.dkt.weight=much", "kd.dkt.weight: must be a number of 0 or more, found 'much'"),
        ("data.augment.crop=4", "data.augment.crop: input should be a valid dictionary, found 4"),
        ("kd.dkt=4", "kd.dkt: input should be a valid dictionary, found 4"),
        ("data.augment.crop.padding=-1", "data.augment.crop.padding: input should be greater than 0"),
        ("data=5", "data=5: unknown data '5'"),
        ("name=a/b", "name: string should match pattern"),
        ("name=..", "name: string should match pattern"),
        ("evaluation.batch_size=0", "evaluation.batch_size: input should be greater than 0, found 0"),
        ("device=tpu", "device=tpu: not usable here"),
        ("evaluation.precision=fp64", "evaluation.precision=fp64 does not go with precision="),
    ],
)
def test_a_wrong_value_is_refused_saying_what_would_be_right(refuse: Refuse, override: str, expected: str) -> None:
    assert expected in refuse("experiment=tiny", override)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["learner=finetune", "kd=kd"],
            "kd=kd has nothing to learn from with learner=finetune: it keeps no old network",
        ),
        (["learner=finetune", "kd=kd"], "Use learner=lwf or bic or der, or kd=none"),
        (["learner=joint", "kd=[dkt,kd]"], "kd=dkt+kd has nothing to learn from with learner=joint"),
        (["learner=dkt", "model=resnet32"], "learner=dkt needs the network with a token pool, found ResNetCifar"),
        (["learner=replay", "memory.size=0"], "learner=replay replays exemplars and memory.size is 0"),
        (
            ["memory.size=9"],
            "memory.size=9 has no room for an exemplar of each of the 10 classes: set it to 10 or more",
        ),
        (["evaluate_on=validation"], "set data.validation, for example to 0.1"),
        (["scenario.classes=11"], "classes must be between 1 and the 10 classes of the data set, found 11"),
        (["scenario.initial_increment=12"], "initial_increment must be at most 10"),
        (["scenario.task_sizes=[4,4]"], "task_sizes=[4, 4] fixes every task: leave out increment"),
        (["learner=replay", "memory.when=after_finetuning"], "learner=replay does not fine-tune"),
        (["learner.late_batch_override=true"], "no effect without learner.incremental_batch_size"),
        (["learner.finetune_epochs=[]"], "learner.finetune_epochs: found an empty list"),
        (
            ["model.width=30", "model.num_heads=4"],
            "width must be a multiple of num_heads, found width=30 and num_heads=4",
        ),
        (["model.patch_kernel=3"], "must be positive multiples of patch_kernel=3"),
        (["data.download=true"], "data.download=true has no effect on digits"),
        (["optim.schedule.legacy_shift=true", "optim.schedule.unit=step"], "has no effect with unit=step"),
        (["data=npz"], "data.path"),
        (["data=npz", "data.path=nowhere.npz"], "nowhere.npz"),
        (["learner=replay", "model=timm", "model.architecture=resnet81"], "unknown timm architecture 'resnet81'"),
        (["learner=dkt_official", "model=resnet32"], "model.merge_bias: unknown key"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_with_what_would(
    refuse: Refuse, overrides: list[str], expected: str
) -> None:
    assert expected in refuse("experiment=tiny", *overrides)


def test_all_problems_are_listed_at_once(refuse: Refuse) -> None:
    message = refuse(
        "experiment=tiny", "sed=1", "optim.lr=-1", "model.widht=3", "memory.selection=best", "kd.dkt.weight=-2"
    )
    for part in ("sed: unknown key", "optim.lr:", "model.widht: unknown key", "memory.selection=best", "kd.dkt.weight"):
        assert part in message
    assert len(message.splitlines()) == 5


def test_a_long_list_of_problems_is_cut_and_counted(refuse: Refuse) -> None:
    message = refuse("experiment=tiny", *(f"unknown_{number}=1" for number in range(30)))
    assert 9 < len(message.splitlines()) <= MAX_LINES
    assert re.search(r"and \d+ more$", message.strip())


def test_a_missing_data_set_is_refused_with_where_it_looked_and_the_command(refuse: Refuse, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    message = refuse("experiment=cifar100_c50", f"data.root={empty}")
    assert str(empty / "cifar100.npz") in message
    assert "data.download=true" in message
    assert not any(empty.iterdir())


def test_the_environment_says_where_data_is(refuse: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIL_DATA", str(tmp_path / "elsewhere"))
    assert str(tmp_path / "elsewhere" / "cifar10.npz") in refuse("data=cifar10")
    monkeypatch.delenv("CIL_DATA")
    assert compose(["data=cifar10"])["data"]["root"] == "data"


def test_a_folder_of_runs_that_cannot_be_made_is_refused(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    assert str(tmp_path / "file") in refuse("experiment=tiny", runs_dir=tmp_path / "file")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_runs_that_may_not_be_written_is_refused(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    assert "Permission denied" in refuse("experiment=tiny", runs_dir=tmp_path / "closed")


def test_an_epoch_without_a_batch_is_refused_when_it_shows(
    run_tiny: RunTiny, capsys: pytest.CaptureFixture[str]
) -> None:
    run_tiny("optim.sampling.round_to=1024", code=2)
    message = capsys.readouterr().err
    assert "cut to a multiple of round_to=1024" in message
    assert "Traceback" not in message


def test_a_loss_that_is_not_finite_ends_the_run_with_what_to_try(
    run_tiny: RunTiny, capsys: pytest.CaptureFixture[str]
) -> None:
    run_tiny("optim.lr=1e30", "optim.optimizer=sgd", "optim.schedule.warmup_epochs=0", learner="replay", code=1)
    message = capsys.readouterr().err
    assert message.startswith("error: stage 0, phase training, epoch ")
    assert "the loss is not finite" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_lists_every_group_and_choice(capsys: pytest.CaptureFixture[str], word: str) -> None:
    assert main(["experiment=nothing", word]) == 0
    text = capsys.readouterr().out
    for path in config_folder().glob("*/*.yaml"):
        if path.parent.name == "ablation":  # files of another command
            continue
        assert re.search(rf"^  {path.parent.name} .*\b{path.stem}\b", text, re.MULTILINE)


def test_the_config_can_be_shown_and_nothing_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    assert main(["experiment=tiny", "seed=5", f"runs_dir={tmp_path / 'runs'}", "--cfg"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["seed"], shown["name"], shown["experiment"]) == (5, "tiny-dkt-dkt-seed5", "tiny")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "digits-dkt-dkt-seed0"),
        (["experiment=tiny"], "tiny-dkt-dkt-seed0"),
        (["experiment=demo"], "demo"),
        (["experiment=tiny", "learner=dkt_official", "seed=7"], "tiny-dkt_official-dkt_official-seed7"),
        (["experiment=tiny", "learner=replay"], "tiny-replay-none-seed0"),
        (["experiment=tiny", "kd=[dkt,kd]"], "tiny-dkt-dkt+kd-seed0"),
        (["experiment=tiny", "kd=none"], "tiny-dkt-none-seed0"),
        (["data=cifar100", "learner=finetune"], "cifar100-finetune-none-seed0"),
        (["experiment=tiny", "name=mine-2.5"], "mine-2.5"),
    ],
)
def test_the_default_name_is_made_of_experiment_learner_distillation_and_seed(overrides: list[str], name: str) -> None:
    assert compose(overrides)["name"] == name


def test_a_later_override_wins_over_experiment_and_learner() -> None:
    tree = compose(["optim.epochs=7", "model=dkt_small", "learner=dkt_official", "experiment=tiny", "memory.size=50"])
    assert (tree["optim"]["epochs"], tree["model"]["width"], tree["memory"]["size"]) == (7, 192, 50)
    assert tree["learner"]["name"] == "dkt_official"


def test_own_arrays_are_learned(run_tiny: RunTiny, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 12)
    images = generator.integers(0, 256, (48, 10, 6, 3)).astype(np.uint8)
    names = np.array(["ant", "bee", "cat", "dog"])
    np.savez(tmp_path / "own.npz", x_train=images, y_train=labels, x_test=images, y_test=labels, classes=names)
    run = run_tiny(
        "data=npz", f"data.path={tmp_path / 'own.npz'}", "scenario.classes=4", "optim.epochs=1", "memory.size=4"
    )
    assert metrics_of(run)["num_test_images"] == [24, 24]


def start(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "train_incremental.py"), *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_the_script_refuses_with_exit_code_2_on_standard_error(tmp_path: Path) -> None:
    done = start("experiment=tiny", "optim.epoch=3", f"runs_dir={tmp_path}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: optim.epoch: unknown key 'epoch'; did you mean 'epochs'?\n"


def test_the_script_runs_from_any_folder_and_hydra_makes_none(tmp_path: Path) -> None:
    from tests.conftest import tiny_command

    done = start(*tiny_command(tmp_path / "runs", "optim.epochs=1", learner="finetune"), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-2:] == [
        f"run     {Path('runs', 'run')}",
        f"report  {Path('runs', 'run', 'report.html')}",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["run"]
    assert not list(tmp_path.rglob(".hydra"))


def test_help_is_fast_since_it_imports_no_torch() -> None:
    code = "import sys; from cil.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: python train_incremental.py")
