"""Between a network and its teacher: what both say for the distillation terms, and the adapters between them."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cil.models.network import Network
from cil.teacher_cache import TeacherCache
from kd import Batch, Distiller, Frozen, Outputs, WeightedSum, probe
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


def connect(distillation: WeightedSum, student: Network, teacher: Network) -> None:
    """Build the adapters of the terms from a probe, and let both networks say the maps that the terms read, no others.

    Leaves no trace in the networks but that.

    Args:
        distillation: The terms.
        student: Is trained, and knows at least the classes of the teacher.
        teacher: Is held still.

    Raises:
        ValueError: If a term needs what a network does not have.
    """
    if not distillation.needs & MAPS:
        student.expose([])
        teacher.expose([])
        distillation.connect(*_probed(student, teacher))
        return
    for network in (student, teacher):
        network.expose(network.taps())
    said = _probed(student, teacher)
    distillation.connect(*said)
    read: tuple[list[str], list[str]] = ([], [])
    for term in _terms(distillation):
        for names, found in zip(read, _read(term, *said, _probe_images(teacher)), strict=True):
            names.extend(name for name in found if name not in names)
    student.expose(read[0])
    teacher.expose(read[1])


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


class Asked:
    """A frozen teacher that is asked about batches, or whose answers to the same views are read from disk.

    Args:
        teacher: The teacher.
        needs: What the terms read (`Distiller.needs`).
        cache: What it said before; None keeps nothing.
    """

    def __init__(self, teacher: Frozen, needs: set[str], cache: TeacherCache | None) -> None:
        self.teacher, self.cache = teacher, cache
        self._needs = needs

    def begin_epoch(self, view_key: int) -> None:
        """An epoch of views begins."""
        if self.cache is not None:
            network = self.teacher.network
            assert isinstance(network, Network)
            names = ["logits", *(["embedding"] if "embedding" in self._needs else []), *network.exposed]
            if "strong" in self._needs:
                names += [f"strong/{name}" for name in names]
            self.cache.begin_pass(view_key, names)

    def size(self, batch: Batch, num_passes: int) -> str | None:
        """What keeping its answers takes on disk, by those to an example batch; None if nothing is kept."""
        if self.cache is None:
            return None
        return self.cache.describe(_flat(said(self.teacher, batch), self._needs), num_passes)

    def __call__(self, batch: Batch) -> Outputs:
        """What the teacher says of a batch."""
        if self.cache is None:
            return said(self.teacher, batch)
        known = self.cache.read(batch.ids)
        if known is None:
            known = _flat(said(self.teacher, batch), self._needs)
            self.cache.write(batch.ids, known)
        return _outputs({name: value.to(batch.images.device) for name, value in known.items()})


def _flat(outputs: Outputs, needs: set[str]) -> dict[str, Tensor]:
    """What is read of the outputs, by name."""
    flat = {"logits": outputs.logits, **outputs.taps}
    if outputs.embedding is not None and "embedding" in needs:
        flat["embedding"] = outputs.embedding
    for view, seen in outputs.views.items():
        flat |= {f"{view}/{name}": value for name, value in _flat(seen, needs).items()}
    return flat


def _outputs(flat: dict[str, Tensor]) -> Outputs:
    own = {name: value for name, value in flat.items() if "/" not in name}
    views = sorted({name.partition("/")[0] for name in flat if "/" in name})
    seen = {}
    for view in views:
        names = [name for name in flat if name.startswith(f"{view}/")]
        seen[view] = _outputs({name.removeprefix(f"{view}/"): flat[name] for name in names})
    taps = {name: value for name, value in own.items() if name not in ("logits", "embedding")}
    return Outputs(own["logits"], own.get("embedding"), taps, seen)
