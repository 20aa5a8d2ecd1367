"""What CRD keeps of every training sample: a row in each of two banks, found by the sample's id."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from kd.distributed import world_size
from kd.feature.crd_sampling import ClassBlocks

SIDES = ("student", "teacher")


class SampleMemory(nn.Module):
    """Two banks of embeddings, sorted by class, so that the other classes are all of a bank but one block.

    The banks, the normaliser Z and the state of the draws are in the state dict, whatever their size. They move with
    the module but are no buffers: DistributedDataParallel need not send them, since all processes change them alike.

    Args:
        width: Numbers in an embedding.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        nothing = torch.zeros(0, dtype=torch.int64)
        # ids and labels are sorted by id, the banks by class and then by id; log_z are those of student and teacher
        self._kept = {"ids": nothing, "labels": nothing, "log_z": torch.zeros(2)}
        self._kept.update({side: torch.zeros(0, width) for side in SIDES})
        self._has_z = False
        self._key: int | None = None
        self._num_draws = 0
        self._index()

    def _index(self) -> None:
        """Find what follows from ids and labels."""
        order = torch.argsort(self._kept["labels"], stable=True)
        self._row_of = torch.argsort(order)
        self._blocks = ClassBlocks.of(self._kept["labels"][order]) if len(order) else None

    def __len__(self) -> int:
        return len(self._kept["ids"])

    def remember(self, ids: Int[Tensor, " samples"], labels: Int[Tensor, " samples"]) -> None:
        """Draw rows for samples that are new, uniform to $\\pm\\sqrt{3 / width}$; with any, Z is to be found anew.

        Raises:
            ValueError: If a sample has two labels.
        """
        both = torch.cat([self._kept["ids"], ids.to(self._row_of)])
        given = torch.cat([self._kept["labels"], labels.to(self._row_of)])
        whole, place = torch.unique(both, return_inverse=True)
        of_sample = torch.empty_like(whole)
        of_sample[place] = given
        if (twice := of_sample[place] != given).any():
            raise ValueError(f"a sample has one label: found two for the samples with ids {both[twice][:5].tolist()}")
        num_known = len(self)
        if len(whole) == num_known:
            return
        if self._key is None:
            self._key = _common_key()
        order = torch.argsort(of_sample, stable=True)
        generator = torch.Generator().manual_seed(self._key - 1 - num_known)
        for side in SIDES:
            known = self._kept[side]
            uniform = torch.rand(len(whole), known.shape[1], generator=generator)
            bank = (math.sqrt(3 / known.shape[1]) * (2 * uniform - 1)).to(known)
            bank[place[:num_known]] = known[self._row_of]
            self._kept[side] = bank[order]
        self._kept.update(ids=whole, labels=of_sample)
        self._has_z = False
        self._index()

    def rows(self, ids: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Where samples are in the banks.

        Raises:
            ValueError: If a sample is not among those remembered. On CUDA this stops the device instead, so that no
                step waits for it.
        """
        known = self._kept["ids"]
        if not len(known):
            raise ValueError("crd keeps an embedding of every sample: call remember(ids, labels) first")
        ids = ids.to(known)
        place = torch.searchsorted(known, ids).clamp(max=len(known) - 1)
        found = known[place] == ids
        if found.device.type != "cpu":
            torch._assert_async(found.all(), "crd met a sample that it was not told to remember")
        elif not found.all():
            others = sorted(set(ids[~found].tolist()))[:5]
            raise ValueError(f"crd remembers {len(known)} samples, found others, with ids {others}: remember these too")
        return self._row_of[place]

    def recall(self, ids: Int[Tensor, " samples"]) -> dict[str, Float[Tensor, "samples width"]]:
        """The rows of samples in the bank of the student and in that of the teacher."""
        rows = self.rows(ids)
        return {side: self._kept[side][rows] for side in SIDES}

    def blocks(self) -> ClassBlocks:
        """The rows of each class; there must be samples."""
        assert self._blocks is not None
        return self._blocks

    def generator(self) -> torch.Generator:
        """Randomness for the draws of one step: the same on every process, and after a resume."""
        assert self._key is not None
        generator = torch.Generator(self._row_of.device).manual_seed(self._key + self._num_draws)
        self._num_draws += self.training
        return generator

    def bank(self, side: str) -> Float[Tensor, "rows width"]:
        """The bank of "student" or "teacher", changed by `update`."""
        return self._kept[side]

    @torch.no_grad()
    def update(self, side: str, rows: Int[Tensor, " batch"], v: Float[Tensor, "batch width"], momentum: float) -> None:
        """$M_b \\leftarrow$ normalise$(m M_b + (1 - m) v_b)$; of rows that are there twice, the last place counts."""
        bank = self._kept[side]
        updated = F.normalize(momentum * bank[rows] + (1 - momentum) * v, dim=1).to(bank.dtype)
        last = torch.where(rows[:, None] == rows, torch.arange(len(rows), device=rows.device), -1).amax(1)
        bank[rows] = updated[last]  # whatever writes a row twice writes the same

    def log_z(self, side: str, log_scores: Float[Tensor, "batch candidates"]) -> Float[Tensor, ""]:
        """Log of Z = n mean(scores) of the first batch after the banks have grown."""
        number = SIDES.index(side)
        if self._has_z:
            return self._kept["log_z"][number].to(log_scores.dtype)
        fresh = log_scores.logsumexp((0, 1)) + math.log(len(self) / log_scores.numel())
        if self.training:
            self._kept["log_z"][number] = fresh
        return fresh

    def normalizers(self) -> Float[Tensor, "2"]:
        """Z of the student's and of the teacher's scores; NaN where a first batch is still to come."""
        return self._kept["log_z"].exp() if self._has_z else torch.full_like(self._kept["log_z"], torch.nan)

    def keep_z(self) -> None:
        """Let Z stay as it is from now on."""
        self._has_z = True

    def get_extra_state(self) -> dict[str, Any]:
        """Everything; the module has neither parameters nor buffers."""
        return {**self._kept, "has_z": self._has_z, "key": self._key, "num_draws": self._num_draws}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take over banks of any size."""
        self._kept = {name: state[name].to(kept, copy=True) for name, kept in self._kept.items()}
        self._has_z, self._key, self._num_draws = state["has_z"], state["key"], state["num_draws"]
        self._index()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SampleMemory":
        self._kept = {name: fn(kept) for name, kept in self._kept.items()}
        self._index()
        return self


def _common_key() -> int:
    """A random number that all processes agree on."""
    key = [int(torch.randint(2**62, ()))]
    if world_size() > 1:
        dist.broadcast_object_list(key, src=0)
    return key[0]
