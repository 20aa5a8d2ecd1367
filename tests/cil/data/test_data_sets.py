import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from cil.data import DataSet, ImageSet, MissingData, data_sets
from cil.data.base import colour_statistics
from cil.data.cifar import Cifar10


@pytest.fixture(scope="module")
def digits():
    return data_sets["digits"](Path("nowhere")).load()


def small_set(seed: int = 0, channels: int = 3) -> ImageSet:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (6, channels, 4, 5), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.tensor([0, 1, 2, 0, 1, 2]))


def write_npz(path: Path, num_classes: int, side: int = 32) -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(num_classes)
    images = generator.integers(0, 256, (num_classes, side, side, 3)).astype(np.uint8)
    names = np.array([f"class {k}" for k in labels])
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels, classes=names)


def test_every_data_set_is_registered():
    assert {"digits", "cifar10", "cifar100", "npz"} <= set(data_sets)


def test_an_image_set_fetches_by_sample_id():
    images = small_set()
    assert len(images) == 6
    assert images.input_shape == (3, 4, 5)
    assert torch.equal(images.fetch(torch.tensor([4, 0])), images.images[[4, 0]])


def test_digits_split_each_class_in_file_order(digits):
    from sklearn.datasets import load_digits

    bunch = load_digits()
    assert digits.input_shape == (1, 8, 8)
    assert len(digits.train) + len(digits.test) == 1797
    for label in range(10):
        scans = np.rint(bunch.images[bunch.target == label] * 255 / 16).astype(np.uint8)
        train = digits.train.images[digits.train.labels == label][:, 0].numpy()
        test = digits.test.images[digits.test.labels == label][:, 0].numpy()
        assert len(train) == int(0.8 * len(scans))
        np.testing.assert_array_equal(np.concatenate([train, test]), scans)


def test_digits_use_the_whole_range_of_bytes(digits):
    assert digits.train.images.dtype == torch.uint8
    assert (int(digits.train.images.min()), int(digits.train.images.max())) == (0, 255)


def test_digits_statistics_are_those_of_the_training_images(digits):
    mean, std = colour_statistics(digits.train.images)
    assert digits.mean == pytest.approx(mean, abs=1e-6)
    assert digits.std == pytest.approx(std, abs=1e-6)


def test_digits_have_nothing_to_download():
    with pytest.raises(ValueError, match="no effect on digits"):
        data_sets["digits"](Path(), download=True)
    data_sets["digits"](Path()).check()


def test_colour_statistics_equal_those_of_floats():
    images = small_set().images
    scaled = images.double() / 255
    mean, std = colour_statistics(images)
    assert mean == pytest.approx(scaled.mean(dim=(0, 2, 3)).tolist(), abs=1e-12)
    assert std == pytest.approx(scaled.std(dim=(0, 2, 3), correction=0).tolist(), abs=1e-12)


def test_a_constant_channel_is_refused():
    images = small_set().images
    images[:, 1] = 9
    with pytest.raises(ValueError, match="channel 1 has the same value"):
        colour_statistics(images)


def test_the_fingerprint_is_repeatable_and_sees_every_part():
    def fingerprint(name="set", train=None, test=None, names=("a", "b", "c")) -> str:
        train, test = train or small_set(0), test or small_set(1)
        return DataSet(name, train, test, names, (0.5,) * 3, (0.2,) * 3).fingerprint()

    pixel = small_set(0)
    pixel.images[0, 0, 0, 0] ^= 1
    label = small_set(1)
    label.labels[3] = 1
    others = [
        fingerprint(name="other"),
        fingerprint(train=pixel),
        fingerprint(test=label),
        fingerprint(names=("a", "c", "b")),
        fingerprint(train=small_set(1), test=small_set(0)),
    ]
    assert fingerprint() == fingerprint()
    assert len({fingerprint(), *others}) == 6
    assert len(fingerprint()) == 64


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_missing_cifar_says_where_it_looked_and_what_fetches_it(tmp_path, name):
    source = data_sets[name](tmp_path)
    with pytest.raises(MissingData) as caught:
        source.check()
    message = str(caught.value)
    assert str(tmp_path / f"{name}.npz") in message
    assert str(tmp_path / source.files.base_folder) in message
    assert "data.download=true" in message
    with pytest.raises(MissingData):
        source.load()


def test_cifar_is_read_from_an_archive(tmp_path):
    write_npz(tmp_path / "cifar10.npz", 10)
    source = data_sets["cifar10"](tmp_path)
    source.check()
    data = source.load()
    assert data.name == "cifar10"
    assert data.input_shape == (3, 32, 32)
    assert data.class_names[3] == "class 3"
    with np.load(tmp_path / "cifar10.npz") as archive:
        np.testing.assert_array_equal(data.train.images.numpy(), archive["x_train"].transpose(0, 3, 1, 2))


def test_an_archive_of_something_else_is_no_cifar(tmp_path):
    write_npz(tmp_path / "cifar100.npz", 10)
    with pytest.raises(ValueError, match=r"must hold 100 classes of 3 x 32 x 32 images; found 10 of 3 x 32 x 32"):
        data_sets["cifar100"](tmp_path).load()
    write_npz(tmp_path / "cifar10.npz", 10, side=28)
    with pytest.raises(ValueError, match=r"found 10 of 3 x 28 x 28"):
        data_sets["cifar10"](tmp_path).load()


def test_cifar_is_read_from_the_files_of_torchvision(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (60, 3 * 32 * 32)).astype(np.uint8)
    batches = [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]
    for number, batch in enumerate(batches):
        content = {"data": pixels[10 * number : 10 * number + 10], "labels": list(range(10))}
        (folder / batch).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(Cifar10.files, "_check_integrity", lambda self: True)
    monkeypatch.setattr(Cifar10.files, "meta", Cifar10.files.meta | {"md5": None})
    data = data_sets["cifar10"](tmp_path).load()
    assert (len(data.train), len(data.test)) == (50, 10)
    assert data.class_names == tuple("abcdefghij")
    np.testing.assert_array_equal(data.train.images.numpy().reshape(50, -1), pixels[:50])


def test_damaged_files_are_reported_as_missing(tmp_path):
    (tmp_path / "cifar-100-python").mkdir()
    source = data_sets["cifar100"](tmp_path)
    source.check()
    with pytest.raises(MissingData, match=r"cannot be used; add data\.download=true"):
        source.load()


def test_nothing_is_fetched_unless_asked(tmp_path, monkeypatch):
    asked = []

    def refuse(published, root, folder):
        asked.append(folder)
        raise OSError("no network")

    monkeypatch.setattr("cil.data.fetch.fetch", refuse)
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(MissingData, match=r"cannot be used; add data\.download=true"):
        data_sets["cifar10"](tmp_path).load()
    assert not asked
    source = data_sets["cifar10"](tmp_path, download=True)
    source.check()
    with pytest.raises(MissingData, match="cannot be fetched: no network"):
        source.load()
    assert asked == ["cifar-10-batches-py"]


def test_a_pickle_that_is_none_of_cifars_is_not_read(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name, _ in Cifar10.files.train_list + Cifar10.files.test_list:
        (folder / name).write_bytes(pickle.dumps(_Attack(tmp_path / "ran")))
    with pytest.raises(MissingData, match="cannot be used"):
        data_sets["cifar10"](tmp_path).load()
    assert not (tmp_path / "ran").exists()


class _Attack:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "ran")


@pytest.mark.skipif(
    not (Path(os.environ.get("CIL_DATA", "")) / "cifar100.npz").is_file(),
    reason="CIL_DATA names no folder with cifar100.npz",
)
def test_the_real_cifar100_is_complete():
    data = data_sets["cifar100"](Path(os.environ["CIL_DATA"])).load()
    assert (len(data.train), len(data.test)) == (50_000, 10_000)
    assert torch.bincount(data.train.labels).tolist() == [500] * 100
    assert torch.bincount(data.test.labels).tolist() == [100] * 100
    assert (data.class_names[0], data.class_names[99]) == ("apple", "worm")
    mean, std = colour_statistics(data.train.images[::10].contiguous())
    assert data.mean == pytest.approx(mean, abs=5e-3)
    assert data.std == pytest.approx(std, abs=5e-3)
