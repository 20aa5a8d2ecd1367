"""What a run has kept for the report under `stage_NNN/report/`, read without torch; `cil.snapshots` says what it is."""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 1


@dataclass(frozen=True)
class Snapshot:
    """One stage.

    Attributes:
        folder: Where it is kept.
        facts: Names and labels.
    """

    folder: Path
    facts: Mapping[str, Any]

    def array(self, name: str) -> np.ndarray | None:
        """An array by its name; None where there is nothing of this kind.

        Raises:
            ValueError: If the file is damaged.
        """
        path = self.folder / "arrays.npz"
        try:
            # opened here: NumPy leaves a file open that is no archive
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                found: np.ndarray | None = arrays.get(name)
                return found
        except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error

    @property
    def stage(self) -> int:
        """Counts from 0."""
        return int(self.facts["stage"])

    @property
    def class_names(self) -> list[str]:
        """Of all classes seen, in learned order."""
        return [str(name) for name in self.facts["class_names"]]

    @property
    def task_of_class(self) -> np.ndarray:
        """The task of every class, counted from 0."""
        sizes = self.facts["task_sizes"]
        return np.repeat(np.arange(len(sizes)), sizes)

    @property
    def confusion(self) -> np.ndarray:
        """Images by true class and answer."""
        found = self.array("confusion")
        if found is None or found.shape != (len(self.class_names),) * 2:
            raise ValueError(f"{self.folder / 'arrays.npz'}: the confusion matrix does not have a row for each class")
        return found

    @property
    def class_accuracy(self) -> np.ndarray:
        """Fraction of right answers for each class; NaN where it has no image."""
        confusion = self.confusion
        with np.errstate(invalid="ignore"):
            accuracy: np.ndarray = np.diag(confusion) / confusion.sum(axis=1)
        return accuracy


def read_snapshots(run: Path) -> list[Snapshot]:
    """The snapshots of a run folder, stage by stage; whatever other versions have written is passed over.

    Raises:
        ValueError: If one is damaged.
    """
    found = []
    for path in sorted(run.glob("stage_*/report/facts.json")):
        try:
            facts = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        if not isinstance(facts, dict):
            raise ValueError(f"{path} must hold a mapping, found {type(facts).__name__}")
        if facts.get("format") == FORMAT:
            found.append(Snapshot(path.parent, facts))
    return found
