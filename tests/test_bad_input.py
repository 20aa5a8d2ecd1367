"""Hostile data, requests and run folders, end to end: exit code 2 or 1, one message, and nothing is lost.

Mistakes in keys and values of a config are in `tests/cil/test_cli.py`, states in `tests/cil/test_checkpoint.py`.
"""

import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from cil import ablate, checkpoint, load
from cil.cli import MAX_LINES
from cil.cli import main as run_command
from cil.report.__main__ import main as report_command
from tests.cil.data.pictures import write_pictures
from tests.conftest import SHORT, tiny_command

ROOT = Path(__file__).parents[1]
#: Stands for the folder of the test in overrides.
HERE = "{here}"

Prepare = Callable[[Path], object]


def as_is(here: Path) -> None:
    """Nothing is prepared."""


@dataclass(frozen=True)
class Case:
    """A request that cannot be fulfilled.

    Attributes:
        kind: What is wrong, roughly; to count them by.
        name: What is wrong.
        words: Overrides.
        said: Must be in the message: what was wrong, what was found, what would be right.
        prepare: Makes the files that the overrides speak of.
        code: The exit code.
        begun: Whether it only shows once the run has begun.
        learner: Choice of the group.
    """

    kind: str
    name: str
    words: Sequence[str]
    said: Sequence[str]
    prepare: Prepare = as_is
    code: int = 2
    begun: bool = False
    learner: str = "finetune"

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}"


def tree_of(folder: Path) -> dict[str, bytes | str]:
    """Every file and link below a folder, but for locks, which hold nothing, and the index of image files."""
    found: dict[str, bytes | str] = {}
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(place, name)
            if path.is_symlink():
                found[str(path.relative_to(folder))] = os.readlink(path)
            elif path.is_file() and name not in (".lock", ".cil_index.json"):
                found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def assert_one_message(err: str, said: Sequence[str]) -> None:
    assert err.count("\n") <= MAX_LINES, err
    assert "Traceback" not in err
    for part in said:
        assert part in err, f"{part!r} is not in: {err}"


# Data


def arrays(**changes: np.ndarray | None) -> dict[str, np.ndarray]:
    """Six classes of grey images of 8 x 8 pixels, four for training and two for testing."""
    pixels = np.random.default_rng(0).integers(0, 256, (36, 8, 8)).astype(np.uint8)
    parts = {
        "x_train": pixels[:24],
        "y_train": np.repeat(np.arange(6), 4),
        "x_test": pixels[24:],
        "y_test": np.repeat(np.arange(6), 2),
    }
    return {key: value for key, value in (parts | changes).items() if value is not None}


def archive(**changes: np.ndarray | None) -> Prepare:
    return lambda here: np.savez(here / "own.npz", allow_pickle=True, **arrays(**changes))


def labelled(label: object, dtype: str = "int64") -> np.ndarray:
    """Training labels, the first of which is something else."""
    labels = np.repeat(np.arange(6), 4).astype(dtype)
    labels[0] = label
    return labels


def archive_bytes() -> bytes:
    file = BytesIO()
    np.savez(file, **arrays())
    return file.getvalue()


def array_bytes() -> bytes:
    file = BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


def archive_of(content: Callable[[bytes], bytes]) -> Prepare:
    return lambda here: (here / "own.npz").write_bytes(content(archive_bytes()))


def flipped(content: bytes) -> bytes:
    middle = len(content) // 3
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def claiming(*shape: int) -> Prepare:
    """An archive in which `x_train` says that it is of another shape than it is."""

    def prepare(here: Path) -> None:
        header = BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
        with zipfile.ZipFile(BytesIO(archive_bytes())) as given, zipfile.ZipFile(here / "own.npz", "w") as made:
            for name in given.namelist():
                made.writestr(name, header.getvalue() + b"abc" if name == "x_train.npy" else given.read(name))

    return prepare


NPZ = ("data=npz", f"data.path={HERE}/own.npz")
NOT_USABLE = "own.npz is not usable as a data set"


def npz(name: str, prepare: Prepare, *said: str, words: Sequence[str] = ()) -> Case:
    return Case("data in an archive", name, (*NPZ, *words), said, prepare)


ARCHIVES = [
    npz("missing", as_is, "there is no file", "own.npz", "data.path=FILE.npz", "numpy.savez"),
    npz("a folder", lambda here: (here / "own.npz").mkdir(), "there is no file"),
    npz("empty", archive_of(lambda _: b""), NOT_USABLE, "No data left"),
    npz("truncated", archive_of(lambda content: content[: len(content) // 2]), NOT_USABLE, "not a zip file"),
    npz("a bit flipped", archive_of(flipped), NOT_USABLE, "Bad CRC-32 for file 'x_train.npy'"),
    npz("text", archive_of(lambda _: b"not an archive"), NOT_USABLE, "Python objects"),
    npz("a pickle", archive_of(lambda _: b"\x80\x04N."), NOT_USABLE, "could run code"),
    npz("one array", archive_of(lambda _: array_bytes()), NOT_USABLE, "write it with numpy.savez"),
    npz("more memory than there is", claiming(10**13, 8, 8), NOT_USABLE, "Unable to allocate"),
    npz("more than there can be", claiming(10**30, 8, 8), NOT_USABLE, "too large"),
    npz("less than nothing", claiming(-5, 8, 8), NOT_USABLE, "negative dimensions"),
    npz("an array missing", archive(y_test=None), "it has no y_test", "found x_train, y_train, x_test"),
    npz("floats", archive(x_train=np.ones((24, 8, 8), "f4")), "x_train must be uint8 with values 0 to 255", "float32"),
    npz("NaN", archive(x_train=np.full((24, 8, 8), np.nan)), "x_train must be uint8", "found float64"),
    npz("infinity", archive(x_test=np.full((12, 8, 8), np.inf, "f2")), "x_test must be uint8", "found float16"),
    npz("complex", archive(x_test=np.ones((12, 8, 8), "c8")), "x_test must be uint8", "found complex64"),
    npz("flat", archive(x_train=np.ones((24, 64), "u1")), "must have shape (images, height, width)", "(24, 64)"),
    npz("channels first", archive(x_train=np.ones((24, 3, 8, 8), "u1")), "looks like channels first", "transpose"),
    npz("no images", archive(x_train=np.ones((0, 8, 8), "u1")), "none of them 0", "(0, 8, 8)"),
    npz("no pixels", archive(x_train=np.ones((24, 0, 8), "u1")), "none of them 0", "(24, 0, 8)"),
    npz("sizes differ", archive(x_test=np.ones((12, 9, 8), "u1")), "must agree in channels, height and width"),
    npz("a label too few", archive(y_train=labelled(0)[1:]), "equally long, found 24 and 23"),
    npz("labels in two columns", archive(y_train=np.zeros((24, 6), int)), "of shape (images,)", "(24, 6)"),
    npz("float labels", archive(y_train=labelled(0.5, "f8")), "y_train must be whole numbers", "float64"),
    npz("NaN labels", archive(y_train=labelled(np.nan, "f8")), "y_train must be whole numbers", "float64"),
    npz("labels are names", archive(y_train=labelled("a", "U3")), "y_train must be whole numbers", "<U3"),
    npz("a negative label", archive(y_train=labelled(-1)), "y_train must count from 0, found -1"),
    npz("a label beyond all others", archive(y_train=labelled(2**62)), "must have test images", str(2**62)),
    npz("a gap", archive(y_train=labelled(7), y_test=np.r_[np.repeat(np.arange(6), 2)[1:], 7]), "no gaps", "[6]"),
    npz("a class only in test", archive(y_test=np.r_[np.repeat(np.arange(6), 2)[1:], 6]), "training images", "[6]"),
    npz("a class only in train", archive(y_train=labelled(6)), "must have test images", "[6]"),
    npz("an object in the labels", archive(y_train=labelled(None, "O")), "Python objects", "store numbers"),
    npz("objects as names", archive(classes=np.array([*"abcde", None], "O")), "could run code", "array of strings"),
    npz("too few names", archive(classes=np.array(["a", "b"])), "labels must lie in 0 to 1", "[2, 3, 4, 5]"),
    npz("a name twice", archive(classes=np.array([*"abcdea"])), "different names", "'a', 'b'"),
    npz("one value", archive(x_train=np.zeros((24, 8, 8), "u1")), "channel 0 has the same value in every training"),
    npz(
        "one pixel",
        archive(x_train=arrays()["x_train"][:, :1, :1], x_test=arrays()["x_test"][:, :1, :1]),
        "an image of 1x1 becomes a map of 1x1",
        "change the image size",
    ),
    npz(
        "nothing left for validation",
        archive(x_train=arrays()["x_train"][:6], y_train=np.arange(6)),
        "a validation split needs at least 2 training images of each class; class 0 has 1",
        "data.validation=0",
        words=["data.validation=0.2"],
    ),
    Case("data in an archive", "its path is a number", ["data=npz", "data.path=5"], ["data.path", "valid string", "5"]),
    Case(
        "data in an archive",
        "of other images than CIFAR-100",
        ["data=cifar100", f"data.root={HERE}"],
        ["must hold 100 classes of 3 x 32 x 32 images", "found 6 of 1 x 8 x 8", "data=npz"],
        lambda here: np.savez(here / "cifar100.npz", **arrays()),
    ),
]

PHOTOS = (
    *("data=image_folder", f"data.path={HERE}/photos", "data.image_size=8", "data.num_workers=0"),
    *("model=resnet8", "model.width=4", "optim.batch_size=8"),
)
FIRST = Path("photos", "train", "a", "0.png")


def photos(change: Prepare = as_is, per_class: int = 3) -> Prepare:
    """Six classes of small pictures, then a change."""

    def prepare(here: Path) -> None:
        for part in ("train", "val"):
            write_pictures(here / "photos" / part, "abcdef", per_class)
        change(here)

    return prepare


def holding(content: bytes | Callable[[bytes], bytes], path: Path = FIRST) -> Prepare:
    def change(here: Path) -> None:
        made = content if isinstance(content, bytes) else content((here / path).read_bytes())
        (here / path).write_bytes(made)

    return photos(change)


def png_header(width: int, height: int) -> bytes:
    """A PNG file of a few bytes that says that it is of another size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    size = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def tiff_of_floats(here: Path) -> None:
    (here / FIRST).unlink()
    Image.fromarray(np.full((9, 9), np.nan, np.float32)).save((here / FIRST).with_suffix(".tif"))


def without(part: str, *, empty: bool = False) -> Prepare:
    """The class folder `a` of one part goes, or what is in it."""

    def change(here: Path) -> None:
        folder = here / "photos" / part / "a"
        shutil.rmtree(folder)
        if empty:
            folder.mkdir()

    return photos(change)


def linked(name: str, target: str) -> Prepare:
    return photos(lambda here: (here / "photos" / "train" / name).symlink_to(target))


def listed(text: str | bytes) -> Prepare:
    content = text if isinstance(text, bytes) else text.encode()
    return photos(lambda here: (here / "classes.txt").write_bytes(content))


def folder(name: str, prepare: Prepare, *said: str, words: Sequence[str] = (), begun: bool = False) -> Case:
    return Case("data in folders", name, (*PHOTOS, *words), said, prepare, begun=begun)


def class_list(name: str, prepare: Prepare, *said: str) -> Case:
    return Case("class lists", name, (*PHOTOS, f"data.class_list={HERE}/classes.txt"), said, prepare)


NO_IMAGE = "photos/train/a/0.png cannot be read as an image"
FOLDERS = [
    folder("missing", as_is, "there is no folder", "photos/train and no", "data.path=FOLDER", "train/CLASS/"),
    folder("no folder for validation", photos(lambda here: shutil.rmtree(here / "photos/val")), "photos/val", "found"),
    folder("an empty file", holding(b""), NO_IMAGE, "cannot identify image file", begun=True),
    folder("text", holding(b"hello"), NO_IMAGE, "cannot identify image file", begun=True),
    folder("truncated", holding(lambda png: png[:-60]), NO_IMAGE, "truncated", begun=True),
    folder("a bit flipped", holding(lambda png: png[:60] + b"\0\0\0\0" + png[64:]), NO_IMAGE, begun=True),
    folder("truncated in test", holding(lambda png: png[:-60], Path("photos/val/a/0.png")), "val/a/0.png", begun=True),
    folder("a bomb", holding(png_header(30000, 30000)), NO_IMAGE, "900000000 pixels", "exceeds limit", begun=True),
    folder("no pixels", holding(png_header(0, 0)), NO_IMAGE, begun=True),
    folder("NaN", photos(tiff_of_floats), "0.tif cannot be read", "floating-point", "8 or 16 bits", begun=True),
    folder("an empty class", without("train", empty=True), "hold no images: a"),
    folder("an empty class in test", without("val", empty=True), "val hold no images: a"),
    folder("a class only in test", without("train"), "val and not in train: a"),
    folder("a class only in train", without("val"), "train and not in val: a"),
    folder("no class", photos(lambda here: [shutil.rmtree(path) for path in (here / "photos/train").iterdir()]),
           "has no class folders", "put the images of each class in one"),
    folder("a folder in itself", linked("a/up", ".."), "is a link to a folder that it lies in", "remove it"),
    folder("a class in itself", linked("g", "g"), "photos/train/g", "Too many levels of symbolic links"),
    folder("a file in itself", linked("a/9.png", "9.png"), "a/9.png", "Too many levels of symbolic links"),
    folder("a link to nothing", linked("a/9.png", "gone.png"), "a/9.png", "No such file"),
    folder("nothing left for validation", photos(per_class=1), "at least 2 training images",
           words=["data.validation=0.5"]),
    folder("two means", photos(), "data.mean.2: missing", words=["data.mean=[0.5,0.5]"]),
    folder("NaN as mean", photos(), "data.mean.2", "finite number, found nan", words=["data.mean=[0.5,0.5,nan]"]),
    folder("a deviation of 0", photos(), "data.std must be above 0", words=["data.std=[0.5,0.5,0]"]),
    class_list("missing", photos(), "classes.txt: there is no such file", "imagenet100_first100"),
    class_list("empty", listed("\n\n"), "must name one or more classes, each once; found none"),
    class_list("a class twice", listed("a\nb\na\n"), "each once; found a"),
    class_list("an unknown class", listed("a\nzebra\n"), "names 2 classes; 1 of them have no folder", "zebra"),
    class_list("a way out", listed("a\n../val/b\n"), "have no folder", "../val/b"),
    class_list("bytes", listed(b"\xff\xfe\0"), "must be text in UTF-8, one folder name a line"),
    class_list("fewer than the scenario", listed("a\nb\n"), "classes must be between 1 and the 2 classes", "found 6"),
]  # fmt: skip

# Splits, orders, memory


def split(name: str, words: Sequence[str], *said: str) -> Case:
    free = ("scenario.initial_increment=null", "scenario.increment=null", "scenario.classes=null")
    return Case("splits", name, (*free, *words), said)


def order(name: str, text: str | bytes, *said: str) -> Case:
    content = text if isinstance(text, bytes) else text.encode()
    words = (f"scenario.class_order={HERE}/order.txt",)
    return Case("orders", name, words, said, lambda here: (here / "order.txt").write_bytes(content))


def listed_order(name: str, words: str, *said: str) -> Case:
    return Case("orders", name, (f"scenario.class_order={words}",), said)


SPLITS = [
    split("nothing said", [], "give increment"),
    split("a first task alone", ["scenario.initial_increment=5"], "give increment"),
    split("an uneven rest", ["scenario.increment=3", "scenario.remainder=error"], "10 classes do not divide"),
    split("a rest after the first task", ["scenario.initial_increment=3", "scenario.increment=4",
          "scenario.remainder=error"], "after initial_increment=3: 3 remain", "remainder=last_small"),
    split("too many", ["scenario.task_sizes=[4,8]"], "sum to 12; they must sum to at most 10"),
    split("a task of none", ["scenario.task_sizes=[4,0]"], "task_sizes.1", "greater than 0, found 0"),
    split("a negative task", ["scenario.task_sizes=[4,-2]"], "task_sizes.1", "greater than 0, found -2"),
    split("no tasks", ["scenario.task_sizes=[]"], "task_sizes must be one or more numbers"),
    split("sizes are no list", ["scenario.task_sizes=5"], "scenario.task_sizes", "valid list", "found 5"),
    split("other than the classes", ["scenario.task_sizes=[4,4]", "scenario.classes=9"], "sum to 8; they must"),
    split("twice", ["scenario.task_sizes=[5,5]", "scenario.increment=5"], "leave out increment", "found 5"),
    split("sizes and a rest", ["scenario.task_sizes=[5,5]", "scenario.remainder=error"], "leave out", "'error'"),
    split("a first task of all and more", ["scenario.initial_increment=11", "scenario.increment=1"], "at most 10"),
    split("more than there are", ["scenario.classes=11", "scenario.increment=1"], "between 1 and the 10 classes", "11"),
    split("an unknown rest", ["scenario.increment=3", "scenario.remainder=drop"], "'last_small', 'error' or"),
]  # fmt: skip
ORDERS = [
    Case(
        "orders", "missing", [f"scenario.class_order={HERE}/order.txt"], ["there is no such file", "Known: ", "natural"]
    ),
    Case("orders", "a folder", [f"scenario.class_order={HERE}"], ["there is no such file"]),
    order("empty", "", "must name each of the 10 classes 0 to 9 once", "it has 0 entries"),
    order("a class twice", "0 0 2 3 4 5 6 7 8 9", "0 more than once, 1 is missing"),
    order("an unknown class", "0 1 2 3 4 5 6 7 8 10", "10 is no label of the data set, 9 is missing"),
    order("a negative class", "0 1 2 3 4 5 6 7 8 -9", "-9 is no label"),
    order("too short", "0 1 2", "it has 3 entries"),
    order("too long", " ".join(map(str, range(11))), "it has 11 entries", "10 is no label"),
    order("no JSON", "[0, 1, 2", "is no class order", "one JSON list of them"),
    order("JSON of something else", "[0, [1], 2]", "is no class order", "whole numbers"),
    order("an object", '{"order": [0, 1]}', "is no class order"),
    order("halves", "0 1.5 2", "is no class order", "1.5"),
    order("names", "zero one two", "is no class order", "zero"),
    order("bytes", b"\xff\xfe\x00\x01", "is no class order"),
    listed_order("of another data set", "order1", "class_order=order1 must name each of the 10 classes", "100 entries"),
    listed_order("a misspelt name", "sedeed", "did you mean 'seeded'?"),
    listed_order("a list with a class twice", "[0,1,1]", "it has 3 entries, 1 more than once"),
    listed_order("a list of words", "[a,b]", "class_order"),
    listed_order("a mapping", "{a:1}", "class_order"),
    Case("orders", "a seed out of range", ["scenario.order_seed=4294967296"], ["order_seed", "less than 4294967296"]),
]


def memory(name: str, learner: str, words: Sequence[str], *said: str) -> Case:
    return Case("memory", name, words, said, learner=learner)


MEMORIES = [
    memory("smaller than the classes", "replay", ["memory.size=5"], "no room for an exemplar of each of the 6"),
    memory("smaller from the start", "replay", ["memory.size=5", "memory.budget=fixed_total"], "has no room for"),
    memory("of one", "dkt", ["memory.size=1"], "memory.size=1 has no room", "or to 0 for no memory"),
    memory("of none", "icarl", ["memory.size=0", "model=resnet8"], "learner=icarl", "memory.size is 0"),
    memory("half an exemplar", "replay", ["memory.size=7.5"], "memory.size", "valid integer", "7.5"),
    memory("an unknown rule", "replay", ["memory.selection=best"], "unknown selection rule 'best'", "herding"),
    memory("after what is not done", "replay", ["memory.when=after_finetuning"], "does not fine-tune"),
]  # fmt: skip

# Configs


def config(name: str, words: Sequence[str], *said: str, learner: str = "dkt", prepare: Prepare = as_is) -> Case:
    return Case("configs", name, words, said, prepare, learner=learner)


CONFIGS = [
    config("a rate that is NaN", ["optim.lr=nan"], "optim.lr", "finite number, found nan"),
    config("an infinite rate", ["optim.lr=inf"], "optim.lr", "finite number, found inf"),
    config("a weight that is NaN", ["kd.dkt.weight=nan"], "kd.dkt.weight: must be a number of 0 or more, found nan"),
    config("an infinite weight", ["kd.dkt.weight=inf"], "kd.dkt.weight: must be a number of 0 or more, found inf"),
    config("a temperature that is NaN", ["kd.dkt.temperature=nan"], "kd.dkt.temperature", "finite number"),
    config("an infinite share", ["data.validation=inf"], "data.validation", "found inf"),
    config("a seed below 0", ["data_seed=-1"], "data_seed", "greater than or equal to 0, found -1"),
    config("a seed beyond 63 bits", ["seed=9223372036854775808"], "seed", "less than 9223372036854775808"),
    config("no threads", ["num_threads=0"], "num_threads", "greater than 0, found 0"),
    config("saved never", ["checkpoint.every_seconds=0"], "checkpoint.every_seconds", "greater than 0, found 0"),
    config("saved after half an epoch", ["checkpoint.every_epochs=0.5"], "checkpoint.every_epochs", "0.5"),
    config("betas above 1", ["optim.betas=[0.9,1.5]"], "optim.betas"),
    config("a momentum below 0", ["optim.momentum=-1"], "optim.momentum"),
    config("a milestone that is a word", ["optim.schedule.milestones=[late]"], "optim.schedule.milestones.0", "'late'"),
    config("a section that is a number", ["memory=5"], "memory=5: unknown memory '5'. Known: ", "total"),
    config("a section that is nothing", ["scenario=null"], "scenario=null: unknown scenario 'null'. Known: b0_inc10"),
    config("a part without a name", ["model.name=null"], "model.name", "valid string"),
    config("a learner that is a number", ["learner.name=5"], "learner.name", "valid string, found 5"),
    config("a method that is a number", ["kd.dkt.method=5"], "kd.dkt.method: must be a name, found 5"),
    config("an augmentation that is a list", ["data.augment.crop=[4]"], "data.augment.crop=[4]: does not fit"),
    config("a name for the file system", [f"name={'n' * 300}"], "File name too long"),
    config("a name that is a path", ["name=../up"], "name", "pattern"),
    config("an interpolation without an end", ["name=${oc.env:NO_SUCH_VARIABLE}"], "NO_SUCH_VARIABLE"),
    config("an interpolation of itself", ["name=${name}"], "nterpolation"),
    config("a missing value", ["name=???"], "name"),
    config("runs in a file", [f"runs_dir={HERE}/file"], "file", prepare=lambda here: (here / "file").touch()),
    config("a folder of something else", ["overwrite=false"], "holds no run (no config.yaml)", "overwrite=true",
           prepare=lambda here: [(here / "runs/run").mkdir(parents=True), (here / "runs/run/mine").touch()]),
    config("a run that is a file", [], "runs/run", prepare=lambda here: [(here / "runs").mkdir(),
           (here / "runs/run").touch()]),
    config("an accelerator that is not there", ["device=cuda:77"], "device=cuda:77"),
]  # fmt: skip

REQUESTS = [*ARCHIVES, *FOLDERS, *SPLITS, *ORDERS, *MEMORIES, *CONFIGS]


@pytest.mark.parametrize("case", REQUESTS, ids=str)
def test_a_bad_request_is_one_message_and_nothing_is_lost(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case.prepare(tmp_path)
    before = tree_of(tmp_path)
    words = [word.replace(HERE, str(tmp_path)) for word in case.words]
    code = run_command(tiny_command(tmp_path / "runs", *words, learner=case.learner))
    err = capsys.readouterr().err
    assert code == case.code, err
    assert err.count("error: ") == 1, err
    assert_one_message(err, case.said)
    after = tree_of(tmp_path)
    if not case.begun:
        assert after == before, "nothing may be written before the request is known to be right"
    assert before.items() <= after.items()
    assert not (tmp_path / "runs" / "run" / "metrics.json").exists()


# Run folders

STATIC = (
    "experiment=tiny_static",
    "student=resnet8",
    "model.width=4",
    "optim.epochs=1",
    "optim.schedule.milestones=[]",
)


def run_again(runs_dir: Path) -> int:
    return run_command(tiny_command(runs_dir, *SHORT, learner="finetune"))


def distill(runs_dir: Path, *words: str) -> int:
    return run_command([*STATIC, f"runs_dir={runs_dir}", *words], program="distill.py", config_name="distill")


@pytest.fixture(scope="session")
def teachers(short_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of static distillation, `teacher`, beside one of fewer classes, `run`."""
    folder = tmp_path_factory.mktemp("teachers")
    shutil.copytree(short_runs / "run", folder / "run")
    with mock.patch("cil.report.write_report", lambda run: run / "report.html"):
        assert distill(folder, "name=teacher") == 0
    return folder


@dataclass(frozen=True)
class Damage:
    """Something that happened to a run folder.

    Attributes:
        name: What.
        change: Does it.
        said: Must be in the message.
        code: The exit code.
    """

    name: str
    change: Prepare
    said: Sequence[str]
    code: int = 2

    def __str__(self) -> str:
        return self.name


def damage(name: str, change: Prepare, *said: str, code: int = 2) -> Damage:
    return Damage(name, change, said, code)


def edits(name: str, how: Callable[[bytes], bytes]) -> Prepare:
    """One file, or all files of this name, hold something else."""

    def change(run: Path) -> None:
        paths = list(run.glob(name))
        assert paths, name
        for path in paths:
            path.write_bytes(how(path.read_bytes()))

    return change


def writes(name: str, text: str) -> Prepare:
    return edits(name, lambda _: text.encode())


def both(*changes: Prepare) -> Prepare:
    def change(run: Path) -> None:
        for each in changes:
            each(run)

    return change


def unchecked(name: str, text: str) -> Prepare:
    """A file of a version that kept no checksum of it."""
    return both(removes("checksums.json"), writes(name, text))


def replaces(name: str, old: str, new: str) -> Prepare:
    def how(content: bytes) -> bytes:
        assert old.encode() in content
        return content.replace(old.encode(), new.encode(), 1)

    return edits(name, how)


def removes(name: str) -> Prepare:
    def change(run: Path) -> None:
        for path in list(run.glob(name)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def makes_folder(name: str) -> Prepare:
    def change(run: Path) -> None:
        (run / name).unlink(missing_ok=True)
        (run / name).mkdir()

    return change


def states(how: Callable[[dict[str, Any]], Any]) -> Prepare:
    """Every state holds something else, with the checksum of that."""

    def change(run: Path) -> None:
        found = {path: torch.load(path, weights_only=True) for path in run.glob("stage_*/state*.pt")}
        for path, state in found.items():
            made = how(state)
            path.unlink()
            checkpoint.write_checked(path.with_name("state.pt"), lambda file, made=made: torch.save(made, file))

    return change


def summaries(how: Callable[[dict[str, Any]], Any]) -> Prepare:
    """Every `stage.json` says something else, with the checksum of that."""

    def change(run: Path) -> None:
        for path in list(run.glob("stage_*/stage.json")):
            text = json.dumps(how(json.loads(path.read_text()))).encode()
            checkpoint.write_checked(path, lambda file, text=text: file.write(text))

    return change


def with_data(**facts: Any) -> Prepare:
    return summaries(lambda summary: summary | {"data": summary["data"] | facts})


class Evil:
    """What a pickle could hold."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("ran",))


ITSELF = "config: &itself\n  name: run\n  data: *itself\n"
CONFIG_DAMAGES = [
    damage("config cut off", edits("config.yaml", lambda text: text[:100]), "runs/run"),
    damage("config empty", writes("config.yaml", ""), "config.yaml: found no mapping"),
    damage("config no YAML", writes("config.yaml", "a: ["), "config.yaml: cannot be read", "while parsing"),
    damage("config a list", writes("config.yaml", "- 1\n- 2\n"), "config.yaml: found no mapping"),
    damage("config bytes", edits("config.yaml", lambda _: b"\xff\xfe\xfd"), "config.yaml: cannot be read"),
    damage("config an impossible date", writes("config.yaml", "config: 2020-13-45\n"), "config.yaml: cannot be read"),
    damage("config without end", writes("config.yaml", "[" * 1500), "config.yaml: cannot be read"),
    damage("config that holds itself", writes("config.yaml", ITSELF), "config.yaml: cannot be read"),
]
RESUMES = [
    *CONFIG_DAMAGES,
    damage("config gone", removes("config.yaml"), "holds no run (no config.yaml)", "another name="),
    damage("config a folder", makes_folder("config.yaml"), "config.yaml"),
    damage("config of another version", replaces("config.yaml", "config:\n", "config:\n  gone: 1\n"),
           "holds a run of another config", "gone: 1 there, None here", "overwrite=true"),
    damage("config of another seed", replaces("config.yaml", "\n  seed: 0", "\n  seed: 1"), "seed: 1 there, 0 here"),
    damage("metrics cut off", edits("metrics.json", lambda text: text[:-20]), "metrics.json: missing or damaged",
           "without this file the same command writes it again"),
    damage("metrics empty", writes("metrics.json", ""), "metrics.json: missing or damaged"),
    damage("metrics of another accuracy", replaces("metrics.json", '"last_accuracy": 0', '"last_accuracy": 1'),
           "metrics.json: missing or damaged (its checksum is not the one"),
    damage("metrics a list", unchecked("metrics.json", "[1]"), "metrics.json: damaged", "mapping of keys, found list"),
    damage("metrics of nothing", unchecked("metrics.json", "{}"), "does not say whether the run is finished"),
    damage("metrics bytes", edits("metrics.json", lambda _: b"\xff\xfe"), "metrics.json: missing or damaged"),
    damage("metrics without end", unchecked("metrics.json", "[" * 100_000), "metrics.json: missing or damaged"),
    damage("metrics a folder", makes_folder("metrics.json"), "metrics.json: missing or damaged"),
    damage("metrics that do not fit", unchecked("metrics.json", '{"finished": true, "accuracy_matrix": 5}'),
           "do not fit together"),
    damage("events no JSON", replaces("events.jsonl", "{", "("), "events.jsonl, line 1: not JSON"),
    damage("events of nothing", replaces("events.jsonl", "{", '{"a": 1}\n{'), "line 1: an event has event, time and"),
    damage("events without a time", replaces("events.jsonl", '"elapsed_seconds": 0', '"elapsed_seconds": "0'),
           "events.jsonl, line 1"),
    damage("a report that cannot be written", makes_folder("report.html"), "report.html", "Is a directory", code=1),
]  # fmt: skip
GOES_ON = [
    damage("states cut off", edits("stage_*/state*.pt", lambda content: content[:-200]), "its checksum is not the one",
           "there is no good checkpoint before it, overwrite=true begins again"),
    damage("states flipped", edits("stage_*/state*.pt", flipped), "state.pt: missing or damaged"),
    damage("states empty", edits("stage_*/state*.pt", lambda _: b""), "state.pt: missing or damaged"),
    damage("checksums gone", removes("stage_*/checksums.json"), "checksums.json: missing or damaged"),
    damage("checksums a list", writes("stage_*/checksums.json", "[]"), "checksums.json: damaged", "found list"),
    damage("checksums cut off", edits("stage_*/checksums.json", lambda text: text[:30]), "checksums.json: missing or"),
    damage("states of another format", states(lambda state: state | {"format": 2}), "written in format 2",
           "reads format 3"),
    damage("states that are none", states(lambda _: [1, 2]), "written in format None"),
    damage("states that run code", states(lambda state: state | {"learner": Evil()}), "cannot be read (Unpickling"),
    damage("states of another protocol", states(lambda state: state | {"protocol": "other"}), "of protocol other"),
    damage("states of another config", states(lambda state: state | {"config": "other"}),
           "of a run of another config", "overwrite=true"),
    damage("events gone", removes("events.jsonl"), "no event can start at byte", "does not belong to this checkpoint"),
    damage("events too short", edits("events.jsonl", lambda text: text[: text.index(b"\n") + 1]), "no event can start"),
    damage("events no JSON", replaces("events.jsonl", '\n{"event"', '\n("event"'), "line 2: not JSON"),
    damage("a lock that is a folder", makes_folder(".lock"), ".lock", "Is a directory"),
]  # fmt: skip


@pytest.mark.parametrize("case", RESUMES, ids=str)
def test_a_damaged_finished_run_is_refused_and_left_as_it_is(
    case: Damage, short_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused_as_it_is(case, short_runs, tmp_path, capsys)


@pytest.mark.parametrize("case", GOES_ON, ids=str)
def test_a_run_that_cannot_go_on_is_refused_and_left_as_it_is(
    case: Damage,
    stopped_runs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused_as_it_is(case, stopped_runs, tmp_path, capsys)
    assert not (tmp_path / "ran").exists()


def assert_refused_as_it_is(case: Damage, made: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(made, here / "runs")
    case.change(here / "runs" / "run")
    before = tree_of(here)
    code = run_again(here / "runs")
    err = capsys.readouterr().err
    assert code == case.code, err
    assert err.count("error: ") == 1, err
    assert_one_message(err, case.said)
    assert before.items() <= tree_of(here).items(), "what was there is still there"


def stages_swapped(run: Path) -> None:
    (run / "stage_000").rename(run / "aside")
    (run / "stage_001").rename(run / "stage_000")
    (run / "aside").rename(run / "stage_001")


def weights_of_other_shapes(run: Path) -> None:
    weights = {"head.weight": torch.zeros(3, 3)}
    path = run / "stage_001" / "network.safetensors"
    checkpoint.write_checked(path, lambda file: file.write(save(weights)))


LOADS = [
    *CONFIG_DAMAGES[1:],
    damage("config gone", removes("config.yaml"), "no run with a finished stage", "has config.yaml"),
    damage("no config in the config", writes("config.yaml", "git: null\n"), "config must be a mapping of keys"),
    damage("config of another version", replaces("config.yaml", "config:\n", "config:\n  gone: 1\n"),
           "of another version (gone: unknown key 'gone'"),
    damage("config of another network", replaces("config.yaml", "width: 4", "width: 8"), "damaged or changed"),
    damage("stages gone", removes("stage_*"), "no run with a finished stage"),
    damage("stages swapped", stages_swapped, "it holds stage 0", "have been moved"),
    damage("summary cut off", edits("stage_*/stage.json", lambda text: text[:-20]), "stage.json: missing or damaged"),
    damage("summary flipped", edits("stage_*/stage.json", flipped), "its checksum is not the one"),
    damage("summary of nothing", summaries(lambda _: {"stage": 1}), "do not fit together", "KeyError: 'data'"),
    damage("summary a list", summaries(lambda _: [1]), "mapping of keys, found list"),
    damage("images of another kind", with_data(input_shape=["a", 8, 8]), "do not fit together"),
    damage("weights gone", removes("stage_*/network.safetensors"), "network.safetensors: missing or damaged"),
    damage("weights cut off", edits("stage_*/network.safetensors", lambda content: content[:-9]), "its checksum"),
    damage("weights flipped", edits("stage_*/network.safetensors", flipped), "its checksum"),
    damage("weights flipped, checksums gone", both(removes("stage_*/checksums.json"),
           edits("stage_*/network.safetensors", lambda content: content[:50])), "network.safetensors: missing or"),
    damage("weights of other shapes", weights_of_other_shapes, "do not fit together", "RuntimeError"),
    damage("checksums cut off", edits("stage_*/checksums.json", lambda text: text[:30]), "checksums.json: missing or"),
]  # fmt: skip


@pytest.mark.parametrize("case", LOADS, ids=str)
def test_a_damaged_run_is_not_loaded(case: Damage, short_runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(short_runs, tmp_path / "runs") / "run"
    case.change(run)
    before = tree_of(run)
    with pytest.raises(ValueError, match=r".") as caught:
        load(run)
    assert_one_message(str(caught.value), case.said)
    assert tree_of(run) == before


def test_a_stage_that_has_gone_is_not_another_one(short_runs: Path, tmp_path: Path) -> None:
    run = shutil.copytree(short_runs, tmp_path / "runs") / "run"
    (run / "stage_000" / "stage.json").unlink()
    with pytest.raises(ValueError, match="stage 0 is not there"):
        load(run, 0)
    assert load(run, 1).class_names == load(short_runs / "run").class_names


REPORTS = [
    damage("nothing", removes("*"), "no run folder"),
    damage("config no YAML", writes("config.yaml", "a: ["), "config.yaml cannot be read"),
    damage("config a list", writes("config.yaml", "- 1\n"), "config.yaml must hold a mapping, found list"),
    damage("config that holds a list", writes("config.yaml", "config: [1]\n"), "do not fit together"),
    damage("config that holds itself", writes("config.yaml", ITSELF), "do not fit together"),
    damage("config an impossible date", writes("config.yaml", "config: 2020-13-45\n"), "config.yaml cannot be read"),
    damage("metrics cut off", edits("metrics.json", lambda text: text[:-20]), "metrics.json cannot be read"),
    damage("metrics a number", writes("metrics.json", "1"), "metrics.json must hold a mapping, found int"),
    damage("metrics without end", writes("metrics.json", "[" * 100_000), "metrics.json cannot be read"),
    damage("a matrix that is a number", writes("metrics.json", '{"accuracy_matrix": 5}'), "do not fit together"),
    damage("a matrix of words", writes("metrics.json", '{"accuracy_matrix": [["a"], ["a", "b"]]}'), "do not fit"),
    damage("tasks that are a number", replaces("metrics.json", '"task_sizes": [', '"task_sizes": 5, "b": ['),
           "do not fit together"),
    damage("events no JSON", replaces("events.jsonl", "{", "("), "events.jsonl, line 1: not JSON"),
    damage("events of nothing", writes("events.jsonl", "{}\n"), "events.jsonl, line 1: an event has event"),
    damage("a stage that is a word", replaces("events.jsonl", '"stage": 0', '"stage": "a"'), "do not fit together"),
    damage("a start without facts", replaces("events.jsonl", '"versions": {', '"versions": 5, "others": {'),
           "do not fit together"),
]  # fmt: skip


@pytest.mark.parametrize("case", REPORTS, ids=str)
def test_of_a_damaged_run_no_page_is_written(
    case: Damage, short_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(short_runs, tmp_path / "runs") / "run"
    case.change(run)
    before = tree_of(tmp_path)
    assert report_command([str(run)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("cil.report: ")
    assert err.count("\n") == 1, err
    assert_one_message(err, case.said)
    assert tree_of(tmp_path) == before


# Teachers


def teacher(name: str, words: Sequence[str], *said: str, prepare: Prepare = as_is, begun: bool = False) -> Case:
    return Case("teachers", name, words, said, prepare, begun=begun)


def of_teacher(change: Prepare) -> Prepare:
    return lambda here: change(here / "runs" / "teacher")


def begun_with(text: str) -> Prepare:
    def prepare(here: Path) -> None:
        (here / "runs" / "student").mkdir()
        (here / "runs" / "student" / "teacher.json").write_text(text)

    return prepare


BY_NAME = ("teacher=teacher", "kd=kd")
TEACHERS = [
    teacher("nobody", ["teacher=nobody", "kd=kd"], "teacher=nobody: no run folder", "(trained networks: resnet8)",
            "python distill.py kd=none student=nobody"),
    teacher("a folder without a run", [f"teacher={HERE}", "kd=kd"], "no run folder"),
    teacher("of another class count", ["teacher=run", "kd=kd"], "its class_labels is [0, 1, 2, 3]", "the same classes"),
    teacher("of another data set", BY_NAME, "its mean is [0.5]", "of the same images is needed",
            prepare=of_teacher(with_data(mean=[0.5]))),
    teacher("of another size of image", BY_NAME, "its input shape is [1, 9, 9]",
            prepare=of_teacher(with_data(input_shape=[1, 9, 9]))),
    teacher("of another width", ["teacher=teacher", "++kd.cluster_separation.weight=1", "model.width=8"],
            "cluster_separation needs embeddings of one width", begun=True),
    teacher("of another width, searched for", ["teacher=teacher", "kd=kd", "search=diswot", "search.batch_size=4"],
            "embedding"),
    teacher("without a method", ["teacher=teacher", "kd=none"], "teacher=teacher has no effect with kd=none"),
    teacher("unfinished", BY_NAME, "no run with a finished stage", prepare=of_teacher(removes("stage_*"))),
    teacher("of another network than it says", BY_NAME, "damaged or changed",
            prepare=of_teacher(replaces("config.yaml", "width: 4", "width: 8"))),
    teacher("cut off", BY_NAME, "network.safetensors: missing or damaged",
            prepare=of_teacher(edits("stage_*/network.safetensors", lambda content: content[:-9]))),
    teacher("of a config that is none", BY_NAME, "config.yaml: cannot be read",
            prepare=of_teacher(writes("config.yaml", "a: ["))),
    teacher("of metrics that are none", BY_NAME, "teacher/metrics.json: missing or damaged",
            prepare=of_teacher(writes("metrics.json", "{"))),
    teacher("beside damaged metrics", ["teacher=resnet8", "kd=kd"], "run/metrics.json: missing or damaged",
            prepare=lambda here: writes("metrics.json", "")(here / "runs" / "run")),
    teacher("forgotten", BY_NAME, "teacher.json: damaged (it has no accuracy, checksum, folder)",
            prepare=begun_with("{}")),
    teacher("that is a list", BY_NAME, "teacher.json: damaged", "found list", prepare=begun_with("[]")),
    teacher("changed since", BY_NAME, "began with another teacher", "bring it back",
            prepare=begun_with('{"folder": "gone", "checksum": "", "accuracy": 1}')),
]  # fmt: skip


@pytest.mark.parametrize("case", TEACHERS, ids=str)
def test_a_teacher_that_cannot_teach_is_refused(
    case: Case, teachers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(teachers, tmp_path / "runs")
    case.prepare(tmp_path)
    before = tree_of(tmp_path)
    code = distill(tmp_path / "runs", "name=student", *(word.replace(HERE, str(tmp_path)) for word in case.words))
    err = capsys.readouterr().err
    assert code == case.code, err
    assert_one_message(err, case.said)
    after = tree_of(tmp_path)
    assert before.items() <= after.items()
    assert case.begun or after == before


# Ablations

ABLATIONS = {
    "missing": (None, ["cannot be read", "No such file"]),
    "no YAML": ("base: [", ["cannot be read"]),
    "an impossible date": ("base: 2020-13-45\n", ["cannot be read"]),
    "a list": ("- 1\n", ["valid dictionary"]),
    "no changes": ("base: []\nchanges: {}\n", ["changes", "at least 1 item"]),
    "no seeds": ("base: []\nchanges: {a: [seed=1]}\nseeds: []\n", ["seeds", "at least 1 item"]),
    "a seed twice": ("base: []\nchanges: {a: [optim.lr=1]}\nseeds: [1, 1]\n", ["every seed once, found [1, 1]"]),
    "a negative seed": ("base: []\nchanges: {a: [optim.lr=1]}\nseeds: [-1]\n", ["seeds.0", "greater than or equal"]),
    "an unknown key": ("bas: []\nchanges: {a: [optim.lr=1]}\n", ["bas"]),
    "a seed as a change": ("base: []\nchanges: {a: [seed=1]}\n", ["seed=1: seeds are listed under seeds:"]),
    "names that are one": ("base: []\nchanges: {a b: [optim.lr=1], a-b: [optim.lr=2]}\n", ["found 'a-b' twice"]),
    "a wrong change": ("base: [experiment=tiny]\nchanges: {a: [optim.epoch=3]}\n", ["a: optim.epoch: unknown key"]),
    "a change of nothing": ("base: [experiment=tiny]\nchanges: {a: [seeds=0]}\n", ["seeds: unknown key"]),
    "another program": ("base: []\nchanges: {a: [optim.lr=1]}\nprogram: other\n", ["program", "'distill'"]),
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_that_makes_no_sense_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, said = ABLATIONS[name]
    if text is not None:
        (tmp_path / "ablation.yaml").write_text(text)
    assert ablate.main([str(tmp_path / "ablation.yaml"), "--runs-dir", str(tmp_path / "runs")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("cil.ablate: ")
    assert_one_message(err, said)
    assert not (tmp_path / "runs").exists()


# Through the command line

TRAIN = ("train_incremental.py", "experiment=tiny", f"runs_dir={HERE}/runs", "name=run")
DISTILL = ("distill.py", *STATIC, f"runs_dir={HERE}/runs", "name=run")


def typed(name: str, words: Sequence[str], *said: str, prepare: Prepare = as_is, code: int = 2) -> Case:
    return Case("command line", name, words, said, prepare, code)


TYPED = [
    typed("too many classes", [*TRAIN, "scenario.classes=11"], "error: classes must be between 1 and the 10 classes"),
    typed("no such order", [*TRAIN, "scenario.class_order=order9"], "error: class_order=order9: there is no such file"),
    typed("a small memory", [*TRAIN, "memory.size=9"], "error: memory.size=9 has no room"),
    typed("a pickle", [*TRAIN, *NPZ], "could run code", prepare=archive(y_train=labelled(None, "O"))),
    typed("no image", [*TRAIN, *PHOTOS, "learner=finetune", "scenario.classes=6"], NO_IMAGE, prepare=holding(b"text")),
    typed("a config that is none", TRAIN, "config.yaml: cannot be read", prepare=lambda here: [
        (here / "runs" / "run").mkdir(parents=True), (here / "runs" / "run" / "config.yaml").write_text("a: ["),
        (here / "runs" / "run" / "metrics.json").write_text('{"finished": true}')]),
    typed("numbers that go wrong", [*TRAIN, "learner=finetune", "optim.optimizer=sgd", "optim.lr=1e30",
          "optim.schedule.warmup_epochs=0"], "the loss is not finite", "optim.lr", code=1),
    typed("a sweep of nothing", [*TRAIN, "-m", "seed=-1,-2"], "seed: input should be greater than or equal to 0"),
    typed("no such teacher", [*DISTILL, "teacher=nobody", "kd=kd"], "error: teacher=nobody: no run folder"),
    typed("no such network", [*DISTILL, "student=reznet20"], "did you mean 'resnet20'?"),
    typed("no run to report", ["-m", "cil.report", f"{HERE}/nowhere"], "cil.report: ", "nowhere is not a folder"),
    typed("no run to look at", ["-m", "cil.cam", HERE, "test"], "cil.cam: ", "no run with a finished stage"),
    typed("no ablation", ["-m", "cil.ablate", f"{HERE}/none.yaml"], "cil.ablate: ", "none.yaml: cannot be read"),
    typed("no checkpoint to convert", ["-m", "cil.convert", f"{HERE}/none.pth", f"{HERE}/out"], "none.pth"),
]  # fmt: skip


@pytest.mark.parametrize("case", TYPED, ids=str)
def test_a_bad_command_ends_with_its_code_and_one_message(case: Case, tmp_path: Path) -> None:
    case.prepare(tmp_path)
    before = tree_of(tmp_path)
    words = [word.replace(HERE, str(tmp_path)) for word in case.words]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == case.code, done.stderr
    assert_one_message(done.stderr, case.said)
    assert before.items() <= tree_of(tmp_path).items()
    assert not (tmp_path / "runs" / "run" / "report.html").exists()
