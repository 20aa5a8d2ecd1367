import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cil import folder as folders
from cil.checking import check
from cil.cli import compose
from cil.config import Config, ConfigError
from cil.folder import git_state, is_finished, open_folder, read_yaml


@pytest.fixture
def config_of(tmp_path: Path) -> Any:
    def make(*overrides: str) -> Config:
        return check(compose(["experiment=tiny", f"runs_dir={tmp_path / 'runs'}", "name=run", *overrides]))

    return make


def opened(config: Config) -> None:
    """Open the folder and leave it."""
    with open_folder(config):
        pass


def finish(config: Config) -> None:
    (config.folder / "metrics.json").write_text('{"finished": true}')


def test_a_new_folder_gets_the_resolved_config_and_is_not_finished(config_of: Any) -> None:
    config = config_of()
    opened(config)
    record = read_yaml(config.folder / "config.yaml")
    assert check(record["config"]) == config
    assert record["versions"].keys() >= {"torch", "torchvision", "timm"}


def test_the_same_config_may_go_on_until_it_is_finished(config_of: Any) -> None:
    config = config_of()
    opened(config)
    opened(config)
    (config.folder / "metrics.json").write_text('{"finished": false}')
    opened(config)
    finish(config)
    assert is_finished(config)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("seed=1", "seed: 0 there, 1 here"),
        ("optim.schedule.min_lr=0.1", "optim.schedule.min_lr: 1e-05 there, 0.1 here"),
        ("data.augment.crop=null", "data.augment.crop.padding: 1 there, None here"),
        ("+data.augment.flip.probability=1", "data.augment.flip.probability: None there, 1"),
        ("learner=finetune", "kd.dkt.method: 'kd' there, None here"),
        ("device=cpu", "device: 'auto' there, 'cpu' here"),
    ],
)
def test_another_config_is_refused_naming_the_keys(config_of: Any, override: str, line: str) -> None:
    opened(config_of())
    with pytest.raises(ConfigError) as caught:
        opened(config_of(override))
    assert line in str(caught.value)
    assert "overwrite=true" in str(caught.value)


def test_many_differences_are_counted(config_of: Any) -> None:
    opened(config_of())
    with pytest.raises(ConfigError, match=r"and \d+ more keys") as caught:
        opened(config_of("learner=dkt_official", "optim=dkt", "memory=per_class"))
    assert len(caught.value.problems) == 8


def test_where_a_run_is_and_where_its_data_is_make_no_other_config(config_of: Any, tmp_path: Path) -> None:
    opened(config_of())
    (tmp_path / "runs" / "run").rename(tmp_path / "moved")
    (tmp_path / "data").mkdir()
    opened(config_of(f"runs_dir={tmp_path}", "name=moved", f"data.root={tmp_path / 'data'}"))


def test_overwriting_moves_aside_to_the_first_free_name(config_of: Any, tmp_path: Path) -> None:
    for seed in range(3):
        config = config_of(f"seed={seed}", "overwrite=true")
        opened(config)
        finish(config)
    runs = tmp_path / "runs"
    assert sorted(path.name for path in runs.iterdir()) == ["run", "run.old-1", "run.old-2"]
    seeds = {path.name: read_yaml(path / "config.yaml")["config"]["seed"] for path in runs.iterdir()}
    assert seeds == {"run.old-1": 0, "run.old-2": 1, "run": 2}


def test_a_folder_of_something_else_is_refused_and_an_empty_one_taken(config_of: Any) -> None:
    config = config_of()
    config.folder.mkdir(parents=True)
    opened(config)
    for name in ("config.yaml", ".lock"):
        (config.folder / name).unlink()
    (config.folder / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds no run \(no config.yaml\)"):
        opened(config)
    assert [path.name for path in config.folder.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("content", [b"a: [1", b"- 1\n- 2\n", b"\xff\xfe\x00", b""])
def test_a_config_that_cannot_be_read_is_refused_with_its_path(config_of: Any, content: bytes) -> None:
    config = config_of()
    opened(config)
    (config.folder / "config.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        opened(config)
    assert str(config.folder / "config.yaml") in str(caught.value)
    assert len(caught.value.problems) == 1


def test_without_a_checkout_there_is_no_git_state(monkeypatch: pytest.MonkeyPatch, config_of: Any) -> None:
    monkeypatch.setenv("PATH", "")
    assert git_state() is None
    config = config_of()
    opened(config)
    assert yaml.safe_load((config.folder / "config.yaml").read_text())["git"] is None


def test_a_checkout_has_a_commit_and_may_be_dirty(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"rev-parse": "abc\n", "status": " M file\n"}

    class Done:
        def __init__(self, words: list[str], **_: Any) -> None:
            self.stdout = next(answers[word] for word in words if word in answers)

    monkeypatch.setattr(folders.subprocess, "run", Done)
    assert git_state() == {"commit": "abc", "dirty": True}
    answers["status"] = ""
    assert git_state() == {"commit": "abc", "dirty": False}


def test_two_processes_in_one_folder_are_refused_and_a_dead_one_leaves_no_lock(config_of: Any, tmp_path: Path) -> None:
    config = config_of()
    opened(config)
    code = (
        "import sys, time; from pathlib import Path; from cil.folder import locked\n"
        f"with locked(Path({str(config.folder)!r})): print('mine', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(ConfigError, match="is in use: another process runs in it"):
            opened(config)
        with pytest.raises(ConfigError, match="is in use"):
            opened(config_of("overwrite=true"))
        assert (config.folder / "config.yaml").exists()
        other.kill()
    opened(config)
