"""What is installed works without the source tree."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("kd", "cil", "configs")
SHIPPED = {".py", ".yaml", ".json", ".txt", ".html", ".css", ".js", ".typed"}


def run(command: list[str], folder: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*words: str | Path, folder: Path) -> None:
    quiet = ["--quiet", "--disable-pip-version-check", "--no-input"]
    run([sys.executable, "-m", "pip", *map(str, words), "--no-deps", "--no-index", *quiet], folder)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since a build leaves files behind and picks up those of an earlier one."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip("wheel", ".", "--no-build-isolation", "--wheel-dir", built, folder=source)
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    pip("install", wheel, "--target", folder, folder=folder)
    return folder


def test_the_wheel_holds_every_module_config_and_template(wheel):
    wanted = {
        path.relative_to(ROOT).as_posix()
        for name in PACKAGES
        for path in (ROOT / name).rglob("*")
        if path.suffix in SHIPPED
    }
    found = set(zipfile.ZipFile(wheel).namelist())
    assert wanted - found == set()
    assert {name.split("/")[0] for name in found if ".dist-info/" not in name} == set(PACKAGES)


def test_the_installed_packages_are_found_before_the_source(installed, tmp_path):
    look = "import sys, importlib.util as u; print(*(u.find_spec(name).origin for name in sys.argv[1:]), sep='\\n')"
    said = run([sys.executable, "-c", look, *PACKAGES], tmp_path, PYTHONPATH=str(installed))
    assert [Path(line).relative_to(installed).parts[0] for line in said.splitlines()] == list(PACKAGES)


def test_an_installed_package_trains_and_reports_away_from_the_source(installed, tmp_path):
    words = ["experiment=tiny", "scenario.classes=6", "optim.epochs=1", "learner=finetune", "name=run"]
    run([sys.executable, "-m", "cil", *words], tmp_path, PYTHONPATH=str(installed))
    folder = tmp_path / "runs" / "run"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["finished"]
    assert sum(metrics["task_sizes"]) == 6
    assert (folder / "report.html").stat().st_size > 0


def test_the_installed_command_names_itself(installed, tmp_path):
    said = run([sys.executable, "-m", "cil", "--help"], tmp_path, PYTHONPATH=str(installed))
    assert said.startswith("usage: python -m cil ")
    assert "tiny" in said
