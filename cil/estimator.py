"""A scikit-learn estimator: every call of `partial_fit` is a task of class-incremental learning."""

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from cil.build import Run, Samples, make_transform
from cil.checking import check
from cil.cli import compose
from cil.config import Config
from cil.data import DataSet
from cil.data.arrays import KeptImages
from cil.data.base import colour_statistics
from cil.engine import Engine, Position
from cil.events import SilentLog
from cil.loading import Model
from cil.optim import Carried
from cil.progress import Progress
from cil.tasks import TaskSequence

_SMALLEST_SIDE = 8  # of the square that a row of features becomes: what the small networks are made for
_WHITE = 255
#: Keys of a config that say something here; the others are about data sets, scenarios and run folders.
_KEYS = ("learner", "model", "kd", "optim", "memory", "data.augment", "data.strong", "precision", "num_threads")


class IncrementalClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """A class-incremental learner of this project behind scikit-learn's interface.

    `partial_fit(X, y)` learns the classes of `y` as one task after those that are known; of earlier tasks only the
    exemplars of the learner's memory are kept. `fit(X, y)` forgets everything and learns all classes as one task.
    Network, learner, engine and config are those of `train_incremental.py`: task after task with the same seed gives
    the same weights as a run of the command line.

    **Every class comes in one call.** A call whose `y` has a class that is known already is refused: it would be
    learned again without the balance that the learner's memory keeps.

    **X** is [samples, features], a row being the pixels of an image, or [samples, channels, height, width]. Rows become
    `image_shape`, or the smallest square of at least 8 x 8 that holds them, filled up with 0. uint8 are pixels; other
    numbers are brought to 0 .. 255, in 256 steps, by the least and the greatest number of the first call: scale
    features of a table first.

    Args:
        learner: A choice of `configs/learner`: dkt, icarl, der, replay, ...
        model: A choice of `configs/model` that goes with it: dkt_tiny, resnet8, ...
        optim: A choice of `configs/optim`.
        kd: Choices of `configs/kd`, as "kd" or "[dkt,kd]"; None for the learner's own.
        memory_size: `memory.size`; None for the config's.
        epochs: `optim.epochs`; None for the config's.
        batch_size: `optim.batch_size`; None for the config's.
        lr: `optim.lr`; None for the config's.
        image_shape: (height, width) or (channels, height, width) of a row; None for a square.
        config: More config keys, as {"learner.finetune_epochs": 5, "data.augment": {"crop": {"padding": 1}}}.
        device: `auto`, `cpu`, `cuda`, ...
        random_state: Seed of everything random, or a generator to draw it from.
        verbose: Show the progress.

    Attributes:
        classes_: All classes, sorted: those learned so far, or those that the first `partial_fit` announced.
        learned_classes_: Those learned so far, in the order of learning.
        n_features_in_: Numbers in an image.
        image_shape_: Channels, height and width of an image.
        model_: The `cil.Model`, as `cil.load` gives it: for `cil.export.export`, or for its network.
    """

    image_shape_: tuple[int, int, int]
    _bounds: tuple[float, float]
    _announced: NDArray[Any] | None

    def __init__(
        self,
        learner: str = "dkt",
        *,
        model: str = "dkt_tiny",
        optim: str = "adamw",
        kd: str | None = None,
        memory_size: int | None = None,
        epochs: int | None = None,
        batch_size: int | None = None,
        lr: float | None = None,
        image_shape: tuple[int, ...] | None = None,
        config: Mapping[str, Any] | None = None,
        device: str = "auto",
        random_state: int | np.random.RandomState | None = None,
        verbose: bool = False,
    ) -> None:
        self.learner = learner
        self.model = model
        self.optim = optim
        self.kd = kd
        self.memory_size = memory_size
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.image_shape = image_shape
        self.config = config
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: Any) -> "IncrementalClassifier":
        """Forget everything, and learn all classes as the first task.

        Args:
            X: Images, see the class.
            y: Their classes.

        Raises:
            ValueError: If they, or a parameter, are not as described.
        """
        return self._learn(X, y, None, first=True)

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> "IncrementalClassifier":
        """Learn the classes of `y` as the next task.

        Args:
            X: Images, see the class.
            y: Their classes, none of which is known.
            classes: All classes that will ever come, told in the first call or not at all. Those to come get the
                probability 0. `memory.budget=fixed_total` divides by their number and needs it.

        Raises:
            ValueError: If they, or a parameter, are not as described.
        """
        return self._learn(X, y, classes, first=not self.__sklearn_is_fitted__())

    def predict(self, X: Any) -> NDArray[Any]:
        """The likeliest of the classes learned so far, for every image."""
        best = np.argmax(self._probabilities(X), axis=1)
        found: NDArray[Any] = self.learned_classes_[best]
        return found

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """How sure the learner is of each of `classes_` (`Model.predict_proba`); rows sum to 1."""
        known = self._probabilities(X)
        found = np.zeros((len(known), len(self.classes_)))
        found[:, np.searchsorted(self.classes_, self.learned_classes_)] = known
        return found

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "run_")

    # Learning

    def _learn(self, X: Any, y: Any, classes: Any, *, first: bool) -> "IncrementalClassifier":
        rows, shape = _rows(X)
        rows, labels = validate_data(self, rows, y, reset=first, ensure_min_samples=2)
        check_classification_targets(labels)
        new, targets = np.unique(labels, return_inverse=True)
        announced = None if classes is None else np.unique(np.asarray(classes))
        if not first:
            self._check_new(new, announced)
        elif announced is not None and len(strange := np.setdiff1d(new, announced)):
            raise ValueError(f"y holds {_some(strange)}, not among the classes announced: {_some(announced)}")
        if first:
            bounds = (0.0, float(_WHITE)) if rows.dtype == np.uint8 else (float(rows.min()), float(rows.max()))
            place = self._shape(rows.shape[1], shape)
        else:
            bounds, place = self._bounds, self.image_shape_
        images = _pixels(rows, bounds, place)
        if first:
            run, carried, learned = self._first(images, torch.from_numpy(targets), len(new), announced), {}, new
        else:
            run, carried = self._next(images, torch.from_numpy(targets), len(new)), dict(self._carried)
            learned = np.concatenate([self.learned_classes_, new])
        self._train(run, carried, learned)  # on copies: what fails leaves what was learned before
        self._bounds, self.image_shape_ = bounds, place
        if first:
            self._announced = announced
        self.classes_ = np.unique(learned) if self._announced is None else self._announced
        return self

    def _check_new(self, new: NDArray[Any], announced: NDArray[Any] | None) -> None:
        if len(known := np.intersect1d(new, self.learned_classes_)):
            raise ValueError(
                f"y holds {_some(known)}, learned in an earlier call: every class comes in one call with all its "
                "samples; fit begins again"
            )
        expected = self._announced
        if announced is not None and (expected is None or not np.array_equal(announced, expected)):
            raise ValueError(
                f"classes={_some(announced)} in a later call: they are announced in the first one, which "
                f"{'announced none' if expected is None else 'announced ' + _some(expected)}"
            )
        if expected is not None and len(strange := np.setdiff1d(new, expected)):
            raise ValueError(f"y holds {_some(strange)}, not among the classes announced: {_some(expected)}")

    def _first(self, images: Tensor, targets: Tensor, num_new: int, announced: NDArray[Any] | None) -> Run:
        seed = self.random_state
        if not isinstance(seed, int | np.integer):
            seed = check_random_state(seed).randint(2**31)
        config = _config(tuple(self._words())).model_copy(update={"seed": int(seed)})
        rest = 0 if announced is None else len(announced) - num_new
        if config.memory.budget == "fixed_total" and announced is None:
            raise ValueError(
                "memory.budget=fixed_total divides by the number of all classes: announce them to the first call of "
                "partial_fit with classes=, or use memory.budget=total"
            )
        sizes = (num_new, rest) if rest else (num_new,)
        nothing = torch.empty(0, dtype=torch.int64)
        kept = KeptImages(images[:0], nothing, nothing).with_new(images, targets)
        mean, std = colour_statistics(images)
        return Run.around(config, *_parts(config, kept, sizes, mean, std))

    def _next(self, images: Tensor, targets: Tensor, num_new: int) -> Run:
        """The run with the next task, around copies of what learns."""
        run: Run = self.run_
        assert isinstance(run.config, Config)
        assert isinstance(run.data.train, KeptImages)
        known = len(self.learned_classes_)
        kept = run.data.train.with_new(images, targets + known)
        sizes = [*run.learner.network.task_sizes, num_new]
        if rest := run.tasks.num_classes - sum(sizes) if self._announced is not None else 0:
            sizes.append(rest)
        data, tasks, samples = _parts(run.config, kept, tuple(sizes), run.data.mean, run.data.std)
        learner, memory = copy.deepcopy(run.learner), copy.deepcopy(run.memory)
        return replace(run, data=data, tasks=tasks, samples=samples, learner=learner, memory=memory)

    def _train(self, run: Run, carried: dict[str, Carried], learned: NDArray[Any]) -> None:
        learner = run.learner
        stage = run.stage(learner.network.num_tasks)
        engine = Engine(run, SilentLog())
        engine.position, engine.carried = Position(stage.index), carried
        total = sum(engine.batches.num_images(stage, phase) for phase in learner.phases(stage))
        engine.progress = Progress(total_images=total, num_stages=stage.index + 1, quiet=not self.verbose)
        with engine.progress:
            engine.train(stage)
            means = engine.class_means(stage) if learner.read_by == "nearest_mean" else None
        needs_all = any(phase.source == "seen" for phase in learner.phases(stage))
        images = run.data.train
        assert isinstance(images, KeptImages)
        assert isinstance(run.config, Config)
        if not needs_all:
            images = images.only(run.memory.ids())
        data, tasks, samples = _parts(run.config, images, run.tasks.task_sizes, run.data.mean, run.data.std)
        self.run_ = replace(run, data=data, tasks=tasks, samples=samples)
        self._carried = engine.carried
        self.learned_classes_ = learned
        names = tuple(str(name) for name in learned)
        labels = tuple(range(len(learned)))
        network = learner.network.eval()
        self.model_ = Model(network, names, labels, samples.transform, run.config, run.config.model, stage.index, means)

    def _words(self) -> Iterator[str]:
        """The parameters as overrides of a config."""
        for group in ("learner", "model", "optim", "kd"):
            if getattr(self, group) is not None:
                yield f"{group}={getattr(self, group)}"
        yield from ("data=npz", "data.name=arrays", "precision=fp32", f"device={self.device}")
        named = {"memory.size": self.memory_size, "optim.epochs": self.epochs, "optim.batch_size": self.batch_size}
        for key, value in {**named, "optim.lr": self.lr}.items():
            if value is not None:
                yield f"{key}={json.dumps(value)}"
        for key, value in (self.config or {}).items():
            if not any(key == known or key.startswith(f"{known}.") for known in _KEYS):
                raise ValueError(f"config: {key} has no effect here. Known: {', '.join(_KEYS)}, and keys below them")
            yield from _overrides(key, value)

    # Images

    def _shape(self, num_features: int, found: tuple[int, ...] | None) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        given = self.image_shape if self.image_shape is not None else found
        if given is None:
            side = max(_SMALLEST_SIDE, int(np.ceil(np.sqrt(num_features))))
            return 1, side, side
        shape = tuple(int(side) for side in given)
        shape = (1, *shape) if len(shape) == 2 else shape
        if len(shape) != 3 or np.prod(shape) != num_features or (found is not None and shape != found):
            what = f"images of {found}" if found else f"rows of {num_features} features"
            raise ValueError(
                f"image_shape={self.image_shape} does not fit X, {what}: "
                "it is (height, width) or (channels, height, width), and their product the number of features"
            )
        channels, height, width = shape
        return channels, height, width

    def _probabilities(self, X: Any) -> NDArray[np.float64]:
        """Of `learned_classes_`."""
        check_is_fitted(self)
        rows, _ = _rows(X)
        rows = validate_data(self, rows, reset=False)
        images = _pixels(rows, self._bounds, self.image_shape_)
        parts = torch.split(images, self.run_.config.evaluation.batch_size)
        shares = torch.cat([self.model_.predict_proba(part).double().cpu() for part in parts])
        found: NDArray[np.float64] = (shares / shares.sum(dim=1, keepdim=True)).numpy()
        return found


@lru_cache(maxsize=64)
def _config(words: tuple[str, ...]) -> Config:
    """The checked config of some overrides; composing one takes longer than training a small network."""
    config = check(compose(["name=estimator", "checkpoint.every_seconds=null", *words]))
    assert isinstance(config, Config)
    return config


def _overrides(key: str, value: Any) -> Iterator[str]:
    if isinstance(value, Mapping) and value:
        for inner, own in value.items():
            yield from _overrides(f"{key}.{inner}", own)
    else:
        yield f"{key}={value if isinstance(value, str) else json.dumps(value)}"


def _parts(
    config: Config, images: KeptImages, sizes: tuple[int, ...], mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[DataSet, TaskSequence, Samples]:
    """Data set, tasks and samples of what is there; accuracies on the way are those on the training images."""
    tasks = TaskSequence(tuple(range(sum(sizes))), sizes)
    data = DataSet("arrays", images, images, tuple(map(str, range(sum(sizes)))), mean, std)
    evaluation = torch.where(images.is_there, images.labels, -1)
    strong = make_transform(config, data, "strong") if config.data.strong else None
    transform = make_transform(config, data)
    return data, tasks, Samples(images, images.labels, images, evaluation, transform, strong, "training")


def _rows(X: Any) -> tuple[Any, tuple[int, ...] | None]:
    """One row for each image, and the shape of an image where X has it; everything else is as it was."""
    if isinstance(X, Tensor):
        X = X.cpu().numpy()
    if isinstance(X, np.ndarray) and X.ndim == 4:
        return X.reshape(len(X), -1), X.shape[1:]
    return X, None


def _pixels(rows: NDArray[Any], bounds: tuple[float, float], shape: tuple[int, int, int]) -> Tensor:
    """Rows of numbers as uint8 images."""
    if rows.dtype != np.uint8 or bounds != (0.0, float(_WHITE)):
        low, high = bounds
        scaled = (rows.astype(np.float64) - low) / (high - low if high > low else 1) * _WHITE
        rows = np.rint(np.clip(scaled, 0, _WHITE)).astype(np.uint8)
    missing = int(np.prod(shape)) - rows.shape[1]
    padded = np.pad(rows, ((0, 0), (0, missing))) if missing else rows
    return torch.from_numpy(np.ascontiguousarray(padded).reshape(len(rows), *shape))


def _some(values: NDArray[Any], most: int = 5) -> str:
    shown = ", ".join(map(str, values[:most].tolist()))
    return f"{'class' if len(values) == 1 else 'classes'} {shown}{' ...' if len(values) > most else ''}"
