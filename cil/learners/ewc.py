"""Elastic weight consolidation (Kirkpatrick et al., PNAS 2017, arXiv:1612.00796)."""

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import BeforeValidator, Field
from torch import Tensor, nn
from torch.func import functional_call

from cil.learners.base import Learner, learners
from cil.models.network import BackboneNetwork, Network
from cil.optim import Sampling, Schedule
from cil.seeding import SampleNoise, current_noise
from cil.stages import Phase, Stage
from kd import Batch, WeightedSum
from kd.base import total
from kd.precision import no_autocast

FISHER = "fisher"  # the phase that measures instead of training

#: On a command line and in YAML a bare `true` is a truth value.
FisherLabels = Annotated[
    Literal["true", "max_pred", "sampled"], BeforeValidator(lambda value: "true" if value is True else value)
]


class PerParameter(nn.Module):
    """A tensor beside every parameter of a network, by the name of the parameter: saved with the rest, not trained.

    Args:
        network: Whose parameters.
        before: What is taken over; the entries that have been added to a parameter since then are 0.
    """

    def __init__(self, network: nn.Module, before: "PerParameter | None" = None) -> None:
        super().__init__()
        for name, parameter in network.named_parameters():
            values = torch.zeros_like(parameter, requires_grad=False)
            if before is not None:
                old = before[name]
                values[tuple(slice(size) for size in old.shape)] = old
            self.register_buffer(self._key(name), values)

    @staticmethod
    def _key(name: str) -> str:
        return name.replace(".", "/")  # torch allows no dot in the name of a buffer

    def __getitem__(self, name: str) -> Tensor:
        return self.get_buffer(self._key(name))


@learners.register("ewc")
class EWC(Learner):
    """Cross-entropy on the data of the new task; weights that mattered to the old ones are held back; no memory.

    $L = CE + \\frac{w}{2} \\sum_i F_i (\\theta_i - \\theta^*_i)^2$, in the first task $L = CE$. $CE$ is over the new
    classes, $\\theta^*$ are the weights after the last task, F is the diagonal of the Fisher information.

    After training, a phase of its own shows every new image once and changes nothing but F: the mean of the squared
    gradient of $CE$ over all classes, computed in float32 or better, cut to `clamp`. It is merged with that of the
    tasks before, $F \\leftarrow \\alpha F_{old} + (1-\\alpha) F_{new}$ with $\\alpha = C_{old} / C$, as in PyCIL (the
    paper keeps a penalty for every task); the rows of the head that this task brought have $F_{new}$ alone.

    Args:
        network: A `BackboneNetwork`: what a weight was to the old tasks is known by its name, and a row of the head
            by its class.
        distillation: Must be None: this learner keeps no old network.
        weight: $w$ ($\\lambda$ in the paper): 1000 in PyCIL, 5000 in FACIL.
        fisher: `batch` squares the gradient of a whole batch, in training mode (PyCIL, fast, smaller values by far);
            `sample` that of every single image, in evaluation mode, which is the definition, at a step per image.
        fisher_labels: The labels of that $CE$: the `true` ones, the likeliest (`max_pred`), or one drawn from the
            prediction (`sampled`, the definition).
        clamp: Largest value of $F_{new}$; null for none.

    Raises:
        ValueError: If the network is no `BackboneNetwork`.
    """

    uses_memory = False

    def __init__(
        self,
        network: Network,
        distillation: WeightedSum | None = None,
        *,
        weight: Annotated[float, Field(gt=0)] = 1000.0,
        fisher: Literal["batch", "sample"] = "batch",
        fisher_labels: FisherLabels = "true",
        clamp: Annotated[float, Field(gt=0)] | None = 1e-4,
    ) -> None:
        super().__init__(network, distillation)
        if not isinstance(network, BackboneNetwork):
            raise ValueError(
                f"learner=ewc needs a network whose old weights stay under their names, a backbone with one linear "
                f"head, found {type(network).__name__}: use model=resnet32 or model=timm, or another learner (lwf, "
                "finetune)"
            )
        self.weight = weight
        self.fisher = fisher
        self.fisher_labels = fisher_labels
        self.clamp = clamp
        #: $F$, $\\theta^*$, and the mean that the Fisher phase has come to so far.
        self.importance = PerParameter(network)
        self.anchor = PerParameter(network)
        self.measured = PerParameter(network)
        self.register_buffer("num_measured", torch.zeros((), dtype=torch.int64))

    def begin_stage(self, stage: Stage) -> None:
        """Grow the network and what is kept beside it."""
        super().begin_stage(stage)
        self._make_room()

    def rebuild(self, structure: dict[str, Any]) -> None:
        """Give a fresh learner the modules of a saved one; the values come from its state dict."""
        super().rebuild(structure)
        self._make_room()

    def _make_room(self) -> None:
        self.importance = PerParameter(self.network, self.importance)
        self.anchor = PerParameter(self.network, self.anchor)
        self.measured = PerParameter(self.network)
        self.get_buffer("num_measured").zero_()

    def phases(self, stage: Stage) -> list[Phase]:
        """Training on the new data alone, then one pass over them that measures F."""
        recipe = stage.recipe.for_task(stage.index)
        once = recipe.changed(
            epochs=1,
            initial_epochs=None,
            schedule=Schedule(name="constant").model_dump(),
            sampling=Sampling().model_dump(),
        )
        batch_size = 1 if self.fisher == "sample" else None
        return [Phase("training", "new", recipe), Phase(FISHER, "new", once, loader_batch_size=batch_size)]

    @property
    def measures(self) -> bool:
        """Whether the phase in work is the one that measures F."""
        return self.phase is not None and self.phase.name == FISHER

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Mean cross-entropy `ce`, and from the second task on the weighted penalty `ewc`; `ce` alone for F."""
        if self.measures:
            return {"ce": self._fisher_loss(batch)}
        first = sum(self.network.task_sizes[:-1])
        losses = {"ce": F.cross_entropy(self.network(batch.images).logits[:, first:], batch.labels - first)}
        if first:
            losses["ewc"] = self.weight / 2 * self.distance()
        return losses

    def distance(self) -> Float[Tensor, ""]:
        """$\\sum_i F_i (\\theta_i - \\theta^*_i)^2$."""
        return total(
            (self.importance[name] * (parameter - self.anchor[name]).square()).sum()
            for name, parameter in self.network.named_parameters()
        )

    def _fisher_loss(self, batch: Batch) -> Float[Tensor, ""]:
        if self.fisher == "sample":
            self.network.eval()  # BatchNorm would make something of the one image of a batch
        # copies, so that the running statistics of BatchNorm stay as they are
        buffers = {name: buffer.clone() for name, buffer in self.network.named_buffers()}
        with no_autocast(batch.images.device):
            logits = functional_call(self.network, buffers, (batch.images,)).logits
        return F.cross_entropy(logits, self.labels(logits.detach(), batch))

    def labels(self, logits: Float[Tensor, "batch classes"], batch: Batch) -> Int[Tensor, " batch"]:
        """The labels whose cross-entropy F is made of, by `fisher_labels`; `sampled` ones depend on seed and sample."""
        if self.fisher_labels == "true":
            return batch.labels
        if self.fisher_labels == "max_pred":
            return logits.argmax(dim=1)
        noise = current_noise()
        if noise is None:
            drawn = torch.rand(len(logits), 1, device=logits.device)
        else:  # by the ids of the whole batch, of which this process may hold a share
            drawn = SampleNoise(noise.key, batch.ids, torch.zeros_like(batch.ids)).uniform("fisher_labels")
        upper = logits.softmax(dim=1).cumsum(dim=1)
        return (upper <= drawn).sum(dim=1).clamp(max=logits.shape[1] - 1)  # the last sum may round to less than 1

    def update(
        self,
        losses: dict[str, Tensor],
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        clip_norm: float | None,
    ) -> None:
        """One optimiser step; in the Fisher phase no step, but one more squared gradient in the mean."""
        if not self.measures:
            super().update(losses, optimizer, scaler, clip_norm)
            return
        optimizer.zero_grad(set_to_none=True)
        total(losses.values()).backward()  # type: ignore[no-untyped-call]
        count = int(self.get_buffer("num_measured").add_(1))
        for name, parameter in self.network.named_parameters():
            gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            self.measured[name].lerp_(gradient.square(), 1 / count)

    @torch.no_grad()
    def end_stage(self, stage: Stage) -> None:
        """Merge what was measured into F, and remember the weights."""
        super().end_stage(stage)
        old_share = stage.num_old / stage.num_seen
        for name, parameter in self.network.named_parameters():
            measured, importance = self.measured[name].clone(), self.importance[name]
            if self.clamp is not None:
                measured.clamp_(max=self.clamp)
            known = slice(stage.num_old) if name.startswith("head.") else ...
            measured[known] = old_share * importance[known] + (1 - old_share) * measured[known]
            importance.copy_(measured)
            self.anchor[name].copy_(parameter)
