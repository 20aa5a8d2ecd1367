"""The exemplar memory: which old images may be trained on again, as sample ids."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cil.memory.rules import selection_rules

Budget = Literal["total", "per_class", "fixed_total"]


class ExemplarMemory:
    """Sample ids per class, best first, within a budget that is never exceeded.

    With C classes seen, a class may keep so many exemplars:

    - "total": floor(size / C) (iCaRL); old classes are cut from the end of their order as classes arrive.
    - "per_class": size (LUCIR, PODNet); the memory grows with the classes.
    - "fixed_total": floor(size / number of classes at the end) from the start (DyTox).

    A class with fewer images keeps all it has; what it leaves free is not given to others. The memory belongs to the
    run: every process holds the same ids.

    Args:
        size: Exemplars in all, or per class with "per_class". 0: there is no memory.
        budget: What `size` counts.
        selection: The name of a rule of `selection_rules`.

    Raises:
        ValueError: If `size` is negative, or `budget` or `selection` is unknown.
    """

    def __init__(self, *, size: int = 0, budget: Budget = "total", selection: str = "herding") -> None:
        if size < 0:
            raise ValueError(f"memory.size must be at least 0, found {size}")
        if budget not in ("total", "per_class", "fixed_total"):
            raise ValueError(f"memory.budget must be total, per_class or fixed_total, found {budget!r}")
        self.size = size
        self.budget = budget
        self.rule = selection_rules[selection]
        self._ids: dict[int, list[int]] = {}

    def quota(self, num_seen: int, num_final: int) -> int:
        """How many exemplars a class may keep.

        Args:
            num_seen: Classes seen so far, those being added included.
            num_final: Classes at the end of the sequence.

        Raises:
            ValueError: If there is a memory, but too small for one exemplar per class.
        """
        assert 0 < num_seen <= num_final, (num_seen, num_final)
        if self.size == 0 or self.budget == "per_class":
            return self.size
        num_classes = num_final if self.budget == "fixed_total" else num_seen
        if self.size < num_classes:
            raise ValueError(
                f"memory.size={self.size} is less than one exemplar for each of {num_classes} classes: "
                f"use at least {num_final}, or 0 for no memory"
            )
        return self.size // num_classes

    def select(
        self, features: Float[Tensor, "samples width"], count: int, *, seed_key: int
    ) -> Int[Tensor, " selected"]:
        """The rows of one class's features that the memory's rule selects, best first, at most `count`."""
        return self.rule(features, count, seed_key=seed_key)

    def update(self, new: Mapping[int, Sequence[int]], num_seen: int, num_final: int) -> None:
        """Take exemplars of new classes and cut every class to its quota.

        A label that is already there is replaced, as when exemplars are selected anew after fine-tuning.

        Args:
            new: Learned label to sample ids, best first; may be longer than the quota.
            num_seen: Classes seen so far, the new ones included.
            num_final: Classes at the end of the sequence.

        Raises:
            ValueError: As `quota`.
        """
        quota = self.quota(num_seen, num_final)
        if quota == 0:
            return
        merged = self._ids | {int(label): [int(sample) for sample in ids] for label, ids in new.items()}
        assert all(0 <= label < num_seen for label in merged), f"labels {sorted(merged)} with {num_seen} classes seen"
        self._ids = {label: merged[label][:quota] for label in sorted(merged)}
        kept = [sample for ids in self._ids.values() for sample in ids]
        assert len(set(kept)) == len(kept), "a sample is remembered twice"
        limit = self.size * num_seen if self.budget == "per_class" else self.size
        assert len(kept) <= limit, f"the memory holds {len(kept)} exemplars, its budget is {limit}"

    def ids(self) -> Int[Tensor, " exemplars"]:
        """All sample ids, by label, best first within a label."""
        return torch.tensor([sample for ids in self._ids.values() for sample in ids], dtype=torch.int64)

    def labels(self) -> Int[Tensor, " exemplars"]:
        """The learned labels of `ids()`."""
        return torch.tensor([label for label, ids in self._ids.items() for _ in ids], dtype=torch.int64)

    def per_class(self) -> dict[int, int]:
        """Number of exemplars of each learned label."""
        return {label: len(ids) for label, ids in self._ids.items()}

    def __len__(self) -> int:
        return sum(len(ids) for ids in self._ids.values())

    def exemplar_bytes(self, bytes_per_image: int) -> int:
        """Bytes the exemplars would take if their pixels were stored."""
        return len(self) * bytes_per_image

    def state_dict(self) -> dict[str, Any]:
        """Everything to go on from, fit for JSON."""
        return {"exemplars": [[label, list(ids)] for label, ids in self._ids.items()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._ids = {int(label): [int(sample) for sample in ids] for label, ids in state["exemplars"]}
