"""Using what a run has learned."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cil import checkpoint
from cil.build import make_learner, make_network
from cil.config import Config, Part, RunConfig, check
from cil.data import Transform
from cil.folder import read_yaml
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
    if stage is not None and not 0 <= stage < len(done):
        raise ValueError(f"{folder}: stage {stage} is not there; stages 0 to {len(done) - 1} are finished")
    place = done[-1 if stage is None else stage]
    config = check(read_yaml(folder / "config.yaml")["config"])
    summary = json.loads((place / "stage.json").read_text())
    info = summary["data"]
    part = Part(**summary["model"]) if "model" in summary else config.model
    network = make_network(part, config.seed, tuple(info["input_shape"]))
    if isinstance(config, Config):  # a learner may give a network another head
        network = make_learner(config, network).network
    network.rebuild(summary["network"])
    where = resolve_device(device)
    network.load_state_dict(checkpoint.load_network(place, where))
    transform = Transform([], tuple(info["mean"]), tuple(info["std"]))
    names, labels = tuple(info["class_names"]), tuple(info["class_labels"])
    return Model(network.to(where).eval(), names, labels, transform, config, checkpoint.load_means(place, where))
