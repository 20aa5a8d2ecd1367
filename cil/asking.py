"""A frozen teacher that is asked about batches, or whose answers to the same views are read from disk."""

from torch import Tensor

from cil.models.network import Network
from cil.teacher_cache import TeacherCache
from cil.transfer import said
from kd import Batch, Frozen, Outputs


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
