"""From a checked config to a run: building the parts, the run folder, and loading what a run has learned."""

import importlib.metadata
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from cil import checkpoint
from cil.config import Config, ConfigError, check
from cil.data import DataSet, Transform, augmentations, data_sets, validation_split
from cil.engine import Engine, Samples
from cil.evaluation import Reader
from cil.events import EventLog
from cil.learners.base import Learner, learners
from cil.memory import ExemplarMemory
from cil.models.network import Network, models
from cil.precision import Precision, resolve_device
from cil.seeding import derive, seeded
from cil.tasks import TaskSequence, task_sequence
from kd import WeightedSum, distillers

#: Keys that may differ between the config of a run folder and the one it is asked to go on with.
_PLACE = {"name", "runs_dir", "overwrite", "experiment", "data.root", "data.download"}
_PACKAGES = ("torch", "torchvision", "timm", "einops", "numpy", "scikit-learn", "pydantic", "hydra-core")


def open_data(config: Config) -> DataSet:
    """The data set of a config.

    Raises:
        ValueError: If it is missing or unusable.
    """
    parameters = config.data.parameters
    data_set = data_sets[config.data.name](config.data.root, download=config.data.download, **parameters)
    data_set.check()
    loaded: DataSet = data_set.load()
    return loaded


def make_tasks(config: Config, data: DataSet) -> TaskSequence:
    """The task sequence of a config.

    Raises:
        ValueError: If the scenario does not fit the data set, or the memory has no room for an exemplar of each class.
    """
    scenario = config.scenario.model_dump(exclude={"order_seed"})
    tasks = task_sequence(len(data.class_names), **scenario, seed=config.scenario.order_seed)
    if config.memory.budget != "per_class" and 0 < config.memory.size < tasks.num_classes:
        raise ValueError(
            f"memory.size={config.memory.size} has no room for one exemplar of each of the {tasks.num_classes} classes: "
            f"set it to {tasks.num_classes} or more, or to 0 for no memory"
        )
    return tasks


def make_transform(config: Config, data: DataSet) -> Transform:
    """Augmentation and normalisation of a config."""
    chosen = {name: values for name, values in config.data.augment.items() if values is not None}
    return Transform([augmentations[name](**values) for name, values in chosen.items()], data.mean, data.std)


def make_network(config: Config, input_shape: tuple[int, int, int]) -> Network:
    """The network of a config, without classes yet; its weights come from the run's seed."""
    with seeded(config.seed, "network"):
        network: Network = models[config.model.name](input_shape, **config.model.parameters)
    return network


def make_distillation(config: Config) -> WeightedSum | None:
    """The distillation terms of a config; None if there are none."""
    terms = {}
    for name, values in config.kd.items():
        parameters = {key: value for key, value in values.items() if key not in ("method", "weight")}
        with seeded(config.seed, "kd", name):
            terms[name] = (float(values.get("weight", 1.0)), distillers[values.get("method", name)](**parameters))
    return WeightedSum(terms) if terms else None


def make_learner(config: Config, network: Network) -> Learner:
    """The learner of a config around a network."""
    with seeded(config.seed, "learner"):
        distillation = make_distillation(config)
        learner: Learner = learners[config.learner.name](network, distillation, **config.learner.parameters)
    return learner


def make_samples(config: Config, data: DataSet, tasks: TaskSequence, transform: Transform) -> Samples:
    """Training and evaluation samples: held-out images leave the training set and keep their ids."""
    labels = tasks.learned(data.train.labels)
    if not config.data.validation:
        return Samples(data.train, labels, data.test, tasks.learned(data.test.labels), transform, "test")
    kept, held_out = validation_split(
        data.train.labels, config.data.validation, derive(config.seed, "validation")
    )
    training = torch.full_like(labels, -1)
    training[kept] = labels[kept]
    if config.evaluate_on == "test":
        return Samples(data.train, training, data.test, tasks.learned(data.test.labels), transform, "test")
    validation = torch.full_like(labels, -1)
    validation[held_out] = labels[held_out]
    return Samples(data.train, training, data.train, validation, transform, "validation")


@dataclass
class Run:
    """A run that is ready to start: everything is checked and built, nothing is written yet.

    Attributes:
        config: The checked config.
        data: The data set.
        tasks: Its division into tasks.
        samples: Its division into training and evaluation.
        learner: The method.
        memory: The exemplar memory.
        precision: Number format and device.
        reader: Evaluates.
    """

    config: Config
    data: DataSet
    tasks: TaskSequence
    samples: Samples
    learner: Learner
    memory: ExemplarMemory
    precision: Precision
    reader: Reader

    @classmethod
    def build(cls, config: Config) -> "Run":
        """Build every part of a run.

        Raises:
            ValueError: If a part cannot be built as configured.
        """
        device = resolve_device(config.device)
        precision = Precision.resolve(config.precision, device)
        data = open_data(config)
        tasks = make_tasks(config, data)
        transform = make_transform(config, data)
        network = make_network(config, data.train.input_shape)
        learner = make_learner(config, network).to(device, precision.dtype)
        memory = ExemplarMemory(size=config.memory.size, budget=config.memory.budget, selection=config.memory.selection)
        eval_precision = precision
        if config.evaluation.precision is not None:
            eval_precision = Precision.resolve(config.evaluation.precision, device)
            if eval_precision.dtype != precision.dtype:
                raise ValueError(
                    f"evaluation.precision={config.evaluation.precision} does not go with precision={precision.name}: "
                    "fp64 weights are evaluated in fp64, and only they"
                )
        reader = Reader(transform, eval_precision, config.evaluation.batch_size)
        samples = make_samples(config, data, tasks, transform)
        return cls(config, data, tasks, samples, learner, memory, precision, reader)

    def go(self) -> None:
        """Train from the newest checkpoint, or from the beginning."""
        with EventLog(self.config.folder / "events.jsonl") as log:
            engine = Engine(
                self.config,
                self.data,
                self.tasks,
                self.samples,
                self.learner,
                self.memory,
                self.precision,
                self.reader,
                log,
            )
            engine.run()
            metrics = read_metrics(self.config.folder)
            log.write(
                "run_finished",
                wall_seconds=metrics["wall_seconds"],
                images_per_second=metrics["images_per_second"],
            )


def open_folder(config: Config) -> bool:
    """Make the run folder, or check that the one that exists belongs to the same config.

    With `overwrite=true` an existing folder is moved aside to the first free `<name>.old-N`.

    Returns:
        Whether the run in it is finished already.

    Raises:
        ConfigError: If the folder holds a run of another config, or something else.
    """
    folder = config.folder
    if folder.exists() and config.overwrite:
        number = 1
        while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
            number += 1
        os.replace(folder, aside)
    path = folder / "config.yaml"
    tree = config.model_dump(mode="json")
    if path.exists():
        found = _flat(_read_yaml(path).get("config", {}))
        wanted = _flat(tree)
        keys = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
        keys = [key for key in keys if key not in _PLACE]
        if keys:
            shown = [f"  {key}: {found.get(key)!r} there, {wanted.get(key)!r} here" for key in keys[:6]]
            more = [f"  and {len(keys) - 6} more keys"] if len(keys) > 6 else []
            raise ConfigError(
                [f"{folder} holds a run of another config. Choose another name=, or overwrite=true to move it aside."]
                + shown
                + more
            )
        metrics = folder / "metrics.json"
        return metrics.exists() and bool(read_metrics(folder)["finished"])
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(
            [f"{folder} exists and holds no run (no config.yaml): choose another name=, or overwrite=true to move it"]
        )
    folder.mkdir(parents=True, exist_ok=True)
    versions = {package: importlib.metadata.version(package) for package in _PACKAGES}
    text = yaml.safe_dump({"config": tree, "versions": versions, "git": git_state()}, sort_keys=False)
    checkpoint.write_atomically(path, lambda file: file.write(text.encode()))
    return False


def read_metrics(folder: Path) -> dict[str, Any]:
    """The content of `metrics.json`."""
    import json

    metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return metrics


def git_state() -> dict[str, Any] | None:
    """Commit and cleanness of the source tree; None if it is no checkout."""
    root = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout

    try:
        return {"commit": git("rev-parse", "HEAD").strip(), "dirty": bool(git("status", "--porcelain").strip())}
    except (OSError, subprocess.CalledProcessError):
        return None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError([f"{path}: cannot be read ({str(error).splitlines()[0]})"]) from error
    if not isinstance(tree, dict):
        raise ConfigError([f"{path}: found no mapping of keys"])
    return tree


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree}
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.")
    return flat


@dataclass(frozen=True)
class Model:
    """What a run has learned, ready to use.

    Attributes:
        network: The network after a stage, in evaluation mode.
        class_names: Names of the classes it knows, in the order of its outputs.
        class_labels: Their labels in the data set.
        transform: Makes its input of uint8 images.
        config: The config of the run.
    """

    network: Network
    class_names: tuple[str, ...]
    class_labels: tuple[int, ...]
    transform: Transform
    config: Config

    @torch.inference_mode()
    def logits(self, images: np.ndarray | Tensor) -> Tensor:
        """Scores of all known classes.

        Args:
            images: uint8, [batch, channels, height, width].

        Raises:
            ValueError: If they are not of this form.
        """
        images = torch.as_tensor(images)
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != self.network.input_shape[0]:
            raise ValueError(
                f"images must be uint8 [batch, {self.network.input_shape[0]}, height, width], "
                f"found {images.dtype} {list(images.shape)}"
            )
        weights = next(self.network.parameters())
        scores: Tensor = self.network(self.transform.test(images.to(weights.device)).to(weights.dtype)).logits
        return scores

    def predict(self, images: np.ndarray | Tensor) -> list[str]:
        """Names of the most likely classes."""
        return [self.class_names[index] for index in self.logits(images).argmax(dim=1).tolist()]


def load(run: str | Path, stage: int | None = None, device: str = "cpu") -> Model:
    """The network of a run folder after its last stage, or after `stage`.

    Raises:
        ValueError: If the folder holds no finished stage, or its files are damaged.
    """
    import json

    folder = Path(run)
    done = sorted(path.parent for path in folder.glob("stage_*/stage.json"))
    if not done or not (folder / "config.yaml").exists():
        raise ValueError(f"{folder}: no run with a finished stage; a run folder has config.yaml and stage_000/stage.json")
    if stage is not None and not 0 <= stage < len(done):
        raise ValueError(f"{folder}: stage {stage} is not there; stages 0 to {len(done) - 1} are finished")
    place = done[-1 if stage is None else stage]
    config = check(_read_yaml(folder / "config.yaml")["config"])
    summary = json.loads((place / "stage.json").read_text())
    info = summary["data"]
    network = make_network(config, tuple(info["input_shape"]))
    network.rebuild(summary["network"])
    where = resolve_device(device)
    network.load_state_dict(checkpoint.load_network(place, where))
    transform = Transform([], tuple(info["mean"]), tuple(info["std"]))
    return Model(
        network.to(where).eval(), tuple(info["class_names"]), tuple(info["class_labels"]), transform, config
    )
