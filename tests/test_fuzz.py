"""A bounded fuzz of what reads configs and run folders: an answer or one message, no traceback, no other bits.

Texts for people that no number is taken from, `events.jsonl` and `report.html`, may come out changed.
"""

import copy
import datetime
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cil import load
from cil.checking import check
from cil.cli import MAX_LINES, compose
from cil.cli import main as run_command
from cil.config import ConfigError
from cil.report.folders import flattened
from cil.report.pages import write_report
from tests.conftest import SHORT, TINY, tiny_command
from tests.run_folders import results_of

pytestmark = pytest.mark.slow

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 1, 8, 8)).astype(np.uint8)
#: Words that ask for something else than a run.
OTHERS = {"-m", "--multirun", "-h", "--help", "--cfg"}

Tree = dict[Any, Any]


def ended(words: list[str]) -> int:
    """Run a command without its page; the exit code, after a look at what it says."""
    said = StringIO()
    with (
        redirect_stdout(StringIO()),
        redirect_stderr(said),
        mock.patch("cil.report.write_report", lambda run: run / "report.html"),
    ):
        code = run_command(words)
    errors = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
    assert code in (0, 1, 2)
    assert len(errors) == (code != 0), said.getvalue()
    assert said.getvalue().count("\n") <= MAX_LINES + 2, said.getvalue()  # and checkpoints that were passed over
    assert "Traceback" not in said.getvalue()
    return code


def reason_of(action: Callable[[], object]) -> str | None:
    """Why something cannot be done, in words for a person; None if it could be."""
    try:
        action()
    except ValueError as error:
        return "\n".join(error.problems) if isinstance(error, ConfigError) else str(error)
    return None


@contextmanager
def copied(runs: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(shutil.copytree(runs, Path(folder) / "runs"))


# Configs

known = st.deferred(lambda: st.sampled_from(sorted(flattened(compose([*TINY, "learner=dkt"])))))
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["", "???", "${name}", "${nothing}", "natural", "seeded", "1e3", "~", "a.b", "\0", "../x", "𝟙"])
)
trees = st.recursive(
    scalars | st.dates() | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=8,
)
values = scalars.map(str) | trees.map(str) | st.sampled_from(["[1,2", "{a:1}", "[]", "{}", "1,2", "range(3)", "'", '"'])
keys = known | known.map(lambda key: key.rpartition(".")[0] or key) | st.text(max_size=8)
overrides = st.builds("{}{}={}".format, st.sampled_from(["", "", "", "+", "++", "~"]), keys, values) | st.text(
    max_size=12
)


@settings(max_examples=300)
@given(st.lists(overrides, min_size=1, max_size=4))
def test_any_overrides_are_a_config_or_one_message(words: list[str]) -> None:
    words = [word for word in words if word not in OTHERS]
    assert ended([*TINY, *words, "--cfg"]) in (0, 2)


@st.composite
def changed_trees(draw: st.DrawFn, whole: Tree) -> Tree:
    """A tree with other, more and fewer keys and values at some places."""
    tree = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 4))):
        place: Any = tree
        while True:
            inner = [key for key, value in place.items() if isinstance(value, dict) and value]
            if not inner or draw(st.booleans()):
                break
            place = place[draw(st.sampled_from(inner))]
        key = draw(
            st.sampled_from(list(place)) if place and draw(st.booleans()) else st.text(max_size=6) | st.integers()
        )
        if draw(st.integers(0, 3)):
            place[key] = draw(trees | st.sampled_from([float("nan"), datetime.date(2020, 1, 1), {1: 2}]))
        else:
            place.pop(key, None)
    return tree


changed = st.deferred(
    lambda: (
        changed_trees(compose([*TINY, "learner=dkt"])) | changed_trees(compose(["experiment=tiny_static"], "distill"))
    )
)


@settings(max_examples=400)
@given(changed)
def test_any_tree_is_a_config_that_survives_its_file_or_a_list_of_problems(tree: Tree) -> None:
    if (reason := reason_of(lambda: check(tree))) is not None:
        assert reason
        return
    config = check(tree)
    stored = yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))
    assert check(stored).model_dump(mode="json") == config.model_dump(mode="json")


# Run folders


@st.composite
def damages(draw: st.DrawFn) -> tuple[str, Callable[[Path], None]]:
    """One thing that happens to a run folder, in words and done; files are counted in the order of their names."""
    kind = draw(st.sampled_from(["flip", "cut", "zero", "append", "delete", "swap", "repeat"]))
    number, other = draw(st.integers(0, 30)), draw(st.integers(0, 30))
    share, byte, length = draw(st.floats(0, 1)), draw(st.integers(0, 255)), draw(st.integers(1, 64))

    def damage(run: Path) -> None:
        files = sorted(path for path in run.rglob("*") if path.is_file())
        path, second = files[number % len(files)], files[other % len(files)]
        content = bytearray(path.read_bytes())
        place = min(int(share * len(content)), max(len(content) - 1, 0))
        match kind:
            case "flip" if content:
                content[place] ^= byte or 1
            case "cut":
                del content[place:]
            case "zero":
                content[place : place + length] = bytes(len(content[place : place + length]))
            case "append":
                content += bytes([byte]) * length
            case "repeat":
                content[place:place] = content[place : place + length]
            case "swap":
                path.write_bytes(second.read_bytes())
                second.write_bytes(content)
                return
            case "delete":
                path.unlink()
                return
        path.write_bytes(content)

    return f"{kind} {number} {other} {share} {byte} {length}", damage


def assert_loads_the_same_or_says_why_not(run: Path, whole: Path) -> None:
    for stage in range(2):
        if reason_of(lambda stage=stage: load(run, stage)):
            continue
        found, expected = load(run, stage), load(whole, stage)
        assert found.logits(IMAGES).equal(expected.logits(IMAGES)), f"stage {stage}"
        assert found.class_names == expected.class_names


@settings(max_examples=120)
@given(damages())
def test_a_damaged_finished_run_says_the_same_or_why_not(
    short_runs: Path, happened: tuple[str, Callable[[Path], None]]
) -> None:
    whole = short_runs / "run"
    with copied(short_runs) as runs:
        happened[1](runs / "run")
        if list((runs / "run").glob("stage_*")):
            assert_loads_the_same_or_says_why_not(runs / "run", whole)
        reason = reason_of(lambda: write_report(runs / "run", runs / "page.html"))
        assert reason is None or reason.count("\n") == 0
        if ended(tiny_command(runs, *SHORT, learner="finetune")) == 0:
            assert results_of(runs / "run") == results_of(whole)
            assert_loads_the_same_or_says_why_not(runs / "run", whole)


@settings(max_examples=50)
@given(damages())
def test_a_damaged_unfinished_run_ends_as_if_nothing_had_happened_or_says_why_not(
    short_runs: Path, stopped_runs: Path, happened: tuple[str, Callable[[Path], None]]
) -> None:
    whole = short_runs / "run"
    with copied(stopped_runs) as runs:
        happened[1](runs / "run")
        if ended(tiny_command(runs, *SHORT, learner="finetune")) == 0:
            assert results_of(runs / "run") == results_of(whole)
            assert load(runs / "run").logits(IMAGES).equal(load(whole).logits(IMAGES))
            assert_loads_the_same_or_says_why_not(runs / "run", whole)
