"""Which samples a phase shows, in which batches, and where their random numbers come from."""

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from cil.build import Run
from cil.data import epoch_plan
from cil.seeding import derive
from cil.stages import Phase, SetApart, Source, Stage


class Batches:
    """The training samples of a run, phase by phase: a pure function of the run's seed and its memory.

    Args:
        run: The parts of the run.
    """

    def __init__(self, run: Run) -> None:
        self.labels, self.memory, self.seed = run.samples.labels, run.memory, run.config.seed
        self.data_seed = run.config.data_seed
        self.num_classes = run.tasks.num_classes
        self._counts = np.bincount(self.labels[self.labels >= 0].numpy(), minlength=self.num_classes)

    def of_phase(self, phase: Phase, stage: Stage) -> Int[Tensor, " samples"]:
        """The ids of the training samples that a phase shows."""
        ids = self.ids(phase.source, stage)
        if phase.set_apart is None:
            return ids
        each = self._num_apart(phase.set_apart, stage)
        chosen = torch.zeros(len(ids), dtype=torch.bool)
        for label in range(stage.num_seen):
            places = torch.nonzero(self.labels[ids] == label).flatten()
            generator = torch.Generator().manual_seed(derive(self.seed, "set apart", stage.index, label))
            chosen[places[torch.randperm(len(places), generator=generator)[:each]]] = True
        return ids[chosen if phase.set_apart.shown else ~chosen]

    def _num_apart(self, apart: SetApart, stage: Stage) -> int:
        """Samples of each class that are set apart; a class that has fewer than its exemplars may be counts as it is.

        Raises:
            ValueError: If the memory is too small to set one of each class apart and to leave one.
        """
        smallest = int(self._counts[: stage.num_seen].min())
        quota = min(self.memory.quota(stage.num_old, self.num_classes), smallest)
        each = int(apart.fraction * quota)
        if not 0 < each < quota:
            raise ValueError(
                f"{each} of the {quota} samples of the smallest class would be set apart (a fraction of "
                f"{apart.fraction}), and at least one has to be, and one to be left: raise memory.size or the fraction"
            )
        return each

    def ids(self, source: Source, stage: Stage) -> Int[Tensor, " samples"]:
        """The ids of the training samples of a source."""
        labels = self.labels
        if source == "memory":
            return self.memory.ids()
        if source == "seen":
            return torch.nonzero((labels >= 0) & (labels < stage.num_seen)).flatten()
        new = torch.nonzero((labels >= stage.labels.start) & (labels < stage.labels.stop)).flatten()
        if source == "new":
            return new
        old = self.memory.ids()
        return torch.cat([new, old[labels[old] < stage.labels.start]])

    def key(self, stage: Stage, phase: int, epoch: int) -> int:
        """Where the random numbers of an epoch come from."""
        return derive(self.seed, "epoch", stage.index, phase, epoch)

    def view_key(self, stage: Stage, number: int, phase: Phase, epoch: int) -> int:
        """Where the augmentation of an epoch comes from: the same for epochs that part one pass or show one view."""
        turn = epoch // phase.recipe.sampling.epoch_parts
        if phase.views is not None:
            turn %= phase.views
        if self.data_seed is None:
            return self.key(stage, number, turn)
        return derive(self.data_seed, "augmentation", stage.index, number, turn)

    def plan(
        self, ids: Int[Tensor, " samples"], stage: Stage, number: int, phase: Phase, epoch: int
    ) -> list[tuple[Int[Tensor, " batch"], Int[Tensor, " batch"]]]:
        """The batches of an epoch: ids and views."""
        sampling = phase.recipe.sampling
        halved, parts = sampling.emulate_missing_launcher, sampling.epoch_parts
        batches = epoch_plan(
            ids,
            key=derive(self.key(stage, number, 0 if halved else epoch // parts), "order"),
            batch_size=phase.batch_size,
            shuffle=sampling.shuffle,
            views=sampling.views,
            round_to=sampling.round_to,
            drop_last=sampling.drop_last,
            num_shares=2 if halved else 1,
        )
        part = epoch % parts
        return batches[part * len(batches) // parts : (part + 1) * len(batches) // parts]

    def num_images(self, stage: Stage, phase: Phase) -> int:
        """Images that a phase will show in all its epochs, known before its exemplars are (short classes aside)."""
        new = int(self._counts[stage.labels.start : stage.labels.stop].sum())
        old = stage.num_old * self.memory.quota(stage.num_old, self.num_classes) if stage.num_old else 0
        samples = {
            "new": new,
            "new+memory": new + old,
            "memory": stage.num_seen * self.memory.quota(stage.num_seen, self.num_classes),
            "seen": int(self._counts[: stage.num_seen].sum()),
        }[phase.source]
        if phase.set_apart is not None:
            apart = stage.num_seen * self._num_apart(phase.set_apart, stage)
            samples = apart if phase.set_apart.shown else samples - apart
        sampling = phase.recipe.sampling
        shown = samples // sampling.round_to * sampling.round_to // (2 if sampling.emulate_missing_launcher else 1)
        return shown * phase.recipe.epochs // sampling.epoch_parts
