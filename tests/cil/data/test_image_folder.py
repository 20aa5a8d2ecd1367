import shutil
from pathlib import Path

import pytest
import torch

from cil.build import Run
from cil.data import MissingData, data_sets
from cil.data.image_folder import IMAGENET_MEAN
from cil.tasks import imagenet100_classes
from tests.cil.data.pictures import write_pictures
from tests.run_folders import metrics_of

CLASSES = ["ant", "Bär", "two words", "fox", "gnu", "hen"]
ORDER = sorted(CLASSES)


@pytest.fixture
def folder(tmp_path):
    write_pictures(tmp_path / "my photos" / "train", CLASSES, 4)
    write_pictures(tmp_path / "my photos" / "val", CLASSES, 2)
    return tmp_path / "my photos"


def source(folder, **parameters):
    return data_sets["image_folder"](Path(), path=str(folder), image_size=8, num_workers=0, **parameters)


def load(folder, **parameters):
    return source(folder, **parameters).load()


def test_classes_are_the_folders_in_alphabetical_order(folder):
    data = load(folder)
    assert data.class_names == tuple(ORDER)
    assert data.input_shape == (3, 8, 8)
    assert data.train.labels.tolist() == [label for label in range(6) for _ in range(4)]
    assert data.test.labels.tolist() == [label for label in range(6) for _ in range(2)]
    assert data.train.path(5) == folder / "train" / ORDER[1] / "1.png"
    assert data.mean == IMAGENET_MEAN


def test_by_default_the_shorter_side_is_an_eighth_longer_than_the_square():
    for image_size, resize in [(224, 256), (64, 73), (8, 9), (1, 1)]:
        made = data_sets["image_folder"](Path(), path="x", image_size=image_size)
        assert made.framing.resize == resize


def test_a_list_of_classes_restricts_and_orders(folder, tmp_path):
    (tmp_path / "list.txt").write_text("two words\n\n  ant \nBär\n", encoding="utf-8")
    data = load(folder, class_list=str(tmp_path / "list.txt"))
    assert data.class_names == ("two words", "ant", "Bär")
    assert len(data.train) == 12
    assert data.train.path(0).parent.name == "two words"


@pytest.mark.parametrize("which", ["first100", "seed1993"])
def test_the_lists_of_imagenet100_have_names(folder, which):
    wnids = imagenet100_classes(which)
    with pytest.raises(
        ValueError, match=f"imagenet100_{which} names 100 classes; 100 .*{wnids[0]}.* and 95 more.*wnid"
    ):
        load(folder, class_list=f"imagenet100_{which}")
    for part in ("train", "val"):
        write_pictures(folder / part, wnids, 1, size=(2, 2))
    data = load(folder, class_list=f"imagenet100_{which}")
    assert data.class_names == wnids
    assert len(data.train) == len(data.test) == 100


def test_a_list_that_is_wrong_is_named(folder, tmp_path):
    path = tmp_path / "list.txt"
    for content, problem in [
        ("ant\nfox\nant\n", "must name one or more classes, each once; found ant"),
        ("\n", "each once; found none"),
        ("ant\nunicorn\n", f"names 2 classes; 1 of them have no folder in {folder / 'train'}: unicorn"),
    ]:
        path.write_text(content)
        with pytest.raises(ValueError, match=problem):
            load(folder, class_list=str(path))
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(ValueError, match="must be text in UTF-8"):
        load(folder, class_list=str(path))
    with pytest.raises(ValueError, match=r"no such file, .* did you mean 'imagenet100_first100'"):
        load(folder, class_list="imagenet100_first10")


def test_a_missing_folder_is_missing_data_with_the_place(folder):
    with pytest.raises(MissingData, match=r"no folder .*/nowhere/train and no .*/nowhere/val\. .*data\.path=FOLDER"):
        source("nowhere").check()
    (folder / "val").rename(folder / "test")
    with pytest.raises(MissingData, match=r"no folder .*my photos/val \(found test, train\)"):
        load(folder)


def test_parts_must_have_the_same_classes_with_images(folder):
    shutil.rmtree(folder / "val" / "fox")
    with pytest.raises(ValueError, match=r"in .*train and not in val: fox"):
        load(folder)
    shutil.rmtree(folder / "train" / "fox")
    write_pictures(folder / "val", ["yak"], 1)
    with pytest.raises(ValueError, match=r"in .*val and not in train: yak"):
        load(folder)
    (folder / "train" / "yak").mkdir()
    with pytest.raises(ValueError, match=r"folders in .*train hold no images: yak"):
        load(folder)
    for inner in (folder / "train").iterdir():
        shutil.rmtree(inner) if inner.is_dir() else inner.unlink()
    with pytest.raises(ValueError, match="no class folders"):
        load(folder)


def test_wrong_parameters_are_refused():
    for wrong, message in [
        ({"std": (0.2, 0.0, 0.2)}, "data.std must be above 0"),
        ({"resize": 7}, "data.resize must be at least data.image_size"),
        ({"scale": (0.5, 2.0)}, "data.scale"),
        ({"download": True}, "no effect on image_folder"),
    ]:
        with pytest.raises(ValueError, match=message):
            source("x", **wrong)


def test_the_fingerprint_sees_every_file(folder):
    first = load(folder).fingerprint()
    assert load(folder).fingerprint() == first
    assert load(folder, scale=(0.5, 1.0)).fingerprint() == first
    assert load(folder, resize=10).fingerprint() != first
    write_pictures(folder / "val", ["ant"], 3)
    assert load(folder).fingerprint() != first


def folder_words(folder: Path) -> list[str]:
    small = ["data.image_size=8", "data.num_workers=0", "model=dkt_tiny", "scenario.classes=6", "optim.batch_size=8"]
    return ["data=image_folder", f"data.path='{folder}'", *small]


def test_a_run_on_photographs_goes_from_end_to_end(folder, run_tiny):
    narrow = ["model.width=16", "model.num_heads=2", "model.depth=1"]
    for name, words in {"a": [], "b": ["memory.transform=train"]}.items():
        metrics = metrics_of(run_tiny(*folder_words(folder), *narrow, *words, f"name={name}", report=False))
        assert metrics["finished"]
    run_tiny(*folder_words(folder), *narrow, "name=a", "data.num_workers=2", report=False)  # counts as the same run


def test_a_file_that_is_damaged_ends_the_run_in_one_line(folder, run_tiny, capsys):
    (folder / "train" / "gnu" / "1.png").write_bytes(b"")
    run_tiny(*folder_words(folder), learner="finetune", code=2, report=False)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "cannot be read" in line]
    assert line.startswith("error: ")
    assert "my photos/train/gnu/1.png cannot be read as an image" in line


def test_held_out_photographs_are_shown_as_for_testing(folder):
    from tests.test_configs import check, compose

    words = [*folder_words(folder), "learner=finetune", "data.validation=0.25", "evaluate_on=validation"]
    run = Run.build(check(compose(words)))
    held_out = torch.nonzero(run.samples.eval_labels >= 0).flatten()
    assert len(held_out) == 6
    assert run.samples.eval_images is run.samples.images
