"""A validation set out of the training data, so that the test set need not be read while choices are made."""

import torch
from jaxtyping import Int
from torch import Tensor

from cil.seeding import SampleNoise, derive


def validation_split(
    labels: Int[Tensor, " samples"], fraction: float, seed: int
) -> tuple[Int[Tensor, " train"], Int[Tensor, " validation"]]:
    """Part the training images, class by class, into those to train on and those to validate on.

    Of a class with n images, `round(fraction * n)` are for validation, at least one and at most n - 1. Which ones is
    a function of seed and sample id.

    Args:
        labels: Labels of all training images.
        fraction: Share for validation, in [0, 1); 0 keeps every image for training.
        seed: The run's seed.

    Returns:
        Sample ids to train on and to validate on, ascending: indices into the full training arrays.

    Raises:
        ValueError: If `fraction` is out of range, or a class has a single image and can not be parted.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"the validation fraction must be at least 0 and below 1, found {fraction}")
    ids = torch.arange(len(labels), device=labels.device)
    validation = torch.zeros_like(ids, dtype=torch.bool)
    if fraction > 0:
        lots = SampleNoise(derive(seed, "validation split"), ids, torch.zeros_like(ids)).uniform("lot")[:, 0]
        for label in torch.unique(labels):
            members = ids[labels == label]
            if len(members) < 2:
                raise ValueError(
                    f"a validation split needs at least 2 training images of each class; class {int(label)} has 1. "
                    "Use data.validation=0, or leave the class out"
                )
            count = min(max(round(fraction * len(members)), 1), len(members) - 1)
            validation[members[lots[members].argsort(stable=True)[:count]]] = True
    return ids[~validation], ids[validation]
