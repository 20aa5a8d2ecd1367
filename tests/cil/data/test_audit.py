import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cil.data.__main__ import main
from cil.data.audit import audit
from tests.cil.data.pictures import write_pictures


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes, of which nothing is wrong; the pictures for testing have another size."""
    write_pictures(tmp_path / "photos" / "train", ["cat", "dog"], 4)
    write_pictures(tmp_path / "photos" / "val", ["cat", "dog"], 2, size=(20, 30))
    return tmp_path / "photos"


def test_a_good_folder_is_counted_and_measured(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = audit(photos)
    assert found.problems() == []
    assert found.parts["train"].summary() == {
        "num_images": 8,
        "num_classes": 2,
        "counts": {"cat": 4, "dog": 4},
        "width": {"min": 16, "median": 16.0, "max": 16},
        "height": {"min": 12, "median": 12.0, "max": 12},
        "formats": {"PNG": 8},
        "modes": {"RGB": 8},
    }
    assert main([str(photos)]) == 0
    assert "nothing wrong was found" in capsys.readouterr().out


def test_sizes_are_those_of_the_picture_as_it_was_held(photos: Path) -> None:
    image = Image.new("RGB", (40, 10), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    image.save(photos / "val" / "cat" / "held.jpg", exif=exif)
    part = audit(photos).parts["val"].summary()
    assert (part["width"], part["height"]) == (
        {"min": 10, "median": 20.0, "max": 20},
        {"min": 30, "median": 30.0, "max": 40},
    )
    assert part["formats"] == {"PNG": 4, "JPEG": 1}


def test_unreadable_files_are_named_with_the_reason(photos: Path) -> None:
    (photos / "train" / "cat" / "bad.jpg").write_bytes(b"no image")
    whole = (photos / "train" / "dog" / "0.png").read_bytes()
    (photos / "train" / "dog" / "torn.png").write_bytes(whole[: len(whole) // 2])
    found = audit(photos)
    assert [image for image, _ in found.unreadable] == ["train/cat/bad.jpg", "train/dog/torn.png"]
    assert found.problems()[0].startswith("2 images cannot be read: train/cat/bad.jpg (cannot identify image file")


def test_equal_pixels_are_found_under_any_name_and_lossless_format(photos: Path) -> None:
    Image.open(photos / "train" / "cat" / "0.png").save(photos / "val" / "cat" / "copy.bmp")
    shutil.copy(photos / "train" / "cat" / "1.png", photos / "train" / "dog" / "other.png")
    found = audit(photos)
    assert found.duplicates_between() == [{"train": ["train/cat/0.png"], "val": ["val/cat/copy.bmp"]}]
    assert found.duplicates_inside() == {"train": [["train/cat/1.png", "train/dog/other.png"]], "val": []}
    assert found.of_two_classes() == [["train/cat/1.png", "train/dog/other.png"]]
    assert found.problems() == [
        "1 picture in both train and val: train/cat/0.png = val/cat/copy.bmp",
        "1 picture more than once in train: train/cat/1.png = train/dog/other.png",
        "1 picture in two classes: train/cat/1.png = train/dog/other.png",
    ]


def test_classes_of_one_part_and_empty_ones_are_named(photos: Path) -> None:
    write_pictures(photos / "train", ["emu", "cat"], 1, size=(9, 9))
    (photos / "val" / "fox").mkdir()
    problems = audit(photos).problems()
    assert problems == ["1 class in train alone: emu", "1 class without any image: fox"]


def test_the_json_holds_everything(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(photos / "val" / "dog")
    assert main([str(photos), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["only_in"] == {"train": ["dog"], "val": []}
    assert found["problems"] == ["1 class in train alone: dog"]
    assert found["parts"]["val"]["counts"] == {"cat": 2}


def write_npz(path: Path, **changes: np.ndarray) -> Path:
    generator = np.random.default_rng(0)
    arrays = {
        "x_train": generator.integers(0, 256, (9, 4, 5, 3)).astype(np.uint8),
        "y_train": np.arange(9) % 3,
        "x_test": generator.integers(0, 256, (6, 4, 5, 3)).astype(np.uint8),
        "y_test": np.arange(6) % 3,
        "classes": np.array(["a", "b", "c"]),
    }
    np.savez(path, **(arrays | changes))  # type: ignore[arg-type]
    return path


def test_arrays_are_looked_at_the_same_way(tmp_path: Path) -> None:
    good = audit(write_npz(tmp_path / "good.npz"))
    assert good.problems() == []
    assert good.parts["test"].summary()["counts"] == {"a": 2, "b": 2, "c": 2}
    assert good.parts["test"].summary()["modes"] == {"3 channels": 6}
    twice = np.load(tmp_path / "good.npz")["x_train"][:6]
    bad = audit(write_npz(tmp_path / "bad.npz", x_test=twice, y_test=np.array([0, 1, 0, 1, 0, 1])))
    assert bad.only_in() == {"train": ["c"], "test": []}
    assert bad.duplicates_between()[0] == {"train": ["x_train[0]"], "test": ["x_test[0]"]}
    assert any("is not usable as a data set: classes with training images must have" in line for line in bad.problems())


def test_damaged_arrays_are_wrong_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.npz").write_bytes(b"no archive")
    np.savez(tmp_path / "y.npz", x_train=np.zeros(3))
    for name, message in (("x.npz", "is not usable"), ("y.npz", "it has no y_train, x_test, y_test")):
        assert main([str(tmp_path / name)]) == 1
        assert message in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere", "no file or folder"), (".", "there is no folder"), ("note.txt", "neither a folder nor a .npz file")],
)
def test_where_there_is_nothing_to_look_at_the_code_is_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    (tmp_path / "note.txt").touch()
    assert main([str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err


def test_folders_without_classes_are_wrong_data(tmp_path: Path) -> None:
    for part in ("train", "val"):
        (tmp_path / part).mkdir()
    assert audit(tmp_path).problems() == ["there are no class folders: put the images of each class in one"]
