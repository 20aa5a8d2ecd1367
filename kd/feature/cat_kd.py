"""Class attention transfer (Guo et al., CVPR 2023, arXiv:2304.12777)."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from einops import reduce
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kd.base import Batch, Distiller, Outputs, distillers
from kd.cam import linear_weight
from kd.distributed import gathered
from kd.precision import full_precision

Strategy = Literal["top", "bottom"]
Variant = Literal["exact", "released"]

_SMALLEST_NORM = 1e-6  # a map of zeros has no direction; less would make its gradient enormous
_RELEASED_CLASSES = 100  # written into the release


@distillers.register("cat_kd")
class CATKD(Distiller):
    """The student finds the classes at the same places as the teacher: their class activation maps agree.

    With the maps M of `kd.cam.class_maps`, over the classes of the teacher:
    $\\mathrm{mean}\\,(\\phi(M_s) - \\phi(M_t))^2$, where $\\phi$ averages a map over r x r fields and, if `normalize`,
    divides it by its L2 norm. The bias of a head is no part of its maps; the release also trains the student without
    one: give student and teacher a head `without_bias` for that.

    Args:
        resolution: r.
        normalize: Compare directions of maps. The released settings do so for half of the pairs, with larger weights.
        binarize: The teacher's maps become 1 where they are above their mean absolute value, 0 elsewhere.
        keep: Compare the maps of that many classes of each sample only; all by default.
        strategy: Which: those that the teacher scores highest (`top`) or lowest (`bottom`).
        variant: `exact` keeps `keep` classes. `released` keeps one less at the top (those strictly above the
            `keep`-th score), one more at the bottom (those not above the (100 - `keep`)-th, whatever the number of
            classes), and all if ties leave a number of maps that is no multiple of the batch size.

    Raises:
        ValueError: If a number is not positive, a choice is unknown, or a choice has no effect; on use, if class maps
            are missing, or there are too few classes.
    """

    needs = {"class_maps", "logits"}
    recordable = True

    def __init__(
        self,
        *,
        resolution: int = 2,
        normalize: bool = False,
        binarize: bool = False,
        keep: int | None = None,
        strategy: Strategy = "top",
        variant: Variant = "exact",
    ) -> None:
        super().__init__()
        if resolution < 1:
            raise ValueError(f"cat_kd.resolution must be at least 1, found {resolution}")
        for name, value, known in (("strategy", strategy, get_args(Strategy)), ("variant", variant, get_args(Variant))):
            if value not in known:
                raise ValueError(f"cat_kd.{name} must be one of {', '.join(known)}, found {value!r}")
            if keep is None and value != known[0]:
                raise ValueError(
                    f"cat_kd.{name}={value} has no effect without cat_kd.keep: set it, or leave {name} out"
                )
        if keep is not None and keep < 1:
            raise ValueError(f"cat_kd.keep must be at least 1, found {keep}")
        if variant == "released" and keep == 1 and strategy == "top":
            raise ValueError("cat_kd.keep=1 with variant=released keeps no map (one less than asked): use 2 or more")
        if variant == "released" and strategy == "bottom" and keep is not None and keep >= _RELEASED_CLASSES:
            raise ValueError(
                f"cat_kd.keep must be below {_RELEASED_CLASSES} with variant=released, strategy=bottom, found {keep}"
            )
        self.resolution = resolution
        self.normalize = normalize
        self.binarize = binarize
        self.keep = keep
        self.strategy = strategy
        self.variant = variant

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Float[Tensor, ""]:
        """The mean squared difference of the pooled maps."""
        student, teacher = only_class_maps(student, "student"), only_class_maps(teacher, "teacher")
        if self.variant == "released":  # what it keeps depends on the whole batch
            student, teacher, _ = gathered(student, teacher, batch)
        maps = full_precision(student.taps["class_maps"])
        targets = full_precision(teacher.taps["class_maps"].detach())
        num_classes = targets.shape[1]
        if maps.shape[1] < num_classes or teacher.logits.shape[1] != num_classes:
            raise ValueError(
                f"cat_kd compares the classes of the teacher: found maps of {num_classes} classes and "
                f"{teacher.logits.shape[1]} logits of the teacher, maps of {maps.shape[1]} of the student"
            )
        if self.binarize:
            targets = binarized(targets)
        difference = (self.pooled(maps[:, :num_classes]) - self.pooled(targets)).square()
        if self.keep is None:
            return difference.mean()
        kept = self.kept(teacher.logits.detach())
        return reduce(difference, "b k h w -> b k", "mean").where(kept, 0).sum() / kept.sum()

    def pooled(self, maps: Float[Tensor, "batch classes _ _"]) -> Float[Tensor, "batch classes rows columns"]:
        """$\\phi$: averages over r x r fields, normalised if asked for."""
        fields = F.adaptive_avg_pool2d(maps, self.resolution)
        if not self.normalize:
            return fields
        norms = torch.linalg.vector_norm(fields, dim=(2, 3), keepdim=True)
        return torch.div(fields, norms.clamp_min(_SMALLEST_NORM))

    def kept(self, logits: Float[Tensor, "batch classes"]) -> Bool[Tensor, "batch classes"]:
        """Which classes of a sample are compared, by the teacher's logits."""
        assert self.keep is not None
        released_bottom = self.variant == "released" and self.strategy == "bottom"
        fewest = _RELEASED_CLASSES - self.keep if released_bottom else self.keep
        if logits.shape[1] < fewest:
            raise ValueError(
                f"cat_kd.keep={self.keep} (strategy={self.strategy}, variant={self.variant}) needs at least {fewest} "
                f"classes of the teacher, found {logits.shape[1]}"
            )
        if self.variant == "exact":
            best = logits.topk(self.keep, largest=self.strategy == "top").indices
            return torch.zeros_like(logits, dtype=torch.bool).scatter(1, best, True)
        bar = logits.sort(dim=1, descending=True).values[:, fewest - 1, None]
        kept = logits <= bar if released_bottom else logits > bar
        uneven = (kept.sum() % len(kept) != 0) | ~kept.any()
        return kept | uneven


def only_class_maps(outputs: Outputs, whose: str) -> Outputs:
    """Without what this loss does not read, so that it is not sent between processes.

    Raises:
        ValueError: If there are no class maps.
    """
    if "class_maps" not in outputs.taps:
        raise ValueError(
            f"cat_kd compares class activation maps, but the {whose} gives none (taps: "
            f"{', '.join(outputs.taps) or 'none'}): kd.taps.Tapped(network, outputs={{'last': PATH}}, head=PATH) makes "
            "them, as does kd.cam.class_maps(features, head.weight)"
        )
    return Outputs(outputs.logits, taps={"class_maps": outputs.taps["class_maps"]})


def binarized(maps: Float[Tensor, "batch classes height width"]) -> Float[Tensor, "batch classes height width"]:
    """1 where a map is above its mean absolute value, 0 elsewhere."""
    return (maps > maps.abs().mean((2, 3), keepdim=True)).to(maps.dtype)


def without_bias(head: nn.Module) -> nn.Linear:
    """A linear head on the same weight without a bias, as the release has it in student and teacher.

    Args:
        head: The head to replace; the weight is shared, not copied.

    Raises:
        ValueError: If it is not linear.
    """
    weight = linear_weight(head)
    bare = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    bare.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
    return bare
