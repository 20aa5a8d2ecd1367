"""Who a static run learns from: a network that another run has trained, found by name, checked, and told apart."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from cil import checkpoint
from cil.config import ConfigError, Part, StaticConfig
from cil.data import DataSet
from cil.folder import read_metrics
from cil.loading import load
from cil.models.network import Network

_MOVED_ASIDE = re.compile(r"\.old-\d+$")
#: How far what a teacher is found to know may be from what its run says: other number formats round otherwise.
_ACCURACY_TOLERANCE = 0.01


@dataclass(frozen=True)
class Teacher:
    """A trained network.

    Attributes:
        folder: The run that trained it.
        network: The network after the last stage of that run.
        part: What it was configured as.
        checksum: Of its weights.
        said_accuracy: What its run says, if that was read as in this run; else None.
    """

    folder: Path
    network: Network
    part: Part
    checksum: str
    said_accuracy: float | None

    def check(self, accuracy: float) -> None:
        """Compare what it is found to know with what its run says.

        Raises:
            ValueError: If the two are apart.
        """
        said = self.said_accuracy
        if said is not None and abs(accuracy - said) > _ACCURACY_TOLERANCE:
            raise ValueError(
                f"teacher {self.folder}: its accuracy here is {100 * accuracy:.2f} %, its run says {100 * said:.2f} %: "
                "weights, data or number format are not those it was trained with"
            )


def find_teacher(config: StaticConfig) -> Path:
    """The run folder that `teacher` stands for: a path, the name of a run, or the newest finished run of a network.

    Raises:
        ConfigError: If there is none.
    """
    named = config.teacher
    assert named is not None
    for folder in (Path(named), config.runs_dir / named):
        if (folder / "config.yaml").is_file():
            return folder
    finished = {}
    for path in sorted(config.runs_dir.glob("*/metrics.json")):
        folder = path.parent
        if _MOVED_ASIDE.search(folder.name) or folder.name == config.name or not (folder / "config.yaml").is_file():
            continue
        metrics = read_metrics(folder)
        if metrics["finished"] and metrics.get("student") and metrics.get("data_set") == config.data.name:
            finished[folder] = str(metrics["student"])
    matching = [folder for folder, student in finished.items() if student == named]
    if matching:
        return max(matching, key=lambda folder: (folder / "metrics.json").stat().st_mtime)
    there = ", ".join(sorted(set(finished.values()))) or "none"
    raise ConfigError(
        [
            f"teacher={named}: no run folder, no run of that name in {config.runs_dir} and no finished run of such a "
            f"network on {config.data.name} there (trained networks: {there}). Train one: python distill.py kd=none "
            f"student={named}"
        ]
    )


def load_teacher(folder: Path, config: StaticConfig, data: DataSet, device: torch.device) -> Teacher:
    """The network of a run folder, if it scores the classes of `data` and sees images as this run shows them.

    Raises:
        ValueError: If it does not, or the folder is unfinished or damaged.
    """
    model = load(folder, device=str(device))
    stage = sorted(folder.glob("stage_*/stage.json"))[-1]
    summary = checkpoint.read_json(stage)
    info = summary["data"]
    part = Part(**summary["model"]) if "model" in summary else model.config.model
    wanted = {
        "data set": (model.config.data.name, config.data.name),
        "class_labels": (list(model.class_labels), list(range(len(data.class_names)))),
        "input shape": (info["input_shape"], list(data.train.input_shape)),
        "mean": (info["mean"], list(data.mean)),
        "std": (info["std"], list(data.std)),
    }
    for what, (found, right) in wanted.items():
        if found != right:
            shown = [text if len(text) < 60 else f"{text[:57]}..." for text in (str(found), str(right))]
            raise ValueError(
                f"teacher {folder}: its {what} is {shown[0]}, but the student's is {shown[1]}: a teacher of the same "
                "classes, in the same order, and of the same images is needed"
            )
    said = None
    if (folder / "metrics.json").is_file():
        metrics = read_metrics(folder)
        if metrics["finished"] and metrics.get("evaluate_on") == config.evaluate_on == "test":
            said = metrics.get("last_accuracy")
    return Teacher(folder, model.network, part, checksum(stage.parent), said)


def checksum(stage: Path) -> str:
    """Of the weights of a finished stage."""
    return hashlib.blake2b((stage / "network.safetensors").read_bytes(), digest_size=16).hexdigest()


def pinned(run: Path, config: StaticConfig) -> Path:
    """Who a run learns from: the teacher it began with, else who `teacher` stands for now.

    Raises:
        ConfigError: If there is none, or the one it began with has gone or changed.
    """
    path = run / "teacher.json"
    if not path.is_file() or config.overwrite:
        return find_teacher(config)
    began = checkpoint.read_json(path)
    if missing := {"folder", "checksum", "accuracy"} - began.keys():
        raise ConfigError([f"{path}: damaged (it has no {', '.join(sorted(missing))}); overwrite=true begins again"])
    folder = Path(began["folder"])
    if not (folder / "config.yaml").is_file():
        folder = find_teacher(config)
    done = sorted(folder.glob("stage_*/network.safetensors"))
    if not done or checksum(done[-1].parent) != began["checksum"]:
        raise ConfigError(
            [f"{run} began with another teacher than {folder} holds now: bring it back, or start again: overwrite=true"]
        )
    return folder
