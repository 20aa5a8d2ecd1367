"""Every learner with every distillation method, two short tasks on the digits: to a finite end, or refused."""

import math
import re
from pathlib import Path

import pytest

from benchmarks.transfer import LEARNERS, METHODS, SETTING, refusal, words
from cil.events import read_events
from cil.learners.base import learners
from tests.conftest import RunTiny
from tests.run_folders import metrics_of

PAIRS = [(learner, method) for learner in LEARNERS for method in METHODS]
#: Learners that keep no old network, and a head without class maps.
REFUSED = [(learner, method) for learner in ("finetune", "joint", "ewc") for method in METHODS if method != "own"]
REFUSED.append(("podnet", "cat_kd"))
#: Two tasks of two digits, one epoch each.
SHORT = [
    *(word for word in SETTING if word.startswith("memory")),
    *("scenario.classes=4", "optim.epochs=1", "optim.batch_size=64", "evaluation.nearest_mean=false"),
]
#: One epoch of fine-tuning where there is any.
FINETUNES = ("podnet", "dytox", "dkt")


def test_the_matrix_has_every_learner():
    presets = {"dkt_official"}  # of another learner
    assert set(LEARNERS) == set(learners) - presets


def test_the_documentation_prints_the_matrix():
    text = (Path(__file__).parents[1] / "docs" / "transfer.md").read_text()
    header = f"| learner | {' | '.join(METHODS)} |"
    rows = text.split(header)[1].split("\n\n")[0].splitlines()[2:]
    cells = {row.split(" | ")[0].removeprefix("| "): row.removesuffix(" |").split(" | ")[1:] for row in rows}
    assert list(cells) == list(LEARNERS)
    found = [
        (learner, method)
        for learner in cells
        for method, cell in zip(METHODS, cells[learner], strict=True)
        if "(" in cell
    ]
    assert sorted(found) == sorted(REFUSED)


@pytest.mark.parametrize(("learner", "method"), REFUSED)
def test_a_pair_without_sense_is_refused_with_the_nearest_that_works(learner: str, method: str):
    reason = refusal(learner, method)
    assert reason is not None
    assert f"learner={learner}" in reason
    (instead,) = re.findall(r"Use learner=(\w+)", reason)
    assert instead != learner
    assert refusal(instead, method) is None


@pytest.mark.parametrize(("learner", "method"), [pair for pair in PAIRS if pair not in REFUSED])
def test_a_pair_runs_to_a_finite_end(learner: str, method: str, run_tiny: RunTiny):
    more = ["learner.finetune_epochs=1"] if learner in FINETUNES else []
    run = run_tiny(*SETTING, *words(learner, method)[1:], *SHORT, *more, learner=learner, report=False)
    metrics = metrics_of(run)
    assert metrics["finished"]
    assert len(metrics["accuracy_after"]) == 2
    epochs = [event for event in read_events(run / "events.jsonl") if event["event"] == "epoch"]
    assert all(math.isfinite(loss) for event in epochs for loss in event["losses"].values())
    if method != "own":
        (name,) = {word.removeprefix("kd=") for word in METHODS[method] if word.startswith("kd=")}
        assert any(event["stage"] == 1 and name in event["losses"] for event in epochs)
        assert not any(event["stage"] == 0 and name in event["losses"] for event in epochs)
