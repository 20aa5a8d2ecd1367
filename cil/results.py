"""What a run reports: derived from one accuracy matrix and what was counted on the way."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from cil.config import Config, RunConfig, StaticConfig
from cil.data import DataSet
from cil.metrics import AccuracyMatrix
from cil.tasks import TaskSequence

_BYTES_PER_PARAMETER = 4  # float32, as checkpoints keep them


@dataclass
class History:
    """What a run has counted so far; part of every checkpoint.

    Attributes:
        correct: Row per finished stage: correct predictions per task.
        before_finetuning: Accuracy over all seen classes before fine-tuning, None where a stage has none.
        top5: Fraction of samples whose class is among the five best (or all, if fewer).
        exemplars: Number kept after each stage.
        num_parameters: Of the network after each stage.
        images: Training images shown so far, repeated views included.
        training_seconds: Time spent on them.
        test_reads: How often the test set was read.
        accuracy_by: Accuracy over all seen classes after each stage by the way of reading it: `classifier`, and
            `nearest_mean` where there are exemplars.
        skipped_steps: Left out because a gradient was not finite (fp16, `optim.skip_nonfinite`).
    """

    correct: list[list[int]] = field(default_factory=list)
    before_finetuning: list[float | None] = field(default_factory=list)
    top5: list[float] = field(default_factory=list)
    exemplars: list[int] = field(default_factory=list)
    num_parameters: list[int] = field(default_factory=list)
    images: int = 0
    training_seconds: float = 0.0
    test_reads: int = 0
    accuracy_by: dict[str, list[float]] = field(default_factory=dict)
    skipped_steps: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def matrix(self, num_images: np.ndarray) -> AccuracyMatrix:
        """The accuracy matrix of the stages done so far."""
        matrix = AccuracyMatrix(num_images)
        for stage, row in enumerate(self.correct):
            matrix.record(stage, row)
        return matrix


def protocol(config: RunConfig, data: DataSet, tasks: TaskSequence) -> str:
    """A hash of what makes two results comparable: data, classes, order, splits, memory rule, evaluation."""
    facts = {
        "data": data.fingerprint(),
        "class_order": tasks.class_order,
        "task_sizes": tasks.task_sizes,
        "validation": [config.data.validation, config.split_seed if config.data.validation else None],
        "memory": [config.exemplars.size, config.exemplars.budget],
        "evaluate_on": config.evaluate_on,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def metrics(
    config: Config, data: DataSet, tasks: TaskSequence, history: History, num_images: np.ndarray, wall_seconds: float
) -> dict[str, Any]:
    """The content of `metrics.json`: accuracies as fractions; only what a repeat reproduces, but for three keys."""
    matrix = history.matrix(num_images)
    report: dict[str, Any] = {
        "name": config.name,
        "wall_seconds": wall_seconds,
        "images_per_second": history.images / history.training_seconds if history.training_seconds else None,
        "finished": len(history.correct) == tasks.num_tasks,
        "seed": config.seed,
        "protocol": protocol(config, data, tasks),
        "learner": config.learner.name,
        "data_set": config.data.name,
        "evaluate_on": config.evaluate_on,
        "class_order": list(tasks.class_order),
        "task_sizes": list(tasks.task_sizes),
        "num_test_images": num_images,
        "accuracy_matrix": matrix.values[: len(history.correct)],
        "accuracy_after": matrix.accuracy_after()[: len(history.correct)],
        "accuracy_before_finetuning": history.before_finetuning,
        "average_incremental_accuracy": matrix.average_incremental_accuracy(),
        "last_accuracy": matrix.last_accuracy(),
        "forgetting": matrix.forgetting(),
        "forgetting_after": matrix.forgetting_after()[: len(history.correct)],
        "backward_transfer": matrix.backward_transfer(),
        "forward_transfer": None,  # nothing is evaluated on tasks before they are learned
        "top5_after": history.top5,
        "accuracy_by": {
            name: {
                "after": accuracies,
                "average_incremental": float(np.mean(accuracies)),
                "last": accuracies[-1],
            }
            for name, accuracies in history.accuracy_by.items()
        },
        "num_parameters": history.num_parameters[-1] if history.num_parameters else None,
        "num_parameters_after": history.num_parameters,
        "model_bytes": history.num_parameters[-1] * _BYTES_PER_PARAMETER if history.num_parameters else None,
        "exemplars": history.exemplars,
        "exemplar_bytes": history.exemplars[-1] * math.prod(data.train.input_shape) if history.exemplars else None,
        "views_trained": history.images,
        "skipped_steps": history.skipped_steps,
        "test_reads": history.test_reads,
    }
    if config.evaluation.continuum:
        report["continuum"] = {
            "forgetting": matrix.forgetting(definition="continuum"),
            "backward_transfer": matrix.backward_transfer(definition="continuum"),
        }
    plain: dict[str, Any] = plain_values(report)
    return plain


def static_metrics(
    config: StaticConfig,
    data: DataSet,
    tasks: TaskSequence,
    history: History,
    num_images: np.ndarray,
    wall_seconds: float,
    *,
    networks: list[str],
    teacher: dict[str, Any] | None,
    ensembles: dict[int, float],
) -> dict[str, Any]:
    """The content of `metrics.json` of a static run: like `metrics`, with a stage for every network.

    Args:
        config: The run's.
        data: Its data set.
        tasks: All classes as one task.
        history: What was counted.
        num_images: Evaluation images of the task.
        wall_seconds: So far.
        networks: Their names, in the order in which they are trained.
        teacher: Who the first network learned from, and how good it is; None if from nobody.
        ensembles: Number of last generations to the accuracy of the mean of their probabilities.
    """
    accuracies = [row[0] / int(num_images[0]) for row in history.correct]
    report = {
        "name": config.name,
        "wall_seconds": wall_seconds,
        "images_per_second": history.images / history.training_seconds if history.training_seconds else None,
        "finished": len(accuracies) == len(networks),
        "seed": config.seed,
        "protocol": protocol(config, data, tasks),
        "student": networks[-1],
        "teacher": teacher,
        "kd": list(config.kd),
        "data_set": config.data.name,
        "evaluate_on": config.evaluate_on,
        "num_test_images": num_images,
        "networks": networks,
        "accuracy_after": accuracies,
        "last_accuracy": accuracies[-1] if accuracies else None,
        "top5_after": history.top5,
        "ensemble_accuracy": ensembles,
        "num_parameters": history.num_parameters[-1] if history.num_parameters else None,
        "num_parameters_after": history.num_parameters,
        "views_trained": history.images,
        "skipped_steps": history.skipped_steps,
        "test_reads": history.test_reads,
    }
    plain: dict[str, Any] = plain_values(report)
    return plain


def plain_values(value: Any) -> Any:
    """Arrays as lists and numbers that are not defined as null."""
    if isinstance(value, dict):
        return {str(key): plain_values(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain_values(value.tolist())
    if isinstance(value, list | tuple):
        return [plain_values(item) for item in value]
    if isinstance(value, np.generic):
        return plain_values(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
