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


def test_what_does_not_fit_in_memory_is_refused():
    with pytest.raises(ValueError, match=r"would take 167\.5 GiB, more than 8: lower num_classes"):
        data_sets["synthetic"](Path(), num_classes=1000, images_per_class=1175, image_size=224)
    with pytest.raises(ValueError, match="no effect on synthetic"):
        data_sets["synthetic"](Path(), download=True)
