"""The run folder: made once, never overwritten, and only continued by the config that it was made with."""

import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from cil import checkpoint
from cil.config import ConfigError, RunConfig
from cil.lock import LOCK
from cil.place import PLACE
from cil.precision import Precision

_PACKAGES = ("torch", "torchvision", "timm", "einops", "numpy", "scikit-learn", "pydantic", "hydra-core")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a folder to this process, not to its children; the system takes the lock away however the process ends.

    Raises:
        ConfigError: If another process has it.
    """
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise ConfigError(
                [f"{folder} is in use: another process runs in it; wait for its end, or choose another name="]
            ) from error
        except OSError as error:  # some network disks have no locks
            print(f"{folder} cannot be locked ({error.strerror}): start nothing else in it", file=sys.stderr)
        yield


@contextmanager
def open_folder(config: RunConfig) -> Iterator[None]:
    """Make the run folder, or check that the one that exists belongs to the same config; it is locked inside.

    With `overwrite=true` an existing folder is moved aside to the first free `<name>.old-N`.

    Raises:
        ConfigError: If the folder holds a run of another config, or something else, or another process runs in it.
    """
    folder = config.folder
    if folder.exists() and config.overwrite:
        number = 1
        while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
            number += 1
        with locked(folder):  # no run is moved away while it goes on
            os.replace(folder, aside)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.yaml").exists() and any(entry.name != LOCK for entry in folder.iterdir()):
        raise ConfigError(
            [f"{folder} exists and holds no run (no config.yaml): choose another name=, or overwrite=true to move it"]
        )
    with locked(folder):
        _fill(config)
        yield


def _fill(config: RunConfig) -> None:
    folder = config.folder
    path = folder / "config.yaml"
    if path.exists():
        if differing := _differing(config):
            more = [f"  and {len(differing) - 6} more keys"] if len(differing) > 6 else []
            raise ConfigError(
                [
                    f"{folder} holds a run of another config; choose another name=, or overwrite=true to move it away",
                    *differing[:6],
                    *more,
                ]
            )
        return
    versions = {package: importlib.metadata.version(package) for package in _PACKAGES}
    tree = config.model_dump(mode="json")
    text = yaml.safe_dump({"config": tree, "versions": versions, "git": git_state()}, sort_keys=False)
    checkpoint.write_atomically(path, lambda file: file.write(text.encode()))


def is_finished(config: RunConfig) -> bool:
    """Whether the run folder holds the finished run of this config, and is to be left as it is.

    Raises:
        ConfigError: If `config.yaml` in it cannot be read.
    """
    folder = config.folder
    if config.overwrite or not all((folder / name).exists() for name in ("config.yaml", "metrics.json")):
        return False
    return bool(read_metrics(folder)["finished"]) and not _differing(config)


def _differing(config: RunConfig) -> list[str]:
    """The keys that are not equal in the config and in that of its folder, one a line."""
    found = _flat(read_yaml(config.folder / "config.yaml").get("config", {}))
    wanted = _flat(config.model_dump(mode="json"))
    keys = sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
    return [f"  {key}: {found.get(key)!r} there, {wanted.get(key)!r} here" for key in keys if key not in PLACE]


def read_metrics(folder: Path) -> dict[str, Any]:
    """The content of `metrics.json`.

    Raises:
        ValueError: If it is missing or damaged.
    """
    try:
        metrics = checkpoint.read_json(folder / "metrics.json")
        if "finished" not in metrics:
            raise ValueError(f"{folder / 'metrics.json'}: damaged (it does not say whether the run is finished)")
    except ValueError as error:
        raise ValueError(f"{error}; without this file the same command writes it again") from error
    return metrics


def config_digest(tree: dict[str, Any]) -> str:
    """A hash of a config as `config.yaml` holds it, without the keys that say where a run is; null is as no key."""
    facts = {key: value for key, value in _flat(tree).items() if key not in PLACE and value is not None}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def git_state() -> dict[str, Any] | None:
    """Commit and cleanness of the source tree; None if it is no checkout."""
    root = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout

    try:
        return {"commit": git("rev-parse", "HEAD").strip(), "dirty": bool(git("status", "--porcelain").strip())}
    except (OSError, subprocess.CalledProcessError):
        return None


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        ConfigError: If it cannot be read, or holds something else.
    """
    try:
        tree = yaml.safe_load(path.read_text())
        json.dumps(tree, default=str, skipkeys=True)  # which says so if a mapping holds itself
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError([f"{path}: cannot be read ({str(error).splitlines()[0]})"]) from error
    if not isinstance(tree, dict):
        raise ConfigError([f"{path}: found no mapping of keys"])
    return tree


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.")
    return flat


def machine(precision: Precision) -> dict[str, Any]:
    """Where a run takes place; for the diary, not for the results."""
    return {
        "host": platform.node(),
        "num_cores": os.cpu_count(),
        "device": str(precision.device),
        "precision": precision.name,
        "versions": {"python": platform.python_version(), "torch": importlib.metadata.version("torch")},
    }
