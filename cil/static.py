"""Runs of static distillation: the parts that differ from those of a class-incremental run."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cil import checkpoint
from cil.build import Run, Samples, make_distillation, make_network
from cil.config import Part, RunConfig, StaticConfig
from cil.data import DataSet
from cil.distillation import StaticDistillation
from cil.distributed import num_launched
from cil.evaluation import Reader
from cil.events import EventLog, SilentLog
from cil.learners.base import Learner
from cil.models.network import Network
from cil.progress import Progress
from cil.results import History, static_metrics
from cil.search import SearchResult, find_student
from cil.stages import Stage
from cil.tasks import TaskSequence, task_sequence
from cil.teacher_cache import TeacherCache
from cil.teachers import Teacher, load_teacher, pinned
from kd.distributed import rank


class StaticRun(Run):
    """Every stage trains one network on all classes, beside the network before it."""

    @classmethod
    def divide(cls, config: RunConfig, data: DataSet) -> TaskSequence:
        """All classes as one task, in their natural order."""
        return task_sequence(len(data.class_names), task_sizes=[len(data.class_names)])

    @classmethod
    def make_learner(cls, config: RunConfig, data: DataSet, samples: Samples, reader: Reader) -> Learner:
        """The student, and who it learns from."""
        assert isinstance(config, StaticConfig)
        shape, precision = data.train.input_shape, reader.precision
        given: Teacher | None = None
        if config.teacher is not None:
            given = load_teacher(pinned(config.folder, config), config, data, precision.device)
            given.network.to(precision.dtype)

        found = found_student(config, data, samples, reader, given) if given is not None else None
        networks = with_student(config, found)

        def network(index: int) -> Network:
            return make_network(networks[index][1], config.seed, shape, index)

        def teacher(index: int) -> Network | None:
            if index == 0:
                return given.network if given is not None else None
            before = trained(config, networks[index - 1][1], shape, index - 1, precision.device)
            return before.to(precision.device, precision.dtype)

        cache = None
        if config.teacher_cache is not None and given is not None:
            cache = make_cache(config, data, samples, reader, given)
        learner = StaticDistillation(network(0), network, lambda: make_distillation(config), teacher, given, cache)
        learner.found = found
        return learner

    @property
    def static(self) -> StaticConfig:
        """The config, by its kind."""
        assert isinstance(self.config, StaticConfig)
        return self.config

    @property
    def teacher(self) -> Teacher | None:
        """Who the first network learns from."""
        assert isinstance(self.learner, StaticDistillation)
        return self.learner.given

    @property
    def networks(self) -> list[tuple[str, Part]]:
        """The networks in the order in which they are trained, by name."""
        assert isinstance(self.learner, StaticDistillation)
        return with_student(self.static, self.learner.found)

    @property
    def num_stages(self) -> int:
        """How many networks are trained."""
        return len(self.networks)

    def stage(self, index: int) -> Stage:
        """What the learner is told about a stage."""
        return Stage(index, self.tasks.labels(0), self.config.optim, has_memory=False)

    def describe(self) -> str:
        """The networks in a line."""
        names = [name for name, _ in self.networks]
        path = " -> ".join([self.static.teacher, *names] if self.static.teacher else names)
        return f"{path}; {self.tasks.num_classes} classes, kd {'+'.join(self.config.kd) or 'none'}"

    def started(self, log: EventLog | SilentLog, progress: Progress) -> None:
        """See what the teacher knows, say so, and keep who it is. Every process reads a share.

        Raises:
            ValueError: If it knows less, or more, than its run says.
        """
        assert isinstance(self.learner, StaticDistillation)
        if self.teacher is None:
            return
        if (searched := self.learner.found) is not None:
            progress.say(f"search: {searched.winner.code} of {len(searched.candidates)} candidates")
            if rank() == 0:
                checkpoint.write_json(self.config.folder / SEARCH, searched.model_dump(mode="json"))
        sizes = self.tasks.task_sizes
        found = self.reader.count(
            Learner(self.teacher.network, None), self.samples.eval_images, self.samples.eval_labels, sizes
        )
        self.teacher.check(found.accuracy)
        progress.say(f"teacher {self.teacher.folder.name}: accuracy {100 * found.accuracy:.2f} %")
        log.write("test_read", stage=0, when="teacher", split=self.samples.eval_split, num_images=sum(found.num_images))
        facts = {
            "folder": str(self.teacher.folder.resolve()),
            "checksum": self.teacher.checksum,
            "accuracy": found.accuracy,
            "split": self.samples.eval_split,
        }
        log.write("teacher_loaded", **facts)
        if rank() == 0:
            checkpoint.write_json(self.config.folder / "teacher.json", facts)

    def metrics(self, history: History, num_images: np.ndarray, wall_seconds: float) -> dict[str, Any]:
        """The content of `metrics.json`."""
        finished = len(history.correct) == self.num_stages
        ensembles = self.ensembles() if finished and self.static.generations > 1 and rank() == 0 else {}
        teacher = None
        if (path := self.config.folder / "teacher.json").is_file():
            kept = checkpoint.read_json(path)
            teacher = {"name": Path(kept["folder"]).name, "accuracy": kept["accuracy"], "checksum": kept["checksum"]}
        return static_metrics(
            self.static,
            self.data,
            self.tasks,
            history,
            num_images,
            wall_seconds,
            networks=[name for name, _ in self.networks],
            teacher=teacher,
            ensembles=ensembles,
        )

    @torch.inference_mode()
    def ensembles(self) -> dict[int, float]:
        """Accuracy of the mean of the probabilities of the last 2, 3, ... generations (Born-Again)."""
        labels = self.samples.eval_labels
        ids = torch.nonzero(labels >= 0).flatten()
        total: Float[Tensor, "images classes"] | None = None
        found = {}
        for count in range(1, self.static.generations + 1):
            index = self.num_stages - count
            shape, device = self.data.train.input_shape, self.precision.device
            network = trained(self.static, self.networks[index][1], shape, index, device)
            learner = Learner(network.to(device, self.precision.dtype), None)
            logits = self.reader.logits(learner, self.samples.eval_images, ids)
            probabilities = logits.double().softmax(dim=1)
            total = probabilities if total is None else total + probabilities
            if count > 1:
                found[count] = float((total.argmax(dim=1) == labels[ids]).double().mean())
        return found

    def facts(self, stage: Stage) -> dict[str, Any]:
        """Which network this is."""
        name, part = self.networks[stage.index]
        return {"name": name, "model": part.model_dump(mode="json")}

    def tell(self, progress: Progress, history: History, num_images: np.ndarray, stage: Stage) -> None:
        """Say what came out of a stage."""
        accuracy = history.correct[-1][0] / int(num_images[0])
        progress.say(f"{self.networks[stage.index][0]}: accuracy {100 * accuracy:.2f} %")


def build(config: RunConfig) -> Run:
    """The parts of a run of either kind.

    Raises:
        ValueError: If a part cannot be built as configured.
    """
    return (StaticRun if isinstance(config, StaticConfig) else Run).build(config)


SEARCH = "search.json"


def found_student(
    config: StaticConfig, data: DataSet, samples: Samples, reader: Reader, teacher: Teacher
) -> SearchResult | None:
    """What the search for the student finds, or found when the run began; None if none is wanted.

    Raises:
        ValueError: If what it found is damaged, or there is nothing to find.
    """
    if config.search is None:
        return None
    path = config.folder / SEARCH
    if path.is_file() and not config.overwrite:
        return SearchResult.model_validate(checkpoint.read_json(path))
    ids = config.search.sample(samples.labels, config.seed)
    precision = reader.precision
    images = samples.transform.test(data.train.fetch(ids).to(precision.device))
    labels = samples.labels[ids].to(precision.device)
    num_classes = len(data.class_names)
    return find_student(config.search, data.train.input_shape, num_classes, images, labels, config.seed, teacher.part)


def with_student(config: StaticConfig, found: SearchResult | None) -> list[tuple[str, Part]]:
    """The networks of a run, with the student that a search found in the place of the named one."""
    if found is None:
        return config.networks
    student = (f"{found.settings.space}-{found.winner.code}", Part(**found.student))
    return [*config.assistants.items(), *[student] * config.generations]


def make_cache(config: StaticConfig, data: DataSet, samples: Samples, reader: Reader, teacher: Teacher) -> TeacherCache:
    """What a teacher said in other runs, if it, the images and the arithmetic were the same.

    Raises:
        ValueError: With several processes.
    """
    assert config.teacher_cache is not None
    if num_launched() > 1:
        raise ValueError("teacher_cache is for a single process: set teacher_cache=null, or do not start torchrun")
    views = config.data.model_dump(mode="json", include={"augment", "strong"})
    facts = {
        "teacher": teacher.checksum,
        "data": data.fingerprint(),
        "views": views if config.data.strong else {"augment": views["augment"]},
        "batch_size": config.optim.batch_size,
        "precision": reader.precision.name,
        "device": reader.precision.device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    ids = torch.nonzero(samples.labels >= 0).flatten()
    return TeacherCache(config.teacher_cache.folder, facts, ids, max_gib=config.teacher_cache.max_gib)


def trained(
    config: StaticConfig, part: Part, input_shape: tuple[int, int, int], index: int, device: torch.device
) -> Network:
    """The network of a finished stage.

    Raises:
        ValueError: If its weights are missing or damaged.
    """
    folder = checkpoint.stage_folder(config.folder, index)
    network = make_network(part, config.seed, input_shape, index)
    network.rebuild(checkpoint.read_json(folder / "stage.json")["network"])
    network.load_state_dict(checkpoint.load_network(folder, device))
    return network.eval()
