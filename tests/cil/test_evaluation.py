import pytest
import torch
from torch import Tensor

from cil.data import ImageSet, Transform, augmentations
from cil.evaluation import TOP_K, Counts, Reader
from cil.learners.base import Learner
from cil.models.network import Network
from cil.precision import Precision
from kd import Outputs

CPU = torch.device("cpu")
CLEAN = Transform([], (0.0,), (1.0,))
NUM_IMAGES = 60


class Reading(Network):
    """Scores written in the image: the first pixels of the first row, one a class."""

    def _grow(self, num_new: int) -> None: ...

    def forward(self, images: Tensor) -> Outputs:
        rows = images[:, 0, 0]
        return Outputs(rows[:, : self.num_classes].contiguous(), rows)


@pytest.fixture
def learner() -> Learner:
    network = Reading((1, 2, 9), 9)
    for num_new in (3, 1, 2):
        network.grow(num_new)
    return Learner(network, None)


@pytest.fixture
def images() -> ImageSet:
    pixels = torch.randint(256, (NUM_IMAGES, 1, 2, 9), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    return ImageSet(pixels, torch.zeros(NUM_IMAGES, dtype=torch.int64))


@pytest.fixture
def labels() -> Tensor:
    """Of 8 classes, of which 6 are known; some images are not used."""
    return torch.randint(-1, 8, (NUM_IMAGES,), generator=torch.Generator().manual_seed(4))


def reader(batch_size: int = 16, precision: str = "fp32", transform: Transform = CLEAN) -> Reader:
    return Reader(transform, Precision(precision, CPU), batch_size)


def test_right_answers_are_counted_by_task_over_all_known_classes(
    learner: Learner, images: ImageSet, labels: Tensor
) -> None:
    counts = reader().count(learner, images, labels, (3, 1, 2))
    scores = images.images[:, 0, 0, :6].float()
    expected, total = [0, 0, 0], [0, 0, 0]
    top = 0
    for row, label in zip(scores, labels.tolist(), strict=True):
        if 0 <= label < 6:
            task = 0 if label < 3 else 1 if label < 4 else 2
            total[task] += 1
            expected[task] += int(row.argmax()) == label
            top += label in row.topk(TOP_K).indices.tolist()
    assert counts == Counts(expected, total, top)
    assert counts.confusion is not None
    right = counts.confusion.diagonal().split([3, 1, 2])
    assert [int(some.sum()) for some in right] == expected
    assert [int(some.sum()) for some in counts.confusion.sum(dim=1).split([3, 1, 2])] == total
    assert sum(total) < NUM_IMAGES


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_the_size_of_the_batches_does_not_matter(
    learner: Learner, images: ImageSet, labels: Tensor, batch_size: int
) -> None:
    assert reader(batch_size).count(learner, images, labels, (3, 1, 2)) == reader().count(
        learner, images, labels, (3, 1, 2)
    )


def test_with_few_classes_every_answer_is_among_the_best(learner: Learner, images: ImageSet, labels: Tensor) -> None:
    learner.network.task_sizes = [3]
    counts = reader().count(learner, images, labels, (3,))
    assert counts.top5 == sum(counts.num_images) == int(((labels >= 0) & (labels < 3)).sum())


def test_accuracies_of_parts_are_weighted_by_images() -> None:
    counts = Counts(correct=[1, 30], num_images=[2, 40], top5=42)
    assert counts.accuracy == 31 / 42
    assert counts.part(slice(0, 1)) == 0.5
    assert counts.part(slice(1, None)) == 0.75
    assert counts.part(slice(0, 0)) is None


def test_evaluation_is_done_in_evaluation_mode_and_leaves_no_gradient(
    learner: Learner, images: ImageSet, labels: Tensor
) -> None:
    learner.train()
    seen = []
    learner.network.register_forward_hook(
        lambda module, args, out: seen.append((module.training, torch.is_inference_mode_enabled(), args[0].dtype))
    )
    reader(1000).count(learner, images, labels, (3, 1, 2))
    assert seen == [(False, True, torch.float32)]
    assert not torch.is_inference_mode_enabled()


def test_the_clean_image_is_what_the_test_transform_makes(learner: Learner, images: ImageSet) -> None:
    found = reader(7).features(learner, images, torch.tensor([5, 3, 40]))
    assert found.equal(images.images[[5, 3, 40], 0, 0].float() / 255)


def test_features_come_in_the_order_of_the_ids_whatever_the_batches(learner: Learner, images: ImageSet) -> None:
    ids = torch.randperm(NUM_IMAGES, generator=torch.Generator().manual_seed(0))
    assert reader(7).features(learner, images, ids).equal(reader(1000).features(learner, images, ids))


def test_features_of_augmented_views_depend_on_key_and_sample_alone(learner: Learner, images: ImageSet) -> None:
    crop = Transform([augmentations["crop"](padding=2)], (0.0,), (1.0,))
    ids = torch.arange(NUM_IMAGES)
    found = reader(7, transform=crop).features(learner, images, ids, noise_key=11)
    part = reader(1000, transform=crop).features(learner, images, ids[20:30], noise_key=11)
    assert part.equal(found[20:30])
    assert not found.equal(reader(transform=crop).features(learner, images, ids, noise_key=12))
    assert not found.equal(reader(transform=crop).features(learner, images, ids))


def test_features_are_float32_or_better_in_every_format(learner: Learner, images: ImageSet) -> None:
    for precision, dtype in (("bf16", torch.float32), ("fp64", torch.float64)):
        found = reader(precision=precision).features(learner, images, torch.arange(4))
        assert found.dtype == dtype


def test_a_network_without_embedding_cannot_choose_exemplars(learner: Learner, images: ImageSet) -> None:
    class Silent(Reading):
        def forward(self, images: Tensor) -> Outputs:
            return Outputs(super().forward(images).logits)

    silent = Learner(Silent((1, 2, 9), 9), None)
    silent.network.grow(2)
    with pytest.raises(ValueError, match="Silent gives no embedding to choose exemplars by"):
        reader().features(silent, images, torch.arange(4))


def test_the_nearest_mean_is_that_of_the_normalised_features(
    learner: Learner, images: ImageSet, labels: Tensor
) -> None:
    ids = torch.nonzero((labels >= 0) & (labels < 6)).flatten()
    exemplars = ids[::2]
    means = reader().class_means(learner, images, exemplars, labels[exemplars])
    features = torch.nn.functional.normalize(images.images[:, 0, 0].float() / 255)
    by_hand = torch.stack([features[exemplars][labels[exemplars] == label].mean(0) for label in range(6)])
    torch.testing.assert_close(means, torch.nn.functional.normalize(by_hand))
    counts = reader().count(learner, images, labels, (3, 1, 2), means)
    nearest = torch.cdist(features[ids], means).argmin(dim=1)
    assert sum(counts.correct) == int((nearest == labels[ids]).sum())
    assert sum(counts.num_images) == len(ids)
