"""Between a network and its teacher: what both say for the distillation terms, and the adapters between them."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cil.models.network import Network
from kd import Batch, Distiller, Outputs, WeightedSum, probe
from kd.connect import held_still

MAPS = {"taps", "class_maps"}  # what `Distiller.needs` calls the maps of a network
_NUM_IMAGES = 2


class _Listening(dict[str, Tensor]):
    """Taps that remember which of them were read."""

    def __init__(self, taps: dict[str, Tensor]) -> None:
        super().__init__(taps)
        self.read: list[str] = []

    def __getitem__(self, name: str) -> Tensor:
        self.read.append(name)
        return super().__getitem__(name)


Shapes = dict[str, list[int]]
#: Named by what a network says; their shapes follow the number of classes, to which no adapter is made.
_BY_CLASS = {"logits", "class_maps"}


@dataclass(frozen=True)
class Connection:
    """How two networks are connected, as plain values: enough to build the same adapters again.

    Attributes:
        exposed: The maps that the terms read of student and teacher, by name.
        shapes: What the adapters are made for: shapes of what student and teacher say, by name, without the batch.
    """

    exposed: tuple[list[str], list[str]] = ([], [])
    shapes: tuple[Shapes, Shapes] = field(default_factory=lambda: ({}, {}))

    def build(self, distillation: WeightedSum, device: torch.device) -> None:
        """Build the adapters of fresh terms as `connect` has built them; their values come from a state dict."""
        distillation.connect(*(_of_shapes(shapes, device) for shapes in self.shapes))


def connect(distillation: WeightedSum, student: Network, teacher: Network) -> Connection:
    """Build the adapters of the terms from a probe, and let both networks say the maps that the terms read, no others.

    Leaves no trace in the networks but that.

    Args:
        distillation: The terms.
        student: Is trained, and knows at least the classes of the teacher.
        teacher: Is held still.

    Raises:
        ValueError: If a term needs what a network does not have.
    """
    reads_maps = bool(distillation.needs & MAPS)
    for network in (student, teacher):
        network.expose(network.taps() if reads_maps else [])
    said = _probed(student, teacher)
    distillation.connect(*said)
    read: tuple[list[str], list[str]] = ([], [])
    for term in _terms(distillation):
        for names, found in zip(read, _read(term, *said, _probe_images(teacher)), strict=True):
            names.extend(name for name in found if name not in names)
    student.expose(read[0])
    teacher.expose(read[1])
    return Connection(read, (_shapes(said[0]), _shapes(said[1])))


def _shapes(outputs: Outputs) -> Shapes:
    found = dict(outputs.taps)
    if outputs.embedding is not None:
        found["embedding"] = outputs.embedding
    return {name: list(value.shape[1:]) for name, value in found.items() if name not in _BY_CLASS}


def _of_shapes(shapes: Shapes, device: torch.device) -> Outputs:
    made = {name: torch.zeros(_NUM_IMAGES, *shape, device=device) for name, shape in shapes.items()}
    return Outputs(torch.zeros(_NUM_IMAGES, 1, device=device), made.pop("embedding", None), made)


def _probed(student: Network, teacher: Network) -> tuple[Outputs, Outputs]:
    images = _probe_images(teacher)
    theirs = probe(teacher, images)
    return probe(student.to(images.device), images).first(theirs.logits.shape[1]), theirs


def _probe_images(network: Network) -> Float[Tensor, "batch channels height width"]:
    weight = next(network.parameters())
    return torch.zeros(_NUM_IMAGES, *network.input_shape, dtype=weight.dtype, device=weight.device)


def _terms(distillation: WeightedSum) -> Iterator[Distiller]:
    for term in distillation.distillers.values():
        assert isinstance(term, Distiller)
        if term.needs & MAPS:
            yield term


def _read(
    term: Distiller, student: Outputs, teacher: Outputs, images: Float[Tensor, "batch channels height width"]
) -> tuple[list[str], list[str]]:
    """Names of the taps that a term reads of each network."""
    if "teacher_graph" in term.needs:  # it differentiates, which a probe cannot
        common = [name for name in student.taps if name in teacher.taps and name.endswith(".post")]
        return common, common
    ours, theirs = _Listening(student.taps), _Listening(teacher.taps)
    labels = torch.zeros(len(images), dtype=torch.int64, device=student.logits.device)
    batch = Batch(images, labels, labels, gathered=True)
    term.to(student.logits.device)
    with held_still(term), torch.no_grad():
        term(
            Outputs(student.logits, student.embedding, ours), Outputs(teacher.logits, teacher.embedding, theirs), batch
        )
    return ours.read, theirs.read


def said(network: nn.Module, batch: Batch) -> Outputs:
    """What a network says of a batch and of its other views."""
    outputs: Outputs = network(batch.images)
    views: dict[str, Outputs] = {name: network(images) for name, images in batch.views.items()}
    return replace(outputs, views=views) if views else outputs


def taught_by(distillation: WeightedSum | None, name: str) -> bool:
    """Whether a term reads something of that name (`Distiller.needs`)."""
    return distillation is not None and name in distillation.needs


def num_auxiliary(distillation: nn.Module | None) -> int:
    """Numbers in the adapters: trained beside the student, no part of it."""
    return 0 if distillation is None else sum(parameter.numel() for parameter in distillation.parameters())
