"""DKT: Diverse Knowledge Transfer Transformer (Gao et al., CVPR 2023, pages 24236-24245)."""

import inspect
from typing import Annotated, Any

import torch
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from cil.learners.base import Learner, learners
from cil.learners.dkt_losses import BaseLoss, Reduction, dkt_losses
from cil.learners.finetuning import Epochs, balanced_finetuning, check_views, per_task
from cil.models.dkt import DKTNetwork
from cil.models.network import Network
from cil.stages import Phase, Stage
from cil.transfer import said
from kd import Batch, WeightedSum
from kd.feature.cluster_separation import ClusterSeparation


@learners.register("dkt")
class DKT(Learner):
    """A transformer with a token pool, trained on new data and memory, then fine-tuned on the balanced memory.

    Main phase of task t > 0, with $\\lambda = C_{old} / C$:
    $L = w\\,(1-\\lambda)\\,BCE + \\lambda\\,KD + CS$; old task tokens and the stability classifier are frozen.
    Fine-tuning: $L = BCE$ on the memory, encoder and task tokens frozen. Task 0: $L = BCE$.

    The defaults are the corrected method; `learner=dkt_official` sets every switch as the release has it
    (docs/method.md lists them).

    Args:
        network: A `DKTNetwork`.
        distillation: The transfer from the network of the last task; None leaves the term out.
        base_weight: $w$; the release counts the base loss twice (R1).
        base_reduction: `batchmean` sums BCE over the classes, so that it stands on the scale of a distillation term
            that is a mean over the batch; `mean` divides it by them, which only balances a KD divided likewise (R2).
        base_loss: `bce` is published. Two variants of this project: `cross_entropy`, the mean over the batch, and
            `balanced_cross_entropy`, which knows that the memory has few samples of old classes; both go with
            `base_reduction=batchmean`.
        separation: Coefficient of the cluster-separation loss; 0 leaves the term out.
        finetune_epochs: Epochs of balanced fine-tuning, one number or one per task from the second on, of which the
            last goes on (R9); 0 leaves it out.
        finetune_lr: Constant rate of fine-tuning, scaled by batch size like the main one.
        finetune_batch_size: Null takes the batch size of the recipe.
        finetune_shuffle: The release reads the memory in class order (R4a).
        finetune_drop_last: The release drops the tail, which is the newest classes (R4b).
        finetune_frozen_in_eval: Hold frozen layers in evaluation mode; in the release their BatchNorm statistics move
            on and their drop path stays on (R6).
        finetune_views: A variant of this project, for speed: fine-tuning shows so many fixed augmented views of every
            exemplar, in turn, and the frozen encoder reads each once; null draws new views, as published.
        finetune_general_token: Train the general token too, as the release does (R7).
        incremental_batch_size: Batch size from the second task on; null keeps the recipe's.
        late_batch_override: Scale the rate by `incremental_batch_size` but load batches of the recipe's size (R12).

    Raises:
        ValueError: If the network is no `DKTNetwork`, or a switch has nothing to act on.
    """

    keeps_teacher = True
    recordable = True

    def __init__(
        self,
        network: Network,
        distillation: WeightedSum | None,
        *,
        base_weight: Annotated[float, Field(gt=0)] = 1.0,
        base_reduction: Reduction = "batchmean",
        base_loss: BaseLoss = "bce",
        separation: Annotated[float, Field(ge=0)] = 0.003,
        finetune_epochs: Epochs = 10,
        finetune_lr: Annotated[float, Field(gt=0)] = 5e-5,
        finetune_batch_size: Annotated[int, Field(gt=1)] | None = None,
        finetune_shuffle: bool = True,
        finetune_drop_last: bool = False,
        finetune_frozen_in_eval: bool = True,
        finetune_views: Annotated[int, Field(gt=0)] | None = None,
        finetune_general_token: bool = False,
        incremental_batch_size: Annotated[int, Field(gt=1)] | None = None,
        late_batch_override: bool = False,
    ) -> None:
        super().__init__(network, distillation)
        if not isinstance(network, DKTNetwork):
            raise ValueError(
                f"learner=dkt needs the network with a token pool, found {type(network).__name__}: use model=dkt, or "
                "another learner (replay, finetune, joint)"
            )
        if base_loss != "bce" and base_reduction != "batchmean":
            raise ValueError(
                f"learner.base_reduction={base_reduction} is about bce, and learner.base_loss={base_loss} is a mean "
                "over the batch: leave base_reduction at batchmean"
            )
        if late_batch_override and incremental_batch_size is None:
            raise ValueError("learner.late_batch_override has no effect without learner.incremental_batch_size")
        if finetune_general_token and finetune_views is not None:
            raise ValueError(
                "learner.finetune_views keeps what the encoder says, of which the general token is a part: it does not "
                "go with learner.finetune_general_token=true"
            )
        if finetune_general_token and network.token_pool.general_token is None:
            raise ValueError("learner.finetune_general_token has no effect with model.general_token=false")
        self.network: DKTNetwork = network
        self.separation = ClusterSeparation(scale=separation) if separation else None
        self.base_weight = base_weight
        self.base_reduction: Reduction = base_reduction
        self.base_loss: BaseLoss = base_loss
        self._counts: Int[Tensor, " classes"] | None = None
        self.finetune_epochs = per_task(finetune_epochs)
        self.finetune_lr = finetune_lr
        self.finetune_batch_size = finetune_batch_size
        self.finetune_shuffle = finetune_shuffle
        self.finetune_drop_last = finetune_drop_last
        self.finetune_frozen_in_eval = finetune_frozen_in_eval
        self.finetune_views = finetune_views
        check_views(finetune_views, frozen_in_eval=finetune_frozen_in_eval, epochs=self.finetune_epochs)
        self.finetune_general_token = finetune_general_token
        self.incremental_batch_size = incremental_batch_size
        self.late_batch_override = late_batch_override

    @property
    def needs_teacher(self) -> bool:
        """Cluster separation pairs the embeddings of both networks."""
        return super().needs_teacher or self.separation is not None

    def phases(self, stage: Stage) -> list[Phase]:
        """The main phase, and from the second task on balanced fine-tuning on the memory."""
        recipe = stage.recipe.for_task(stage.index)
        if stage.index == 0:
            return [Phase("training", "new", recipe)]
        loader_batch_size = recipe.batch_size if self.late_batch_override else None
        if self.incremental_batch_size is not None:
            recipe = recipe.changed(batch_size=self.incremental_batch_size)
        network = self.network
        pool = network.token_pool
        main = Phase(
            "training",
            "new+memory",
            recipe,
            frozen=[*pool.task_tokens[:-1], *([network.stability] if network.duplex else [])],
            loader_batch_size=loader_batch_size,
        )
        general_token = [] if self.finetune_general_token or pool.general_token is None else [pool.general_token]
        finetuning = balanced_finetuning(
            stage,
            recipe,
            epochs=self.finetune_epochs,
            lr=self.finetune_lr,
            batch_size=self.finetune_batch_size,
            shuffle=self.finetune_shuffle,
            drop_last=self.finetune_drop_last,
            frozen=[network.encoder, *pool.task_tokens, *general_token],
            frozen_in_eval=self.finetune_frozen_in_eval,
            views=self.finetune_views,
        )
        return [main, *finetuning]

    def remember(self, ids: Int[Tensor, " samples"], labels: Int[Tensor, " samples"]) -> None:
        """Also how many samples of every class the main phase shows."""
        super().remember(ids, labels)
        counts = torch.bincount(labels, minlength=self.network.num_classes)
        self._counts = counts.to(next(self.network.parameters()).device)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The weighted base loss, distillation terms and `separation` by name; fine-tuning has the base loss alone."""
        finetuning = self.phase is not None and self.phase.source == "memory"
        # the teacher first: what it needs on the way is free again before the student keeps anything
        teacher = said(self.teacher, batch) if self.teacher is not None and not finetuning else None
        encoded = self.phase is not None and self.phase.views is not None
        student = self.network(batch.images, encoded=True) if encoded else said(self.network, batch)
        return dkt_losses(
            student,
            teacher,
            batch,
            distillation=self.distillation,
            separation=self.separation,
            base_weight=self.base_weight,
            base_reduction=self.base_reduction,
            base_loss=self.base_loss,
            counts=None if finetuning else self._counts,
        )


#: The switches as the release has them (docs/method.md).
_RELEASE: dict[str, Any] = {
    "base_weight": 2.0,
    "base_reduction": "mean",
    "finetune_epochs": [1, 1, 10],
    "finetune_shuffle": False,
    "finetune_drop_last": True,
    "finetune_frozen_in_eval": False,
    "finetune_general_token": True,
}


@learners.register("dkt_official")
class DKTOfficial(DKT):
    """DKT with every switch as the release has it: the same parameters, other defaults.

    `configs/learner/dkt_official.yaml` sets the switches outside the learner: network, memory, sampling, schedule.

    Args:
        network: A `DKTNetwork`.
        distillation: As for `DKT`.
        **switches: The keyword-only parameters of `DKT`.
    """

    __signature__ = inspect.Signature(
        [
            parameter.replace(default=_RELEASE.get(name, parameter.default))
            for name, parameter in inspect.signature(DKT).parameters.items()
        ]
    )

    def __init__(self, network: Network, distillation: WeightedSum | None, **switches: Any) -> None:
        super().__init__(network, distillation, **(_RELEASE | switches))
