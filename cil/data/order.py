"""In which batches the samples of an epoch come."""

import torch
from jaxtyping import Int
from torch import Tensor


def epoch_plan(
    ids: Int[Tensor, " samples"],
    *,
    key: int,
    batch_size: int,
    shuffle: bool = True,
    views: int = 1,
    round_to: int = 1,
    drop_last: bool = False,
    num_shares: int = 1,
) -> list[tuple[Int[Tensor, " batch"], Int[Tensor, " batch"]]]:
    """The batches of one epoch, each as sample ids and view numbers.

    A pure function, so that an epoch can be taken up again anywhere.

    Repeated augmentation (Hoffer et al., CVPR 2020, arXiv:1901.09335) with k views: every sample of the order comes k
    times in a row, with view numbers 0 .. k-1, which is what makes its k augmentations differ. As in DeiT and the DKT
    release the epoch keeps its length N, so only about N/k of the samples are seen.

    A tail of exactly one sample joins the batch before it, since BatchNorm needs two.

    Args:
        ids: Sample ids.
        key: From `cil.seeding.derive`: seed, stage, phase, epoch.
        batch_size: Samples in a batch.
        shuffle: Permute the ids; otherwise they come as given.
        views: Repetitions k of a sample.
        round_to: Cut the epoch to a multiple of so many entries (the release: 256).
        drop_last: Leave out a last batch that is not full, unless it is the only one.
        num_shares: Only the first of so many shares: entries 0, num_shares, 2 num_shares and so on, at most
            N / num_shares of them. This is no way to divide work: it repeats what the sampler of the DKT release does
            when it is told of 2 processes and only one runs.

    Raises:
        ValueError: If a count is below 1, there are no samples, or `round_to` or `num_shares` leaves none.
    """
    counts = {"batch_size": batch_size, "views": views, "round_to": round_to, "num_shares": num_shares}
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, found {value}")
    length = len(ids) // round_to * round_to // num_shares
    if length == 0:
        raise ValueError(
            f"an epoch of {len(ids)} samples, cut to a multiple of round_to={round_to} and divided by "
            f"num_shares={num_shares}, is empty: lower them"
        )
    if shuffle:
        permutation = torch.randperm(len(ids), generator=torch.Generator().manual_seed(key))
        ids = ids[permutation.to(ids.device)]
    entries = ids.repeat_interleave(views)[::num_shares][:length]
    numbers = torch.arange(views, device=ids.device).repeat(len(ids))[::num_shares][:length]
    sizes = [batch_size] * (length // batch_size)
    tail = length % batch_size
    if not sizes:
        sizes = [tail]
    elif tail == 1 and not drop_last:
        sizes[-1] += 1
    elif tail and not drop_last:
        sizes.append(tail)
    used = sum(sizes)
    return list(zip(torch.split(entries[:used], sizes), torch.split(numbers[:used], sizes), strict=True))
