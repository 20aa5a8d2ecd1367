"""From a checked config to the parts of a run. Nothing is written here."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cil.config import Config, Counting, counting_of
from cil.data import DataSet, Images, Transform, augmentations, data_sets, validation_split
from cil.evaluation import Reader
from cil.learners.base import Learner, learners
from cil.memory import ExemplarMemory
from cil.models.network import Network, models
from cil.precision import Precision, resolve_device
from cil.seeding import derive, seeded
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
        eval_split: "test" or "validation".
    """

    images: Images
    labels: Tensor
    eval_images: Images
    eval_labels: Tensor
    transform: Transform
    eval_split: str


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
            f"memory.size={config.memory.size} has no room for an exemplar of each of the {tasks.num_classes} classes: "
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
    terms, schedules = {}, {}
    for name, values in config.kd.items():
        counting = counting_of(values)
        parameters = {key: value for key, value in values.items() if key not in {"method", "weight", *counting}}
        if counting:
            schedules[name] = Counting(**counting).schedule()
        with seeded(config.seed, "kd", name):
            terms[name] = (float(values.get("weight", 1.0)), distillers[values.get("method", name)](**parameters))
    return WeightedSum(terms, schedules=schedules) if terms else None


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
    kept, held_out = validation_split(data.train.labels, config.data.validation, derive(config.seed, "validation"))
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
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        device = resolve_device(config.device)
        precision = Precision.resolve(config.precision, device)
        data = open_data(config)
        tasks = make_tasks(config, data)
        transform = make_transform(config, data)
        network = make_network(config, data.train.input_shape)
        learner = make_learner(config, network).to(device, precision.dtype)
        size = config.memory.size if learner.uses_memory else 0
        memory = ExemplarMemory(size=size, budget=config.memory.budget, selection=config.memory.selection)
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
