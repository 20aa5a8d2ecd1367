"""Networks of the public DKT release in and out: its state dict, by its names, to a `DKTNetwork` and back.

`python -m cil.convert CHECKPOINT OUT_DIR` writes `network.safetensors` and `network.json`, which `load_converted`
reads. The projection `patch_embed.proj.*` of the release is never used by it and is dropped.
"""

import argparse
import json
import pickle
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cil.models.dkt import DKTNetwork

StateDict = Mapping[str, Tensor]

#: What the release names a part, and what it is named here; the first beginning that fits counts.
_NAMES = {
    "general_token": "token_pool.general_token",
    "task_tokens.": "token_pool.task_tokens.",
    "patch_embed.proj1.": "encoder.patch_embedding.stem.",
    "patch_embed.proj2.": "encoder.patch_embedding.norm.",
    "patch_embed.proj4.": "encoder.patch_embedding.project.",
    "sabs.": "encoder.blocks.",
    "tabs.attnCA.": "skab.attention.",
    "tabs.": "skab.",
    "head.0.": "stability.",
    "head.1.": "plasticity.",
}
_NAMES_IN_BLOCKS = {
    ".attn.": ".attention.",
    ".mlp.fc1.": ".mlp.expand.",
    ".mlp.dwconv.": ".mlp.depthwise.",
    ".mlp.fc2.": ".mlp.reduce.",
}
_DEAD = "patch_embed.proj."
_STEM_STRIDE_AND_PADDING = {3: (1, 1), 7: (2, 2)}  # by kernel: the release's CIFAR and ImageNet form
_WIDTH_PER_HEAD = 32  # in the release
_LARGEST_ERROR = 300  # characters of a message of torch that are worth showing


def name_here(name: str) -> str | None:
    """The name that an entry of the release's state dict has here; None for the unused projection.

    Raises:
        ValueError: If the release has no such entry.
    """
    if name.startswith(_DEAD):
        return None
    for there, here in _NAMES.items():
        if name.startswith(there):
            name = here + name.removeprefix(there)
            break
    else:
        raise ValueError(f"{name!r} is no entry of a DKT state dict; known beginnings: {', '.join([*_NAMES, _DEAD])}")
    for there, here in _NAMES_IN_BLOCKS.items():
        name = name.replace(there, here)
    return name


def name_there(name: str) -> str:
    """The name that an entry of a `DKTNetwork`'s state dict has in the release."""
    there, here = next((there, here) for there, here in _NAMES.items() if name.startswith(here))
    name = there + name.removeprefix(here)
    for there, here in _NAMES_IN_BLOCKS.items():
        name = name.replace(here, there)
    return name


def default_task_sizes(num_tasks: int, num_old: int, num_new: int) -> list[int]:
    """Task sizes of a protocol with equal increments after the first task, from what the two heads tell.

    Raises:
        ValueError: If no such protocol fits.
    """
    if num_tasks == 1:
        return [num_old]
    first = num_old - (num_tasks - 2) * num_new
    if first < 1:
        raise ValueError(
            f"{num_tasks} tasks with {num_old} old and {num_new} new classes do not have equal increments: say how "
            "many classes each task has (task_sizes)"
        )
    return [first] + [num_new] * (num_tasks - 1)


def hyper_parameters(state: StateDict, *, num_heads: int | None = None, pool_stride: int = 2) -> dict[str, Any]:
    """The arguments of the `DKTNetwork` that fits a state dict of the release, read from the shapes of its arrays.

    Args:
        state: Entries by the release's names.
        num_heads: Not visible in any shape; None takes 32 channels per head.
        pool_stride: Not visible either; 2 in the release.

    Raises:
        ValueError: If an entry is missing, or the stem is none of the release's two.
    """
    try:
        stem, patch = state["patch_embed.proj1.weight"], state["patch_embed.proj4.weight"]
        hidden = state["tabs.mlp.fc1.weight"].shape[0]
        width = state["general_token"].shape[-1]
    except KeyError as error:
        raise ValueError(f"this is no state dict of DKT: {error.args[0]!r} is missing") from None
    kernel = stem.shape[-1]
    if kernel not in _STEM_STRIDE_AND_PADDING:
        raise ValueError(f"the first convolution of the release has a kernel of 3 or 7, found {kernel}")
    stride, padding = _STEM_STRIDE_AND_PADDING[kernel]
    return {
        "width": width,
        "num_heads": num_heads or max(width // _WIDTH_PER_HEAD, 1),
        "depth": 1 + max((int(name.split(".")[1]) for name in state if name.startswith("sabs.")), default=0),
        "mlp_ratio": hidden // width,
        "stem_width": stem.shape[0],
        "stem_kernel": kernel,
        "stem_stride": stride,
        "stem_padding": padding,
        "pool_stride": pool_stride,
        "patch_kernel": patch.shape[-1],
    }


def dkt_from_release(
    state: StateDict,
    image_size: tuple[int, int] = (32, 32),
    *,
    task_sizes: Sequence[int] | None = None,
    num_heads: int | None = None,
    pool_stride: int = 2,
    **settings: Any,
) -> DKTNetwork:
    """The network of a state dict of the release, in the format of its arrays.

    Args:
        state: Entries by the release's names.
        image_size: Height and width of the images.
        task_sizes: Classes of every task; None assumes equal increments after the first task.
        num_heads: None takes 32 channels per head, as in the release.
        pool_stride: Stride of the max-pooling.
        settings: What is no shape: `drop_path`, `merge_norm`, `merge_bias`.

    Raises:
        ValueError: If entries are missing, unknown or of an impossible shape.
    """
    arguments = hyper_parameters(state, num_heads=num_heads, pool_stride=pool_stride)
    network = DKTNetwork((state["patch_embed.proj1.weight"].shape[1], *image_size), **arguments, **settings)
    num_tasks = sum(name.startswith("task_tokens.") for name in state)
    heads = [state[name].shape[0] for name in ("head.0.head.bias", "head.1.head.bias") if name in state]
    if not num_tasks or len(heads) != min(num_tasks, 2):
        raise ValueError(
            f"a DKT network has one head in its first task and two later on; found {len(heads)} and {num_tasks} tokens"
        )
    sizes = list(task_sizes) if task_sizes is not None else default_task_sizes(num_tasks, heads[0], heads[-1])
    if len(sizes) != num_tasks or sum(sizes) != sum(heads):
        raise ValueError(
            f"task_sizes={sizes} does not fit: the state dict has {num_tasks} task tokens and {sum(heads)} classes"
        )
    network.rebuild({"task_sizes": sizes})
    named = {name_here(name): value for name, value in state.items()}
    converted = {name: value for name, value in named.items() if name is not None}
    try:
        network.to(state["general_token"].dtype).load_state_dict(converted)
    except RuntimeError as error:
        raise ValueError(f"the state dict does not fit the network that its shapes suggest: {_first(error)}") from None
    return network


def to_release(network: DKTNetwork) -> dict[str, Tensor]:
    """The state dict under the release's names, without the unused projection."""
    return {name_there(name): value for name, value in network.state_dict().items()}


def load_release(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a checkpoint of the release, read without running any code from the file.

    Raises:
        ValueError: If the file cannot be read, or holds no state dict under `model`.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}") from None
    except pickle.UnpicklingError as error:  # its text recommends the unsafe way
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it wants to run {code[1]}, and nothing in a checkpoint is run" if code else "it cannot be unpickled"
        raise ValueError(f"{path} is no checkpoint of the release: {reason}") from None
    except EOFError:
        raise ValueError(f"{path} is no checkpoint of the release: it ends too early") from None
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is no checkpoint of the release: {_first(error)}") from None
    state = checkpoint.get("model") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        found = ", ".join(map(str, checkpoint)) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ValueError(f"{path} must hold a state dict under 'model', found: {found[:_LARGEST_ERROR]}")
    return state


def save_converted(network: DKTNetwork, arguments: Mapping[str, Any], folder: Path) -> None:
    """Write a network as arrays and a readable description.

    Args:
        network: The network.
        arguments: What it was built with.
        folder: Where to; it is made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    description = {
        "model": "dkt",
        "input_shape": list(network.input_shape),
        "arguments": dict(arguments),
        "structure": network.structure(),
    }
    save_file(
        {name: value.contiguous() for name, value in network.state_dict().items()}, folder / "network.safetensors"
    )
    (folder / "network.json").write_text(json.dumps(description, indent=2) + "\n")


def load_converted(folder: str | Path) -> DKTNetwork:
    """The network that `python -m cil.convert` wrote into a folder.

    Raises:
        ValueError: If its two files are not there or cannot be read.
    """
    folder = Path(folder)
    try:
        description = json.loads((folder / "network.json").read_text())
        state = load_file(folder / "network.safetensors")
        channels, height, width = description["input_shape"]
        network = DKTNetwork((channels, height, width), **description["arguments"])
        network.rebuild(description["structure"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"{folder} holds no converted network: {_first(error)}") from None
    network.to(state["token_pool.general_token"].dtype).load_state_dict(state)
    return network


def _first(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()[:_LARGEST_ERROR] or type(error).__name__


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert one checkpoint; 0 if that worked, 2 with one message if not."""
    parser = argparse.ArgumentParser(prog="python -m cil.convert", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="file of the release (*.pth)")
    parser.add_argument("out_dir", type=Path, help="folder for network.safetensors and network.json")
    parser.add_argument("--image-size", type=int, nargs=2, default=(32, 32), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--task-sizes", type=int, nargs="+", help="classes of every task (default: equal increments)")
    parser.add_argument("--num-heads", type=int, help=f"heads (default: one per {_WIDTH_PER_HEAD} channels)")
    parser.add_argument("--pool-stride", type=int, default=2, help="stride of the max-pooling (default: 2)")
    given = parser.parse_args(arguments)
    try:
        state = load_release(given.checkpoint)
        network = dkt_from_release(
            state,
            (given.image_size[0], given.image_size[1]),
            task_sizes=given.task_sizes,
            num_heads=given.num_heads,
            pool_stride=given.pool_stride,
        )
        found = hyper_parameters(state, num_heads=given.num_heads, pool_stride=given.pool_stride)
        save_converted(network, found, given.out_dir)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{given.out_dir}: {network.num_classes} classes in {network.num_tasks} tasks")
    return 0


if __name__ == "__main__":
    sys.exit(main())
