"""From a checked config to the parts of a run. Nothing is written here."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cil.config import Config, Counting, Part, RunConfig, counting_of
from cil.data import DataSet, Images, Transform, augmentations, data_sets, validation_split
from cil.evaluation import Reader
from cil.events import EventLog, SilentLog
from cil.learners.base import Learner, learners
from cil.memory import ExemplarMemory
from cil.models.network import Network, models
from cil.precision import Precision, repeat_exactly, resolve_device
from cil.progress import Progress
from cil.results import History, metrics
from cil.seeding import derive, seeded
from cil.stages import Stage
from cil.tasks import TaskSequence, task_sequence
from kd import WeightedSum, distillers


@dataclass(frozen=True)
class Samples:
    """The samples of a run, as ids into the data set's arrays.

    Attributes:
        images: Training images.
        labels: Their labels in learned order; negative where the class or the image is not used for training.
        eval_images: Images results are read on.
        eval_labels: Likewise.
        transform: Makes a network's input.
        strong: Makes the second view of it; None if none is configured.
        eval_split: "test" or "validation".
    """

    images: Images
    labels: Tensor
    eval_images: Images
    eval_labels: Tensor
    transform: Transform
    strong: Transform | None
    eval_split: str


def open_data(config: RunConfig) -> DataSet:
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
            f"memory.size={config.memory.size} has no room for an exemplar of each of the {tasks.num_classes} classes: "
            f"set it to {tasks.num_classes} or more, or to 0 for no memory"
        )
    return tasks


def make_transform(config: RunConfig, data: DataSet, view: Literal["augment", "strong"] = "augment") -> Transform:
    """Augmentation and normalisation of a config, for the first or the second view."""
    listed: dict[str, dict[str, Any] | None] = getattr(config.data, view)
    chosen = {name: values for name, values in listed.items() if values is not None}
    return Transform([augmentations[name](**values) for name, values in chosen.items()], data.mean, data.std)


def make_network(part: Part, seed: int, input_shape: tuple[int, int, int], index: int = 0) -> Network:
    """A network without classes; its weights come from the run's seed.

    Args:
        part: What is configured.
        seed: The run's.
        input_shape: Channels, height and width of an image.
        index: Which network of the run this is.
    """
    with seeded(seed, "network", *([index] if index else [])):
        network: Network = models[part.name](input_shape, **part.parameters)
    return network


def make_distillation(config: RunConfig) -> WeightedSum | None:
    """The distillation terms of a config; None if there are none."""
    terms, schedules, task_weights = {}, {}, {}
    for name, values in config.kd.items():
        counting = counting_of(values)
        own = {"method", "weight", "task_weight", *counting}
        parameters = {key: value for key, value in values.items() if key not in own}
        if counting:
            schedules[name] = Counting(**counting).schedule()
        if "task_weight" in values:
            task_weights[name] = float(values["task_weight"])
        with seeded(config.seed, "kd", name):
            terms[name] = (float(values.get("weight", 1.0)), distillers[values.get("method", name)](**parameters))
    task_weight = min(task_weights.values(), default=1.0)
    return WeightedSum(terms, schedules=schedules, task_weight=task_weight) if terms else None


def make_learner(config: Config, network: Network) -> Learner:
    """The learner of a config around a network."""
    with seeded(config.seed, "learner"):
        distillation = make_distillation(config)
        learner: Learner = learners[config.learner.name](network, distillation, **config.learner.parameters)
    return learner


def make_samples(config: RunConfig, data: DataSet, tasks: TaskSequence, transform: Transform) -> Samples:
    """Training and evaluation samples: held-out images leave the training set and keep their ids."""
    strong = make_transform(config, data, "strong") if config.data.strong else None
    training, images = tasks.learned(data.train.labels), data.test
    evaluation, split = tasks.learned(data.test.labels), "test"
    if config.data.validation:
        _, held_out = validation_split(
            data.train.labels, config.data.validation, derive(config.split_seed, "validation")
        )
        labels = training.clone()
        training[held_out] = -1
        if config.evaluate_on == "validation":
            images, evaluation, split = data.train, torch.full_like(labels, -1), "validation"
            evaluation[held_out] = labels[held_out]
    return Samples(data.train, training, images, evaluation, transform, strong, split)


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

    config: RunConfig
    data: DataSet
    tasks: TaskSequence
    samples: Samples
    learner: Learner
    memory: ExemplarMemory
    precision: Precision
    reader: Reader

    @classmethod
    def build(cls, config: RunConfig) -> "Run":
        """Build every part of a run.

        Raises:
            ValueError: If a part cannot be built as configured.
        """
        data = open_data(config)
        tasks = cls.divide(config, data)
        return cls.around(config, data, tasks, make_samples(config, data, tasks, make_transform(config, data)))

    @classmethod
    def around(cls, config: RunConfig, data: DataSet, tasks: TaskSequence, samples: Samples) -> "Run":
        """Build what trains on samples that are there, from wherever they are.

        Raises:
            ValueError: If a part cannot be built as configured.
        """
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        device = resolve_device(config.device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # recorded steps belong to the current one
        repeat_exactly(device)
        precision = Precision.resolve(config.precision, device)
        eval_precision = precision
        if config.evaluation.precision is not None:
            eval_precision = Precision.resolve(config.evaluation.precision, device)
            if eval_precision.dtype != precision.dtype:
                raise ValueError(
                    f"evaluation.precision={config.evaluation.precision} does not go with precision={precision.name}: "
                    "fp64 weights are evaluated in fp64, and only they"
                )
        reader = Reader(samples.transform, eval_precision, config.evaluation.batch_size)
        learner = cls.make_learner(config, data, samples, reader).to(device, precision.dtype)
        exemplars = config.exemplars
        size = exemplars.size if learner.uses_memory else 0
        memory = ExemplarMemory(size=size, budget=exemplars.budget, selection=exemplars.selection)
        return cls(config, data, tasks, samples, learner, memory, precision, reader)

    # What a kind of run does in its own way; as it stands here, class by class

    @classmethod
    def divide(cls, config: RunConfig, data: DataSet) -> TaskSequence:
        """The division of the data set into tasks."""
        assert isinstance(config, Config)
        return make_tasks(config, data)

    @classmethod
    def make_learner(cls, config: RunConfig, data: DataSet, samples: Samples, reader: Reader) -> Learner:
        """The method around a network."""
        assert isinstance(config, Config)
        network = make_network(config.model, config.seed, data.train.input_shape)
        learner = make_learner(config, network)
        if config.kd:
            try:
                learner.rehearse(config.optim)
            except ValueError as error:
                names = f"learner={config.learner.name} model={config.model.name}"
                raise ValueError(f"kd={'+'.join(config.kd)} does not go with {names}: {error}") from error
        return learner

    @property
    def num_stages(self) -> int:
        """How many stages there are."""
        return self.tasks.num_tasks

    def stage(self, index: int) -> Stage:
        """What the learner is told about a stage."""
        return Stage(index, self.tasks.labels(index), self.config.optim, bool(self.memory.size))

    def describe(self) -> str:
        """The stages in a line."""
        return self.tasks.describe()

    def metrics(self, history: History, num_images: np.ndarray, wall_seconds: float) -> dict[str, Any]:
        """The content of `metrics.json`."""
        assert isinstance(self.config, Config)
        return metrics(self.config, self.data, self.tasks, history, num_images, wall_seconds)

    def started(self, log: EventLog | SilentLog, progress: Progress) -> None:
        """Before the first stage of a run that goes on from no state: what is to be looked at and kept."""

    def facts(self, stage: Stage) -> dict[str, Any]:
        """What `stage.json` says beyond what is true of every kind of run."""
        return {}

    def tell(self, progress: Progress, history: History, num_images: np.ndarray, stage: Stage) -> None:
        """Say what came out of a stage."""
        progress.table(history.matrix(num_images), stage.index)
