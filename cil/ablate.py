"""`python -m cil.ablate configs/ablation/dkt_parts.yaml`: a base run, named changes, seeds; writes one table.

Finished runs are passed over and interrupted ones go on, so the same command again adds what is missing.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cil.checking import check
from cil.checkpoint import write_atomically
from cil.cli import compose
from cil.cli import main as run
from cil.config import ConfigError
from cil.report.comparison import Group, paired
from cil.report.folders import RunFolder, is_run, read_run
from cil.report.table import against_base, as_table

BASE = "base"
Words = list[str]


class Ablation(BaseModel):
    """What an ablation file says.

    Attributes:
        base: Overrides of the run that everything is compared with.
        changes: Name of a change to the overrides that make it, behind those of the base.
        seeds: Every run is repeated with each; differences are paired by them.
        more_seeds_above: Points of average incremental accuracy (last accuracy in a static run) that a change must have
            moved with the first seed to be repeated with the others; null repeats all.
        program: `distill` for static distillation.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    base: Words
    changes: Annotated[dict[str, Words], Field(min_length=1)]
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = [0, 1, 2]
    more_seeds_above: Annotated[float, Field(ge=0)] | None = None
    program: Literal["train_incremental", "distill"] = "train_incremental"

    @model_validator(mode="after")
    def _names(self) -> "Ablation":
        names = [slug(name) for name in [BASE, *self.changes]]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"names must differ in letters and digits, and none may be {BASE!r}: found {twice[0]!r} twice"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"every seed once, found {self.seeds}")
        if taken := [
            w for w in sum(self.changes.values(), self.base) if w.split("=")[0] in ("seed", "name", "runs_dir")
        ]:
            raise ValueError(f"{taken[0]}: seeds are listed under seeds:, and runs are named by the ablation")
        return self


def read(path: Path) -> Ablation:
    """An ablation file.

    Raises:
        ConfigError: If it cannot be read, or something in it is wrong.
    """
    try:
        return Ablation.model_validate(yaml.safe_load(path.read_text()))
    except ValidationError as error:
        problems = [(".".join(str(part) for part in found["loc"]), found["msg"]) for found in error.errors()]
        raise ConfigError([f"{path}: {f'{where}: ' if where else ''}{what}" for where, what in problems]) from error
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError([f"{path}: cannot be read ({str(error).splitlines()[0]})"]) from error


def slug(name: str) -> str:
    """A name as a part of a folder name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


class Runs:
    """The runs of an ablation.

    Args:
        ablation: What to run.
        name: Of the ablation; the names of its runs begin with it.
        runs_dir: Where they are.
    """

    def __init__(self, ablation: Ablation, name: str, runs_dir: Path) -> None:
        self.ablation = ablation
        self.name = name
        self.runs_dir = runs_dir
        self.changes: dict[str, Words] = {BASE: [], **ablation.changes}

    def words(self, change: str, seed: int) -> Words:
        """The overrides of a run."""
        name = f"{self.name}-{slug(change)}-seed{seed}"
        return [*self.ablation.base, *self.changes[change], f"seed={seed}", f"name={name}", f"runs_dir={self.runs_dir}"]

    def check(self) -> None:
        """Compose all configs.

        Raises:
            ConfigError: If one is refused, or a change changes nothing.
        """
        problems, trees = [], {}
        for change in self.changes:
            try:
                config = check(compose(self.words(change, self.ablation.seeds[0]), self.ablation.program))
                trees[change] = config.model_dump(mode="json", exclude={"name", "experiment"})
            except ConfigError as error:
                problems += [f"{change}: {problem}" for problem in error.problems]
        equal = [change for change in self.ablation.changes if BASE in trees and trees.get(change) == trees[BASE]]
        problems += [f"{change}: {self.changes[change]} changes nothing" for change in equal]
        if problems:
            raise ConfigError(problems)

    def group(self, change: str) -> Group:
        """What there is of a change, finished or not."""
        folders = [self.runs_dir / f"{self.name}-{slug(change)}-seed{seed}" for seed in self.ablation.seeds]
        return Group(change, tuple(read_run(folder) for folder in folders if is_run(folder)))

    def seeds(self, change: str) -> list[int]:
        """The seeds that a change is to be run with, as far as can be said now."""
        seeds, least = self.ablation.seeds, self.ablation.more_seeds_above
        if change == BASE or least is None:
            return seeds
        number = "average_incremental_accuracy" if self.ablation.program == "train_incremental" else "last_accuracy"
        base, changed = (_with_seed(self.group(name), seeds[0]) for name in (BASE, change))
        moved = paired(base, changed, number)
        return seeds if moved is not None and 100 * abs(moved.mean) > least else seeds[:1]

    def train(self, changes: Sequence[str]) -> int:
        """Run what is missing, every change with the first seed before the second; returns the worst exit code."""
        worst = 0
        for seed in self.ablation.seeds:
            for change in changes:
                if seed in self.seeds(change):
                    code = run(self.words(change, seed), config_name=self.ablation.program)
                    if code in (130, 143):  # a signal is meant for the whole
                        return code
                    worst = max(worst, code)
        return worst

    def table(self) -> str:
        """The base and every change that has begun, in Markdown."""
        base = self.group(BASE)
        changed = [group for change in self.ablation.changes if (group := self.group(change)).runs]
        return against_base(base, changed) if base.runs else as_table(changed)


def _with_seed(group: Group, seed: int) -> Group:
    def is_it(found: RunFolder) -> bool:
        return bool(found.fact("seed") == seed)

    return Group(group.label, tuple(filter(is_it, group.runs)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run an ablation and print its table; 2 and a message if the file is no good, else the worst code of a run."""
    parser = argparse.ArgumentParser(prog="python -m cil.ablate", description=__doc__)
    parser.add_argument("file", type=Path, help="an ablation file, such as those in configs/ablation")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--only", nargs="+", metavar="CHANGE", help=f"run these changes only, such as {BASE}")
    parser.add_argument("--print", action="store_true", help="train nothing")
    parser.add_argument("-o", "--output", type=Path, help="default: FILE's name with .md in the folder of the runs")
    chosen = parser.parse_args(arguments)
    try:
        runs = Runs(read(chosen.file), chosen.file.stem, chosen.runs_dir)
        if unknown := [change for change in chosen.only or () if change not in runs.changes]:
            raise ConfigError([f"--only {unknown[0]}: no change of this file; there are {', '.join(runs.changes)}"])
        code = 0
        if not chosen.print:
            runs.check()
            code = runs.train(chosen.only or list(runs.changes))
        table = runs.table()
    except ValueError as error:
        problems = error.problems if isinstance(error, ConfigError) else str(error).splitlines()
        print("\n".join([f"cil.ablate: {problems[0]}", *problems[1:]]), file=sys.stderr)
        return 2
    print(table)
    output = chosen.output or chosen.runs_dir / f"{chosen.file.stem}.md"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, lambda file: file.write(f"{table}\n".encode()))
    return code


if __name__ == "__main__":
    sys.exit(main())
