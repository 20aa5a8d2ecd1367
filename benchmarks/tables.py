"""Makes the result tables of docs/results.md: `python -m benchmarks.tables NAME`; `--help` says which there are.

Runs what is missing, one run after another, and prints a Markdown table of what is there; the same command again goes
on where it was stopped. What finished runs came to is kept in `benchmarks/records`, so that a table can be made in
several sittings and on several machines; `--again` trains the rows anew. `--print` only prints.
"""

import argparse
import statistics
import sys
from pathlib import Path

from benchmarks import records
from benchmarks.records import Record
from cil.cli import compose
from cil.cli import main as run

_EVERY_TASK_ALIKE = ["optim.initial_schedule=null"]
_UNCUT = ["optim.clip_norm=null"]  # cosine heads begin steadily
_COSINE = ["optim.schedule.name=cosine", "optim.schedule.min_lr=0", "optim.weight_decay=5e-4", *_EVERY_TASK_ALIKE]
#: Learner to its published milestones, scaled to 8 epochs, and weight decay.
CONVOLUTIONAL: dict[str, list[str]] = {
    "finetune": ["optim.schedule.milestones=[4,7]"],
    "joint": ["optim.schedule.milestones=[2,5,7]", "optim.weight_decay=5e-4"],
    "replay": ["optim.schedule.milestones=[3,6]"],
    "icarl": ["optim.schedule.milestones=[4,6]"],
    "wa": ["optim.schedule.milestones=[3,5,7]"],
    "bic": ["optim.schedule.milestones=[3,5,7]", *_EVERY_TASK_ALIKE, "optim.initial_weight_decay=null"],
    "lucir": ["optim.schedule.milestones=[4,6]", "optim.weight_decay=5e-4", *_EVERY_TASK_ALIKE, *_UNCUT],
    "podnet": [*_COSINE, *_UNCUT, "learner.finetune_epochs=1"],
    "der": ["optim.schedule.milestones=[4,6,7]"],
    "foster": _COSINE,
}
#: A sixth of the training images of experiment=cifar100_c50, and as many.
FAST: dict[str, list[str]] = {
    "sixth": ["experiment=cifar100_c50_fast"],
    "same": [
        *("experiment=cifar100_c50_fast", "optim.epochs=7", "optim.batch_size=64", "learner.finetune_epochs=4"),
    ],
}
_LONG = [
    *("scenario.classes=20", "scenario.increment=4", "memory.size=400", "model=dkt_narrow", "optim.epochs=40"),
    "num_threads=1",
]
#: 20 classes in 5 tasks of 40 epochs, where the recipe of the release has time to work.
LONG: dict[str, list[str]] = {
    "released": ["experiment=cifar100_c50", "learner=dkt_official"],
    "corrected": ["experiment=cifar100_c50", "learner=dkt"],
    "fast": ["experiment=cifar100_c50_fast", "optim.batch_size=64", "learner.finetune_epochs=4"],
}
TABLES: dict[str, list[list[str]]] = {
    "demo": [["experiment=demo", f"seed={seed}", f"name=demo-seed{seed}"] for seed in range(3)],
    "cifar100_c50": [["experiment=cifar100_c50", f"learner={learner}"] for learner in ("dkt_official", "dkt")],
    "cifar100_c50_learners": [
        *(["experiment=cifar100_c50_conv", f"learner={name}", *more] for name, more in CONVOLUTIONAL.items()),
        [
            *("experiment=cifar100_c50", "learner=dytox", "model=dytox_small", "learner.finetune_epochs=10"),
            *("optim.lr_reference_batch=512", "data.augment.cutout=null"),
        ],
        ["experiment=cifar100_c50", "learner=dkt"],
    ],
    "cifar100_c50_fast": [
        [*words, f"seed={seed}", f"name=cifar100_c50_fast-{name}-seed{seed}"]
        for name, words in FAST.items()
        for seed in range(3)
    ],
    "cifar100_c20_long": [
        [*words, *_LONG, f"seed={seed}", f"name=cifar100_c20_long-{name}-seed{seed}"]
        for seed in range(3)
        for name, words in LONG.items()
    ],
}


def percent(values: list[float | None]) -> str:
    """Fractions as percentages with one decimal; a dash where there is none."""
    return ", ".join("-" if value is None else f"{100 * value:.1f}" for value in values)


def by_means(record: Record) -> str:
    """Average and last accuracy of both ways to read a learner with exemplars."""
    both = record["accuracy_by"]
    if "nearest_mean" not in both:
        return "-"
    return "; ".join(
        percent([both[name]["average_incremental"], both[name]["last"]]) for name in ("classifier", "nearest_mean")
    )


def row(name: str, record: Record) -> str:
    """One run as a line of the table."""
    cells = [
        name,
        percent(record["accuracy_after"]),
        percent(record["accuracy_before_finetuning"]),
        percent([record["average_incremental_accuracy"]]),
        percent([record["last_accuracy"]]),
        by_means(record),
        percent([record["forgetting"]]),
        percent(record["accuracy_matrix"][-1]),
        f"{record['num_parameters']:,}".replace(",", " "),
        f"{record['exemplar_bytes'] / 2**20:.2f}",
        f"{record['views_trained']:,}".replace(",", " "),
        f"{record['median_images_per_second']:.0f}",
        f"{record['wall_seconds'] / 60:.1f}",
        f"{record['peak_resident_bytes'] / 2**30:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


HEADER = (
    "| run | after each task | before fine-tuning | average | last | classifier; nearest mean | forgetting "
    "| last row of the matrix | parameters | exemplars, MiB | views | images/s (median epoch) | minutes | peak GiB |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"
)


# Static distillation: one teacher, and students that differ in the method

KD_TABLE = "cifar100_kd"
TEACHER = f"{KD_TABLE}-teacher"
TEACHER_SCHEDULE = ["student=resnet56", "optim.epochs=80", "optim.schedule.milestones=[50,60,70]"]
TAUGHT = ["pair=resnet56_resnet20", f"teacher={TEACHER}"]
#: Row of the table to what makes it; those of three seeds stand in `THREE_SEEDS`.
METHODS: dict[str, list[str]] = {
    "plain": ["student=resnet20"],
    **{name: [*TAUGHT, f"kd={name}"] for name in ("kd", "dkd", "eskd")},
    "kd+dot": [*TAUGHT, "kd=kd", "optim=dot"],
    "dkd+dot": [*TAUGHT, "kd=dkd", "optim=dot"],
    **{name: [*TAUGHT, f"kd={name}"] for name in ("at", "fitnet", "sp", "crd", "reviewkd", "cat_kd")},
    "mld": [*TAUGHT, "kd=mld", "optim.lr=0.025"],
    "ban": ["student=resnet20", f"teacher={KD_TABLE}-plain-seed0", "kd=ban", "generations=2"],
    "takd": [*TAUGHT, "kd=takd", "assistants=[resnet32_conv]"],
}
THREE_SEEDS = ("plain", "kd", "dkd", "reviewkd", "cat_kd", "mld", "kd+dot")
KD_HEADER = (
    "| method | accuracy of each seed | mean | deviation | above plain | adapters | images/s (median epoch) "
    "| minutes |\n"
    "|---|---|---|---|---|---|---|---|"
)


def distillation_runs(runs_dir: Path) -> list[list[str]]:
    """What trains the teacher and then every student, the first seed of all rows before the others."""
    experiment = [f"experiment={KD_TABLE}", f"runs_dir={runs_dir}"]
    cache = [f"++teacher_cache.folder={runs_dir / 'teacher_cache'}", "++teacher_cache.max_gib=30"]
    runs = [[*experiment, *TEACHER_SCHEDULE, f"name={TEACHER}"]]
    for seed in range(3):
        for name, words in METHODS.items():
            if seed == 0 or name in THREE_SEEDS:
                kept = cache if "teacher=" in " ".join(words) else []
                runs.append([*experiment, *words, *kept, f"seed={seed}", f"name={KD_TABLE}-{name}-seed{seed}"])
    return runs


def distillation_table(records: dict[str, Record]) -> str:
    """The finished students in Markdown."""
    lines = []
    if (teacher := records.get(TEACHER)) is not None:
        lines.append(f"Teacher: {100 * teacher['last_accuracy']:.2f} %, {teacher['wall_seconds'] / 60:.0f} minutes.\n")
    lines.append(KD_HEADER)
    plain: float | None = None
    for name in METHODS:
        names = [f"{KD_TABLE}-{name}-seed{seed}" for seed in range(3)]
        runs = [records[run] for run in names if run in records]
        if not runs:
            continue
        accuracies = [100 * run["last_accuracy"] for run in runs]
        mean = statistics.mean(accuracies)
        plain = mean if name == "plain" else plain
        cells = [
            name,
            ", ".join(f"{accuracy:.2f}" for accuracy in accuracies),
            f"{mean:.2f}",
            f"{statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else "-",
            "-" if plain is None or name == "plain" else f"{mean - plain:+.2f}",
            f"{runs[0]['num_auxiliary']:,}".replace(",", " "),
            f"{statistics.median(run['median_images_per_second'] for run in runs):.0f}",
            f"{statistics.median(run['wall_seconds'] for run in runs) / 60:.1f}",
        ]
        if len(runs[0]["networks"]) > 1:
            stages = ", ".join(f"{100 * accuracy:.2f}" for accuracy in runs[0]["accuracy_after"])
            ensembles = "".join(f", ensemble of {n} {100 * a:.2f}" for n, a in runs[0]["ensemble_accuracy"].items())
            cells[0] += f" ({' -> '.join(runs[0]['networks'])}: {stages}{ensembles})"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def make(table: str, runs_dir: Path, rows: list[str] | None, *, again: bool) -> int:
    """Train what has no record, one run after another; returns an exit code that is 0 if all are there."""
    static = table == KD_TABLE
    asked = distillation_runs(runs_dir) if static else [[*words, f"runs_dir={runs_dir}"] for words in TABLES[table]]
    program = {"program": "distill.py", "config_name": "distill"} if static else {}
    left = {name for name in records.read(table) if not again}
    failed = 0
    for words in asked:
        name = compose(words, program.get("config_name", "train_incremental"))["name"]
        chosen = rows is None or any(part in rows for part in (name, row_of(name)))
        # the teacher itself is needed by every student that is still to be trained
        needed = name == TEACHER and any(other[-1].removeprefix("name=") not in left for other in asked)
        if chosen and (name not in left or needed):
            failed |= run(words, **program)
            records.keep(table, runs_dir / name)
    return failed


def row_of(name: str) -> str:
    """The row of the distillation table that a run belongs to."""
    return name.removeprefix(f"{KD_TABLE}-").partition("-seed")[0]


def main() -> int:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    parser.add_argument("table", choices=sorted([*TABLES, KD_TABLE]))
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--rows", nargs="+", help="make these only: names of runs, or rows such as teacher, kd+dot")
    parser.add_argument("--again", action="store_true", help="train rows that have a record too")
    parser.add_argument("--print", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    failed = 0
    if not arguments.print:
        failed = make(arguments.table, arguments.runs_dir, arguments.rows, again=arguments.again)
    found = records.read(arguments.table)
    if arguments.table == KD_TABLE:
        print(distillation_table(found))
        return failed
    print(HEADER)
    for words in TABLES[arguments.table]:
        name = compose(words)["name"]
        if name in found:
            print(row(name, found[name]))
    return failed


if __name__ == "__main__":
    sys.exit(main())
