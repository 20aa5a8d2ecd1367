"""Static distillation: a student trained beside a frozen teacher on all classes, once or several times over."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from cil.asking import Asked
from cil.learners.base import Learner
from cil.models.network import Network
from cil.search import SearchResult
from cil.stages import Phase, Stage
from cil.teacher_cache import TeacherCache
from cil.teachers import Teacher
from cil.transfer import connect, said
from kd import Batch, Frozen, WeightedSum


class StaticDistillation(Learner):
    """Cross-entropy with the labels, and whatever distillation there is from a teacher that knows the same classes.

    $L = w\\,CE + \\sum_i w_i L_i$ with the task weight $w$ of the terms (1 unless one says otherwise); a second view of
    the images, where a term reads one, has a cross-entropy of its own beside the first.

    Every stage trains another network; its teacher is the network of the stage before. That of the first stage is
    given, or there is none, and the first network learns from the labels alone.

    Args:
        network: The network of the first stage.
        make_network: Index of a later stage to its network, without classes.
        make_distillation: The terms of a stage, new ones for each; None for none.
        teacher: Index of a stage to its teacher; None where there is none. It is no part of the learner's state.
        given: The teacher of the first stage, and where it comes from.
        cache: What that teacher said before; None keeps nothing.

    Attributes:
        found: What a search for the student found, if there was one.
    """

    uses_memory = False
    continues = False

    def __init__(
        self,
        network: Network,
        make_network: Callable[[int], Network],
        make_distillation: Callable[[], WeightedSum | None],
        teacher: Callable[[int], Network | None],
        given: Teacher | None = None,
        cache: TeacherCache | None = None,
    ) -> None:
        super().__init__(network, None)
        self._make_network, self._make_distillation, self._teacher_of = make_network, make_distillation, teacher
        self.given = given
        self.index = 0
        self.cache = cache
        self.recordable = cache is None
        self.found: SearchResult | None = None
        self._asked: Asked | None = None  # no module, and so no part of the state dict

    def begin_stage(self, stage: Stage) -> None:
        """Take the next network and its teacher."""
        if stage.index > 0:
            self.network = self._make_network(stage.index)
        self.network.grow(stage.num_new)
        self._take_teacher(stage.index)

    def _take_teacher(self, index: int) -> None:
        self.index = index
        teacher = self._teacher_of(index)
        self.distillation = self._make_distillation() if teacher is not None else None
        self._asked = None
        if teacher is None or self.distillation is None:
            return
        connect(self.distillation, self.network, teacher)
        needs = self.distillation.needs
        cache = self.cache if index == 0 and "teacher_graph" not in needs else None
        self._asked = Asked(Frozen(teacher, keep_graph="teacher_graph" in needs), needs, cache)

    def speakers(self) -> list[Network]:
        """The student and its teacher."""
        if self._asked is None:
            return [self.network]
        teacher = self._asked.teacher.network
        assert isinstance(teacher, Network)
        return [self.network, teacher]

    def remember(self, ids: Int[Tensor, " samples"], labels: Int[Tensor, " samples"]) -> None:
        """Which samples a stage shows, for the terms."""
        if self.distillation is not None:
            self.distillation.remember(ids, labels)

    def begin_epoch(self, epoch: int, *, learning_rate: float, view_key: int, again: bool = False) -> None:
        """An epoch begins, for the terms and for what is kept of the teacher."""
        super().begin_epoch(epoch, learning_rate=learning_rate, view_key=view_key, again=again)
        if self._asked is not None:
            self._asked.begin_epoch(view_key)

    def phases(self, stage: Stage) -> list[Phase]:
        """One phase on all data."""
        return [Phase("training", "new", stage.recipe)]

    def notice(self, batch: Batch) -> str | None:
        """What keeping the teacher's answers takes, before anything is kept."""
        assert self.phase is not None
        recipe = self.phase.recipe
        num_passes = -(-recipe.epochs // recipe.sampling.epoch_parts)
        return self._asked.size(batch, num_passes) if self._asked is not None else None

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Mean cross-entropy, and the weighted distillation terms by name."""
        student = said(self.network, batch)
        labels = batch.labels
        loss = F.cross_entropy(student.logits, labels)
        for view in student.views.values():
            loss = loss + F.cross_entropy(view.logits, labels)
        if self.distillation is None or self._asked is None:
            return {"ce": loss}
        losses = {"ce": self.distillation.task_weight * loss}
        if self.distillation.counts:
            losses |= self.distillation.terms(student, self._asked(batch), batch)
        return losses

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StaticDistillation":
        """Move the teacher too, which is no submodule."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._asked is not None:
            self._asked.teacher._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def structure(self) -> dict[str, Any]:
        """What a resumed run needs to build the same modules."""
        return {"index": self.index, "network": self.network.structure()}

    def rebuild(self, structure: dict[str, Any]) -> None:
        """Take the network and the teacher of the stage that was saved."""
        if structure["index"] > 0:
            self.network = self._make_network(structure["index"])
        self.network.rebuild(structure["network"])
        self._take_teacher(structure["index"])
