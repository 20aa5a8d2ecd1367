"""Every command that README and docs show means something; what is cheap is run."""

import argparse
import importlib.util
import itertools
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser as torchrun_options

from cil.checking import check
from cil.cli import SWEEP, compose
from cil.config import RunConfig
from cil.sweep import expand
from tests.cil.report.conftest import write_run

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ENTRIES = {"train_incremental.py": "train_incremental", "distill.py": "distill"}
PROGRAMS = {"python", "torchrun", "make", "pip", "pytest", "tensorboard"}

#: Commands of fenced blocks that are run here, on the folders of `runs`.
RUN = {
    "python -m cil.watch runs/demo": 0,
    "python -m cil.watch runs/demo --once": 0,
}
#: Why no test runs the others as they stand; a word of the command or its beginning, and the reason.
NOT_RUN = {
    "make demo": "sets up an environment; what it runs is experiment=demo",
    "make test": "runs these tests",
    "make bench": "minutes; tests/test_bench.py runs rows of it",
    "python -m benchmarks.bench": "minutes, and a GPU; tests/test_bench.py runs rows of it",
    "pip install": "needs a package index",
    "pytest ": "runs other tests of this folder",
    "tensorboard ": "a server that does not end",
    "torchrun ": "needs CIFAR-100 and hours; tests/test_distributed.py runs two processes",
    "WANDB_MODE=offline": "needs the extra wandb; tests/cil/sinks/test_wandb.py stands in for it",
    "python -m cil.ablate": "needs CIFAR-100 and hours; tests/cil/test_ablate.py runs a small one",
    "python -m cil.verify": "tests/cil/test_verify.py runs it on runs with a figure",
    "python -m cil.": "needs a trained network; the module's own tests run it",
    "hydra/launcher=": "needs a launcher; tests/cil/test_sweep.py runs one",
    ".py -m ": "as many runs as it says; tests/cil/test_sweep.py runs small ones",
    "experiment=demo": "45 seconds each; tests/test_end_to_end.py runs it, `make demo` too",
    "experiment=cifar100": "needs CIFAR-100, and 50 minutes or days",
    "experiment=imagenet": "needs ImageNet, and days",
    "experiment=tiny": "run by `pytest -m slow`: test_the_tiny_runs_run",
    "data=npz": "the reader's file; tests/cil/test_cli.py runs one",
    "data=image_folder": "the reader's pictures; tests/test_end_to_end.py runs some",
    "data=table": "an example; tests/test_adding.py runs it",
}


def fenced() -> Iterator[tuple[str, str]]:
    """Page and command of every line of a shell block; lines that go on are one."""
    for page in PAGES:
        for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    yield page.name, shlex.join(words)


def inline() -> Iterator[tuple[str, str]]:
    """The same of commands in a line of text or of a table, if they are whole, and of indented blocks."""
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        found = re.findall(r"`(python (?:-m )?[\w.]+[^`]*)`|^    (python .*)$", text, re.MULTILINE)
        for command in map("".join, found):
            if not re.search(r"[A-Z]{3,}|\.\.\.|\[[a-z]+[ =]", command):  # a place for something of the reader's
                yield page.name, shlex.join(shlex.split(command, comments=True))


FENCED = list(dict.fromkeys(fenced()))
#: What is understood only where the files of docs/adding.md are; tests/test_adding.py runs it.
IN_THE_GUIDE = "data=table"
INLINE = [found for found in dict.fromkeys(inline()) if found not in FENCED]


class Parsed(Exception):
    """The words were understood."""


def check_options(module: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a module parse its words, and stop it there."""
    parse = argparse.ArgumentParser.parse_args

    def understood(self: argparse.ArgumentParser, *_: object) -> None:
        parse(self, words)
        raise Parsed

    def start() -> None:
        spec = importlib.util.find_spec(module)
        assert spec is not None, f"there is no module {module}"
        name = module if spec.submodule_search_locations is None else f"{module}.__main__"
        importlib.import_module(name).main()

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", understood)
    with pytest.raises(Parsed):
        start()


def check_config(entry: str, words: list[str]) -> None:
    """Compose and check what a run, or the first and last run of a sweep, would be."""
    own = [word for word in words if word not in SWEEP and not re.match(r"\+*hydra[./]", word)]
    jobs = expand(own)[1] if any(word in SWEEP for word in words) else [own]
    for job in {tuple(jobs[0]), tuple(jobs[-1])}:
        assert isinstance(check(compose(list(job), ENTRIES[entry])), RunConfig)


def check_command(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*itertools.dropwhile(lambda word: re.fullmatch(r"[A-Z_]+=.*", word), shlex.split(command))]
    program, rest = words[0], words[1:]
    assert program in PROGRAMS, f"{program} is no program that these pages may ask for"
    if program == "torchrun":
        launched = torchrun_options().parse_args(rest)
        rest = [launched.training_script, *launched.training_script_args]
    if program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        (named,) = re.findall(r"dkt-incremental\[(\w+)\]", command)
        assert named in extras
    elif program == "pytest":
        assert all((ROOT / word).exists() for word in rest if word.startswith("tests/"))
    elif program in ("python", "torchrun") and rest[0] in ENTRIES:
        check_config(rest[0], rest[1:])
    elif program == "python":
        assert rest[0] == "-m", f"{rest[0]} is no entry of this project"
        check_options(rest[1], rest[2:], monkeypatch)


@pytest.mark.parametrize("command", [command for _, command in FENCED if IN_THE_GUIDE not in command])
def test_a_command_in_a_block_is_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_command(command, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for _, command in INLINE])
def test_a_command_in_a_line_is_understood(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        check_command(command, monkeypatch)
    except SystemExit:  # a text may name a program alone
        assert re.fullmatch(r"python -m [\w.]+", command), command
        assert "the following arguments are required" in capsys.readouterr().err


def test_blocks_and_lines_are_found() -> None:
    assert len(FENCED) > 30
    assert {page for page, _ in FENCED} >= {"README.md", "adding.md", "live.md", "protocol.md", "sweeps.md"}
    assert ("distilling.md", "python distill.py pair=resnet56_resnet20 kd=dkd") in INLINE


@pytest.mark.parametrize("command", [command for _, command in FENCED])
def test_a_command_in_a_block_is_run_or_says_why_not(command: str) -> None:
    assert command in RUN or any(part in f"{command} " for part in NOT_RUN), (
        f"{command!r}: put it into RUN, or say in NOT_RUN why no test can run it"
    )


@pytest.mark.parametrize("command", RUN)
def test_what_is_cheap_runs(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "runs" / "demo")
    monkeypatch.chdir(tmp_path)
    _, _, module, *words = shlex.split(command)
    assert importlib.import_module(module).main(words) == RUN[command]


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [command for _, command in FENCED if "experiment=tiny" in command and ".py -m " not in command]
)
def test_the_tiny_runs_run(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cil.cli import main

    words = shlex.split(command)[1:]
    teacher = [word.removeprefix("teacher=") for word in words if word.startswith("teacher=")]
    for name in teacher:
        assert main([words[1], f"student={name}", f"runs_dir={tmp_path}"], config_name="distill") == 0
    assert main([*words[1:], f"runs_dir={tmp_path}"], config_name=ENTRIES[words[0]]) == 0
