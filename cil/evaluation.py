"""Reading a data set with a learner: counts of right answers, and features for the choice of exemplars."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from cil.data import Images, Transform
from cil.distributed import share
from cil.learners.base import Learner
from cil.precision import Precision
from cil.seeding import SampleNoise
from kd.distributed import all_reduce_sum, gather, world_size
from kd.precision import full_precision

TOP_K = 5


@dataclass(frozen=True)
class Counts:
    """What an evaluation found.

    Attributes:
        correct: Right answers per task.
        num_images: Images per task.
        top5: Answers among the best `TOP_K` classes (or all, if fewer are known), over all tasks.
        confusion: Images by true class (row) and answer (column), in learned order.
    """

    correct: list[int]
    num_images: list[int]
    top5: int
    confusion: Int[Tensor, "classes classes"] | None = field(default=None, compare=False, repr=False)

    @property
    def accuracy(self) -> float:
        """Fraction of right answers over all images."""
        return sum(self.correct) / sum(self.num_images)

    def part(self, tasks: slice) -> float | None:
        """The same over some tasks; None if there are none."""
        images = sum(self.num_images[tasks])
        return sum(self.correct[tasks]) / images if images else None


@dataclass(frozen=True)
class Reader:
    """Runs a learner over clean images.

    Attributes:
        transform: Makes a network's input of uint8 images.
        precision: Number format.
        batch_size: Images at a time.
    """

    transform: Transform
    precision: Precision
    batch_size: int

    def _run(
        self,
        answer: Callable[[Tensor], Tensor],
        images: Images,
        ids: Int[Tensor, " samples"],
        noise_key: int | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        context: AbstractContextManager[object] = self.precision.autocast()
        plan = [(some, torch.zeros_like(some)) for some in torch.split(ids, self.batch_size)]
        for (some, _), pixels in zip(plan, images.stream(plan, noise_key), strict=True):
            raw = pixels.to(self.precision.device, non_blocking=True)
            if noise_key is None:
                inputs = self.transform.test(raw)
            else:
                where = some.to(raw.device)
                inputs = self.transform.train(raw, SampleNoise(noise_key, where, torch.zeros_like(where)))
            with torch.inference_mode(), context:
                yield some, answer(inputs.to(self.precision.dtype))

    def count(
        self,
        learner: Learner,
        images: Images,
        labels: Int[Tensor, " all"],
        task_sizes: tuple[int, ...],
        means: Float[Tensor, "classes width"] | None = None,
    ) -> Counts:
        """Right answers of `learner` over the classes of the tasks in `task_sizes`; every process reads a share.

        Args:
            learner: Predicts.
            images: The images.
            labels: Labels of all images in learned order, negative where the class is not used.
            task_sizes: Classes of each task seen so far.
            means: Classify by the nearest of these (`class_means`) instead of by `predict`.
        """
        learner.eval()
        answer = learner.predict if means is None else nearest_to(means, learner)
        task_of_label = np.repeat(np.arange(len(task_sizes)), task_sizes)
        ids = share(torch.nonzero((labels >= 0) & (labels < len(task_of_label))).flatten())
        correct, total = np.zeros(len(task_sizes), dtype=np.int64), np.zeros(len(task_sizes), dtype=np.int64)
        top5, num_classes = 0, len(task_of_label)
        confusion = torch.zeros(num_classes**2, dtype=torch.int64)
        for some, logits in self._run(answer, images, ids):
            wanted = labels[some]
            best = logits.float().topk(min(TOP_K, logits.shape[1]), dim=1).indices.cpu()
            hits = best == wanted[:, None]
            tasks = task_of_label[wanted.numpy()]
            np.add.at(total, tasks, 1)
            np.add.at(correct, tasks, hits[:, 0].numpy().astype(np.int64))
            top5 += int(hits.sum())
            pairs = wanted.cpu() * num_classes + best[:, 0]
            confusion += torch.bincount(pairs, minlength=num_classes**2)
        found = torch.tensor([*correct, *total, top5], device=self.precision.device)
        *per_task, top5 = all_reduce_sum(found).tolist()
        confusion = all_reduce_sum(confusion.to(self.precision.device)).cpu().view(num_classes, num_classes)
        return Counts(per_task[: len(task_sizes)], per_task[len(task_sizes) :], top5, confusion)

    def class_means(
        self, learner: Learner, images: Images, ids: Int[Tensor, " exemplars"], labels: Int[Tensor, " exemplars"]
    ) -> Float[Tensor, "classes width"]:
        """The mean of every class's normalised features, normalised: the prototypes of iCaRL (arXiv:1611.07725).

        The nearest of them to a normalised feature is the one with the largest product. With the features of
        exemplars this is the nearest-mean-of-exemplars classifier. Every process gets all of them.

        Args:
            learner: Embeds.
            images: Where the exemplars are.
            ids: The exemplars.
            labels: Their classes, in learned order; every class up to the last has one.
        """
        features = F.normalize(self.features(learner, images, ids))
        sums = torch.zeros(int(labels.max()) + 1, features.shape[1], dtype=features.dtype)
        return F.normalize(sums.index_add_(0, labels, features))

    def logits(
        self, learner: Learner, images: Images, ids: Int[Tensor, " samples"]
    ) -> Float[Tensor, "samples classes"]:
        """Scores of some clean images; this process reads all of them."""
        return self.alone(learner, learner.predict, images, ids)

    def alone(
        self, learner: Learner, answer: Callable[[Tensor], Tensor], images: Images, ids: Int[Tensor, " samples"]
    ) -> Float[Tensor, "samples ..."]:
        """What `answer` makes of some clean images, with `learner` in evaluation; this process reads all of them."""
        learner.eval()
        return torch.cat([full_precision(part).cpu() for _, part in self._run(answer, images, ids)])

    def features(
        self, learner: Learner, images: Images, ids: Int[Tensor, " samples"], noise_key: int | None = None
    ) -> Float[Tensor, "samples width"]:
        """Embeddings of some images: of the clean ones, or of one augmented view each if there is a `noise_key`.

        Every process reads a share and gets all of them.
        """
        return full_precision(self.answers(learner, learner.embed, images, ids, noise_key)).cpu()

    def answers(
        self,
        learner: Learner,
        answer: Callable[[Tensor], Tensor],
        images: Images,
        ids: Int[Tensor, " samples"],
        noise_key: int | None = None,
    ) -> Float[Tensor, "samples ..."]:
        """What `answer` makes of images, as `features` shows them, with `learner` in evaluation; in its number format.

        Every process reads a share and gets all of them.
        """
        learner.eval()
        divided = len(ids) >= world_size()
        own = share(ids) if divided else ids
        found = torch.cat([part for _, part in self._run(answer, images, own, noise_key)])
        return gather(full_precision(found)).to(found.dtype) if divided and world_size() > 1 else found


def nearest_to(means: Float[Tensor, "classes width"], learner: Learner) -> Callable[[Tensor], Tensor]:
    """Scores by nearness: the product of an image's normalised features with every class's mean."""
    return lambda images: F.normalize(full_precision(learner.embed(images))) @ means.to(images.device).T
