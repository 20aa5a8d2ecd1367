"""`python -m cil.cam RUN IMAGES`: where in an image a trained network finds the evidence for a class, as pictures.

RUN is a run folder. IMAGES are image files and folders of them, or `test`, `test:right` or `test:wrong`: images of the
run's own test set, chosen at random by the run's seed, of which the prediction is right or wrong.
"""

import argparse
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from einops import rearrange, repeat
from jaxtyping import Float, UInt8
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from cil.build import open_data
from cil.data.folder_index import find_images
from cil.loading import Model, load
from cil.models.network import Network
from cil.seeding import derive
from kd.cam import overlay
from kd.precision import full_precision
from kd.registry import unknown

TEST_CHOICES: dict[str, bool | None] = {"test": None, "test:right": True, "test:wrong": False}
PREDICTED, LABEL = "predicted", "label"  # what stands for a class on the command line
OVERVIEW = "overview.png"

_BATCH_SIZE = 64
_MADE_BY = "cil.cam"  # stands in the pictures: others are never overwritten
_SMALLEST_SIDE = 192  # pixels; smaller images are enlarged by a whole number
_MARGIN, _LINE = 10, 18  # pixels
_DPI, _FONT_SIZE = 100, 9
_CHARACTER = 7.2  # pixels that a character takes up, about
_HEAT_SHARE = 0.5  # of the colours of a map, laid over its image
_COLOURS = "turbo"

Pixels = UInt8[np.ndarray, "height width 3"]


@dataclass(frozen=True)
class Example:
    """An image to look at.

    Attributes:
        name: Of its picture.
        source: Where it is from, in words.
        pixels: In the network's input size.
        label: Which of the network's outputs is its class; None where nobody knows.
    """

    name: str
    source: str
    pixels: UInt8[Tensor, "channels height width"]
    label: int | None


@dataclass(frozen=True)
class Explained:
    """What a network says of an image, and where its evidence is.

    Attributes:
        example: The image.
        probabilities: Of all classes.
        maps: Class maps of all classes, as `kd.cam.class_maps` gives them.
    """

    example: Example
    probabilities: Float[Tensor, " classes"]
    maps: Float[Tensor, "classes rows columns"]

    @property
    def predicted(self) -> int:
        """The class of the largest probability."""
        return int(self.probabilities.argmax())

    @property
    def is_right(self) -> bool:
        """Whether the prediction is the true class."""
        return self.predicted == self.example.label


def tapped(model: Model) -> Network:
    """The network of a run, which says its class maps from now on.

    Raises:
        ValueError: If its scores are no sums over the places of a map, or it takes no images that can be shown.
    """
    network, paths = model.network, model.network.tap_paths()
    is_pooled = "last" in paths.outputs | paths.inputs  # otherwise the means of the maps are not the scores
    if not is_pooled or "class_maps" not in network.taps():
        raise ValueError(
            f"class activation maps need a network whose linear head reads the mean of a feature map; {_kind(model)} "
            "has none, as is so of transformers (dkt, dytox, those of timm), of networks with a norm behind the mean "
            "and of heads with several vectors for a class (podnet): use a run of a convolutional network such as "
            "model=resnet32 with another learner"
        )
    if network.input_shape[0] not in (1, 3):
        raise ValueError(f"images of 1 or 3 channels can be shown, the run has {network.input_shape[0]}")
    network.expose(["class_maps"])
    return network.eval()


def explain(model: Model, examples: Iterable[Example]) -> Iterator[Explained]:
    """What the network of a run says of images of its input size, one after another.

    Raises:
        ValueError: If the network has no class maps, or they have a single place.
    """
    network, weights = tapped(model), next(model.network.parameters())
    for batch in _batches(examples):
        images = torch.stack([example.pixels for example in batch]).to(weights.device)
        with torch.inference_mode():
            outputs = network(model.transform.test(images).to(weights.dtype))
            maps = outputs.taps["class_maps"].cpu()
            probabilities = full_precision(outputs.logits).softmax(dim=1).cpu()
        if maps.shape[2:].numel() == 1:
            raise ValueError(
                f"the class maps of {_kind(model)} have a single place at an input of {images.shape[2]} x "
                f"{images.shape[3]} pixels, so they cannot point at one: use a network that shrinks its images less"
            )
        for example, row, own in zip(batch, probabilities, maps, strict=True):
            yield Explained(example, row, own.clone())  # a view would hold the maps of the whole batch


def of_test_set(model: Model) -> Iterator[Example]:
    """Test images of the classes that the network knows, in an order drawn from the run's seed.

    Raises:
        ValueError: If the data set is missing, or is not that of the run.
    """
    data = open_data(model.config)
    # by name, so that labels stay true when a class folder has been added since
    known = {name: index for index, name in enumerate(model.class_names)}
    labels = torch.tensor([known.get(name, -1) for name in data.class_names])[data.test.labels]
    ids = torch.nonzero(labels >= 0).flatten()
    if data.input_shape != model.network.input_shape or not len(ids):
        raise ValueError(
            f"the data set {data.name} is no longer that of the run: it has images of shape {data.input_shape} and "
            f"{len(ids)} of them are of known classes, the network takes {model.network.input_shape}"
        )
    generator = torch.Generator().manual_seed(derive(model.config.seed, "cam"))
    for some in torch.split(ids[torch.randperm(len(ids), generator=generator)], _BATCH_SIZE):
        for index, pixels in zip(some.tolist(), data.test.fetch(some), strict=True):
            yield Example(f"test_{index:05d}", f"test image {index}", pixels, int(labels[index]))


def of_files(model: Model, files: Sequence[Path]) -> Iterator[Example]:
    """Images of any size, brought to the network's input as test images are (`Model.read`); nobody knows their classes.

    Raises:
        ValueError: If a file is no image, or the network's input is no square.
    """
    for number, path in enumerate(files):
        yield Example(f"{number:03d}_{path.stem}", path.name, model.read(path), None)


def class_chooser(model: Model, words: Sequence[str]) -> list[int | str]:
    """Which maps to show: indices of classes by name; `predicted` and `label` stay, they differ from image to image.

    Raises:
        ValueError: If the network knows no such class.
    """
    indices = {name: index for index, name in enumerate(model.class_names)}
    for word in words:
        if word not in (PREDICTED, LABEL) and word not in indices:
            raise ValueError(f"--classes: {unknown('class', word, list(indices))}; or {PREDICTED}, {LABEL}")
    return [word if word in (PREDICTED, LABEL) else indices[word] for word in words]


def heated(image: Pixels, heat: Float[Tensor, "height width"]) -> Pixels:
    """A map over its image: blue where it is smallest, red where it is largest."""
    colours = matplotlib.colormaps[_COLOURS](heat.numpy())[..., :3] * 255
    mixed: Pixels = np.rint((1 - _HEAT_SHARE) * image + _HEAT_SHARE * colours).astype(np.uint8)
    return mixed


def draw(
    explained: Explained, classes: Iterable[int], class_names: Sequence[str]
) -> UInt8[np.ndarray, "rows columns 3"]:
    """A picture: what is seen in words, the image, and beside it the map of each class laid over it.

    Every map runs from its own smallest to its own largest value, so colours do not compare two maps.

    Args:
        explained: The image and its maps.
        classes: Whose maps are shown.
        class_names: By output.
    """
    example, probabilities = explained.example, explained.probabilities
    factor = math.ceil(_SMALLEST_SIDE / min(example.pixels.shape[1:]))
    shown = repeat(example.pixels, "c h w -> (h fh) (w fw) c", fh=factor, fw=factor)
    image: Pixels = np.broadcast_to(shown.cpu().numpy(), (*shown.shape[:2], 3))
    height, width = image.shape[:2]
    panels = {"image": image}
    for index in classes:
        heat = overlay(explained.maps[None, index, None], (height, width))[0, 0]
        panels[f"map of {class_names[index]}"] = heated(image, heat)

    predicted = explained.predicted
    lines = [example.source, f"predicted {class_names[predicted]}, probability {probabilities[predicted]:.2f}"]
    if example.label is not None:
        share = "right" if explained.is_right else f"wrong, probability {probabilities[example.label]:.2f}"
        lines.append(f"true class {class_names[example.label]}: {share}")
    top = _MARGIN + _LINE * (len(lines) + 1)  # and the line above the panels
    columns, rows = _MARGIN + len(panels) * (width + _MARGIN), top + height + _MARGIN
    with matplotlib.rc_context({"text.parse_math": False, "font.size": _FONT_SIZE}):
        figure = Figure(figsize=(columns / _DPI, rows / _DPI), dpi=_DPI, facecolor="white")

        def write(text: str, x: int, y: int, room: int, weight: str = "normal") -> None:
            figure.text(x / columns, 1 - y / rows, _shortened(text, room), va="top", weight=weight)

        for number, line in enumerate(lines):
            write(line, _MARGIN, _MARGIN // 2 + number * _LINE, columns - _MARGIN, "bold" if number else "normal")
        for number, (title, panel) in enumerate(panels.items()):
            left = _MARGIN + number * (width + _MARGIN)
            write(title, left, top - _LINE, width)
            figure.figimage(panel, left, _MARGIN, origin="upper")  # pixel by pixel, from the lower left corner
        canvas: Any = FigureCanvasAgg(figure)  # whose methods have no types
        canvas.draw()
        return np.array(canvas.buffer_rgba())[..., :3]


def contact_sheet(pictures: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> UInt8[np.ndarray, "rows columns 3"]:
    """All pictures in a grid about as wide as high, row by row, each on white of the size of the largest."""
    height, width = (max(picture.shape[side] for picture in pictures) for side in (0, 1))
    columns = min(len(pictures), math.ceil(math.sqrt(len(pictures) * height / width)))
    cells = np.full((math.ceil(len(pictures) / columns) * columns, height, width, 3), 255, dtype=np.uint8)
    for cell, picture in zip(cells, pictures, strict=False):  # the last row may have cells left
        cell[: picture.shape[0], : picture.shape[1]] = picture
    return rearrange(cells, "(rows columns) h w c -> (rows h) (columns w) c", columns=columns)


def write_pictures(
    model: Model, explained: Sequence[Explained], choice: Sequence[int | str], folder: Path
) -> list[Path]:
    """Write one picture for each image, and `overview.png` with all of them.

    Args:
        model: Of a run.
        explained: The images.
        choice: From `class_chooser`; a class that is chosen twice is shown once.
        folder: Where to; made if it is not there.

    Returns:
        The pictures, the overview last.

    Raises:
        ValueError: If a file of one of these names is there that was not written here.
    """
    paths = [folder / f"{one.example.name}.png" for one in explained] + [folder / OVERVIEW]
    for path in paths:
        if path.exists() and not _is_ours(path):
            raise ValueError(f"{path} exists and was not written by {_MADE_BY}: choose another folder with -o")
    pictures = []
    for one in explained:
        own = {PREDICTED: one.predicted, LABEL: one.example.label}
        classes = [own[word] if isinstance(word, str) else word for word in choice]
        shown = list(dict.fromkeys(index for index in classes if index is not None))
        pictures.append(draw(one, shown, model.class_names))
    folder.mkdir(parents=True, exist_ok=True)
    mark = PngInfo()
    mark.add_text("Software", _MADE_BY)
    for path, picture in zip(paths, [*pictures, contact_sheet(pictures)], strict=True):
        Image.fromarray(picture).save(path, pnginfo=mark)
    return paths


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pictures and print where they are; 2 and one message if the input is no good."""
    parser = argparse.ArgumentParser(prog="python -m cil.cam", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("images", nargs="+", metavar="IMAGES", help=f"files and folders, or {', '.join(TEST_CHOICES)}")
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="default: a folder in RUN/cam")
    parser.add_argument("--stage", type=int, metavar="N", help="the network after this stage; default: the last")
    parser.add_argument("--count", type=int, default=16, metavar="N", help="at most so many images (default 16)")
    parser.add_argument(
        "--classes",
        nargs="+",
        metavar="CLASS",
        help=f"whose maps: {PREDICTED}, {LABEL}, names of classes; default: {PREDICTED}, and {LABEL} where it is known",
    )
    parser.add_argument("--device", default="cpu", help="default cpu")
    chosen = parser.parse_args(arguments)
    try:
        folder, num_left_out = _run(chosen)
    except (ValueError, OSError) as error:
        print(f"cil.cam: {error}", file=sys.stderr)
        return 2
    if num_left_out:
        print(f"{num_left_out} more images were left out; --count shows more")
    print(folder / OVERVIEW)
    return 0


def _run(chosen: argparse.Namespace) -> tuple[Path, int]:
    """The folder of the pictures, and how many images were left out for their number."""
    if chosen.count < 1:
        raise ValueError(f"--count must be at least 1, found {chosen.count}")
    words = [word for word in chosen.images if word in TEST_CHOICES]
    if words and len(chosen.images) > 1:
        raise ValueError(f"{words[0]} stands alone, found it with {len(chosen.images) - 1} more: one command for each")
    if not words and LABEL in (chosen.classes or []):
        raise ValueError(f"--classes {LABEL}: nobody knows the classes of files; use {PREDICTED}, or names of classes")
    model = load(chosen.run, chosen.stage, chosen.device)
    choice = class_chooser(model, chosen.classes or [PREDICTED, LABEL])
    if words:
        wanted = TEST_CHOICES[words[0]]
        explained = []
        for one in explain(model, of_test_set(model)):
            if wanted in (None, one.is_right):
                explained.append(one)
            if len(explained) == chosen.count:
                break
        if not explained:
            raise ValueError(f"{words[0]}: every prediction is {'wrong' if wanted else 'right'}, so there is no image")
        num_left_out = 0  # of a random choice nobody expects all
    else:
        may_be = f"image files, folders of them, or one of {', '.join(TEST_CHOICES)}"
        files = find_images(map(Path, chosen.images), may_be)
        explained = list(explain(model, of_files(model, files[: chosen.count])))
        num_left_out = len(files) - len(explained)
    folder = chosen.output or chosen.run / "cam" / (words[0].replace(":", "_") if words else "files")
    write_pictures(model, explained, choice, folder)
    return folder, num_left_out


def _batches(examples: Iterable[Example]) -> Iterator[list[Example]]:
    batch: list[Example] = []
    for example in examples:
        batch.append(example)
        if len(batch) == _BATCH_SIZE:
            yield batch
            batch = []
    if batch:
        yield batch


def _kind(model: Model) -> str:
    return type(model.network).__name__


def _shortened(text: str, room: int) -> str:
    """What of a text has room in so many pixels."""
    longest = int(room / _CHARACTER)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _is_ours(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == _MADE_BY
    except OSError:  # no image
        return False


if __name__ == "__main__":
    sys.exit(main())
