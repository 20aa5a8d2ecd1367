"""How well DisWOT's score predicts: `python -m benchmarks.diswot --data cifar100` or `--data digits`, in Markdown.

All 64 networks of the space S1 are scored beside a ResNet-56 and compared with the released accuracies; the evolution
looks for a student with several seeds; `--train` trains ten networks, spread over the table, in a short recipe of our
own. Scores and runs are kept under `--runs-dir`: the same command again goes on where it was stopped.
"""

import argparse
import csv
import json
import sys
from dataclasses import asdict
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from scipy.stats import kendalltau, spearmanr

from cil.build import make_samples, make_transform, open_data
from cil.checking import check
from cil.checkpoint import write_atomically
from cil.cli import compose
from cil.cli import main as run
from cil.search import S1_CHOICES, Blocks, Search, SearchResult, StudentScore, code_of, search
from cil.static import StaticRun
from kd.search.diswot import Score

RELEASED = Path(__file__).parents[1] / "tests" / "goldens" / "diswot_s1.csv"
SPACE: list[Blocks] = [(a, b, c) for a, b, c in product(S1_CHOICES, repeat=3)]
TOP_QUARTER = len(SPACE) // 4
NUM_TRAINED = 10
TEACHER = "student=resnet56"  # its architecture; nothing of it is trained
DATA = {"cifar100": "data=cifar100_kd", "digits": "data=digits"}
#: The same short recipe for all. On CIFAR-100 each is distilled, for three quarters of a pass, from the teacher
#: that `python -m benchmarks.tables cifar100_kd --rows teacher` trains: alone it would learn too little to be ranked.
RECIPES = {
    "cifar100": [
        *("experiment=cifar100_kd", "teacher=cifar100_kd-teacher", "kd=dkd", "kd.dkd.beta=2", "kd.dkd.warmup_epochs=1"),
        *("optim.epochs=6", "optim.schedule.milestones=[4,5]"),
    ],
    "digits": ["data=digits", "optim.epochs=30", "optim.schedule.milestones=[18,24,27]"],
}


def released() -> dict[str, tuple[float, float]]:
    """Accuracy in per cent of every network of S1 by its code: trained alone, and distilled."""
    with RELEASED.open() as file:
        return {
            row["depth_code"]: (float(row["vanilla_top1"]), float(row["distilled_top1"]))
            for row in csv.DictReader(file)
        }


def student_score(data: str, settings: Search, seed: int) -> StudentScore:
    """The score beside a ResNet-56, on images of a data set."""
    config = check(compose([DATA[data], TEACHER, f"seed={seed}"], "distill"))
    loaded = open_data(config)
    samples = make_samples(config, loaded, StaticRun.divide(config, loaded), make_transform(config, loaded))
    ids = settings.sample(samples.labels, seed)
    images = samples.transform.test(samples.images.fetch(ids))
    shape = loaded.input_shape
    return StudentScore(settings, shape, loaded.num_classes, images, samples.labels[ids], seed, config.model)


def table(data: str, settings: Search, seed: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Score and size of all networks by code, from the file that an earlier call left or anew."""
    path = folder / f"diswot-{data}-scores{seed}.json"
    asked = settings.model_dump(mode="json")
    if path.exists() and (stored := json.loads(path.read_text()))["settings"] == asked:
        return dict(stored["networks"])
    score = student_score(data, settings, seed)
    networks = {}
    for blocks in SPACE:
        networks[code_of(blocks)] = asdict(score(blocks)) | {"num_parameters": score.num_parameters(blocks)}
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"settings": asked, "networks": networks}, indent=1)
    write_atomically(path, lambda file: file.write(text.encode()))
    return networks


def evolution(networks: dict[str, dict[str, Any]], settings: Search, seed: int) -> SearchResult:
    """The search of a run, with scores that are known already."""
    fields = ("value", "relation", "semantic", "spread")

    @cache
    def score(blocks: Blocks) -> Score:
        return Score(**{field: networks[code_of(blocks)][field] for field in fields})

    return search(settings, score, lambda blocks: int(networks[code_of(blocks)]["num_parameters"]), seed)


def agreement(ranking: dict[str, float], truth: dict[str, float]) -> str:
    """Kendall's tau-b and Spearman's rho of two columns, over the networks of the second."""
    pairs = ([ranking[code] for code in truth], list(truth.values()))
    return f"{kendalltau(*pairs).statistic:.3f} | {spearmanr(*pairs).statistic:.3f}"


def trained_codes() -> list[str]:
    """Networks from the best distilled to the worst, evenly spaced."""
    ordered = sorted(released(), key=lambda code: -released()[code][1])
    return [ordered[i * (len(ordered) - 1) // (NUM_TRAINED - 1)] for i in range(NUM_TRAINED)]


def train(data: str, folder: Path) -> int:
    """Train what is missing; returns the first exit code that is not 0."""
    for code in trained_codes():
        words = [*RECIPES[data], "student=resnet_s1", f"model.blocks=[{','.join(code)}]", "num_threads=1"]
        words += [f"name=diswot-{data}-{code}", f"runs_dir={folder}"]
        if data == "cifar100":
            words += [f"++teacher_cache.folder={folder / 'teacher_cache'}", "++teacher_cache.max_gib=30"]
        if failed := run(words, program="distill.py", config_name="distill"):
            return failed
    return 0


def own_accuracies(data: str, folder: Path) -> dict[str, float]:
    """Accuracy in per cent of what has been trained, by code."""
    found = {}
    for code in trained_codes():
        path = folder / f"diswot-{data}-{code}" / "metrics.json"
        if path.exists() and (metrics := json.loads(path.read_text()))["finished"]:
            found[code] = 100 * metrics["last_accuracy"]
    return found


def report(data: str, settings: Search, seeds: int, folder: Path) -> list[str]:
    """The tables."""
    accuracies = released()
    columns = {
        name: {code: row[i] for code, row in accuracies.items()} for i, name in enumerate(("alone", "distilled"))
    }
    rank = {code: i for i, code in enumerate(sorted(accuracies, key=lambda code: -accuracies[code][1]), start=1)}
    tables = [table(data, settings, seed, folder) for seed in range(seeds)]
    sizes = {code: float(row["num_parameters"]) for code, row in tables[0].items()}

    lines = ["| ranked by | tau-b, alone | rho, alone | tau-b, distilled | rho, distilled |", "|---|---|---|---|---|"]
    for seed, networks in enumerate(tables):
        for term, name in (("value", "score"), ("relation", "relation alone"), ("semantic", "semantic alone")):
            ranking = {code: float(row[term]) for code, row in networks.items()}
            cells = " | ".join(agreement(ranking, column) for column in columns.values())
            lines.append(f"| {name}, seed {seed} | {cells} |")
    lines.append(f"| number of parameters | {' | '.join(agreement(sizes, column) for column in columns.values())} |")

    lines += [
        "",
        "| seed | winner | score | distilled, released | rank of 64 | networks scored |",
        "|---|---|---|---|---|---|",
    ]
    ranks = []
    for seed, networks in enumerate(tables):
        found = evolution(networks, settings, seed)
        code = found.winner.code
        ranks.append(rank[code])
        scored = len({candidate.code for candidate in found.candidates})
        lines.append(
            f"| {seed} | {code} | {found.winner.score:.4f} | {accuracies[code][1]:.2f} | {rank[code]} | {scored} |"
        )
    lines += [
        "",
        f"In the top quarter (rank {TOP_QUARTER} or better): {sum(r <= TOP_QUARTER for r in ranks)} of {seeds}.",
    ]

    if own := own_accuracies(data, folder):
        lines += ["", "| network | parameters | score, seed 0 | own accuracy | alone, released | distilled, released |"]
        lines.append("|---|---|---|---|---|---|")
        for code, accuracy in own.items():
            alone, distilled = accuracies[code]
            score = tables[0][code]["value"]
            lines.append(
                f"| {code} | {int(sizes[code])} | {score:.4f} | {accuracy:.2f} | {alone:.2f} | {distilled:.2f} |"
            )
    if len(own) > 1:
        lines += ["", "| with the own accuracies | tau-b | rho |", "|---|---|---|"]
        rankings = {f"score, seed {i}": {c: float(row["value"]) for c, row in t.items()} for i, t in enumerate(tables)}
        for name, ranking in (rankings | {"number of parameters": sizes} | columns).items():
            lines.append(f"| {name} | {agreement(ranking, own)} |")
    return lines


def main() -> int:
    """Score, train if asked to, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.diswot", description=__doc__)
    parser.add_argument("--data", choices=sorted(RECIPES), default="cifar100")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--seeds", type=int, default=5, help="seeds of weights, images and evolution")
    parser.add_argument("--train", action="store_true", help=f"train {NUM_TRAINED} networks first")
    arguments = parser.parse_args()
    code = train(arguments.data, arguments.runs_dir) if arguments.train else 0
    print("\n".join(report(arguments.data, Search(), arguments.seeds, arguments.runs_dir)))
    return code


if __name__ == "__main__":
    sys.exit(main())
