"""Every learner with every distillation method: `python -m benchmarks.transfer`, in Markdown.

Digits, 3 tasks of 2 classes, a small network, one seed: a table of last accuracies that says which pairs there are, not
which are best. A pair that makes no sense is refused when its config is read, and its reason is printed below. The same
command again goes on where it was stopped; `--print` only prints.
"""

import argparse
import json
import sys
from pathlib import Path

from cil.checking import check
from cil.cli import compose
from cil.cli import main as run
from cil.config import ConfigError

RESNET = ["model=resnet8", "model.width=8"]
#: Learner to the network it is tried on, and what it needs in short runs.
LEARNERS: dict[str, list[str]] = {
    "finetune": RESNET,
    "joint": RESNET,
    "ewc": RESNET,
    "replay": RESNET,
    "lwf": RESNET,
    "icarl": RESNET,
    "bic": RESNET,
    "wa": RESNET,
    "lucir": RESNET,
    "podnet": [*RESNET, "learner.finetune_epochs=2"],
    "der": RESNET,
    "foster": RESNET,
    "memo": RESNET,
    "dytox": ["model=dytox_tiny", "learner.finetune_epochs=2", "learner.finetune_lr=5e-4"],
    "dkt": ["model=dkt_tiny", "learner.finetune_epochs=2", "learner.finetune_lr=5e-4"],
}
#: Column to what chooses the method; warm-ups are as short as the runs.
METHODS: dict[str, list[str]] = {
    "own": [],
    "kd": ["kd=kd"],
    "dkd": ["kd=dkd", "kd.dkd.warmup_epochs=1"],
    "mld": ["kd=mld"],
    "dist": ["kd=dist"],
    "fitnet": ["kd=fitnet"],
    "at": ["kd=at"],
    "sp": ["kd=sp"],
    "crd": ["kd=crd", "kd.crd.num_negatives=256"],
    "reviewkd": ["kd=reviewkd", "kd.reviewkd.warmup_epochs=1"],
    "cat_kd": ["kd=cat_kd"],
    "kd, DOT": ["kd=kd", "optim.optimizer=dot", "optim.lr=0.02", "optim.lr_reference_batch=null"],
}
SETTING = [
    "experiment=tiny",
    *("scenario.classes=6", "scenario.initial_increment=2", "scenario.increment=2", "memory.size=60"),
    "optim.epochs=8",
]


def words(learner: str, method: str) -> list[str]:
    """What asks for a pair, beside the setting."""
    return [f"learner={learner}", *LEARNERS[learner], *METHODS[method]]


def refusal(learner: str, method: str) -> str | None:
    """Why a pair is refused; None if it is not."""
    try:
        check(compose([*SETTING, *words(learner, method)]))
    except ConfigError as error:
        return str(error)
    return None


def name_of(learner: str, method: str) -> str:
    """The run folder of a pair."""
    return f"transfer-{learner}-{method.replace(', ', '-')}"


def table(runs_dir: Path) -> str:
    """What there is, in Markdown: last accuracy in per cent, "yes" if it was not run, or the number of a refusal."""
    lines = [f"| learner | {' | '.join(METHODS)} |", "|---" * (len(METHODS) + 1) + "|"]
    reasons: list[str] = []
    for learner in LEARNERS:
        cells = []
        for method in METHODS:
            path = runs_dir / name_of(learner, method) / "metrics.json"
            if (reason := refusal(learner, method)) is not None:
                reason = reason.replace(f"kd={method}", "kd=...").replace("kd=kd", "kd=...")
                reasons += [] if reason in reasons else [reason]
                cells.append(f"({reasons.index(reason) + 1})")
            elif path.exists() and (metrics := json.loads(path.read_text()))["finished"]:
                cells.append(f"{100 * metrics['last_accuracy']:.0f}")
            else:
                cells.append("yes")
        lines.append(f"| {learner} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"({number}) {reason}  " for number, reason in enumerate(reasons, start=1))])


def main() -> int:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfer", description=__doc__)
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--print", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    failed = 0
    for learner in () if arguments.print else LEARNERS:
        for method in METHODS:
            if refusal(learner, method) is None:
                chosen = [*SETTING, *words(learner, method), f"runs_dir={arguments.runs_dir}"]
                failed |= run([*chosen, f"name={name_of(learner, method)}"])
    print(table(arguments.runs_dir))
    return failed


if __name__ == "__main__":
    sys.exit(main())
