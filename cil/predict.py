"""`python -m cil.predict RUN IMAGES...`: which classes a trained network sees in images, and how sure it is.

RUN is a run folder, or a file of `python -m cil.export --to safetensors`. IMAGES are image files, folders of them, and
.npz or .npy files of uint8 arrays [images, height, width] or [images, height, width, channels].
"""

import argparse
import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from cil.data.files import default_num_workers
from cil.data.folder_index import find_images
from cil.data.npz import DAMAGED
from cil.loading import Model, load
from cil.text_table import as_text

T = TypeVar("T")

FORMATS = ("table", "json", "csv")
ARRAY_SUFFIXES = (".npz", ".npy")
ARRAY_NAMES = ("x", "images", "x_test")  # of which the first that is in an .npz file is read


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image.

    Attributes:
        source: The file, or the file with the image's number in it.
        classes: Likeliest first: name, label in the data set, confidence.
    """

    source: str
    classes: list[tuple[str, int, float]]


@dataclass(frozen=True)
class Unreadable:
    """An image, or a file of them, that could not be read.

    Attributes:
        source: The file.
        reason: What is wrong with it.
    """

    source: str
    reason: str


def predict(
    model: Model, files: Sequence[Path], *, top_k: int = 5, batch_size: int = 64
) -> Iterator[Prediction | Unreadable]:
    """What a model says of the images in some files, in their order; files that cannot be read stop nothing.

    Args:
        model: The model.
        files: Image files as `Model.read` takes them, and files of arrays.
        top_k: Classes to name for an image; all, if the model knows fewer.
        batch_size: Images at a time.

    Raises:
        ValueError: If `top_k` or `batch_size` is below 1.
    """
    if top_k < 1 or batch_size < 1:
        raise ValueError(f"top-k and batch-size must be at least 1, found {top_k} and {batch_size}")
    for some in _batches(_images(model, files, batch_size), batch_size):
        readable = [image for _, image in some if isinstance(image, Tensor)]
        best = iter(_best(model, torch.stack(readable), top_k) if readable else [])
        for source, image in some:
            yield Prediction(source, next(best)) if isinstance(image, Tensor) else Unreadable(source, str(image))


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def _best(model: Model, images: Tensor, top_k: int) -> list[list[tuple[str, int, float]]]:
    labels = dict(zip(model.class_names, model.class_labels, strict=True))
    return [[(name, labels[name], share) for name, share in classes] for classes in model.top_k(images, top_k)]


def _images(model: Model, files: Sequence[Path], ahead: int) -> Iterator[tuple[str, Tensor | ValueError]]:
    """Every image with its source, or what is wrong with it; files are decoded by several threads."""

    def read(path: Path) -> Tensor | ValueError:
        try:
            return model.read(path)
        except ValueError as error:
            return error

    def load_file(path: Path) -> Tensor | ValueError:
        try:
            return read_arrays(path, model.network.input_shape)
        except ValueError as error:
            return error

    with ThreadPoolExecutor(default_num_workers()) as threads:
        for some in _batches(files, ahead):
            pictures = [path for path in some if path.suffix.lower() not in ARRAY_SUFFIXES]
            decoded = iter(threads.map(read, pictures))
            for path in some:
                if path.suffix.lower() not in ARRAY_SUFFIXES:
                    yield str(path), next(decoded)
                    continue
                arrays = load_file(path)
                if isinstance(arrays, ValueError):
                    yield str(path), arrays
                else:
                    yield from ((f"{path}[{index}]", image) for index, image in enumerate(arrays))


def read_arrays(path: Path, input_shape: tuple[int, int, int]) -> Tensor:
    """The images of a .npy file, or of the array `x`, `images` or `x_test` of an .npz file; channels come first then.

    Args:
        path: The file.
        input_shape: Channels, height and width that its images must have.

    Raises:
        ValueError: If the file is damaged, or holds no such array.
    """
    try:
        # opened here, since NumPy leaves its own file open when the archive in it is damaged
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            images: NDArray[Any] = loaded if isinstance(loaded, np.ndarray) else _named(loaded)
    except DAMAGED as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    channels, height, width = input_shape
    wanted = f"uint8 [images, {height}, {width}" + (f", {channels}]" if channels > 1 else "] or [..., 1]")
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.shape[1:] != (height, width, channels):
        raise ValueError(f"{path} holds {images.dtype} {list(images.shape)}, the network of the run takes {wanted}")
    return torch.from_numpy(np.ascontiguousarray(rearrange(images, "n h w c -> n c h w")))


def _named(archive: Any) -> NDArray[Any]:
    for name in ARRAY_NAMES:
        if name in archive.files:
            array: NDArray[Any] = archive[name]
            return array
    raise ValueError(f"it has no {' or '.join(ARRAY_NAMES)}; found {', '.join(archive.files) or 'nothing'}")


def as_table(found: Sequence[Prediction]) -> str:
    """A line for each image: the likeliest class and its confidence, then the others."""
    rows = []
    for one in found:
        (name, _, share), *others = one.classes
        rest = ", ".join(f"{other} {value:.3f}" for other, _, value in others)
        rows.append((one.source, name, f"{share:.3f}", rest))
    return as_text(("image", "class", "confidence", "then"), rows, left=("image", "class", "then"))


def as_json(model: Model, run: str, found: Sequence[Prediction], unreadable: Sequence[Unreadable]) -> str:
    """All of it, as one JSON object."""
    return (
        json.dumps(
            {
                "run": run,
                "stage": model.stage,
                "class_names": list(model.class_names),
                "predictions": [
                    {
                        "image": one.source,
                        "classes": [
                            {"class": name, "label": label, "confidence": share} for name, label, share in one.classes
                        ],
                    }
                    for one in found
                ],
                "unreadable": [{"image": one.source, "reason": one.reason} for one in unreadable],
            },
            indent=1,
            ensure_ascii=False,
        )
        + "\n"
    )


def as_csv(found: Sequence[Prediction]) -> str:
    """A line for each image and class: `image,rank,class,label,confidence`; the likeliest class has rank 1."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", "rank", "class", "label", "confidence"])
    for one in found:
        for rank, (name, label, share) in enumerate(one.classes, start=1):
            writer.writerow([one.source, rank, name, label, f"{share:.6f}"])
    return text.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """Say what is seen; returns the exit code: 0 done, 1 some images could not be read, 2 the request was wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m cil.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder, or an exported .safetensors file")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGES", help="image files, folders, .npz, .npy")
    parser.add_argument("--top-k", type=int, default=5, metavar="K", help="classes to name for an image (default 5)")
    parser.add_argument("--format", choices=FORMATS, help="default: that of FILE's name, else table")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write there instead of printing")
    parser.add_argument("--overwrite", action="store_true", help="write over FILE if it is there")
    parser.add_argument("--stage", type=int, metavar="N", help="the network after this stage; default: the last")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at a time (default 64)")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, auto")
    chosen = parser.parse_args(arguments)
    try:
        return _run(chosen)
    except (ValueError, OSError) as error:
        print(f"cil.predict: {error}", file=sys.stderr)
        return 2


def _run(chosen: argparse.Namespace) -> int:
    output: Path | None = chosen.output
    if output is not None and output.exists() and not chosen.overwrite:
        raise ValueError(f"{output} exists: choose another name, or --overwrite")
    form = chosen.format or (output.suffix[1:] if output is not None and output.suffix[1:] in FORMATS else "table")
    files = find_images(chosen.images, "image files, folders of them, .npz or .npy files")
    model = load(chosen.run, chosen.stage, chosen.device)
    found: list[Prediction] = []
    unreadable: list[Unreadable] = []
    for one in predict(model, files, top_k=chosen.top_k, batch_size=chosen.batch_size):
        if isinstance(one, Prediction):
            found.append(one)
        else:
            unreadable.append(one)
            print(f"cil.predict: {one.reason}", file=sys.stderr)
    if form == "json":
        text = as_json(model, str(chosen.run), found, unreadable)
    else:
        text = as_csv(found) if form == "csv" else as_table(found)
    if output is None:
        print(text, end="")
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
        print(output)
    if unreadable:
        print(f"cil.predict: {len(unreadable)} of {len(files)} files could not be read", file=sys.stderr)
    return 1 if unreadable else 0


if __name__ == "__main__":
    sys.exit(main())
