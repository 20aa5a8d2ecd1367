"""The contract between the engine and a method: six hooks."""

import copy
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.profiler import record_function

from cil.models.network import Network
from cil.optim import Recipe
from cil.stages import Phase, Source, Stage
from cil.transfer import Connection, connect, said
from kd import DOT, Batch, Frozen, Outputs, WeightedSum, frozen
from kd.base import total
from kd.registry import Registry

Reading = Literal["classifier", "nearest_mean"]

learners: Registry["type[Learner]"] = Registry("learner", "cil.learners")


class Learner(nn.Module):
    """A method: a network, perhaps a teacher, and what is done with them in every stage.

    A learner says what to train; the engine sums the losses, steps, logs, evaluates and saves. Everything it learns
    or remembers is a parameter, a buffer or part of `structure()`, so that a run can go on from a checkpoint.

    Args:
        network: The network to train; it has no classes yet.
        distillation: What the network learns from its predecessor; None to learn nothing.
    """

    #: Whether the method can keep the network of the last task, to distil from it; it does where it needs it.
    keeps_teacher: ClassVar[bool] = False
    #: What its networks cannot say (`Distiller.needs`), each with the reason.
    cannot_say: ClassVar[Mapping[str, str]] = {}
    #: Whether the network of a task goes on from that of the task before, and with it the state of its optimiser.
    continues: bool = True
    #: Which reading counts: the scores of `predict`, or the nearest mean of exemplars. The other is told beside it.
    read_by: Reading = "classifier"
    #: Whether the method trains on exemplars; if not, none are chosen, whatever the memory could hold.
    uses_memory: ClassVar[bool] = True
    #: Whether the method is at a loss without exemplars.
    needs_memory: ClassVar[bool] = False
    #: Whether `forward` is the same operations on tensors in every step of a phase, so that a GPU can be given all of
    #: them at once (`cil.recorded`): it reads no file and keeps nothing in Python; `update` is not overridden.
    recordable: bool = False

    def __init__(self, network: Network, distillation: WeightedSum | None) -> None:
        super().__init__()
        self.network = network
        self.distillation = distillation
        self.teacher: Frozen | None = None
        #: The phase in work; the engine sets it.
        self.phase: Phase | None = None
        # in a tuple, so that they are no part of the state: the terms as they were before they met two networks
        self._fresh_terms = (copy.deepcopy(distillation),)
        self._connection: Connection | None = None

    @property
    def needs_teacher(self) -> bool:
        """Whether there is anything to learn from the network of the last task."""
        return self.distillation is not None

    def begin_stage(self, stage: Stage) -> None:
        """Before the phases of a stage: take the teacher, grow."""
        if stage.index > 0:
            self.take_teacher()
        self.network.grow(stage.num_new)
        self.connect()

    def take_teacher(self) -> None:
        """Hold a copy of the network as it is now, if there is something to learn from it."""
        if self.keeps_teacher and self.needs_teacher:
            self.teacher = frozen(self.network, keep_graph=self._keeps_graph)

    @property
    def _keeps_graph(self) -> bool:
        return self.distillation is not None and "teacher_graph" in self.distillation.needs

    def connect(self) -> None:
        """Let teacher and grown network say what the distillation terms read.

        Adapters go on learning if everything the two say has the shapes of the last task, and are made anew otherwise.

        Raises:
            ValueError: If a network cannot say what a term reads.
        """
        if self.teacher is None or self.distillation is None:
            return
        teacher = self.teacher.network
        assert isinstance(teacher, Network)
        before = self._connection
        fresh = copy.deepcopy(self._fresh_terms[0])
        assert fresh is not None
        found = connect(fresh, self.network, teacher)
        if before is None or found.shapes != before.shapes:
            self.distillation = fresh
        self._connection = found

    def phases(self, stage: Stage) -> list[Phase]:
        """What to train in a stage, in order. Has no side effect: it is asked again after a resume."""
        source: Source = "new+memory" if stage.has_memory else "new"
        return [Phase("training", source, stage.recipe.for_task(stage.index))]

    def rehearse(self, recipe: Recipe) -> None:
        """Let a copy begin two stages, so that what cannot work in the second is refused before the first.

        Raises:
            ValueError: If a network cannot say what a distillation term reads.
        """
        trial = copy.deepcopy(self)
        with torch.random.fork_rng(devices=[]):
            for index in range(2):
                trial.begin_stage(Stage(index, range(2 * index, 2 * index + 2), recipe, has_memory=True))

    def remember(self, ids: Int[Tensor, " samples"], labels: Int[Tensor, " samples"]) -> None:
        """Which samples the phases of a stage will show, after `begin_stage` and after a resume."""
        if self.distillation is not None and self.teacher is not None:  # before that nothing is compared
            self.distillation.remember(ids, labels)

    def begin_epoch(self, epoch: int, *, learning_rate: float, view_key: int, again: bool = False) -> None:
        """An epoch of the phase in work begins.

        Args:
            epoch: Counts from 0.
            learning_rate: Its first rate.
            view_key: Where the augmentation of its samples comes from: equal keys show equal views.
            again: The epoch goes on after a resume; what its beginning changed in the state is there.
        """
        # fine-tuning on the memory comes after the end of a schedule, it does not start it again
        counts = self.phase is None or self.phase.source != "memory"
        if self.distillation is not None and counts and not again:
            self.distillation.begin_epoch(epoch, learning_rate=learning_rate)

    def notice(self, batch: Batch) -> str | None:
        """What a person should know before a phase shows its first batch; None for nothing."""
        return None

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The losses of a batch by name, already weighted."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its losses are")

    @property
    def learns_from_old(self) -> bool:
        """Whether distillation terms stand beside the task loss, now or later in this stage.

        Where a loss is divided by $\\lambda$ between the two, the task loss is whole again after the end of a schedule.
        """
        return self.teacher is not None and self.distillation is not None and not self.distillation.ended

    def transferred(
        self, student: Outputs, batch: Batch, weight: float = 1.0, teacher: Outputs | None = None
    ) -> dict[str, Tensor]:
        """The distillation terms of a batch by name, times `weight`; none in the first stage.

        Terms that compare scores see those of the old classes; a label that the teacher does not know is the term's own
        affair (`kd`).

        Args:
            student: What the network says (`cil.transfer.said`).
            batch: The batch.
            weight: Of the learner.
            teacher: What the teacher says, where it has been asked already.
        """
        if self.teacher is None or self.distillation is None or not self.distillation.counts:
            return {}
        teacher = said(self.teacher, batch) if teacher is None else teacher
        terms = self.distillation.terms(student.first(teacher.logits.shape[1]), teacher, batch)
        return {name: weight * term for name, term in terms.items()}

    def update(
        self,
        losses: dict[str, Tensor],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        clip_norm: float | None,
    ) -> None:
        """One optimiser step on the sum of the losses: `differentiate`, then `advance`."""
        self.differentiate(losses, optimizer, scaler)
        self.advance(optimizer, scaler, clip_norm)

    def differentiate(
        self, losses: dict[str, Tensor], optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
    ) -> None:
        """The gradient of the sum of the losses; DOT is given those of the distillation terms apart."""
        optimizer.zero_grad(set_to_none=True)
        if isinstance(optimizer, DOT):
            terms = self.distillation.weights if self.distillation is not None else {}
            kd = [loss for name, loss in losses.items() if name in terms]
            task = [loss for name, loss in losses.items() if name not in terms]
            with record_function("backward"):
                optimizer.backward(scaler.scale(total(task)), scaler.scale(total(kd)) if kd else None)
            return
        with record_function("backward"):
            loss: Tensor = scaler.scale(total(losses.values()))
            loss.backward()  # type: ignore[no-untyped-call]

    def advance(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, clip_norm: float | None) -> None:
        """One optimiser step along the gradient that is there."""
        with record_function("optimiser"):
            if isinstance(optimizer, DOT):
                scaler.step(optimizer, max_norm=clip_norm)
                scaler.update()
                return
            if clip_norm is not None:
                scaler.unscale_(optimizer)
                parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
                nn.utils.clip_grad_norm_(parameters, clip_norm)
            scaler.step(optimizer)
            scaler.update()

    def end_stage(self, stage: Stage) -> None:
        """After the phases and the choice of exemplars: weight aligning, bias correction."""
        self.teacher = None
        self.network.expose([])

    def predict(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Scores of all classes seen so far, for evaluation."""
        outputs: Outputs = self.network(images)
        return outputs.logits

    def embed(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch embedding"]:
        """The features by which exemplars are chosen.

        Raises:
            ValueError: If the network has none.
        """
        outputs: Outputs = self.network(images)
        if outputs.embedding is None:
            raise ValueError(f"{type(self.network).__name__} gives no embedding to choose exemplars by")
        return outputs.embedding

    def speakers(self) -> list[Network]:
        """The networks that are asked about training images; several processes put together what these say."""
        networks = [self.network]
        if self.teacher is not None:
            assert isinstance(self.teacher.network, Network)
            networks.append(self.teacher.network)
        return networks

    def structure(self) -> dict[str, Any]:
        """What growing has made of the modules, as plain JSON values."""
        teacher = self.teacher.network.structure() if self.teacher is not None else None  # type: ignore[operator]
        connection = asdict(self._connection) if self._connection is not None else None
        return {"network": self.network.structure(), "teacher": teacher, "connection": connection}

    def rebuild(self, structure: dict[str, Any]) -> None:
        """Give a fresh learner the modules of a saved one; the values come from its state dict."""
        if structure["teacher"] is not None:
            teacher = copy.deepcopy(self.network)
            teacher.rebuild(structure["teacher"])
            self.teacher = Frozen(teacher, keep_graph=self._keeps_graph)
        self.network.rebuild(structure["network"])
        if structure["connection"] is not None:
            self._connection = Connection(**structure["connection"])
            assert self.distillation is not None
            self._connection.build(self.distillation, next(self.network.parameters()).device)
            if self.teacher is not None:
                ours, theirs = self._connection.exposed
                self.network.expose(ours)
                self.teacher.network.expose(theirs)  # type: ignore[operator]
