"""DyTox: Transformers for Continual Learning with Dynamic Token Expansion (Douillard et al., CVPR 2022, 2111.11326)."""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from cil.learners.base import Learner, learners
from cil.learners.dkt_losses import Reduction
from cil.learners.dytox_losses import dytox_losses
from cil.learners.finetuning import Epochs, balanced_finetuning, check_views, per_task
from cil.models.dytox import DyToxNetwork
from cil.models.network import Network
from cil.stages import Phase, Stage
from cil.transfer import said
from kd import Batch, WeightedSum


@learners.register("dytox")
class DyTox(Learner):
    """A token and a classifier for every task, trained on new data and memory, then fine-tuned on the balanced memory.

    Main phase of task t > 0, with $\\lambda = C_{old} / C$:
    $L = (1-\\lambda)\\,BCE + \\lambda\\,KD + d\\,BCE_{div}$; old task tokens and classifiers are frozen. The last
    term is that of a divergence head on the newest answer, which tells old (one class) from each new class.
    Fine-tuning: $L = BCE$ on the memory, encoder frozen. Task 0: $L = BCE$.

    DyTox+ (mixup) and DyTox++ (SAM) are not built.

    Args:
        network: A `DyToxNetwork`.
        distillation: The transfer from the network of the last task; None leaves the term out, with $\\lambda = 0$.
            `configs/kd/dytox.yaml` is the published term: temperature 1, the mean over batch and old classes.
        divergence: $d$; 0 leaves the term out.
        base_reduction: Of both cross-entropies: `mean` over batch and classes as published, which balances a
            distillation divided by the classes likewise; `batchmean` sums them over the classes, for a distillation
            that is a mean over the batch alone (most of `configs/kd`), which would drown them otherwise.
        finetune_epochs: Epochs of balanced fine-tuning, one number or one per task from the second on, of which the
            last goes on; 0 leaves it out.
        finetune_lr: Constant rate of fine-tuning, scaled by batch size like the main one.
        finetune_batch_size: Null takes the batch size of the recipe.
        finetune_shuffle: The release, like that of DKT, reads the memory in class order (R4a of DKT).
        finetune_drop_last: It drops the tail, which is the newest classes (R4b).
        finetune_frozen_in_eval: Hold the frozen encoder in evaluation mode; in the release its drop path stays on (R6).
        finetune_views: A variant of this project, for speed: fine-tuning shows so many fixed augmented views of every
            exemplar, in turn, and the frozen encoder reads each once; null draws new views, as published.
        finetune_task_tokens: Train all task tokens in fine-tuning too, as all classifiers are; DKT freezes them.

    Raises:
        ValueError: If the network is no `DyToxNetwork`, or a list of epochs is empty.
    """

    keeps_teacher = True
    recordable = True

    def __init__(
        self,
        network: Network,
        distillation: WeightedSum | None,
        *,
        divergence: Annotated[float, Field(ge=0)] = 0.1,
        base_reduction: Reduction = "mean",
        finetune_epochs: Epochs = 20,
        finetune_lr: Annotated[float, Field(gt=0)] = 5e-5,
        finetune_batch_size: Annotated[int, Field(gt=1)] | None = None,
        finetune_shuffle: bool = True,
        finetune_drop_last: bool = False,
        finetune_frozen_in_eval: bool = True,
        finetune_views: Annotated[int, Field(gt=0)] | None = None,
        finetune_task_tokens: bool = True,
    ) -> None:
        super().__init__(network, distillation)
        if not isinstance(network, DyToxNetwork):
            raise ValueError(
                f"learner=dytox needs the network with a token and a classifier for every task, found "
                f"{type(network).__name__}: use model=dytox, or another learner (replay, finetune, joint)"
            )
        self.network: DyToxNetwork = network
        self.divergence = divergence
        self.base_reduction: Reduction = base_reduction
        self.finetune_epochs = per_task(finetune_epochs)
        self.finetune_lr = finetune_lr
        self.finetune_batch_size = finetune_batch_size
        self.finetune_shuffle = finetune_shuffle
        self.finetune_drop_last = finetune_drop_last
        self.finetune_frozen_in_eval = finetune_frozen_in_eval
        self.finetune_views = finetune_views
        check_views(finetune_views, frozen_in_eval=finetune_frozen_in_eval, epochs=self.finetune_epochs)
        self.finetune_task_tokens = finetune_task_tokens

    def phases(self, stage: Stage) -> list[Phase]:
        """The main phase, and from the second task on balanced fine-tuning on the memory."""
        recipe = stage.recipe.for_task(stage.index)
        if stage.index == 0:
            return [Phase("training", "new", recipe)]
        network = self.network
        # a head that has no loss would take no gradient all the same, but count as trained
        idle = [] if network.divergence is None else [network.divergence]
        main = Phase(
            "training",
            "new+memory",
            recipe,
            frozen=[*network.task_tokens[:-1], *network.heads[:-1], *([] if self.divergence else idle)],
        )
        tokens = [] if self.finetune_task_tokens else list(network.task_tokens)
        finetuning = balanced_finetuning(
            stage,
            recipe,
            epochs=self.finetune_epochs,
            lr=self.finetune_lr,
            batch_size=self.finetune_batch_size,
            shuffle=self.finetune_shuffle,
            drop_last=self.finetune_drop_last,
            frozen=[network.patch_embedding, network.position, network.encoder, *tokens, *idle],
            frozen_in_eval=self.finetune_frozen_in_eval,
            views=self.finetune_views,
        )
        return [main, *finetuning]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The weighted terms `bce`, the distillation terms by name and `divergence`; fine-tuning has `bce` alone."""
        encoded = self.phase is not None and self.phase.views is not None
        student = self.network(batch.images, encoded=True) if encoded else said(self.network, batch)
        teacher, divergence = None, None
        if self.phase is None or self.phase.source != "memory":
            teacher = said(self.teacher, batch) if self.teacher is not None and self.learns_from_old else None
            if self.divergence and self.network.divergence is not None:
                # of the embeddings of all processes, which are put together by now
                divergence = self.network.divergence(student.embedding)
        return dytox_losses(
            student,
            teacher,
            batch,
            distillation=self.distillation,
            divergence=divergence,
            divergence_weight=self.divergence,
            base_reduction=self.base_reduction,
        )
