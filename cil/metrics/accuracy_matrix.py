"""The accuracy matrix of a run of tasks, and every number of class-incremental learning that is derived from it.

With a[t][j] the accuracy on the test images of task j after training on task t (j <= t), counted from 0:

- forgetting: Chaudhry et al., "Riemannian Walk for Incremental Learning", ECCV 2018, arXiv:1801.10112;
- backward and forward transfer: Lopez-Paz and Ranzato, "Gradient Episodic Memory", NIPS 2017, arXiv:1706.08840;
- `definition="continuum"`: what continuum 1.2.3 computes under the same names. It looks one task less far back than
  the papers (mended upstream after that release) and stands in the logs of DKT, so it is kept to compare with those.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

Definition = Literal["chaudhry", "continuum"]
Values = Float[np.ndarray, "tasks tasks"]
UNSEEN = -1  # the count that stands for "task not seen yet" where counts are integers


def chaudhry_forgetting_per_task(values: Values, after: int) -> Float[np.ndarray, " old"]:
    """Best accuracy before stage `after` minus accuracy after it: max_{j<=l<after} a[l][j] - a[after][j], j < after."""
    best = np.nanmax(values[:after, :after], axis=0, initial=-np.inf)
    lost: Float[np.ndarray, " old"] = best - values[after, :after]
    return lost


def chaudhry_forgetting(values: Values, after: int) -> float:
    """Mean of `chaudhry_forgetting_per_task` over the old tasks; NaN at the first stage, negative if old tasks gain."""
    return float(chaudhry_forgetting_per_task(values, after).mean()) if after else math.nan


def gem_backward_transfer(values: Values, after: int) -> float:
    """Mean over old tasks of a[after][j] - a[j][j]; NaN at the first stage."""
    return float((values[after, :after] - values.diagonal()[:after]).mean()) if after else math.nan


def continuum_forgetting(values: Values, after: int) -> float:
    """continuum 1.2.3: the sum over j < after-1 of max_{l<after-1} a[l][j] - a[after][j], over `after` all the same."""
    if not after:
        return math.nan
    past = after - 1
    best = np.nanmax(values[:past, :past], axis=0, initial=-np.inf)
    return float((best - values[after, :past]).sum() / after)


def continuum_backward_transfer(values: Values, after: int) -> float:
    """continuum 1.2.3: the sum over i <= after and j < i-1 of a[i][j] - a[j][j], over the number of pairs j < i."""
    if not after:
        return math.nan
    change = values[: after + 1, : after + 1] - values.diagonal()[: after + 1]
    return float(np.tril(change, k=-2).sum() / _num_pairs(after))


def continuum_forward_transfer(values: Values, after: int) -> float:
    """continuum 1.2.3: the mean of a[i][j] over j < i <= after, which is past accuracy and no transfer at all."""
    return float(np.tril(values[: after + 1, : after + 1], k=-1).sum() / _num_pairs(after)) if after else math.nan


def _num_pairs(after: int) -> int:
    return after * (after + 1) // 2


class AccuracyMatrix:
    """Correct predictions by (stage, task), built up stage by stage; fractions, averages and forgetting follow from it.

    Accuracies are fractions. "After" arrays have one entry per task of the run, NaN where the stage has not been
    finished; scalars speak of the stages finished so far and are NaN where they are undefined (forgetting and backward
    transfer before the second stage, everything before the first).

    Args:
        num_images: Test images of each task.

    Raises:
        ValueError: If there is no task, or a task without test images.
    """

    def __init__(self, num_images: Sequence[int] | Int[np.ndarray, " tasks"]) -> None:
        self.num_images: Int[np.ndarray, " tasks"] = np.asarray(num_images, dtype=np.int64)
        if self.num_images.size == 0 or self.num_images.min() < 1:
            raise ValueError(f"every task needs at least one test image, found num_images={self.num_images.tolist()}")
        # Float, so that matrices published as fractions fit; counts of images are exact in it.
        self._correct: Values = np.full((self.num_tasks, self.num_tasks), np.nan)
        self.num_finished = 0

    @classmethod
    def from_counts(
        cls,
        correct: Sequence[Sequence[int]] | Int[np.ndarray, "tasks tasks"],
        num_images: Sequence[int] | Int[np.ndarray, " tasks"],
    ) -> "AccuracyMatrix":
        """The matrix of a whole or unfinished run.

        Args:
            correct: Row t: correct predictions per task after stage t; -1 where the task was not seen yet.
            num_images: Test images of each task.

        Raises:
            ValueError: If the shapes do not fit, a seen count is missing or out of range, or an unseen task has one.
        """
        matrix = cls(num_images)
        matrix._fill(np.asarray(correct, dtype=np.float64), most=matrix.num_images)
        return matrix

    @classmethod
    def from_fractions(
        cls,
        values: Sequence[Sequence[float | None]] | Float[np.ndarray, "tasks tasks"],
        num_images: Sequence[int] | Int[np.ndarray, " tasks"],
    ) -> "AccuracyMatrix":
        """A matrix of accuracies of which no counts are known; all results are in the unit of `values`.

        Args:
            values: Row t: accuracy per task after stage t, in fractions or in percent; NaN or None where unseen.
            num_images: Test images of each task, or any numbers in the same proportion.

        Raises:
            ValueError: If the shapes do not fit, a seen value is missing, or one is below 0 or above 100.
        """
        matrix = cls(num_images)
        fractions = np.asarray(values, dtype=np.float64)
        percent = 100
        matrix._fill(np.where(np.isnan(fractions), UNSEEN, fractions * matrix.num_images), percent * matrix.num_images)
        return matrix

    def _fill(self, correct: Float[np.ndarray, "..."], most: Int[np.ndarray, " tasks"]) -> None:
        if correct.shape != self._correct.shape:
            raise ValueError(f"the matrix of {self.num_tasks} tasks must be square, found shape {correct.shape}")
        for stage, row in enumerate(correct):
            if (row == UNSEEN).all():  # this stage and those after it have not been run
                break
            self._set(stage, row[: stage + 1], most)
        if (correct[np.isnan(self._correct)] != UNSEEN).any():
            raise ValueError("the matrix says something about tasks that were not seen yet; write -1 or null there")

    def _set(self, stage: int, correct: Float[np.ndarray, " seen"], most: Int[np.ndarray, " tasks"]) -> None:
        if not ((correct >= 0) & (correct <= most[: stage + 1])).all():
            raise ValueError(
                f"after stage {stage} the seen tasks need 0 to {most[: stage + 1].tolist()}, found {correct.tolist()}"
            )
        self._correct[stage, : stage + 1] = correct
        self.num_finished = stage + 1

    def record(self, stage: int, correct: Sequence[int] | Int[np.ndarray, " seen"]) -> None:
        """Enter the result of the next stage.

        Args:
            stage: Its index; stages are recorded once and in order.
            correct: Correct predictions on each task seen so far, this stage's task included.

        Raises:
            ValueError: If it is not this stage's turn, or the counts do not fit the seen tasks.
        """
        if stage != self.num_finished or stage >= self.num_tasks:
            raise ValueError(f"stage {self.num_finished} of {self.num_tasks} is next to be recorded, found {stage}")
        if len(correct) != stage + 1:
            raise ValueError(f"after stage {stage} there are {stage + 1} seen tasks, found {len(correct)} counts")
        self._set(stage, np.asarray(correct, dtype=np.float64), self.num_images)

    @property
    def num_tasks(self) -> int:
        """Tasks of the whole run."""
        return len(self.num_images)

    @property
    def values(self) -> Values:
        """a[t][j], the accuracy on task j after stage t; NaN where unseen."""
        values: Values = self._correct / self.num_images
        return values

    def accuracy_after(self) -> Float[np.ndarray, " tasks"]:
        """A_t = sum_{j<=t} correct[t][j] / sum_{j<=t} num_images[j]: over the images of all classes seen so far."""
        after: Float[np.ndarray, " tasks"] = self._sums_of_finished(self._correct) / self.num_images.cumsum()
        return after

    def accuracy_after_task_mean(self) -> Float[np.ndarray, " tasks"]:
        """mean_{j<=t} a[t][j]: every task counts alike, however many images it has."""
        after: Float[np.ndarray, " tasks"] = self._sums_of_finished(self.values) / np.arange(1, self.num_tasks + 1)
        return after

    def average_incremental_accuracy(self) -> float:
        """Mean of `accuracy_after` over the finished stages: the "avg" of tables of results."""
        return self._mean_of_finished(self.accuracy_after())

    def average_incremental_task_mean(self) -> float:
        """Mean of `accuracy_after_task_mean` over the finished stages."""
        return self._mean_of_finished(self.accuracy_after_task_mean())

    def last_accuracy(self) -> float:
        """`accuracy_after` of the last finished stage."""
        return self._last_of_finished(self.accuracy_after())

    def last_task_mean(self) -> float:
        """`accuracy_after_task_mean` of the last finished stage."""
        return self._last_of_finished(self.accuracy_after_task_mean())

    def forgetting_after(self, definition: Definition = "chaudhry") -> Float[np.ndarray, " tasks"]:
        """Forgetting after each stage; NaN at the first."""
        measure = {"chaudhry": chaudhry_forgetting, "continuum": continuum_forgetting}[definition]
        return np.array([measure(self.values, t) if t < self.num_finished else np.nan for t in range(self.num_tasks)])

    def forgetting_per_task(self) -> Float[np.ndarray, " old"]:
        """What each old task has lost by the last finished stage: the terms of `forgetting`, so none at the first."""
        if not self.num_finished:
            return np.empty(0)
        return chaudhry_forgetting_per_task(self.values, self.num_finished - 1)

    def forgetting(self, definition: Definition = "chaudhry") -> float:
        """Forgetting after the last finished stage."""
        return self._last_of_finished(self.forgetting_after(definition))

    def backward_transfer(self, definition: Definition = "chaudhry") -> float:
        """Backward transfer after the last finished stage ("chaudhry" names the papers' side: the one of GEM)."""
        measure = {"chaudhry": gem_backward_transfer, "continuum": continuum_backward_transfer}[definition]
        return measure(self.values, self.num_finished - 1) if self.num_finished else math.nan

    def forward_transfer(
        self, before: Sequence[float] | None = None, untrained: Sequence[float] | None = None
    ) -> float | None:
        """Forward transfer of GEM: mean over tasks j >= 1 of a[j-1][j] - b[j]. None unless measured, never 0 instead.

        Args:
            before: a[j-1][j] for j = 1, 2, ...: accuracy on each later task just before training on it.
            untrained: b[j] for the same tasks: accuracy of a network with random weights.

        Raises:
            ValueError: If only one of the two was measured, or their lengths differ.
        """
        if before is None and untrained is None:
            return None
        if before is None or untrained is None or len(before) != len(untrained) or not before:
            raise ValueError(
                "forward transfer needs the accuracy on each later task before training on it and that of an untrained "
                f"network on the same tasks, found before={before} and untrained={untrained}"
            )
        return float(np.mean(np.subtract(before, untrained)))

    def rows(self) -> list[list[float | None]]:
        """`values` as rows for JSON: null where unseen."""
        return [_nullable(row) for row in self.values]

    def summary(self, definition: Definition = "chaudhry") -> dict[str, Any]:
        """All derived numbers under the names they have in `metrics.json`, null where undefined."""
        scalars = {
            "average_incremental_accuracy": self.average_incremental_accuracy(),
            "last_accuracy": self.last_accuracy(),
            "forgetting": self.forgetting(definition),
            "backward_transfer": self.backward_transfer(definition),
        }
        return {
            "accuracy_matrix": self.rows(),
            "accuracy_after": _nullable(self.accuracy_after()),
            "forgetting_after": _nullable(self.forgetting_after(definition)),
            **dict(zip(scalars, _nullable(np.array(list(scalars.values()))), strict=True)),
            "forward_transfer": self.forward_transfer(),
        }

    def to_json(self) -> dict[str, Any]:
        """The counts, for a checkpoint; -1 where unseen."""
        counts = np.where(np.isnan(self._correct), UNSEEN, self._correct)
        whole = bool((counts == np.rint(counts)).all())
        return {
            "num_images": self.num_images.tolist(),
            "correct": counts.astype(np.int64).tolist() if whole else counts.tolist(),
        }

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> "AccuracyMatrix":
        """The matrix that `to_json` stored."""
        matrix = cls(stored["num_images"])
        percent = 100
        matrix._fill(np.asarray(stored["correct"], dtype=np.float64), percent * matrix.num_images)
        return matrix

    def _sums_of_finished(self, rows: Values) -> Float[np.ndarray, " tasks"]:
        sums: Float[np.ndarray, " tasks"] = np.full(self.num_tasks, np.nan)
        sums[: self.num_finished] = np.nansum(rows[: self.num_finished], axis=1)
        return sums

    def _mean_of_finished(self, after: Float[np.ndarray, " tasks"]) -> float:
        return float(after[: self.num_finished].mean()) if self.num_finished else math.nan

    def _last_of_finished(self, after: Float[np.ndarray, " tasks"]) -> float:
        return float(after[self.num_finished - 1]) if self.num_finished else math.nan


def _nullable(values: Float[np.ndarray, " n"]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values.tolist()]
