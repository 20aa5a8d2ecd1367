"""Kills runs again and again, in every kind of place, and compares what they come to with runs that were left alone.

`python -m tests.kills [KIND ...]` prints a Markdown table, a line per kind; exit code 1 if one came to anything else.
A kill is SIGKILL by the process itself, before or in the middle of the n-th call of a function of that place, or after
a time; the place goes round, n, the side and the time are drawn. A run that comes to its end before it was killed often
enough is compared and begins anew in another folder.
"""

import argparse
import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from cil import checkpoint
from cil.cli import main as run
from cil.engine import Engine
from cil.evaluation import Reader
from cil.memory import ExemplarMemory
from cil.stages import Phase
from tests.run_folders import assert_same_weights, facts_of, results_of, weights_of

NUM_KILLS = 20
_SECONDS = 1.5  # of training, within which a kill by time falls

_CONV = ("model=resnet8", "model.width=4")
_DKT = ("model.width=16", "model.num_heads=2", "model.depth=1", "model.mlp_ratio=1", "model.stem_width=8")
_TASKS = (
    *("experiment=tiny", "scenario.initial_increment=2", "scenario.increment=2", "memory.size=40", "optim.epochs=2"),
    *("precision=fp32", "checkpoint.every_steps=3", "checkpoint.every_seconds=null"),
)
_STATIC = (
    *("experiment=tiny_static", "student=resnet8", "model.width=4", "optim.epochs=2", "optim.schedule.milestones=[1]"),
    *("checkpoint.every_steps=4", "checkpoint.every_seconds=null"),
)


@dataclass(frozen=True)
class Kind:
    """A run to kill.

    Attributes:
        words: Its overrides.
        places: Where it can be killed, names of `PLACES`.
        static: Whether it is `distill.py`.
        before: A run that it needs.
    """

    words: tuple[str, ...]
    places: tuple[str, ...] = ("training", "herding", "evaluation", "checkpoint write", "between stages", "any time")
    static: bool = False
    before: tuple[str, ...] | None = None


_ONE_STAGE = ("training", "evaluation", "checkpoint write", "any time")
_ALL = ("fine-tuning", *Kind(()).places)
KINDS: dict[str, Kind] = {
    "dkt": Kind((*_TASKS, *_DKT, "learner=dkt", "learner.finetune_epochs=2"), _ALL),
    "dkt, bf16": Kind((*_TASKS, *_DKT, "learner=dkt", "learner.finetune_epochs=2", "precision=bf16"), _ALL),
    "icarl": Kind((*_TASKS, *_CONV, "learner=icarl")),
    "der": Kind((*_TASKS, *_CONV, "learner=der")),
    "CRD": Kind((*_TASKS, *_CONV, "learner=replay", "kd=[kd,crd]", "kd.crd.num_negatives=16")),
    "DOT": Kind(
        (
            *(*_TASKS, *_CONV, "learner=replay", "kd=kd"),
            *("optim.optimizer=dot", "optim.lr=0.02", "optim.lr_reference_batch=null", "optim.momentum=0.9"),
        )
    ),
    "static": Kind(
        (*_STATIC, "teacher=resnet14", "kd=crd", "kd.crd.num_negatives=64"),
        _ONE_STAGE,
        static=True,
        before=(*_STATIC, "student=resnet14"),
    ),
    "Born-Again": Kind((*_STATIC, "kd=ban", "generations=3"), (*_ONE_STAGE, "between stages"), static=True),
}

Armed = Callable[["Moment"], contextlib.AbstractContextManager[Any]]


@dataclass
class Moment:
    """When to kill.

    Attributes:
        call: At which call of the function of the place, counted from 1.
        after: Behind the call instead of before it.
        seconds: For a kill by time.
    """

    call: int
    after: bool
    seconds: float


def die() -> None:
    """SIGKILL: nothing is flushed, no handler runs."""
    os.kill(os.getpid(), signal.SIGKILL)


def at(owner: Any, name: str, counts: Callable[..., bool] = lambda *_: True) -> Armed:
    """Killed at the n-th call of a function; `counts` says of the arguments whether a call counts."""

    def armed(moment: Moment) -> contextlib.AbstractContextManager[Any]:
        original, calls = getattr(owner, name), 0

        def killing(*arguments: Any, **more: Any) -> Any:
            nonlocal calls
            calls += counts(*arguments)
            due = counts(*arguments) and calls == moment.call
            if due and not moment.after:
                die()
            result = original(*arguments, **more)
            if due:
                die()
            return result

        return mock.patch.object(owner, name, killing)

    return armed


def in_phase(source: str) -> Callable[..., bool]:
    """Whether a step belongs to a phase that is trained on these samples."""

    def counts(engine: Engine, phase: Phase, *_: Any) -> bool:
        return phase.source == source if source == "memory" else phase.source != "memory"

    return counts


def in_a_write(moment: Moment) -> contextlib.AbstractContextManager[Any]:
    """Killed with half of a file written, or between the renames that put a whole one in its place."""
    original, calls = checkpoint._write_part, 0
    if moment.after:
        return at(os, "replace")(Moment(moment.call, bool(moment.call % 2), 0))

    def half(path: Path, write: Callable[..., object]) -> Path:
        nonlocal calls
        calls += 1
        part = original(path, write)
        if calls == moment.call:
            os.truncate(part, part.stat().st_size // 2)
            die()
        return part

    return mock.patch.object(checkpoint, "_write_part", half)


@contextlib.contextmanager
def by_time(moment: Moment) -> Any:
    """Killed some time after training began, wherever that is."""
    original = Engine.restore

    def started(engine: Engine) -> None:
        timer = threading.Timer(moment.seconds, die)
        timer.daemon = True
        timer.start()
        original(engine)

    with mock.patch.object(Engine, "restore", started):
        yield


#: Name of a place to what kills there, and by which call at the latest.
PLACES: dict[str, tuple[Armed, int]] = {
    "training": (at(Engine, "step", in_phase("new")), 12),
    "fine-tuning": (at(Engine, "step", in_phase("memory")), 3),
    "herding": (at(ExemplarMemory, "select"), 2),
    "evaluation": (at(Reader, "count"), 1),
    "checkpoint write": (in_a_write, 6),
    "between stages": (at(Engine, "begin"), 1),
    "any time": (by_time, 1),
}


def _child(words: list[str], static: bool, place: str | None, moment: Moment, said: Path) -> None:
    armed = PLACES[place][0](moment) if place else contextlib.nullcontext()
    with (
        said.open("w") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
        mock.patch("cil.report.write_report", lambda folder: folder / "report.html"),  # read only once it is finished
        armed,
    ):
        code = run(words, **({"program": "distill.py", "config_name": "distill"} if static else {}))
    sys.exit(code)


def start(words: list[str], static: bool, place: str | None, moment: Moment, said: Path) -> int:
    """Run a command in a process of its own; returns its exit code, negative for a signal."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cil.engine", "cil.static"])  # torch is imported once, not by every run
    process = context.Process(target=_child, args=(words, static, place, moment, said))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


@dataclass
class Outcome:
    """What came of the kills of a kind.

    Attributes:
        kills: How many there were, by place.
        runs: Runs that came to their end.
        differing: What was not as in the run that was left alone.
    """

    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    differing: list[str] = field(default_factory=list)


def differences(killed: Path, whole: Path) -> list[str]:
    """What two finished runs do not have in common: results, weights, events."""
    found = []
    if results_of(killed) != results_of(whole):
        found.append("metrics.json")
    if facts_of(killed) != facts_of(whole):
        found.append("events")
    try:
        assert_same_weights(weights_of(killed), weights_of(whole))
    except AssertionError:
        found.append("weights")
    return found


def kill(name: str, folder: Path, num_kills: int = NUM_KILLS, seed: int = 0) -> Outcome:
    """Kill a kind of run so often, and compare.

    Args:
        name: Of the kind.
        folder: Where the runs go; what is in it is removed.
        num_kills: How often.
        seed: Of the moments.

    Raises:
        RuntimeError: If a run fails without being killed.
    """
    kind, chance, outcome = KINDS[name], random.Random(f"{name} {seed}"), Outcome()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    said, never = folder / "said.txt", Moment(0, False, 0)

    def started(runs_dir: Path, words: tuple[str, ...], place: str | None, moment: Moment) -> bool:
        """Whether the run came to its end."""
        code = start([*words, f"runs_dir={runs_dir}", "name=run"], kind.static, place, moment, said)
        if code not in (0, -signal.SIGKILL) or (place is None and code):
            raise RuntimeError(f"{name}, {place}: exit code {code}\n{said.read_text()}")
        return code == 0

    words = kind.words
    if kind.before is not None:
        started(folder / "before", kind.before, None, never)
        words = (*words, f"teacher={folder / 'before' / 'run'}")
    started(folder / "whole", words, None, never)
    places = list(kind.places)
    chance.shuffle(places)
    while outcome.kills.total() < num_kills:
        runs_dir = folder / f"killed{outcome.runs}"
        place = places[outcome.kills.total() % len(places)]
        moment = Moment(chance.randint(1, PLACES[place][1]), chance.random() < 0.5, chance.uniform(0, _SECONDS))
        ended = started(runs_dir, words, place, moment)
        if not ended:
            outcome.kills[place] += 1
            if outcome.kills.total() == num_kills:
                ended = started(runs_dir, words, None, never)
        if ended:
            outcome.runs += 1
            outcome.differing += differences(runs_dir / "run", folder / "whole" / "run")
            places.append(places.pop(0))  # a run that ended had no such place any more: another comes first
    return outcome


def main() -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.kills", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"default: all of {', '.join(KINDS)}")
    parser.add_argument("--kills", type=int, default=NUM_KILLS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.kinds if name not in KINDS]:
        parser.error(f"unknown kind {unknown[0]!r}; there are {', '.join(KINDS)}")
    places = list(PLACES)
    print(f"| run | kills | {' | '.join(places)} | runs to the end | as if left alone |")
    print("|---|---|" + "---|" * (len(places) + 2))
    wrong = False
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.kinds or KINDS:
            outcome = kill(name, Path(folder) / "runs", arguments.kills, arguments.seed)
            wrong |= bool(outcome.differing)
            counts = [str(outcome.kills[place]) if place in KINDS[name].places else "-" for place in places]
            verdict = ", ".join(sorted(set(outcome.differing))) or "to the bit"
            print(
                f"| {name} | {outcome.kills.total()} | {' | '.join(counts)} | {outcome.runs} | {verdict} |", flush=True
            )
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
