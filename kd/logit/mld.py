"""Multi-level logit distillation (Jin, Wang and Lin, CVPR 2023, pages 24276-24285)."""

from typing import Literal, get_args

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from kd.base import Batch, Distiller, Outputs, check_same_classes, distillers, total
from kd.distributed import gathered
from kd.precision import full_precision, no_autocast

Variant = Literal["paper", "released"]
Views = Literal["weak", "weak+strong"]

Logits = Float[Tensor, "batch classes"]

_NUM_TEMPERATURES = 5  # of the release, ...
_NUM_STRONG = 3  # ... which reads the strong view at the first three of them only


@distillers.register("mld")
class MLD(Distiller):
    """The student matches the teacher's probabilities, and how they relate samples to samples and classes to classes.

    With P = softmax(z / T) [B, K], of the student (s) and of the teacher (t), summed over temperatures and views:
    $\\sum_T T^2 KL + \\|P_t P_t^\\top - P_s P_s^\\top\\|_F^2 / B + \\|P_t^\\top P_t - P_s^\\top P_s\\|_F^2 / K$
    (instance, batch and class level). Only the first carries $T^2$. Over the batch of all processes.

    Variant `released` is the authors' code: the batch and class levels of the strong view are left out, so are the
    strong instance terms at the last two temperatures, in whose place the weak ones count again; and the weak terms
    are multiplied by the share of `uncertain_samples` (instance and batch) or of `rare_classes` (class), which the
    code means to be masks and applies after the sums: about one half.

    Args:
        temperatures: Every T that is summed over, each above 0. The release has its base temperature first (4 for
            CIFAR-100, 1 for ImageNet), then 3, 5, 2, 6; variant `released` needs five.
        variant: `paper`, or `released` as above.
        views: `weak+strong` compares the two networks on a second, strongly augmented view of every image too, which
            stands in `Outputs.views["strong"]`; `weak` on the ordinary one alone.

    Raises:
        ValueError: If a parameter is out of range; on use, if the strong view is missing, or if student and teacher do
            not score the same classes.
    """

    recordable = True

    def __init__(
        self,
        *,
        temperatures: tuple[float, ...] = (4.0, 3.0, 5.0, 2.0, 6.0),
        variant: Variant = "paper",
        views: Views = "weak+strong",
    ) -> None:
        super().__init__()
        if not temperatures or not all(temperature > 0 for temperature in temperatures):
            raise ValueError(f"mld.temperatures must be numbers above 0, at least one, found {list(temperatures)}")
        if variant not in get_args(Variant):
            raise ValueError(f"mld.variant must be one of {', '.join(get_args(Variant))}, found {variant!r}")
        if views not in get_args(Views):
            raise ValueError(f"mld.views must be one of {', '.join(get_args(Views))}, found {views!r}")
        if variant == "released" and len(temperatures) != _NUM_TEMPERATURES:
            raise ValueError(
                f"mld.temperatures must be {_NUM_TEMPERATURES} numbers for variant=released, which treats the last "
                f"{_NUM_TEMPERATURES - _NUM_STRONG} its own way; found {list(temperatures)}"
            )
        self.temperatures = tuple(temperatures)
        self.variant = variant
        self.views = views
        self.needs = {"logits"} if views == "weak" else {"logits", "strong"}

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Float[Tensor, ""]:
        """The sum of the three levels."""
        read = self._only_logits(student, "student"), self._only_logits(teacher, "teacher")
        student, teacher, _ = gathered(*read, batch)
        return total(self.terms(student, teacher).values())

    def terms(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        """The levels apart: `kd` (instance), `cc` (class) and `bc` (batch), over the batch as it is given."""
        check_same_classes("mld", student, teacher)
        s, t = student.logits, teacher.logits
        levels = {"kd": instance_level, "cc": class_level, "bc": batch_level}
        losses = {name: total(level(s, t, T) for T in self.temperatures) for name, level in levels.items()}
        if self.variant == "released":
            sample_share = uncertain_samples(t).to(losses["kd"].dtype).mean()
            class_share = rare_classes(t).to(losses["kd"].dtype).mean()
            losses["kd"] = sample_share * losses["kd"]
            losses["cc"] = class_share * losses["cc"]
            losses["bc"] = sample_share * losses["bc"]
        if self.views == "weak":
            return losses
        strong_s, strong_t = self._strong(student, "student"), self._strong(teacher, "teacher")
        check_same_classes("mld", strong_s, strong_t)
        if self.variant == "released":
            for number, temperature in enumerate(self.temperatures):
                pair = (strong_s.logits, strong_t.logits) if number < _NUM_STRONG else (s, t)
                losses["kd"] = losses["kd"] + instance_level(*pair, temperature)
            return losses
        for name, level in levels.items():
            strong = total(level(strong_s.logits, strong_t.logits, T) for T in self.temperatures)
            losses[name] = losses[name] + strong
        return losses

    def _only_logits(self, outputs: Outputs, who: str) -> Outputs:
        """Without what this loss does not read, so that it is not sent between processes."""
        if self.views == "weak":
            return Outputs(outputs.logits)
        return Outputs(outputs.logits, views={"strong": Outputs(self._strong(outputs, who).logits)})

    def _strong(self, outputs: Outputs, who: str) -> Outputs:
        if "strong" not in outputs.views:
            raise ValueError(
                f'mld.views=weak+strong compares a second view of every image: found no view "strong" of the {who}. '
                'Run it on a strongly augmented copy of the batch and put what it says in Outputs.views["strong"], or '
                "set views=weak"
            )
        return outputs.views["strong"]


def instance_level(student: Logits, teacher: Logits, temperature: float) -> Float[Tensor, ""]:
    """$T^2 KL(P_t \\| P_s)$, mean over the batch: plain KD."""
    log_q = F.log_softmax(full_precision(student) / temperature, dim=1)
    log_p = F.log_softmax(full_precision(teacher.detach()) / temperature, dim=1)
    return temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def class_level(student: Logits, teacher: Logits, temperature: float) -> Float[Tensor, ""]:
    """$\\|P_t^\\top P_t - P_s^\\top P_s\\|_F^2 / K$: which classes are seen together."""
    q, p = _softened(student, temperature), _softened(teacher.detach(), temperature)
    with no_autocast(q.device):
        return (p.T @ p - q.T @ q).square().sum() / q.shape[1]


def batch_level(student: Logits, teacher: Logits, temperature: float) -> Float[Tensor, ""]:
    """$\\|P_t P_t^\\top - P_s P_s^\\top\\|_F^2 / B$: which samples look alike."""
    q, p = _softened(student, temperature), _softened(teacher.detach(), temperature)
    with no_autocast(q.device):
        return (p @ p.T - q @ q.T).square().sum() / q.shape[0]


def _softened(logits: Logits, temperature: float) -> Logits:
    return F.softmax(full_precision(logits) / temperature, dim=1)


def uncertain_samples(teacher: Logits) -> Bool[Tensor, " batch"]:
    """Samples of which the teacher is at most as sure (T = 1) as of the median one of the batch."""
    confidence = _softened(teacher.detach(), 1.0).amax(dim=1)
    return confidence <= confidence.median()  # of the two in the middle the lower: the same samples as by their mean


def rare_classes(teacher: Logits) -> Bool[Tensor, " classes"]:
    """Classes to which the teacher gives at most as much probability (T = 1, over the batch) as to the median one."""
    mass = _softened(teacher.detach(), 1.0).sum(dim=0)
    return mass <= mass.median()
