"""Many runs by one command: the product of all values, names that tell them apart, and what went wrong in words."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cil.cli import main
from cil.config import ConfigError
from cil.sweep import expand, named
from tests.conftest import TINY
from tests.run_folders import content_of, metrics_of

ROOT = Path(__file__).parents[2]
#: Runs of a second or so: 2 tasks of 2 digits, a small network, one epoch.
QUICK = [
    *(*TINY, "model=resnet8", "model.width=4", "learner=replay", "kd=none", "num_threads=1"),
    *("scenario.classes=4", "optim.epochs=1", "memory.size=8"),
]


def names(*words: str, config_name: str = "train_incremental") -> list[str]:
    swept, jobs = expand(list(words))
    return [named(job, swept, config_name)[-1].removeprefix("name=").strip("'") for job in jobs]


def test_the_values_of_all_keys_are_combined_and_ranges_are_read() -> None:
    swept, jobs = expand(["learner=dkt,icarl", "seed=range(3)", "optim.epochs=4"])
    assert swept == {"learner", "seed"}
    assert jobs == [
        [f"learner={name}", f"seed={seed}", "optim.epochs=4"] for name in ("dkt", "icarl") for seed in range(3)
    ]


def test_a_list_is_one_value() -> None:
    swept, jobs = expand(["kd=[kd,at],dkd", "scenario.task_sizes=[4,2]"])
    assert swept == {"kd"}
    assert [job[0] for job in jobs] == ["kd=[kd,at]", "kd=dkd"]
    assert {job[1] for job in jobs} == {"scenario.task_sizes=[4,2]"}


def test_names_tell_what_is_swept_and_nothing_else() -> None:
    words = ("experiment=tiny", "learner=dkt", "optim.epochs=2")
    assert names(*words, "kd=dkt,[kd,at]", "seed=0,1") == [
        *("tiny-dkt-dkt-seed0", "tiny-dkt-dkt-seed1"),
        *("tiny-dkt-kd+at-seed0", "tiny-dkt-kd+at-seed1"),
    ]
    assert names(*words, "optim.lr=0.1,0.2") == ["tiny-dkt-dkt-seed0-optim.lr=0.1", "tiny-dkt-dkt-seed0-optim.lr=0.2"]
    assert names(*words, "scenario.task_sizes=[4,2],[2,4]")[0] == "tiny-dkt-dkt-seed0-scenario.task_sizes=.4.2"
    assert names(*words, "name=mine", "seed=0,1") == ["mine-seed=0", "mine-seed=1"]
    assert names(*words, "name=a,b") == ["a", "b"]
    assert names(*words, "optim.lr=1", "optim.lr=2,3") == [f"tiny-dkt-dkt-seed0-optim.lr={rate}" for rate in (2, 3)]


def test_names_of_static_runs_do_the_same() -> None:
    found = names("experiment=tiny_static", "student=resnet8,resnet14", "seed=0,1", config_name="distill")
    assert len(set(found)) == 4
    assert found[0] == "tiny_static-resnet8-none-seed0"


@pytest.mark.parametrize("word", ["optim.lr={", "seed=1,"])
def test_a_word_that_cannot_be_read_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        expand([word])


def test_a_sweep_runs_every_combination_names_what_went_wrong_and_passes_over_what_is_finished(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    words = ["-m", *QUICK, "learner=replay,finetune", "kd=none,kd", f"runs_dir={runs}"]
    assert main(words) == 2  # kd with finetune, which keeps no old network
    out, err = capfd.readouterr()
    assert "4 runs, 1 of them refused" in out
    folders = sorted(path.name for path in runs.iterdir() if path.name != "sweeps")
    assert folders == [f"tiny-{name}-seed0" for name in ("finetune-none", "replay-kd", "replay-none")]
    assert all(metrics_of(runs / name)["finished"] for name in folders)
    table = [line for line in out.splitlines() if line.startswith("| tiny-")]
    assert [line.split(" | ")[:2] for line in table] == [
        [f"| tiny-{name}", "1"] for name in ("replay-none", "replay-kd", "finetune-none")
    ]
    refused = [line for line in err.splitlines() if line.startswith("refused: ")]
    assert len(refused) == 1
    assert refused[0].startswith("refused: learner=finetune kd=kd: kd=kd has nothing to learn from")

    before = content_of(runs / "tiny-replay-kd-seed0")
    assert main(words) == 2
    out, _ = capfd.readouterr()
    assert out.count("is finished already") == 3
    after = content_of(runs / "tiny-replay-kd-seed0")
    assert {name: before[name] for name in before if name != "report.html"} == {
        name: after[name] for name in after if name != "report.html"
    }


def test_a_run_that_fails_does_not_stop_the_others(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    runs = tmp_path / "runs"
    words = ["-m", *QUICK, "optim.lr=1e30,0.001", "optim.optimizer=sgd", "optim.schedule.warmup_epochs=0"]
    assert main([*words, f"runs_dir={runs}"]) == 1
    out, err = capfd.readouterr()
    assert re.search(r"^failed: optim.lr=\S+: stage 0, .* not finite", err, re.MULTILINE)
    assert metrics_of(runs / "tiny-replay-none-seed0-optim.lr=0.001")["finished"]
    assert "optim.lr=0.001 | 1 |" in out


def test_the_table_is_divided_by_protocol(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["-m", *QUICK, "memory.size=8,12", f"runs_dir={tmp_path / 'runs'}"]) == 0
    out, _ = capfd.readouterr()
    assert out.count("not comparable with the other tables") == 2
    assert out.count("| run | seeds |") == 2


def test_a_run_whose_process_died_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cil.sweep.write_json", lambda *_: None)
    assert main(["-m", *QUICK, "seed=0,1", f"runs_dir={tmp_path / 'runs'}"]) == 1
    assert capfd.readouterr().err.count("it left no word: its process died, or never began") == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["seed=0,1", "learner=dtk,replay"], "unknown learner 'dtk'; did you mean 'dkt'"),
        (["optim.epochs=0,-1"], "optim.epochs: input should be greater than 0"),
        (["seed=0,0"], "two runs of this sweep would share the folder"),
        (["seed=0,1", "--bogus"], "'--bogus' is no option"),
    ],
)
def test_a_sweep_of_nothing_but_mistakes_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    assert main(["-m", "experiment=tiny", *words, f"runs_dir={tmp_path / 'runs'}"]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_torchrun_and_a_sweep_do_not_go_together(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    assert main(["-m", "experiment=tiny", "seed=0,1"]) == 2
    assert "leave torchrun out" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [["joblib", "hydra.launcher.n_jobs=2"], ["submitit_local"]])
def test_launchers_give_what_one_process_gives(tmp_path: Path, launcher: list[str]) -> None:
    pytest.importorskip(f"hydra_plugins.hydra_{launcher[0].removesuffix('_local')}_launcher", reason="an extra")
    runs = tmp_path / "runs"
    words = [*QUICK, "seed=0,1", f"runs_dir={runs}", f"hydra/launcher={launcher[0]}", *launcher[1:]]
    done = subprocess.run(
        [sys.executable, "train_incremental.py", "-m", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "| tiny-replay-none | 2 |" in done.stdout
    assert main([*QUICK, "seed=1", f"runs_dir={tmp_path / 'alone'}"]) == 0
    found, expected = (
        {
            key: value
            for key, value in metrics_of(folder / "tiny-replay-none-seed1").items()
            if key not in ("wall_seconds", "images_per_second")
        }
        for folder in (runs, tmp_path / "alone")
    )
    assert found == expected
    outcomes = [json.loads(path.read_text()) for path in runs.glob("sweeps/*/*/outcome.json")]
    assert outcomes == [{"code": 0, "reason": ""}] * 2
