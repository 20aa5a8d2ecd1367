"""Memory that runs out: how to tell, and what would fit."""

from collections.abc import Callable

import torch

_ON_A_CPU = "can't allocate memory"  # of torch's allocator, which raises a plain RuntimeError


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory left, on the device or beside it."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or _ON_A_CPU in str(error)


def largest_that_fits(attempt: Callable[[int], object], count: int) -> int | None:
    """The first of count / 2, count / 4, ... for which an attempt does not run out of memory; None if none does.

    Args:
        attempt: Does with so many samples what failed with `count`.
        count: Samples that were too many.
    """
    while count := count // 2:
        try:
            attempt(count)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            return count
    return None
