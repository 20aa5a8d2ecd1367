from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cil.data import data_sets


def load(**parameters):
    return data_sets["synthetic"](Path(), **parameters).load()


@settings(max_examples=10)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 3), st.integers(2, 20), st.sampled_from([1, 3]))
def test_it_has_the_sizes_that_are_asked_for(num_classes, images, test_images, side, channels):
    data = load(
        num_classes=num_classes,
        images_per_class=images,
        test_images_per_class=test_images,
        image_size=side,
        channels=channels,
    )
    assert data.input_shape == (channels, side, side)
    assert data.num_classes == num_classes
    assert torch.bincount(data.train.labels).tolist() == [images] * num_classes
    assert torch.bincount(data.test.labels).tolist() == [test_images] * num_classes


def test_it_is_a_function_of_the_seed():
    assert load(seed=3).fingerprint() == load(seed=3).fingerprint() != load(seed=4).fingerprint()


def test_more_images_and_classes_leave_the_others_as_they_are():
    few, many = load(num_classes=3, images_per_class=4).train, load(num_classes=5, images_per_class=9).train
    for label in range(3):
        assert many.images[many.labels == label][:4].equal(few.images[few.labels == label])


def test_training_and_test_images_differ():
    data = load(num_classes=1, images_per_class=5, test_images_per_class=5)
    assert len(torch.unique(torch.cat([data.train.images, data.test.images]), dim=0)) == 10


def test_its_classes_can_be_told_apart_by_their_mean_images():
    data = load(num_classes=20, noise=0.2)
    means = torch.stack([data.train.images[data.train.labels == k].float().mean(0).flatten() for k in range(20)])
    distances = torch.cdist(data.test.images.float().flatten(1), means)
    assert (distances.argmin(dim=1) == data.test.labels).float().mean() > 0.95


def test_images_made_when_they_are_asked_for_are_the_same():
    sizes = {"num_classes": 3, "images_per_class": 10, "test_images_per_class": 4}
    kept, made = load(**sizes), load(**sizes, in_memory=False)
    for name in ("train", "test"):
        there, asked = getattr(kept, name), getattr(made, name)
        assert asked.labels.equal(there.labels)
        ids = torch.randperm(len(there), generator=torch.Generator().manual_seed(0))
        assert asked.fetch(ids).equal(there.images[ids])
        batches = [(ids[:2], ids[:2]), (ids[2:], ids[2:])]
        assert torch.cat(list(asked.stream(batches, key=1))).equal(there.images[ids])
    assert made.input_shape == kept.input_shape
    assert (made.mean, made.std) == (kept.mean, kept.std)
    assert made.fingerprint() == load(**sizes, in_memory=False).fingerprint()
    assert made.fingerprint() != load(**sizes, in_memory=False, noise=0.1).fingerprint()


def test_colours_of_very_many_images_are_those_of_some():
    sizes = {"num_classes": 5, "images_per_class": 100}
    for told, true in zip(load(**sizes, in_memory=False).mean, load(**sizes).mean, strict=True):
        assert told == pytest.approx(true, abs=0.01)


def test_the_size_of_imagenet_takes_no_memory():
    data = load(num_classes=1000, images_per_class=1281, test_images_per_class=50, image_size=224, in_memory=False)
    assert len(data.train) == 1_281_000
    assert data.train.fetch(torch.tensor([1_280_999])).shape == (1, 3, 224, 224)


def test_what_does_not_fit_in_memory_is_refused():
    with pytest.raises(ValueError, match=r"would take 167\.5 GiB, more than 8: lower .* or set data.in_memory=false"):
        data_sets["synthetic"](Path(), num_classes=1000, images_per_class=1175, image_size=224)
    with pytest.raises(ValueError, match="no effect on synthetic"):
        data_sets["synthetic"](Path(), download=True)
