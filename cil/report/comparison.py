"""Runs beside each other: repeats with other seeds form a group, groups differ in their settings."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import ttest_rel

from cil.report.folders import RunFolder

_TELLING_KEYS = ("learner.name", "model.name", "data.name", "memory.size")  # preferred as the label of a group
_MISSING = "not set"
_SEED = re.compile(r"[-_]?seed[-_=]?\d+$")  # how a name ends that the run was not given by a person


@dataclass(frozen=True)
class Group:
    """Runs that are alike in everything but the seed.

    Attributes:
        label: The settings in which it differs from the other groups, as short as they can be told apart.
        runs: One or more.
    """

    label: str
    runs: tuple[RunFolder, ...]

    @property
    def finished(self) -> list[RunFolder]:
        """The runs that learned every task: numbers after fewer tasks would spoil a mean."""
        return [run for run in self.runs if run.finished]

    def values(self, number: str) -> list[float]:
        """A number of the finished runs that have it: a key of `RunFolder.summary`, or an attribute of the run."""
        found = [run.summary[number] if number in run.summary else getattr(run, number) for run in self.finished]
        return [value for value in found if value is not None]

    def mean(self, number: str) -> float | None:
        """Mean of the values; None if there are none."""
        values = self.values(number)
        return float(np.mean(values)) if values else None

    def std(self, number: str) -> float | None:
        """Sample standard deviation of the values; None for fewer than two."""
        return _std(self.values(number))

    def median(self, number: str) -> float | None:
        """Median of the values; None if there are none."""
        values = self.values(number)
        return float(np.median(values)) if values else None

    @property
    def protocols(self) -> tuple[str, ...]:
        """The protocols of its runs, as far as they are known: one, if all runs are comparable."""
        known = {run.metrics.get("protocol") for run in self.runs}
        return tuple(sorted(str(protocol) for protocol in known if protocol))


@dataclass(frozen=True)
class Difference:
    """What a group has more than another, over the seeds that both have finished.

    Attributes:
        mean: Mean difference.
        std: Sample standard deviation of the differences; None for fewer than two seeds.
        p_value: Of the two-sided paired t-test; None for fewer than two seeds, or if all differences are equal.
        num_seeds: How many seeds both have.
    """

    mean: float
    std: float | None
    p_value: float | None
    num_seeds: int


def paired(base: Group, group: Group, number: str) -> Difference | None:
    """The difference of two groups, seed by seed; None if they share no finished seed.

    Args:
        base: Is subtracted.
        group: What is compared with it.
        number: A key of `RunFolder.summary`.
    """
    values = [
        {run.fact("seed"): run.summary[number] for run in each.finished if run.summary.get(number) is not None}
        for each in (base, group)
    ]
    seeds = sorted(values[0].keys() & values[1].keys())
    if not seeds:
        return None
    before, after = ([column[seed] for seed in seeds] for column in values)
    differences = [b - a for a, b in zip(before, after, strict=True)]
    std = _std(differences)
    p_value = float(ttest_rel(after, before).pvalue) if std else None
    return Difference(float(np.mean(differences)), std, p_value, len(seeds))


def _std(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def grouped(runs: Sequence[RunFolder]) -> list[Group]:
    """The runs in groups of equal settings, in the order in which they come.

    A run without a config is a group of its own, since nobody knows what it repeats.
    """
    members: dict[str, list[RunFolder]] = {}
    for run in runs:
        known = json.dumps(run.settings, sort_keys=True, default=str)
        members.setdefault(known if run.settings else str(run.folder), []).append(run)
    groups = list(members.values())
    return [Group(label, tuple(group)) for label, group in zip(_labels(groups), groups, strict=True)]


def differences(groups: Sequence[Group]) -> dict[str, list[Any]]:
    """The settings that are not equal in all groups: dotted key to its value in each group."""
    return _differing([group.runs[0].settings for group in groups])


def _differing(settings: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    keys = sorted({key for each in settings for key in each})
    rows = {key: [each.get(key, _MISSING) for each in settings] for key in keys}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}


def _labels(groups: Sequence[Sequence[RunFolder]]) -> list[str]:
    """One label a group, all different: the names of its runs but for the seed, else what differs in the settings."""
    names = [{_SEED.sub("", run.name) for run in group} for group in groups]
    if all(len(name) == 1 for name in names) and len(set.union(*names)) == len(groups):
        return [name.pop() for name in names]
    if len(groups) == 1:
        return [groups[0][0].part_name("learner") or groups[0][0].name]
    differing = _differing([group[0].settings for group in groups])
    keys = [key for key in _TELLING_KEYS if key in differing] + [key for key in differing if key not in _TELLING_KEYS]
    labels = [""] * len(groups)
    for key in keys:
        said = f"{key.removesuffix('.name')}="
        tried = [
            f"{label}, {said}{_short(value)}".lstrip(", ") for label, value in zip(labels, differing[key], strict=True)
        ]
        if len(set(tried)) > len(set(labels)):
            labels = tried
        if len(set(labels)) == len(groups):
            return labels
    return [group[0].name for group in groups]


def _short(value: object) -> str:
    text, most = str(value), 24
    return text if len(text) <= most else f"{text[: most - 1]}…"
