"""Small photographs in class folders, for tests."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def write_pictures(folder: Path, classes: Sequence[str], per_class: int, size: tuple[int, int] = (16, 12)) -> None:
    """`per_class` pictures of random pixels in a folder for each class: one colour a class, its own roughness."""
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(per_class):
            generator = np.random.default_rng([number, index])
            colour = np.random.default_rng(number).integers(40, 216, 3)
            pixels = np.clip(colour + generator.normal(0, 20, (size[1], size[0], 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{index}.png")
