"""Whom CRD compares a sample with: draws that know the classes, for a whole batch at once and without tables."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class ClassBlocks:
    """Rows that lie sorted by class, as one block each.

    Attributes:
        block: The block of every row.
        first: The first row of every block.
        size: How many rows it has.
        smallest: Size of the smallest block; like `largest`, kept as a number so that no draw waits for the device.
        largest: Size of the largest block.
    """

    block: Int[Tensor, " rows"]
    first: Int[Tensor, " blocks"]
    size: Int[Tensor, " blocks"]
    smallest: int
    largest: int

    @classmethod
    def of(cls, labels: Int[Tensor, " rows"]) -> "ClassBlocks":
        """The blocks of sorted labels, of which there must be some."""
        _, block, size = torch.unique_consecutive(labels, return_inverse=True, return_counts=True)
        return cls(block, size.cumsum(0) - size, size, int(size.min()), int(size.max()))

    def positives(self, rows: Int[Tensor, " batch"], generator: torch.Generator) -> Int[Tensor, " batch"]:
        """For every row one of its block, perhaps itself."""
        own = self.block[rows]
        return self.first[own] + self._below(self.size[own], (len(rows),), generator)

    def negatives(
        self, rows: Int[Tensor, " batch"], count: int, generator: torch.Generator
    ) -> Int[Tensor, "batch {count}"]:
        """For every row `count` rows of other blocks, all equally likely.

        They are distinct where the other blocks have enough rows; where they have not, each is drawn on its own.

        Args:
            rows: The rows to find others for.
            count: How many.
            generator: Source of randomness, on the device of the blocks.

        Raises:
            ValueError: If there is one block only.
        """
        if len(self.size) < 2:
            raise ValueError("negatives are samples of other classes: found samples of one class only")
        own, num_rows = self.block[rows], len(self.block)
        first, size = self.first[own, None], self.size[own, None]
        if count <= num_rows - self.largest:
            return self._walk(first, size, count, generator)
        # places behind the own block, counted around the circle of all rows
        beyond = self._below(num_rows - size, (len(rows), count), generator)
        repeated = (first + size + beyond) % num_rows
        if count > num_rows - self.smallest:
            return repeated
        return torch.where(count <= num_rows - size, self._walk(first, size, count, generator), repeated)

    def _walk(
        self, first: Int[Tensor, "batch 1"], size: Int[Tensor, "batch 1"], count: int, generator: torch.Generator
    ) -> Int[Tensor, "batch {count}"]:
        """The first `count` rows of other blocks behind a random place of one shuffled circle of all rows.

        Shuffling once and starting anywhere gives every sample a uniform draw without replacement; two samples share
        the shuffle, not the place. What falls on the own block is replaced by the next rows of the walk. This costs
        the copy of `count` numbers a sample, and about ten operations on one block's worth of them.
        """
        num_rows, device = len(self.block), self.block.device
        order = torch.randperm(num_rows, generator=generator, device=device)
        place = torch.empty_like(order)
        place[order] = torch.arange(num_rows, device=device)
        start = torch.randint(num_rows, (len(first),), generator=generator, device=device)
        num_spare = min(self.largest, num_rows - count)
        walk = order.repeat(2).unfold(0, count + num_spare, 1).index_select(0, start)  # copies whole stretches

        member = torch.arange(self.largest, device=device)
        found_at = place[(first + member).remainder_(num_rows)].sub_(start[:, None]).remainder_(num_rows)
        hole = (member < size) & (found_at < count)
        spare = walk[:, count:]
        fits = (spare < first) | (spare >= first + size)
        # the n-th spare row that fits goes into the n-th hole; a column past the end takes what has no use
        queue = torch.zeros(len(walk), num_spare + 1, dtype=walk.dtype, device=device)
        queue.scatter_(1, fits.cumsum(1).sub_(1).masked_fill_(~fits, num_spare), spare)
        turn = hole.cumsum(1).sub_(1).masked_fill_(~hole, num_spare).clamp_(max=num_spare)
        walk.scatter_(1, found_at.masked_fill_(~hole, count), queue.gather(1, turn))
        return walk[:, :count]

    def _below(
        self, bound: Int[Tensor, "..."], shape: tuple[int, ...], generator: torch.Generator
    ) -> Int[Tensor, "..."]:
        """Uniform whole numbers from 0 up to, but not, each bound."""
        device = bound.device
        return (torch.rand(shape, dtype=torch.float64, generator=generator, device=device) * bound).long()
