"""Small pictures for the page as data URIs: evaluation images beside where the evidence is, and exemplars."""

import base64
import io
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image

from cil.report.snapshots import Snapshot

_SMALLEST_SIDE = 96  # pixels; smaller images are enlarged by a whole number under their maps
_SHOWN_SIDE = 36  # of an exemplar, in pixels of the page
_HEAT_SHARE = 0.55  # of the colours of a map, laid over its image
_COLOURS = "inferno"  # lightness grows with the value, so it is read without colour too


class Example(NamedTuple):
    """An evaluation image, and what is said of it.

    Attributes:
        image: Data URI.
        heated: Data URI of the image under its map; None without one.
        label: Name of its class.
        answer: Name of the class that is the answer.
        is_right: Whether they are one.
        score: Probability, or nearness, of the answer.
    """

    image: str
    heated: str | None
    label: str
    answer: str
    is_right: bool
    score: float


class Kept(NamedTuple):
    """The first exemplars of a class, best first, as one strip of `shown_width` pixels on the page."""

    name: str
    strip: str
    num_images: int
    shown_width: int


def examples(snapshot: Snapshot) -> list[Example]:
    """The examples of a snapshot, rightly answered ones first."""
    images, maps = snapshot.array("examples"), snapshot.array("maps")
    names = snapshot.class_names
    if images is None:
        return []
    found = []
    for index, said in enumerate(snapshot.facts["examples"]):
        pixels = _rgb(images[index])
        heated = None if maps is None else _uri(_heated(pixels, maps[index]))
        label, answer = said["label"], said["answer"]
        found.append(Example(_uri(pixels), heated, names[label], names[answer], label == answer, said["score"]))
    return found


def exemplars(snapshot: Snapshot) -> list[Kept]:
    """A strip for each class that has some."""
    images = snapshot.array("exemplars")
    if images is None:
        return []
    labels = np.array(snapshot.facts["exemplar_labels"])
    found = []
    for label in np.unique(labels):
        strip = np.concatenate([_rgb(image) for image in images[labels == label]], axis=1)
        count = int((labels == label).sum())
        found.append(Kept(snapshot.class_names[label], _uri(strip), count, _SHOWN_SIDE * count))
    return found


def _rgb(image: np.ndarray) -> np.ndarray:
    """[channels, height, width] as [height, width, 3]."""
    return np.ascontiguousarray(np.broadcast_to(np.moveaxis(image, 0, 2), (*image.shape[1:], 3)))


def _heated(pixels: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """A map over its image: the lighter, the more evidence."""
    factor = -(-_SMALLEST_SIDE // min(pixels.shape[:2]))
    large = pixels.repeat(factor, axis=0).repeat(factor, axis=1)
    size = large.shape[1], large.shape[0]
    smooth = np.asarray(Image.fromarray(heat).resize(size, Image.Resampling.BILINEAR)) / 255
    grey = large.mean(axis=2, keepdims=True)  # the colours are those of the map
    colours = matplotlib.colormaps[_COLOURS](smooth)[..., :3] * 255
    mixed: np.ndarray = np.rint((1 - _HEAT_SHARE) * grey + _HEAT_SHARE * colours).astype(np.uint8)
    return mixed


def _uri(pixels: np.ndarray) -> str:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"
