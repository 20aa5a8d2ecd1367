"""Saving and finding the state of a run: complete or absent, checked when it is read, never a pickle that runs code.

A stage folder holds `network.safetensors` and `stage.json` once the stage is finished, and `state.pt`: everything
else a run needs to go on. During a stage `state.pt` holds the whole learner; at its end the network's weights are left
to the safetensors file beside it. `state.previous.pt` is the state before it, for the day when the newest is damaged,
and `checksums.json` holds the checksums of these files.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from kd.distributed import rank

FORMAT = 3
_NETWORK = "network."
CLASS_MEANS = "class_means"
_STATE, _PREVIOUS = "state.pt", "state.previous.pt"
_CHECKSUMS = "checksums.json"


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write to a new name, flush to the disk, rename: a reader sees the old file or the new one."""
    os.replace(_write_part(path, write), path)


def write_checked(path: Path, write: Callable[[BinaryIO], object], keep: Path | None = None) -> None:
    """As `write_atomically`, with the checksum in `checksums.json` beside the file.

    The old and the new checksum both stand there while the file changes: whichever of the two a kill leaves is known.

    Args:
        path: The file.
        write: Writes it.
        keep: Where the file that was there goes; None drops it.
    """
    part = _write_part(path, write)
    try:
        known = _parsed(path.parent / _CHECKSUMS)
    except ValueError:  # there is none yet, or it is damaged: then so is what it was about
        known = {}
    known[path.name] = [checksum(part), *known.get(path.name, [])[:1]]
    write_json(path.parent / _CHECKSUMS, known)
    if keep is not None and path.exists():
        os.replace(path, keep)
    os.replace(part, path)


def _write_part(path: Path, write: Callable[[BinaryIO], object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)  # if the disk is full, others need the room
        problem = error.__context__ if isinstance(error, RuntimeError) else error  # torch.save hides it behind its own
        if not isinstance(problem, OSError):
            raise
        problem.filename = str(path)
        raise problem from None
    return part


def checksum(path: Path) -> str:
    """BLAKE2b of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _verify(path: Path, name: str | None = None) -> None:
    """Compare a file with its checksum, which may stand under another name.

    Raises:
        ValueError: If the file is missing, or another than was written.
    """
    known = _parsed(path.parent / _CHECKSUMS).get(name or path.name, [])
    try:
        found = checksum(path)
    except OSError as error:
        raise ValueError(f"{path}: missing or damaged ({error.strerror or error})") from error
    if found not in known:
        raise ValueError(f"{path}: missing or damaged (its checksum is not the one it was written with)")


def write_json(path: Path, value: Any, *, checked: bool = False) -> None:
    """Write plain values as indented JSON, atomically, and if asked to with a checksum (`write_checked`)."""
    text = (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()
    if checked:
        write_checked(path, lambda file: file.write(text))
    else:
        write_atomically(path, lambda file: file.write(text))


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote, compared with its checksum if there is one: older versions kept none of some files.

    Raises:
        ValueError: If the file is missing or damaged.
    """
    checksums = path.with_name(_CHECKSUMS)
    if checksums.exists() and path.name in _parsed(checksums):
        _verify(path)
    return _parsed(path)


def _parsed(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: missing or damaged ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: damaged (it must hold a mapping of keys, found {type(value).__name__})")
    return value


def stage_folder(run: Path, stage: int) -> Path:
    """Where a run keeps what belongs to a stage."""
    return run / f"stage_{stage:03d}"


def save_state(run: Path, stage: int, state: dict[str, Any]) -> None:
    """Save the state of a run in the middle of `stage`; the one before it is kept."""
    path = stage_folder(run, stage) / _STATE
    write_checked(path, lambda file: torch.save({"format": FORMAT, **state}, file), keep=path.with_name(_PREVIOUS))
    if path.with_name(_PREVIOUS).exists() and stage:  # two states are kept of a run
        (stage_folder(run, stage - 1) / _PREVIOUS).unlink(missing_ok=True)


def forget_previous(run: Path) -> None:
    """Keep of a finished run its newest state alone."""
    for path in run.glob(f"stage_*/{_PREVIOUS}"):
        path.unlink()


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
    write_checked(folder / "network.safetensors", lambda file: file.write(save(network)))
    if means is not None:
        text = save({CLASS_MEANS: means.contiguous()})
        write_checked(folder / f"{CLASS_MEANS}.safetensors", lambda file: file.write(text))
    write_json(folder / "stage.json", summary, checked=True)
    save_state(run, stage, {**state, "learner": rest})


def load_state(run: Path, device: torch.device, protocol: str | None = None) -> dict[str, Any] | None:
    """The newest good state of a run, or None if it has none at all; what is passed over is said on standard error.

    Args:
        run: The run folder.
        device: Where its tensors go.
        protocol: What the state must belong to, where it says so; None takes any.

    Raises:
        ValueError: If there are states and none is good.
    """
    problems: list[str] = []
    for folder in sorted(run.glob("stage_*"), reverse=True):
        for path in (folder / _STATE, folder / _PREVIOUS):
            if not path.exists():
                continue
            try:
                state = _load(path, device, protocol)
            except ValueError as error:
                problems.append(str(error))
                continue
            for problem in problems if rank() == 0 else ():
                print(f"{problem}; passed over for the checkpoint before it, {path}", file=sys.stderr)
            return state
    if problems:
        raise ValueError(f"{problems[0]}; there is no good checkpoint before it, overwrite=true begins again")
    return None


def _load(path: Path, device: torch.device, protocol: str | None) -> dict[str, Any]:
    _verify(path, _STATE)
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # whatever a file that is none of torch's makes the reader say
        raise ValueError(f"{path}: cannot be read ({type(error).__name__})") from error
    written = state.get("format") if isinstance(state, dict) else None
    if written != FORMAT:
        raise ValueError(f"{path}: written in format {written}, this version reads format {FORMAT}")
    if protocol is not None and state.get("protocol", protocol) != protocol:
        raise ValueError(f"{path}: of protocol {state['protocol']}, this run has {protocol}")
    if not any(name.startswith(_NETWORK) for name in state["learner"]):
        state["learner"] |= load_network(path.parent, device, prefix=_NETWORK)
    return state


def load_means(folder: Path, device: torch.device) -> Tensor | None:
    """The means of the classes after a finished stage; None if the answers are the scores of the network.

    Raises:
        ValueError: If the file is damaged.
    """
    path = folder / f"{CLASS_MEANS}.safetensors"
    return _read(path, device)[CLASS_MEANS] if path.exists() else None


def load_network(folder: Path, device: torch.device, prefix: str = "") -> dict[str, Tensor]:
    """The weights of a finished stage.

    Raises:
        ValueError: If the file is missing or damaged.
    """
    weights = _read(folder / "network.safetensors", device)
    return {prefix + name: value for name, value in weights.items()}


def _read(path: Path, device: torch.device) -> dict[str, Tensor]:
    if path.with_name(_CHECKSUMS).exists():  # folders of older versions have none
        _verify(path)
    try:
        return dict(load_file(path, device=str(device)))
    except Exception as error:  # the reader has no common base class of its errors
        raise ValueError(f"{path}: missing or damaged ({error})") from error
