"""Runs beside each other: repeats with other seeds form a group, groups differ in their settings."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

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
        values = self.values(number)
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
