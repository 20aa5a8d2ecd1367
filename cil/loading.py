"""Using what a run has learned."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, UInt8
from safetensors.torch import load_file
from torch import Tensor

from cil import checkpoint
from cil.build import make_learner, make_network
from cil.checking import check
from cil.config import Config, ConfigError, Part, RunConfig
from cil.data import Transform, data_sets
from cil.data.framing import Framing
from cil.data.image_folder import ImageFolder
from cil.data.pixels import luminance
from cil.folder import config_digest, read_yaml
from cil.models.network import Network
from cil.precision import resolve_device
from kd import Outputs
from kd.precision import full_precision

#: What a file of `python -m cil.export --to safetensors` is, and which version of it this is.
FILE_FORMAT, FILE_VERSION = "cil-model", 1
WEIGHTS, FACTS = ".safetensors", ".json"


@dataclass(frozen=True)
class Model:
    """What a run has learned, ready to use.

    Attributes:
        network: The network after a stage, in evaluation mode.
        class_names: Names of the classes it knows, in the order of its outputs.
        class_labels: Their labels in the data set.
        transform: Makes its input of uint8 images.
        config: The config of the run.
        part: Name and hyper-parameters of the network.
        stage: The stage it is of; counts from 0.
        means: Of the classes, normalised, where the nearest one is the answer (`learner=icarl`); else None.
    """

    network: Network
    class_names: tuple[str, ...]
    class_labels: tuple[int, ...]
    transform: Transform
    config: RunConfig
    part: Part
    stage: int
    means: Tensor | None = None

    @torch.inference_mode()
    def logits(self, images: np.ndarray | Tensor) -> Tensor:
        """Scores of all known classes: those of the head, or how near the means of the classes are.

        Args:
            images: uint8, [batch, channels, height, width].

        Raises:
            ValueError: If they are not of this form.
        """
        images = torch.as_tensor(images)
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != self.network.input_shape[0]:
            raise ValueError(
                f"images must be uint8 [batch, {self.network.input_shape[0]}, height, width], "
                f"found {images.dtype} {list(images.shape)}"
            )
        weights = next(self.network.parameters())
        outputs: Outputs = self.network(self.transform.test(images.to(weights.device)).to(weights.dtype))
        if self.means is None:
            return outputs.logits
        assert outputs.embedding is not None
        return F.normalize(outputs.embedding) @ self.means.to(outputs.embedding).T

    def predict(self, images: np.ndarray | Tensor) -> list[str]:
        """Names of the most likely classes."""
        return [self.class_names[index] for index in self.logits(images).argmax(dim=1).tolist()]

    def predict_proba(self, images: np.ndarray | Tensor) -> Float[Tensor, "batch classes"]:
        """How sure the model is of every class it knows; each row sums to 1.

        Of a head it is the softmax of the scores. Where the nearest mean is the answer, it is the softmax of
        $-\\|f - m_k\\|^2$, the squared distances of the normalised feature to the means (prototypical networks: Snell
        et al., NIPS 2017, arXiv:1703.05175). These lie between 0 and 4, so it stays far below 1: with 10 classes it is
        at most 0.86. Neither is calibrated: compare confidences within one model only.

        Args:
            images: uint8, [batch, channels, height, width].

        Raises:
            ValueError: If they are not of this form.
        """
        scores = full_precision(self.logits(images))
        return torch.softmax(scores if self.means is None else 2 * scores, dim=1)  # |f - m|^2 = 2 - 2 cos

    def top_k(self, images: np.ndarray | Tensor, k: int = 5) -> list[list[tuple[str, float]]]:
        """The `k` likeliest classes of every image with their confidence, best first; all, if fewer are known.

        Raises:
            ValueError: If `k` is below 1, or the images are not of the form that `logits` takes.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, found {k}")
        best = self.predict_proba(images).topk(min(k, len(self.class_names)), dim=1)
        return [
            [(self.class_names[index], share) for index, share in zip(indices, shares, strict=True)]
            for indices, shares in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def read(self, path: str | Path) -> UInt8[Tensor, "channels height width"]:
        """An image file of any size and kind, brought to the network's input as test images are.

        Those of a run on image folders are framed by its config. Other data sets show whole images: the shorter side is
        brought to the input size and the middle is cut out, so that a file of that very size stays as it is. A network
        of one channel sees the luminance.

        Raises:
            ValueError: If the file is no image, or a damaged one, or the network's input is no square of 1 or 3
                channels.
        """
        channels, height, width = self.network.input_shape
        if height != width or channels not in (1, 3):
            raise ValueError(
                f"files are brought to a square, the network of the run takes {height} x {width} pixels "
                f"of {channels} channels: give it arrays"
            )
        pixels = rearrange(torch.tensor(self._framing.read(Path(path), None)), "h w c -> c h w")
        return luminance(pixels[None])[0] if channels == 1 else pixels

    @cached_property
    def _framing(self) -> Framing:
        config, side = self.config.data, self.network.input_shape[1]
        source = data_sets[config.name]
        if issubclass(source, ImageFolder):
            return source(config.root, **config.parameters).framing
        return Framing(side, side, scale=(1.0, 1.0), ratio=(1.0, 1.0), interpolation="bicubic")

    def facts(self) -> dict[str, Any]:
        """What a person or another program has to know to use the weights; plain values, enough for `load`."""
        channels, height, width = self.network.input_shape
        nearest = self.means is not None
        return {
            "format": FILE_FORMAT,
            "version": FILE_VERSION,
            "class_names": list(self.class_names),
            "class_labels": list(self.class_labels),
            "input": {
                "name": "images",
                "dtype": "uint8",
                "shape": ["batch", channels, height, width],
                "values": "0 to 255, RGB" if channels == 3 else "0 to 255",
                "mean": self.transform.mean.flatten().tolist(),
                "std": self.transform.std.flatten().tolist(),
                "normalised": "(images / 255 - mean) / std",
            },
            "output": {
                "name": "scores",
                "shape": ["batch", len(self.class_names)],
                "meaning": "cosines to the means of the classes" if nearest else "scores of the classes (logits)",
                "confidence": "softmax(2 * scores)" if nearest else "softmax(scores)",
            },
            "architecture": self.part.model_dump(mode="json"),
            "structure": self.network.structure(),
            "num_parameters": sum(parameter.numel() for parameter in self.network.parameters()),
            "stage": self.stage,
            "config": self.config.model_dump(mode="json"),
        }


def load(run: str | Path, stage: int | None = None, device: str = "cpu") -> Model:
    """The network of a run folder after its last finished stage, or after `stage`; or that of an exported file.

    A run that is still going on, or was interrupted, is read as far as it has come.

    Args:
        run: The run folder, or a file that `python -m cil.export --to safetensors` wrote.
        stage: Which stage; counts from 0. A file has one only.
        device: Where the network goes: `cpu`, `cuda`, `cuda:1`, `auto`.

    Raises:
        ValueError: If the folder holds no finished stage, or its files are damaged.
    """
    path, where = Path(run), resolve_device(device)
    if path.is_file():
        return _load_file(path, stage, where)
    done = sorted(found.parent for found in path.glob("stage_*/stage.json"))
    if not done or not (path / "config.yaml").exists():
        raise ValueError(f"{path}: no run with a finished stage; a run folder has config.yaml and stage_000/stage.json")
    place = done[-1] if stage is None else checkpoint.stage_folder(path, stage)
    if place not in done:
        first, last = (int(found.name.removeprefix("stage_")) for found in (done[0], done[-1]))
        raise ValueError(f"{path}: stage {stage} is not there; stages {first} to {last} are finished")
    config, digest = _config(path)
    summary = checkpoint.read_json(place / "stage.json")
    if summary.get("config", digest) != digest:
        raise ValueError(f"{path / 'config.yaml'}: damaged or changed; it is not the config that {place} is of")
    if checkpoint.stage_folder(path, summary.get("stage", -1)) != place:
        raise ValueError(f"{place}: it holds stage {summary.get('stage')}: the folders of stages have been moved")
    weights, means = checkpoint.load_network(place, where), checkpoint.load_means(place, where)
    with _fitting(place):
        info = summary["data"]
        return _assembled(
            config,
            Part(**summary["model"]) if "model" in summary else config.model,
            summary["stage"],
            summary["network"],
            info,
            tuple(info["input_shape"]),
            weights,
            means,
            where,
        )


@contextmanager
def _fitting(place: Path) -> Iterator[None]:
    """A block that puts together what was stored.

    Raises:
        ValueError: If it does not fit together.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{place}: config, stage.json and weights do not fit together ({reason:.200})") from error


def _config(folder: Path) -> tuple[RunConfig, str]:
    """The config of a run folder, and the hash of it as it is written there.

    Raises:
        ValueError: If it is damaged, or of a version that had other keys.
    """
    path = folder / "config.yaml"
    tree = read_yaml(path).get("config")
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: damaged (config must be a mapping of keys, found {type(tree).__name__})")
    try:
        return check(tree), config_digest(tree)
    except ConfigError as error:
        more = f", and {len(error.problems) - 1} more" if len(error.problems) > 1 else ""
        raise ValueError(f"{path}: damaged, or of another version ({error.problems[0]}{more})") from error


def _load_file(path: Path, stage: int | None, device: torch.device) -> Model:
    if path.suffix not in (WEIGHTS, FACTS):
        raise ValueError(f"{path}: give a run folder, or a {WEIGHTS} file of `python -m cil.export --to safetensors`")
    facts = checkpoint.read_json(path.with_suffix(FACTS))
    found = facts.get("format"), facts.get("version")
    if found != (FILE_FORMAT, FILE_VERSION):
        raise ValueError(
            f"{path.with_suffix(FACTS)}: found format {found[0]} of version {found[1]}, this reads {FILE_FORMAT} of "
            f"version {FILE_VERSION}"
        )
    if stage not in (None, facts.get("stage")):
        raise ValueError(f"{path}: holds stage {facts.get('stage')}, not {stage}; export that one from the run")
    with _fitting(path):
        weights = _read_weights(path.with_suffix(WEIGHTS), device, facts["blake2b"])
        means = weights.pop(checkpoint.CLASS_MEANS, None)
        return _assembled(
            check(facts["config"]),
            Part(**facts["architecture"]),
            facts["stage"],
            facts["structure"],
            facts | facts["input"],
            tuple(facts["input"]["shape"][1:]),
            weights,
            means,
            device,
        )


def _read_weights(path: Path, device: torch.device, expected: str) -> dict[str, Tensor]:
    try:
        found = checkpoint.checksum(path)
    except OSError as error:
        raise ValueError(f"{path}: missing or damaged ({error.strerror or error})") from error
    if found != expected:
        raise ValueError(f"{path}: missing or damaged (its checksum is not the one in {path.with_suffix(FACTS).name})")
    return load_file(path, device=str(device))


def _assembled(
    config: RunConfig,
    part: Part,
    stage: int,
    structure: dict[str, Any],
    info: dict[str, Any],
    input_shape: tuple[int, int, int],
    weights: dict[str, Tensor],
    means: Tensor | None,
    device: torch.device,
) -> Model:
    """The model of what was stored.

    Args:
        config: Of the run.
        part: The network.
        stage: The stage it is of.
        structure: What growing had made of it.
        info: `class_names`, `class_labels`, `mean` and `std`.
        input_shape: Channels, height and width of an image.
        weights: Of the network.
        means: Of the classes, or None.
        device: Where the network goes.
    """
    first = {"pretrained": False} if part.parameters.get("pretrained") else {}  # its own weights follow
    network = make_network(part.model_copy(update=first), config.seed, input_shape)
    if isinstance(config, Config):  # a learner may give a network another head
        network = make_learner(config, network).network
    network.rebuild(structure)
    network.load_state_dict(weights)
    transform = Transform([], tuple(info["mean"]), tuple(info["std"]))
    names, labels = tuple(info["class_names"]), tuple(info["class_labels"])
    return Model(network.to(device).eval(), names, labels, transform, config, part, stage, means)
