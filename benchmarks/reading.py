"""Rows of `make bench` about everything around the steps: images, exemplars, evaluation, checkpoints, start."""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder as TorchvisionFolder

from benchmarks.measuring import Measured, device, rate, row, seconds_of, side_by_side, threads, way
from cil import checkpoint
from cil.data import Transform, augmentations, data_sets
from cil.data.base import ImageSet
from cil.evaluation import Reader
from cil.learners.base import Learner
from cil.memory import selection_rules
from cil.models.network import models
from cil.seeding import SampleNoise

_MEAN, _STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)  # of CIFAR-100


def _photos(count: int, side: int) -> torch.Tensor:
    """Smooth coloured pictures: what equalising and decoding take depends on what is in an image."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1)
    return (255 * smooth).to(torch.uint8)


def _pil(images: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]


def _augmented(names: dict[str, dict[str, object]], pipeline: Callable[[Image.Image], torch.Tensor]) -> Measured:
    images = _photos(512, 32)
    own = images.to(device())
    transform = Transform([augmentations[name](**values) for name, values in names.items()], _MEAN, _STD)
    ids = torch.arange(len(images), device=device())
    pictures = _pil(images)

    def ours() -> None:
        for some in ids.split(128):
            transform.train(own[some], SampleNoise(0, some, torch.zeros_like(some)))

    with threads(1):
        return rate(len(images), ours, lambda: torch.stack([pipeline(picture) for picture in pictures]))


_END = (transforms.ToTensor(), transforms.Normalize(_MEAN, _STD))


@row
def crop_flip() -> Measured:
    """Random crop with padding and flip at 32 px, per core, beside torchvision on PIL images."""
    pipeline = transforms.Compose([transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), *_END])
    return _augmented({"crop": {"padding": 4}, "flip": {}}, pipeline)


@row
def randaugment_cutout() -> Measured:
    """Crop, flip, RandAugment and cutout at 32 px, per core, beside torchvision on PIL images."""
    pipeline = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.RandAugment(2, 9, interpolation=transforms.InterpolationMode.BICUBIC),
            *_END,
            transforms.RandomErasing(1.0),
        ]
    )
    return _augmented({"crop": {"padding": 4}, "flip": {}, "randaugment": {}, "cutout": {}}, pipeline)


@row
def jpeg_folder_224() -> Measured:
    """Photographs of 500 x 375 pixels from a folder as random crops of 224 px, per core, beside torchvision."""
    with tempfile.TemporaryDirectory() as folder, threads(1):
        for number, picture in enumerate(_pil(_photos(64, 500)[:, :, :375])):
            for part in ("train", "val"):
                path = Path(folder, part, f"class{number % 2}", f"{number}.jpg")
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path, quality=90)
        data = data_sets["image_folder"](Path(folder), path=folder, num_workers=0).load()
        ids = torch.arange(len(data.train.labels))
        transform = Transform([augmentations["flip"]()], data.mean, data.std)
        bicubic = transforms.InterpolationMode.BICUBIC
        pipeline = transforms.Compose(
            [transforms.RandomResizedCrop(224, interpolation=bicubic), transforms.RandomHorizontalFlip(), *_END]
        )
        other = TorchvisionFolder(str(Path(folder, "train")), pipeline)

        def ours() -> None:
            plan = [(some, torch.zeros_like(some)) for some in ids.split(32)]
            for (some, views), pixels in zip(plan, data.train.stream(plan, 0), strict=True):
                transform.train(pixels, SampleNoise(0, some, views))

        return rate(len(ids), ours, lambda: [other[index] for index in range(len(other))])


def _reader(plain: bool) -> tuple[Reader, Learner]:
    torch.manual_seed(0)
    network = models["dkt"]((3, 32, 32))
    network.grow(10)
    learner = Learner(network.to(device()), None)
    fast, precision = way(plain=plain)
    fast.apply(learner)
    return Reader(Transform([], _MEAN, _STD), precision, 256), learner


@row
def evaluation() -> Measured:
    """Right answers of DKT (width 384) on 512 images of 32 px."""
    images = ImageSet(_photos(512, 32), torch.arange(512) % 10)
    sides = []
    for plain in (False, True):
        reader, learner = _reader(plain)
        sides.append(lambda r=reader, n=learner: r.count(n, images, images.labels, (5, 5)))
    return rate(512, *sides, repetitions=3)


@row
def herding() -> Measured:
    """20 exemplars of a class of 500 by herding, features of width 384; the release's loop over all rows for each."""
    features = F.normalize(torch.randn(500, 384, generator=torch.Generator().manual_seed(0)))
    rule = selection_rules["herding"]

    def released() -> list[int]:
        rows, chosen = features.double().numpy(), []
        mean, running = rows.mean(axis=0), np.zeros(rows.shape[1])
        for count in range(20):
            distances = np.linalg.norm(mean - (running + rows) / (count + 1), axis=1)
            distances[chosen] = np.inf
            chosen.append(int(distances.argmin()))
            running += rows[chosen[-1]]
        return chosen

    return side_by_side(lambda: rule(features, 20), released)


def _state() -> dict[str, torch.Tensor]:
    return {f"layer{number}": torch.randn(1000, 1000) for number in range(12)}


@row
def checkpoint_write() -> Measured:
    """48 MB of state with flushing to the disk, checksum and renaming, beside torch.save alone, which does none."""
    state = _state()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "state.pt")
        return side_by_side(
            lambda: checkpoint.write_checked(path, lambda file: torch.save(state, file)),
            lambda: torch.save(state, Path(folder, "plain.pt")),
            repetitions=5,
        )


@row
def checkpoint_read() -> Measured:
    """The same read with its checksum, beside torch.load alone."""
    state = _state()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "state.pt")
        checkpoint.write_checked(path, lambda file: torch.save(state, file))

        def ours() -> None:
            checkpoint.checksum(path)
            torch.load(path, weights_only=True)

        return side_by_side(ours, lambda: torch.load(path, weights_only=True), repetitions=5)


def _run(*words: str) -> None:
    subprocess.run([sys.executable, *words], check=True, capture_output=True)


def _beside_torch(ours: Callable[[], None]) -> Measured:
    """Seconds of what a command does, and of importing torch."""
    value, torch_alone = seconds_of(ours, lambda: _run("-c", "import torch"), repetitions=3)
    return Measured(value, "s", torch_alone, torch_alone / value)


@row
def show_help() -> Measured:
    """`train_incremental.py --help`, beside starting Python and importing torch."""
    return _beside_torch(lambda: _run("train_incremental.py", "--help"))


def _first_step() -> None:
    """From the command to the end of the first epoch of the demo."""
    with tempfile.TemporaryDirectory() as folder:
        words = ("experiment=demo", f"runs_dir={folder}", "name=first", "log=[]", "optim.epochs=1")
        with subprocess.Popen(
            [sys.executable, "train_incremental.py", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            events = Path(folder, "first", "events.jsonl")
            while process.poll() is None and not (events.exists() and '"epoch"' in events.read_text()):
                time.sleep(0.01)
            process.kill()


@row
def first_step() -> Measured:
    """From the command to the end of the first epoch (5 steps) of the demo, beside importing torch."""
    return _beside_torch(_first_step)


@row
def report() -> Measured:
    """The page of 20 runs, beside importing torch."""
    with tempfile.TemporaryDirectory() as folder:
        words = ("experiment=tiny", f"runs_dir={folder}", "device=cpu")
        _run("train_incremental.py", *words, "name=run0")
        metrics = Path(folder, "run0", "metrics.json")
        assert json.loads(metrics.read_text())["finished"]
        for number in range(1, 20):
            shutil.copytree(metrics.parent, Path(folder, f"run{number}"))
        page = str(Path(folder, "page.html"))
        return _beside_torch(lambda: _run("-m", "cil.report", folder, "-o", page))
