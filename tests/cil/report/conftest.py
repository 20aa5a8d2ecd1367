"""Run folders as the engine writes them, without an engine."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from cil.events import EventLog
from cil.metrics import AccuracyMatrix

CLASS_NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
NUM_TASKS, CLASSES_PER_TASK, IMAGES_PER_CLASS, EPOCHS, FINETUNING_EPOCHS = 5, 2, 36, 8, 3


class Clock:
    """A clock that is moved by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def accuracy(stage: int, task: int, seed: int, learner: str) -> float:
    """A plausible accuracy: high on the newest task, lower the longer a task is past."""
    loss = {"dkt": 0.035, "finetune": 0.18}.get(learner, 0.07)
    return max(0.0, 0.985 - loss * (stage - task) - 0.01 * task - 0.004 * ((seed * 7 + stage * 3 + task) % 5))


def write_run(
    folder: Path, *, seed: int = 0, learner: str = "dkt", stages: int = NUM_TASKS, protocol: str = "5f1d0c0ffee01234"
) -> Path:
    """A run folder after `stages` finished stages; one more has begun if that is not the end."""
    folder.mkdir(parents=True)
    name = folder.name
    config = {
        "name": name,
        "seed": seed,
        "learner": {"name": learner, "head": {"merge_bias": learner == "dkt"}},
        "data": {"name": "digits"},
        "scenario": {"increment": CLASSES_PER_TASK},
        "optim": {"lr": 1e-3, "epochs": EPOCHS, "batch_size": 64},
        "memory": {"size": 200},
    }
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"config": config, "versions": {"torch": "2.14.1"}, "git": None}, sort_keys=False)
    )
    images_per_task = CLASSES_PER_TASK * IMAGES_PER_CLASS
    matrix = AccuracyMatrix([images_per_task] * NUM_TASKS)
    before: list[float | None] = []
    clock = Clock()
    with EventLog(folder / "events.jsonl", clock=clock) as log:
        log.write(
            "run_started",
            name=name,
            host="somewhere",
            num_cores=2,
            device="cpu",
            precision="fp32",
            versions={"python": "3.11", "torch": "2.14.1"},
            resumed_at=None,
        )
        for stage in range(min(stages + 1, NUM_TASKS)):
            first = stage * CLASSES_PER_TASK
            log.write(
                "stage_started",
                stage=stage,
                labels=[first, first + CLASSES_PER_TASK - 1],
                class_names=CLASS_NAMES[first : first + CLASSES_PER_TASK],
                num_new_samples=286,
                num_parameters=1_203_840 + 770 * stage,
                num_trainable=1_203_840,
            )
            phases = [("training", EPOCHS, 1e-3)] + ([("finetuning", FINETUNING_EPOCHS, 1e-4)] if stage else [])
            for index, (phase, epochs, peak) in enumerate(phases):
                unfinished = stage == stages
                if unfinished and index:
                    break
                log.write(
                    "phase_started",
                    stage=stage,
                    phase=phase,
                    phase_index=index,
                    epochs=epochs,
                    num_samples=286 + 200 * (stage > 0),
                    num_steps=7,
                )
                for epoch in range(epochs // 2 if unfinished else epochs):
                    clock.now += 1.3
                    losses = {"bce": 0.6 * math.exp(-0.35 * epoch) / (1 + index) + 0.02}
                    if stage and not index:
                        losses |= {"kd": 0.2 * math.exp(-0.2 * epoch) + 0.01, "cluster": 0.004 - 0.0006 * epoch}
                    log.write(
                        "epoch",
                        stage=stage,
                        phase=phase,
                        phase_index=index,
                        epoch=epoch,
                        learning_rate=peak * (0.02 + 0.5 * (1 + math.cos(math.pi * epoch / epochs)))
                        if not index
                        else peak,
                        losses=losses,
                        num_images=448,
                        images_per_second=344.6,
                        seconds=1.3,
                    )
                if stage and not index and not unfinished:
                    reached = sum(accuracy(stage, task, seed, learner) - 0.05 for task in range(stage + 1)) / (
                        stage + 1
                    )
                    before.append(reached)
                    write_evaluation(log, stage, "before_finetuning", [reached] * (stage + 1))
            if stage == stages:
                break
            if not stage:
                before.append(None)
            log.write("memory_updated", stage=stage, num_exemplars=200, per_class=100 // (stage + 1), seconds=0.4)
            correct = [round(images_per_task * accuracy(stage, task, seed, learner)) for task in range(stage + 1)]
            matrix.record(stage, correct)
            write_evaluation(log, stage, "after", [count / images_per_task for count in correct])
            clock.now += 1.0
            log.write(
                "stage_finished",
                stage=stage,
                seconds={"training": 1.3 * EPOCHS, "checkpoint": 0.3, "memory": 0.4, "evaluation": 0.3}
                | ({"finetuning": 1.3 * FINETUNING_EPOCHS} if stage else {}),
                peak_resident_bytes=800_000_000 + stage,
            )
        if stages == NUM_TASKS:
            log.write("run_finished", wall_seconds=clock.now, images_per_second=344.6)
    if stages:
        summary = matrix.summary()
        for key in ("accuracy_matrix", "accuracy_after", "forgetting_after"):
            summary[key] = summary[key][:stages]
        metrics = {
            "name": name,
            "wall_seconds": clock.now,
            "images_per_second": 344.6,
            "seed": seed,
            "protocol": protocol,
            "learner": learner,
            "data_set": "digits",
            "evaluate_on": "test",
            "class_order": list(range(len(CLASS_NAMES))),
            "task_sizes": [CLASSES_PER_TASK] * NUM_TASKS,
            "num_test_images": [images_per_task] * NUM_TASKS,
            "accuracy_before_finetuning": before[:stages],
            "num_parameters": 1_203_840 + 770 * (stages - 1),
            "exemplars": [200] * stages,
            "top5_after": [1.0] * stages,
            "views_trained": 448 * (EPOCHS + FINETUNING_EPOCHS) * stages,
            **summary,
        }
        (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def write_snapshots(run: Path, stages: int = NUM_TASKS, *, names: list[str] | None = None, per_task: int = 2) -> Path:
    """Snapshots of the first stages of a run, as `cil.snapshots` writes them: 30 images of each class, 3 x 12 x 12."""
    names = CLASS_NAMES if names is None else names
    numbers = np.random.default_rng(0)
    for stage in range(stages):
        seen = per_task * (stage + 1)
        shares = np.full((seen, seen), 1.0) + 12 * np.eye(seen)
        confusion = np.stack([numbers.multinomial(30, row / row.sum()) for row in shares]).astype(np.int32)
        labels = np.repeat(np.arange(seen), 4)[:400].astype(np.int32)
        answers = np.where(numbers.random(len(labels)) < 0.8, labels, 0).astype(np.int32)
        said = [(0, 0), (1, 1), (1, 0)]
        facts = {
            "format": 1,
            "stage": stage,
            "split": "test",
            "read_by": "classifier",
            "class_names": names[:seen],
            "task_sizes": [per_task] * (stage + 1),
            "maps": "class_activation",
            "examples": [{"id": 7, "label": a, "answer": b, "score": 0.5} for a, b in said],
            "embedding_variance": [0.5, 0.3],
            "exemplar_labels": [0, 0, 1],
        }
        arrays = {
            "confusion": confusion,
            "embedding": (numbers.normal(size=(len(labels), 8)) + 3 * np.eye(8)[labels % 8]).astype(np.float16),
            "embedding_labels": labels,
            "embedding_answers": answers,
            "examples": numbers.integers(0, 255, (3, 3, 12, 12), dtype=np.uint8),
            "maps": numbers.integers(0, 255, (3, 4, 4), dtype=np.uint8),
            "exemplars": numbers.integers(0, 255, (3, 3, 12, 12), dtype=np.uint8),
        }
        if stage:
            arrays["token_distances"] = (1 - np.eye(stage + 1)).astype(np.float32)
        folder = run / f"stage_{stage:03d}" / "report"
        folder.mkdir(parents=True)
        (folder / "facts.json").write_text(json.dumps(facts))
        np.savez_compressed(folder / "arrays.npz", **arrays)  # type: ignore[arg-type]
    return run


def write_evaluation(log: EventLog, stage: int, when: str, per_task: list[float]) -> None:
    """The two events of one evaluation; tasks have equal numbers of images."""
    num_images = (stage + 1) * CLASSES_PER_TASK * IMAGES_PER_CLASS
    log.write("test_read", stage=stage, when=when, split="test", num_images=num_images)
    log.write(
        "evaluated",
        stage=stage,
        when=when,
        accuracy=sum(per_task) / len(per_task),
        per_task=per_task,
        accuracy_old=sum(per_task[:-1]) / stage if stage else None,
        accuracy_new=per_task[-1],
        top5=1.0,
        seconds=0.1,
    )


@pytest.fixture(name="write_run", scope="session")
def write_run_anywhere() -> Callable[..., Path]:
    """`write_run(folder, ...)` for fixtures of a wider scope."""
    return write_run


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """`make_run(name, ...)` writes a run folder below a folder of runs of its own."""
    return lambda name="demo", **facts: write_run(tmp_path / "runs" / name, **facts)


@pytest.fixture(scope="session")
def with_snapshots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with snapshots; not to be changed."""
    return write_snapshots(write_run(tmp_path_factory.mktemp("snapshots") / "demo"))
