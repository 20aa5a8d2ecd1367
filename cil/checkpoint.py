"""Saving and finding the state of a run: complete or absent, and never a pickle that could run code.

A stage folder holds `network.safetensors` and `stage.json` once the stage is finished, and `state.pt`: everything
else a run needs to go on. During a stage `state.pt` holds the whole learner; at its end the network's weights are left
to the safetensors file beside it.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load_file, save
from torch import Tensor

FORMAT = 2
_NETWORK = "network."
_MEANS = "class_means"


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write to a new name, flush to the disk, rename: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def write_json(path: Path, value: Any) -> None:
    """Write plain values as indented JSON, atomically."""
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote.

    Raises:
        ValueError: If the file is missing or damaged.
    """
    try:
        value: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: missing or damaged ({error})") from error
    return value


def stage_folder(run: Path, stage: int) -> Path:
    """Where a run keeps what belongs to a stage."""
    return run / f"stage_{stage:03d}"


def save_state(run: Path, stage: int, state: dict[str, Any]) -> None:
    """Save the state of a run in the middle of `stage`."""
    write_atomically(stage_folder(run, stage) / "state.pt", lambda file: torch.save({"format": FORMAT, **state}, file))


def save_stage(
    run: Path, stage: int, state: dict[str, Any], summary: dict[str, Any], means: Tensor | None = None
) -> None:
    """Save a finished stage; `state.pt` is written last and makes it count.

    Args:
        run: The run folder.
        stage: The stage that ended.
        state: As for `save_state`; the weights of the network are taken out of `state["learner"]`.
        summary: For people and reports: plain values.
        means: Of the classes, where the nearest one is the answer.
    """
    folder = stage_folder(run, stage)
    learner: dict[str, Tensor] = state["learner"]
    network = {
        name.removeprefix(_NETWORK): value.contiguous() for name, value in learner.items() if name.startswith(_NETWORK)
    }
    rest = {name: value for name, value in learner.items() if not name.startswith(_NETWORK)}
    write_atomically(folder / "network.safetensors", lambda file: file.write(save(network)))
    if means is not None:
        text = save({_MEANS: means.contiguous()})
        write_atomically(folder / f"{_MEANS}.safetensors", lambda file: file.write(text))
    write_json(folder / "stage.json", summary)
    save_state(run, stage, {**state, "learner": rest})


def load_state(run: Path, device: torch.device) -> dict[str, Any] | None:
    """The newest state of a run, or None if it has none.

    Raises:
        ValueError: If the file is damaged or of another format.
    """
    paths = sorted(run.glob("stage_*/state.pt"))
    if not paths:
        return None
    path = paths[-1]
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # whatever a damaged file makes the reader say
        raise ValueError(
            f"{path}: damaged, cannot be read ({type(error).__name__}); remove it to go on from the stage before"
        ) from error
    if state.get("format") != FORMAT:
        raise ValueError(f"{path}: written in format {state.get('format')}, this version reads format {FORMAT}")
    if not any(name.startswith(_NETWORK) for name in state["learner"]):
        state["learner"] |= load_network(path.parent, device, prefix=_NETWORK)
    return state


def load_means(folder: Path, device: torch.device) -> Tensor | None:
    """The means of the classes after a finished stage; None if the answers are the scores of the network.

    Raises:
        ValueError: If the file is damaged.
    """
    path = folder / f"{_MEANS}.safetensors"
    return _read(path, device)[_MEANS] if path.exists() else None


def load_network(folder: Path, device: torch.device, prefix: str = "") -> dict[str, Tensor]:
    """The weights of a finished stage.

    Raises:
        ValueError: If the file is missing or damaged.
    """
    weights = _read(folder / "network.safetensors", device)
    return {prefix + name: value for name, value in weights.items()}


def _read(path: Path, device: torch.device) -> dict[str, Tensor]:
    try:
        return dict(load_file(path, device=str(device)))
    except Exception as error:  # the reader has no common base class of its errors
        raise ValueError(f"{path}: missing or damaged ({error})") from error
