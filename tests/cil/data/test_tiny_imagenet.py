from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cil.data import MissingData, data_sets

WNIDS = ["n02", "n01", "n03"]


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "tiny-imagenet-200"
    generator = np.random.default_rng(0)

    def save(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path, format="png")

    for wnid in WNIDS:
        for k in range(2):
            save(folder / "train" / wnid / "images" / f"{wnid}_{k}.JPEG")
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("boxes")
    for k in range(6):
        save(folder / "val" / "images" / f"val_{k}.JPEG")
    rows = [f"val_{k}.JPEG\t{WNIDS[k % 3]}\t0\t0\t63\t63\n" for k in range(6)]
    (folder / "val" / "val_annotations.txt").write_text("".join(rows))
    (folder / "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn02\ttench\nn99\tother\n")
    return tmp_path


def load(root):
    return data_sets["tiny_imagenet"](root, num_workers=0).load()


def test_the_unpacked_folder_is_read(root):
    data = load(root)
    assert data.input_shape == (3, 64, 64)
    assert data.class_names == ("goldfish, Carassius auratus", "tench", "n03")
    assert data.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.test.labels.tolist() == [1, 0, 2, 1, 0, 2]
    assert data.train.path(2).name == "n02_0.JPEG"


def test_images_are_shown_whole_in_testing_and_training(root):
    data = load(root)
    ids = torch.arange(6)
    pixels = torch.stack([torch.tensor(np.array(Image.open(data.test.path(k)))).permute(2, 0, 1) for k in range(6)])
    assert data.test.fetch(ids).equal(pixels)
    (trained,) = data.test.stream([(ids, ids)], 5)
    assert trained.equal(pixels)


def test_missing_files_are_named_with_where_to_get_them(tmp_path):
    source = data_sets["tiny_imagenet"](tmp_path)
    with pytest.raises(MissingData, match=r"tiny-imagenet-200/train.*tiny-imagenet-200\.zip .*data\.root"):
        source.check()
    with pytest.raises(ValueError, match="no effect on tiny_imagenet: unpack http"):
        data_sets["tiny_imagenet"](tmp_path, download=True)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("val_0.JPEG n01\n", "columns parted by tabs, found the line 'val_0.JPEG n01'"),
        ("val_0.JPEG\tn01\n", r"must agree; 5 are in only one of them, such as images/val_1\.JPEG"),
        ("".join(f"val_{k}.JPEG\tn0{k % 2 + 1}\n" for k in range(6)), "must name the classes of train; n03 is in only"),
        ("".join(f"val_{k}.JPEG\tn0{k % 4 + 1}\n" for k in range(6)), "must name the classes of train; n04 is in only"),
    ],
)
def test_annotations_that_do_not_fit_are_refused(root, rows, message):
    (root / "tiny-imagenet-200" / "val" / "val_annotations.txt").write_text(rows)
    with pytest.raises(ValueError, match=message):
        load(root)
