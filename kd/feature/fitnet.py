"""FitNets: hints for thin deep nets (Romero et al., ICLR 2015, arXiv:1412.6550)."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kd.base import Batch, Distiller, Outputs, distillers
from kd.connect import Regressor, Start, held_still
from kd.precision import full_precision
from kd.taps import read_tap

Variant = Literal["code", "paper"]


@distillers.register("fitnet")
class FitNet(Distiller):
    """A regressor on a middle layer of the student (the guided layer) matches one of the teacher (the hint layer).

    With the maps f and the regressor r (`kd.connect.Regressor`): "code", trained jointly with the task in the public
    releases with a weight of 100, is the mean over batch, channels and places of $(r(f_s) - f_t)^2$. "paper" is
    $\\frac{1}{2} \\| r(f_s) - f_t \\|^2$, summed over channels and places, mean over the batch. The paper trains in two
    stages: first the student up to the guided layer and the regressor on this loss alone (`guided_parameters`), then
    the whole student with plain distillation (`kd`).

    Args:
        hint: Tap of the guided layer of the student, and of the hint layer of the teacher.
        teacher_hint: Tap of the hint layer, where it has another name; None is `hint`.
        variant: "code" or "paper".
        init: Start of the regressor: "identity" for networks of one architecture.

    Raises:
        ValueError: If `variant` or `init` is neither; on use, if a tap is missing, `connect` was not called, or the
            maps are no longer those that were connected.
    """

    needs = {"taps"}
    recordable = True

    def __init__(
        self,
        *,
        hint: str = "stage1.post",
        teacher_hint: str | None = None,
        variant: Variant = "code",
        init: Start = "random",
    ) -> None:
        super().__init__()
        for name, found, known in (("variant", variant, get_args(Variant)), ("init", init, get_args(Start))):
            if found not in known:
                raise ValueError(f"fitnet.{name} must be one of {', '.join(known)}, found {found!r}")
        self.hint = hint
        self.teacher_hint = hint if teacher_hint is None else teacher_hint
        self.variant = variant
        self.init = init
        self.regressor: Regressor | None = None

    def connect(self, student: Outputs, teacher: Outputs) -> None:
        """Build the regressor between the two maps."""
        guided, hint = self._maps(student, teacher)
        for owner, maps in (("student", guided), ("teacher", hint)):
            if maps.ndim != 4:
                raise ValueError(
                    f"fitnet.hint must be a tap of maps [batch, channels, height, width], found {tuple(maps.shape)} of "
                    f"the {owner}"
                )
        regressor = Regressor(_shape(guided), _shape(hint), init=self.init)
        self.regressor = regressor.to(guided.device, full_precision(guided).dtype)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch) -> Float[Tensor, ""]:
        """The distance of the regressed map from the hint."""
        guided, hint = self._maps(student, teacher)
        if self.regressor is None:
            raise ValueError(
                "fitnet has no regressor yet: call connect(student, teacher) with what both say of a probe"
            )
        regressed = full_precision(self.regressor(full_precision(guided)))
        if regressed.shape != hint.shape:
            raise ValueError(
                f"fitnet.regressor gives {tuple(regressed.shape)} but the hint is {tuple(hint.shape)}: connect the "
                "networks with images of the size that they are trained with"
            )
        if self.variant == "code":
            return F.mse_loss(regressed, full_precision(hint.detach()), reduction="mean")
        return F.mse_loss(regressed, full_precision(hint.detach()), reduction="sum") / (2 * len(hint))

    def _maps(self, student: Outputs, teacher: Outputs) -> tuple[Tensor, Tensor]:
        return read_tap(student, self.hint, "fitnet, student"), read_tap(teacher, self.teacher_hint, "fitnet, teacher")


def _shape(maps: Tensor) -> tuple[int, int, int]:
    _, channels, height, width = maps.shape
    return channels, height, width


def guided_parameters(network: nn.Module, hint: str, images: Float[Tensor, "batch ..."]) -> dict[str, nn.Parameter]:
    """The trainable parameters of a student that a tap depends on: those of stage one, by their names.

    Found by one backward pass from the tap, in evaluation mode; nothing in the network changes.

    Args:
        network: The student; returns `Outputs`.
        hint: Name of the tap.
        images: A few images.

    Raises:
        ValueError: If there is no such tap or it depends on no trainable parameter.
    """
    named = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    with held_still(network), torch.enable_grad():
        guided = read_tap(network(images), hint, "guided_parameters")
        if not guided.requires_grad:
            raise ValueError(f"the tap {hint!r} depends on no trainable parameter: is the network frozen?")
        gradients = torch.autograd.grad(guided.sum(), list(named.values()), allow_unused=True)
    return {
        name: parameter for (name, parameter), found in zip(named.items(), gradients, strict=True) if found is not None
    }
