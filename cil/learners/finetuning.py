"""Balanced fine-tuning: the second phase of a task in DKT and DyTox."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import nn

from cil.optim import Recipe, Schedule
from cil.stages import Phase, Stage

#: One number, or one per task from the second on, of which the last goes on; 0 leaves fine-tuning out.
Epochs = Annotated[int, Field(ge=0)] | list[Annotated[int, Field(ge=0)]]


def per_task(epochs: Epochs) -> list[int]:
    """The numbers of `Epochs` as a list.

    Raises:
        ValueError: If there are none.
    """
    if isinstance(epochs, list) and not epochs:
        raise ValueError("learner.finetune_epochs: found an empty list; give one number, or one for each task")
    return epochs if isinstance(epochs, list) else [epochs]


def balanced_finetuning(
    stage: Stage,
    recipe: Recipe,
    *,
    epochs: list[int],
    lr: float,
    batch_size: int | None,
    shuffle: bool,
    drop_last: bool,
    frozen: Sequence[nn.Module | nn.Parameter],
    frozen_in_eval: bool,
    views: int | None,
) -> list[Phase]:
    """Training at a constant rate on the memory alone, which holds as many samples of every class seen.

    Args:
        stage: The second or a later one.
        recipe: Of the main phase.
        epochs: From `per_task`.
        lr: Constant rate, scaled by the batch size like that of the recipe.
        batch_size: None takes that of the recipe.
        shuffle: Whether the memory is read in another order every epoch, or by class.
        drop_last: Whether a last batch that is not full is left out.
        frozen: See `Phase`.
        frozen_in_eval: See `Phase`.
        views: See `Phase`.

    Returns:
        The phase; nothing without memory or epochs.
    """
    num_epochs = epochs[min(stage.index, len(epochs)) - 1]
    if not num_epochs or not stage.has_memory:
        return []
    own = recipe.changed(
        epochs=num_epochs,
        initial_epochs=None,
        lr=lr,
        batch_size=batch_size or recipe.batch_size,
        schedule=Schedule(name="constant").model_dump(),
        sampling={"shuffle": shuffle, "drop_last": drop_last},
    )
    return [Phase("finetuning", "memory", own, frozen=frozen, frozen_in_eval=frozen_in_eval, views=views)]


def check_views(views: int | None, *, frozen_in_eval: bool, epochs: list[int]) -> None:
    """Whether fine-tuning can read what the encoder made once.

    Raises:
        ValueError: If the encoder does not rest, or there is no fine-tuning.
    """
    if views is not None and not frozen_in_eval:
        raise ValueError(
            "learner.finetune_views keeps what the frozen encoder says, which changes from step to step with "
            "learner.finetune_frozen_in_eval=false: set it to true, or finetune_views=null"
        )
    if views is not None and not any(epochs):
        raise ValueError("learner.finetune_views has no effect with learner.finetune_epochs=0")
