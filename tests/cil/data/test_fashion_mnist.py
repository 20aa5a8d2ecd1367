import gzip
import struct

import numpy as np
import pytest
from torchvision.datasets import FashionMNIST

from cil.data import MissingData, data_sets


def write(folder, part: str, count: int) -> np.ndarray:
    pixels = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
    labels = (np.arange(count) % 10).astype(np.uint8)
    for name, magic, shape, content in [
        (f"{part}-images-idx3-ubyte", 2051, pixels.shape, pixels),
        (f"{part}-labels-idx1-ubyte", 2049, labels.shape, labels),
    ]:
        whole = struct.pack(f">i{len(shape)}i", magic, *shape) + content.tobytes()
        (folder / name).write_bytes(whole)
        (folder / f"{name}.gz").write_bytes(gzip.compress(whole))
    return pixels


def test_the_files_of_torchvision_are_read(tmp_path):
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    train, test = write(folder, "train", 30), write(folder, "t10k", 20)
    data = data_sets["fashion_mnist"](tmp_path).load()
    assert data.input_shape == (1, 28, 28)
    assert data.class_names[9] == "Ankle boot"
    assert data.test.labels.tolist() == [*range(10), *range(10)]
    np.testing.assert_array_equal(data.train.images[:, 0].numpy(), train)
    np.testing.assert_array_equal(data.test.images[:, 0].numpy(), test)


def test_missing_files_are_missing_data_with_what_fetches_them(tmp_path):
    with pytest.raises(MissingData, match=r"FashionMNIST/raw\. .*data\.download=true"):
        data_sets["fashion_mnist"](tmp_path).check()


@pytest.mark.parametrize("damage", ["gone", "short"])
def test_damaged_files_are_reported_as_missing(tmp_path, damage):
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    write(folder, "train", 30)
    write(folder, "t10k", 20)
    path = folder / "train-images-idx3-ubyte"
    path.unlink() if damage == "gone" else path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(MissingData, match=r"cannot be used; add data\.download=true"):
        data_sets["fashion_mnist"](tmp_path).load()


def test_nothing_is_fetched_unless_asked(tmp_path, monkeypatch):
    asked = []

    def refuse(published, root, folder):
        asked.extend(published)
        raise OSError("no network")

    monkeypatch.setattr("cil.data.fetch.fetch", refuse)
    with pytest.raises(MissingData, match="cannot be fetched: no network"):
        data_sets["fashion_mnist"](tmp_path, download=True).load()
    assert [address.removeprefix(FashionMNIST.mirrors[0]) for address in asked] == [
        name for name, _ in FashionMNIST.resources
    ]
