"""A base run, named changes and seeds become one table; differences are paired by seed."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy.stats import ttest_rel

from cil import ablate
from cil.ablate import BASE, Ablation, Runs, main, read, slug
from cil.cli import config_folder
from cil.report.comparison import Group, paired
from cil.report.folders import read_run
from cil.report.table import against_base
from tests.cil.report.conftest import write_run
from tests.cil.test_sweep import QUICK
from tests.run_folders import metrics_of

FILES = sorted((config_folder() / "ablation").glob("*.yaml"))


def write(path: Path, **content: object) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_ablation_file_says_what_it_is_and_every_run_of_it_is_valid(path: Path, tmp_path: Path) -> None:
    header = path.read_text().split("base:")[0]
    assert f"python -m cil.ablate configs/ablation/{path.name}" in header
    assert "# Source: " in header
    assert "Cost: " in header
    Runs(read(path), path.stem, tmp_path).check()


def test_the_parts_of_dkt_are_all_there() -> None:
    changes = read(config_folder() / "ablation" / "dkt_parts.yaml").changes
    assert len(changes) >= 7


def test_one_command_trains_what_is_missing_and_writes_the_table(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = write(
        tmp_path / "mini.yaml",
        base=QUICK,
        seeds=[0, 1],
        changes={"Two epochs": ["optim.epochs=2"], "more memory": ["memory.size=12"]},
    )
    runs = tmp_path / "runs"
    assert main([str(file), "--runs-dir", str(runs)]) == 0
    out, _ = capfd.readouterr()
    folders = sorted(path.name for path in runs.iterdir() if path.is_dir())
    assert folders == [f"mini-{name}-seed{seed}" for name in ("base", "more-memory", "two-epochs") for seed in (0, 1)]
    table = (runs / "mini.md").read_text()
    assert table.strip() in out
    lines = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert [line.split(" | ")[0] for line in lines] == ["| base", "| Two epochs", "| more memory*"]
    assert "another protocol than the first line" in table
    values = [
        [metrics_of(runs / f"mini-{name}-seed{seed}")["average_incremental_accuracy"] for seed in (0, 1)]
        for name in ("base", "two-epochs")
    ]
    assert f"{100 * np.mean(values[0]):.1f} ± {100 * np.std(values[0], ddof=1):.1f}" in lines[0]
    assert f"{100 * (np.mean(values[1]) - np.mean(values[0])):+.1f} ± " in lines[1]
    assert f"p = {ttest_rel(values[1], values[0]).pvalue:.3f}" in lines[1]

    assert main([str(file), "--runs-dir", str(runs), "--only", "Two epochs"]) == 0
    out, _ = capfd.readouterr()
    assert out.count("is finished already") == 2


def test_only_what_moves_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []
    levels = {"base": 0.0, "moves": 0.02, "rests": 0.001}

    def run(words: list[str], config_name: str) -> int:
        name = next(word.removeprefix("name=") for word in words if word.startswith("name="))
        _, change, seed = name.split("-")
        asked.append((change, int(seed.removeprefix("seed"))))
        folder = write_run(tmp_path / name, seed=int(seed.removeprefix("seed")))
        metrics = metrics_of(folder)
        metrics["accuracy_matrix"] = [
            [value if value is None else value - 0.1 + levels[change] for value in row]
            for row in metrics["accuracy_matrix"]
        ]
        (folder / "metrics.json").write_text(json.dumps(metrics))
        return 0

    monkeypatch.setattr(ablate, "run", run)
    file = Ablation(
        base=["experiment=tiny"], changes={"moves": ["optim.lr=1"], "rests": ["optim.lr=2"]}, more_seeds_above=1.0
    )
    assert Runs(file, "mini", tmp_path).train([BASE, "moves", "rests"]) == 0
    assert asked == [("base", 0), ("moves", 0), ("rests", 0), ("base", 1), ("moves", 1), ("base", 2), ("moves", 2)]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"base": QUICK}, "changes: Field required"),
        ({"base": QUICK, "changes": {}}, "changes: Dictionary should have at least 1 item"),
        ({"base": QUICK, "changes": {"a": ["optim.epochs=2"]}, "sedes": [1]}, "sedes: Extra inputs are not permitted"),
        ({"base": QUICK, "changes": {"a": ["optim.epochs=2"]}, "seeds": [1, 1]}, "every seed once"),
        ({"base": QUICK, "changes": {"a b": ["optim.epochs=2"], "A-b": ["optim.epochs=3"]}}, "names must differ"),
        ({"base": QUICK, "changes": {"base": ["optim.epochs=2"]}}, "names must differ"),
        ({"base": QUICK, "changes": {"a": ["seed=2"]}}, "seeds are listed under seeds:"),
        ({"base": QUICK, "changes": {"a": ["optim.epochs=1"]}}, r"a: \['optim.epochs=1'\] changes nothing"),
        ({"base": QUICK, "changes": {"a": ["optim.epoch=1"]}}, "a: optim.epoch: unknown key 'epoch'"),
        ({"base": QUICK, "changes": {"a": ["kd=kdd"]}}, "a: kd=kdd: unknown kd 'kdd'"),
    ],
)
def test_a_file_that_is_wrong_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: dict[str, object], expected: str
) -> None:
    file = write(tmp_path / "wrong.yaml", **content)
    assert main([str(file), "--runs-dir", str(tmp_path / "runs")]) == 2
    assert re.search(expected, capsys.readouterr().err)
    assert not (tmp_path / "runs").exists()


def test_a_file_that_cannot_be_read_and_a_change_that_is_not_there_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.yaml").write_text("a: [1")
    assert main([str(tmp_path / "bad.yaml")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    file = write(tmp_path / "mini.yaml", base=QUICK, changes={"a": ["optim.epochs=2"]})
    assert main([str(file), "--only", "b", "--runs-dir", str(tmp_path)]) == 2
    assert "--only b: no change of this file; there are base, a" in capsys.readouterr().err


def test_differences_are_paired_over_the_seeds_that_both_have(tmp_path: Path) -> None:
    base = Group("base", tuple(read_run(write_run(tmp_path / f"b{seed}", seed=seed)) for seed in (0, 1, 2)))
    other = Group(
        "other", tuple(read_run(write_run(tmp_path / f"o{seed}", seed=seed, learner="finetune")) for seed in (1, 2, 3))
    )
    found = paired(base, other, "last_accuracy")
    assert found is not None
    expected = [other.runs[i - 1].summary["last_accuracy"] - base.runs[i].summary["last_accuracy"] for i in (1, 2)]
    assert found.num_seeds == 2
    assert found.mean == pytest.approx(np.mean(expected))
    assert found.std == pytest.approx(np.std(expected, ddof=1))


def test_without_a_common_seed_or_any_spread_there_is_no_test(tmp_path: Path) -> None:
    base = Group("base", (read_run(write_run(tmp_path / "b", seed=0)),))
    other = Group("other", (read_run(write_run(tmp_path / "o", seed=1)),))
    assert paired(base, other, "last_accuracy") is None
    same = paired(base, base, "last_accuracy")
    assert same is not None
    assert (same.mean, same.std, same.p_value) == (0.0, None, None)
    assert "| base | 1 |" in against_base(base, [other])


def test_slugs_are_folder_names() -> None:
    assert slug("R4a and R4b: memory, in order") == "r4a-and-r4b-memory-in-order"
