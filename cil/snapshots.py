"""What the report shows of a stage beyond the numbers, kept under `stage_NNN/report/`: the one place that writes it.

`facts.json` holds names and labels, `arrays.npz` the rest, both small whatever the run: see the bounds below. A
snapshot is a function of the network, the memory and the data alone. It draws no random number and leaves learner and
memory as they are, so a run with snapshots has the bits of one without, and a resumed run the snapshots of one that
went through. `cil.report` reads them, without torch.

| array | shape | what |
|---|---|---|
| `confusion` | classes, classes | evaluation images by true class (row) and answer (column) |
| `embedding` | images, at most 16 | features of some evaluation images on their principal axes, float16 |
| `embedding_labels`, `embedding_answers` | images | their classes and the answers |
| `examples` | at most 12, channels, side, side | evaluation images, rightly answered ones first |
| `maps` | like them, rows, columns | where the evidence is: 0 to 255 by each map's own smallest and largest value |
| `exemplars` | at most 120, channels, side, side | kept images, best first within a class |
| `token_distances` | tasks, tasks | cosine distances between task tokens |
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from cil.build import Run
from cil.checkpoint import stage_folder, write_atomically, write_json
from cil.evaluation import Counts, nearest_to
from cil.models.network import Network
from cil.models.patches import PatchNetwork
from cil.stages import Stage
from kd.cam import normalised

FOLDER, FACTS, ARRAYS = "report", "facts.json", "arrays.npz"
FORMAT = 1
MOST_EMBEDDED = 400  # evaluation images on the map of embeddings, as many of each class
MOST_AXES = 16
MOST_EXAMPLES = 12  # images with their maps; half of them wrongly answered ones, if there are so many
LARGEST_EXAMPLE = 96  # pixels; larger images are made smaller
MOST_EXEMPLARS = 120
MOST_EXEMPLARS_PER_CLASS = 8
LARGEST_EXEMPLAR = 32  # pixels


def write(run_folder: Path, run: Run, stage: Stage, counts: Counts, means: Tensor | None) -> None:
    """Keep a snapshot of a stage that has been evaluated. Rank 0 alone comes here, and reads some images by itself.

    Args:
        run_folder: The run folder.
        run: The run, whose learner is as it was when it was evaluated.
        stage: The stage.
        counts: The evaluation that counts.
        means: Of the classes; they give the answers if the learner is read by the nearest of them.
    """
    facts, arrays = snapshot(run, stage, counts, means)
    folder = stage_folder(run_folder, stage.index) / FOLDER
    write_atomically(folder / ARRAYS, lambda file: np.savez_compressed(file, **arrays))  # type: ignore[arg-type]
    write_json(folder / FACTS, facts)


@torch.inference_mode()
def snapshot(
    run: Run, stage: Stage, counts: Counts, means: Tensor | None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The content of the two files; see `write`."""
    learner, samples, reader = run.learner, run.samples, run.reader
    network = learner.network
    assert counts.confusion is not None
    arrays: dict[str, np.ndarray] = {"confusion": counts.confusion.numpy().astype(np.int32)}
    facts: dict[str, Any] = {
        "format": FORMAT,
        "stage": stage.index,
        "split": samples.eval_split,
        "read_by": "classifier",
        "class_names": [run.data.class_names[run.tasks.original(label)] for label in range(stage.num_seen)],
        "task_sizes": list(run.tasks.task_sizes[: stage.index + 1]),
        "examples": [],
        "maps": None,
    }
    answer: Callable[[Tensor], Tensor] = learner.predict
    if means is not None and learner.read_by == "nearest_mean":
        answer, facts["read_by"] = nearest_to(means, learner), "nearest_mean"

    ids = spread(samples.eval_labels, stage.num_seen, MOST_EMBEDDED)
    labels = samples.eval_labels[ids]
    scores = reader.alone(learner, answer, samples.eval_images, ids)
    if facts["read_by"] == "classifier":
        scores = scores.softmax(dim=1)
    best, answers = scores.max(dim=1)
    has_embedding = network(_zeros(network)).embedding is not None
    if has_embedding:
        features = reader.alone(learner, learner.embed, samples.eval_images, ids)
        arrays["embedding"], facts["embedding_variance"] = principal(features)
        arrays["embedding_labels"], arrays["embedding_answers"] = _small(labels), _small(answers)

    if network.input_shape[0] in (1, 3):
        chosen = examples(answers == labels)
        arrays["examples"] = thumbnails(samples.eval_images.fetch(ids[chosen]), LARGEST_EXAMPLE)
        facts["examples"] = [
            {"id": int(ids[i]), "label": int(labels[i]), "answer": int(answers[i]), "score": round(float(best[i]), 4)}
            for i in chosen.tolist()
        ]
        kind = evidence(network)
        if kind is not None:
            maps = reader.alone(learner, lambda images: _maps(network, images), samples.eval_images, ids[chosen])
            if maps.ndim == 4:  # a map for each class
                maps = maps[torch.arange(len(chosen)), answers[chosen]]
            if maps[0].numel() > 1:
                arrays["maps"], facts["maps"] = _bytes(maps), kind
        kept = best_exemplars(run.memory.labels(), stage.num_seen)
        if len(kept):
            arrays["exemplars"] = thumbnails(samples.images.fetch(run.memory.ids()[kept]), LARGEST_EXEMPLAR)
            facts["exemplar_labels"] = run.memory.labels()[kept].tolist()
    if isinstance(network, PatchNetwork) and len(tokens := network.tokens_of_tasks()) > 1:
        directions = F.normalize(tokens.double().cpu())
        arrays["token_distances"] = (1 - directions @ directions.T).numpy().astype(np.float32)
    return facts, arrays


def spread(labels: Int[Tensor, " all"], num_classes: int, most: int) -> Int[Tensor, " chosen"]:
    """The first samples of every class, as many of each; of evenly spaced classes alone if there are too many.

    Args:
        labels: In learned order, negative where a sample is not used.
        num_classes: Classes to choose from: the first so many labels.
        most: How many samples at most.
    """
    classes = torch.linspace(0, num_classes - 1, min(num_classes, most)).round().long()
    each = most // len(classes)
    return torch.cat([torch.nonzero(labels == label).flatten()[:each] for label in classes])


def examples(right: Bool[Tensor, " images"]) -> Int[Tensor, " chosen"]:
    """Right answers, then wrong ones, half and half as far as there are so many, evenly spaced among all of them."""
    groups = [torch.nonzero(right).flatten(), torch.nonzero(~right).flatten()]
    half = MOST_EXAMPLES // 2
    room = [max(half, MOST_EXAMPLES - len(other)) for other in reversed(groups)]
    return torch.cat([_spaced(group, most) for group, most in zip(groups, room, strict=True)])


def best_exemplars(labels: Int[Tensor, " exemplars"], num_classes: int) -> Int[Tensor, " chosen"]:
    """Places in the memory of the first exemplars of every class; of evenly spaced classes if there are too many."""
    each = min(MOST_EXEMPLARS_PER_CLASS, max(1, MOST_EXEMPLARS // num_classes))
    classes = _spaced(torch.unique(labels), MOST_EXEMPLARS)
    return torch.cat([torch.nonzero(labels == label).flatten()[:each] for label in classes]) if len(classes) else labels


def principal(features: Float[Tensor, "images width"]) -> tuple[np.ndarray, list[float]]:
    """Features on their first principal axes, and the share of the variance on each axis.

    Every axis points to where its largest coordinate is positive, so that the same features give the same numbers.
    """
    centred = (features - features.mean(dim=0)).double().numpy()
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    scores = (left * sizes)[:, :MOST_AXES]
    largest = scores[np.abs(scores).argmax(axis=0), np.arange(scores.shape[1])]
    scale = np.abs(scores).max() or 1.0  # float16 has room up to 65504
    shares = sizes**2 / max(float((sizes**2).sum()), np.finfo(float).tiny)
    signed = scores * np.where(largest < 0, -1.0, 1.0) / scale
    return signed.astype(np.float16), [round(float(share), 4) for share in shares[:MOST_AXES]]


def evidence(network: Network) -> str | None:
    """What can be shown of where a network finds its evidence; None where nothing can.

    A class activation map needs a linear head on the mean of a feature map, attention a decoder with task tokens.
    """
    if isinstance(network, PatchNetwork):
        return "attention"
    paths = network.tap_paths()
    is_pooled = "last" in paths.outputs | paths.inputs  # otherwise the means of the maps are not the scores
    return "class_activation" if is_pooled and "class_maps" in network.taps() else None


def _maps(network: Network, images: Tensor) -> Tensor:
    if isinstance(network, PatchNetwork):
        return network.attention(images)
    exposed = network.exposed
    network.expose(["class_maps"])
    try:
        outputs = network(images)
    finally:
        network.expose(exposed)
    maps: Tensor = outputs.taps["class_maps"]
    return maps


def thumbnails(images: UInt8[Tensor, "images channels height width"], largest: int) -> np.ndarray:
    """Images whose longer side has at most so many pixels."""
    factor = largest / max(images.shape[2:])
    if factor >= 1:
        return images.cpu().numpy()
    size = [max(1, math.floor(side * factor)) for side in images.shape[2:]]
    smaller = F.interpolate(images.cpu().float(), size, mode="bilinear", antialias=True)
    return smaller.round().clamp(0, 255).byte().numpy()


def _spaced(items: Int[Tensor, " items"], most: int) -> Int[Tensor, " chosen"]:
    return items[torch.linspace(0, len(items) - 1, min(len(items), most)).round().long()] if len(items) else items


def _bytes(maps: Float[Tensor, "images rows columns"]) -> np.ndarray:
    each = rearrange(normalised(rearrange(maps, "b h w -> b 1 h w")), "b 1 h w -> b h w")
    return (255 * each).round().byte().numpy()


def _small(labels: Int[Tensor, " images"]) -> np.ndarray:
    return labels.cpu().numpy().astype(np.int32)


def _zeros(network: Network) -> Tensor:
    weights = next(network.parameters())
    return torch.zeros(1, *network.input_shape, device=weights.device, dtype=weights.dtype)
