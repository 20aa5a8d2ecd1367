"""Using what a run has learned."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cil import checkpoint
from cil.build import make_learner, make_network
from cil.config import Config, ConfigError, Part, RunConfig, check
from cil.data import Transform
from cil.folder import config_digest, read_yaml
from cil.models.network import Network
from cil.precision import resolve_device
from kd import Outputs


@dataclass(frozen=True)
class Model:
    """What a run has learned, ready to use.

    Attributes:
        network: The network after a stage, in evaluation mode.
        class_names: Names of the classes it knows, in the order of its outputs.
        class_labels: Their labels in the data set.
        transform: Makes its input of uint8 images.
        config: The config of the run.
        means: Of the classes, normalised, where the nearest one is the answer (`learner=icarl`); else None.
    """

    network: Network
    class_names: tuple[str, ...]
    class_labels: tuple[int, ...]
    transform: Transform
    config: RunConfig
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


def load(run: str | Path, stage: int | None = None, device: str = "cpu") -> Model:
    """The network of a run folder after its last stage, or after `stage`.

    Raises:
        ValueError: If the folder holds no finished stage, or its files are damaged.
    """
    folder = Path(run)
    done = sorted(path.parent for path in folder.glob("stage_*/stage.json"))
    if not done or not (folder / "config.yaml").exists():
        raise ValueError(
            f"{folder}: no run with a finished stage; a run folder has config.yaml and stage_000/stage.json"
        )
    place = done[-1] if stage is None else checkpoint.stage_folder(folder, stage)
    if place not in done:
        first, last = (int(path.name.removeprefix("stage_")) for path in (done[0], done[-1]))
        raise ValueError(f"{folder}: stage {stage} is not there; stages {first} to {last} are finished")
    config, digest = _config(folder)
    summary, where = checkpoint.read_json(place / "stage.json"), resolve_device(device)
    if summary.get("config", digest) != digest:
        raise ValueError(f"{folder / 'config.yaml'}: damaged or changed; it is not the config that {place} is of")
    if checkpoint.stage_folder(folder, summary.get("stage", -1)) != place:
        raise ValueError(f"{place}: it holds stage {summary.get('stage')}: the folders of stages have been moved")
    weights, means = checkpoint.load_network(place, where), checkpoint.load_means(place, where)
    try:
        info = summary["data"]
        part = Part(**summary["model"]) if "model" in summary else config.model
        if part.parameters.get("pretrained"):  # the run's own weights follow, the first ones are not needed
            part = part.model_copy(update={"pretrained": False})
        network = make_network(part, config.seed, tuple(info["input_shape"]))
        if isinstance(config, Config):  # a learner may give a network another head
            network = make_learner(config, network).network
        network.rebuild(summary["network"])
        network.load_state_dict(weights)
        transform = Transform([], tuple(info["mean"]), tuple(info["std"]))
        names, labels = tuple(info["class_names"]), tuple(info["class_labels"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{place}: config, stage.json and weights do not fit together ({reason:.200})") from error
    return Model(network.to(where).eval(), names, labels, transform, config, means)


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
