from pathlib import Path

import numpy as np
import pytest
import torch

from cil.data import MissingData, data_sets


def arrays(**changes):
    generator = np.random.default_rng(0)
    good = {
        "x_train": generator.integers(0, 256, (9, 5, 6, 3)).astype(np.uint8),
        "y_train": np.array([0, 1, 2] * 3),
        "x_test": generator.integers(0, 256, (3, 5, 6, 3)).astype(np.uint8),
        "y_test": np.array([2, 1, 0]),
    }
    return {key: value for key, value in (good | changes).items() if value is not None}


def load(folder, **changes):
    np.savez(folder / "mine.npz", **arrays(**changes))
    return data_sets["npz"](Path(), path=str(folder / "mine.npz")).load()


def test_colour_images_become_channels_first(tmp_path):
    data = load(tmp_path)
    assert data.input_shape == (3, 5, 6)
    np.testing.assert_array_equal(data.train.images.numpy(), arrays()["x_train"].transpose(0, 3, 1, 2))
    assert data.train.images.is_contiguous()
    assert data.test.labels.tolist() == [2, 1, 0]
    assert data.class_names == ("0", "1", "2")


def test_grey_images_may_come_without_channels(tmp_path):
    grey = arrays()["x_train"][..., 0], arrays()["x_test"][..., 0]
    data = load(tmp_path, x_train=grey[0], x_test=grey[1])
    assert data.input_shape == (1, 5, 6)
    np.testing.assert_array_equal(data.train.images[:, 0].numpy(), grey[0])


def test_statistics_are_those_of_the_training_images(tmp_path):
    data = load(tmp_path)
    scaled = arrays()["x_train"] / 255
    assert data.mean == pytest.approx(scaled.mean(axis=(0, 1, 2)), abs=1e-12)
    assert data.std == pytest.approx(scaled.std(axis=(0, 1, 2)), abs=1e-12)


def test_class_names_and_small_labels_are_read(tmp_path):
    data = load(tmp_path, classes=np.array(["cat", "dog", "eel"]), y_test=np.array([2, 1, 0], dtype=np.uint8))
    assert data.class_names == ("cat", "dog", "eel")
    assert data.test.labels.dtype == torch.int64


def test_a_missing_file_is_missing_data_with_the_place():
    source = data_sets["npz"](Path(), path="no/such.npz")
    with pytest.raises(MissingData, match=r"no/such\.npz.*data\.path=FILE"):
        source.check()


def test_there_is_nothing_to_download():
    with pytest.raises(ValueError, match="no effect on npz"):
        data_sets["npz"](Path(), path="mine.npz", download=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, r"has no y_test; found x_train, y_train, x_test"),
        ({"x_train": arrays()["x_train"].astype(np.float32) / 255}, "x_train must be uint8 .* found float32"),
        ({"x_test": arrays()["x_test"].astype(np.int64)}, "x_test must be uint8 .* found int64"),
        ({"x_train": arrays()["x_train"][:, 0, 0]}, r"x_train must have shape .* found \(9, 3\)"),
        ({"x_train": np.zeros((0, 5, 6, 3), np.uint8)}, r"none of them 0; found \(0, 5, 6, 3\)"),
        ({"x_train": np.zeros((9, 3, 5, 6), np.uint8)}, r"channels first: store x_train\.transpose\(0, 2, 3, 1\)"),
        ({"x_test": arrays()["x_test"][:, :4]}, r"must agree .* \(3, 5, 6\) and \(3, 4, 6\)"),
        ({"y_train": np.zeros(9)}, "y_train must be whole numbers .* found float64"),
        ({"y_train": np.zeros((9, 1), int)}, r"y_train must be whole numbers .* of \(9, 1\)"),
        ({"y_train": np.array([0, 1, 2])}, "equally long, found 9 and 3"),
        ({"y_test": np.array([-1, 1, 2])}, "y_test must count from 0, found -1"),
        (
            {"y_test": np.array([3, 1, 0])},
            r"classes with test images must have training images; found otherwise: \[3\]",
        ),
        ({"y_test": np.array([1, 1, 0])}, r"classes with training images must have test images.*\[2\]"),
        (
            {"y_train": np.array([0, 1, 3] * 3), "y_test": np.array([3, 1, 0])},
            r"labels must have no gaps.*\[2\]",
        ),
        ({"classes": np.array(["cat", "dog"])}, r"must lie in 0 to 1 \(there are 2 classes\).*\[2\]"),
        ({"classes": np.array(["a", "b", "c", "d"])}, r"every class must have images.*\[3\]"),
        ({"classes": np.array(["a", "b", "a"])}, "different names"),
        ({"y_train": np.array([0, 1, None] * 3)}, "holds Python objects, which could run code"),
    ],
)
def test_a_wrong_array_is_named_with_what_would_be_right(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path, **changes)
    assert "mine.npz is not usable as a data set" in str(caught.value)


@pytest.mark.parametrize("keep", [0, 10, 300, 700, -1, -40])
def test_a_truncated_file_is_refused_by_name(tmp_path, keep):
    path = tmp_path / "mine.npz"
    np.savez(path, **arrays())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"mine\.npz is not usable as a data set"):
        data_sets["npz"](Path(), path=str(path)).load()


@pytest.mark.parametrize("keep", [400, 900, 1200])
def test_a_damaged_compressed_file_is_refused_by_name(tmp_path, keep):
    path = tmp_path / "mine.npz"
    np.savez_compressed(path, **arrays())
    content = bytearray(path.read_bytes())
    content[keep // 2 : keep // 2 + 40] = b"?" * 40
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"mine\.npz is not usable as a data set"):
        data_sets["npz"](Path(), path=str(path)).load()


def test_a_single_array_is_no_archive(tmp_path):
    np.save(tmp_path / "mine.npy", arrays()["x_train"])
    with pytest.raises(ValueError, match=r"mine\.npy is not usable as a data set"):
        data_sets["npz"](Path(), path=str(tmp_path / "mine.npy")).load()
