"""Distillation-oriented trainer (Zhao, Cui, Song, Liang, ICCV 2023, arXiv:2307.08436)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kd.distributed import all_reduce_sum, world_size

Gradients = Mapping[Tensor, Tensor | None] | Sequence[Tensor | None]
BUFFERS = ("momentum_buffer", "momentum_kd_buffer")  # of the task, of the distillation


class DOT(torch.optim.Optimizer):
    """Two momenta for one set of parameters: the distillation's lasts longer than the task's.

    $v_{task} \\leftarrow (\\mu - \\delta) v_{task} + g_{task} + \\lambda \\theta$,
    $v_{kd} \\leftarrow (\\mu + \\delta) v_{kd} + g_{kd}$,
    $\\theta \\leftarrow \\theta - lr (v_{task} + v_{kd})$, each v starting as its first gradient. A parameter with one
    gradient only has momentum $\\mu$ for it; one with a distillation gradient only has its weight decay there, from the
    second step on, as in the authors' release.

    ```python
    dot.zero_grad()
    dot.backward(scaler.scale(task_loss), scaler.scale(kd_loss))
    scaler.step(dot, max_norm=5.0)
    scaler.update()
    ```

    Without a `GradScaler`, `dot.backward(task_loss, kd_loss)` and `dot.step()`. Further calls of `backward` add to the
    gradients. In `p.grad` stands the sum of both, for a scaler and for logs; `step` does not read it.

    With several processes `backward` averages both gradients over them. The forward pass must then not be followed by
    a reduction of its own: no DistributedDataParallel, or its `no_sync`.

    Args:
        params: Parameters or parameter groups.
        lr: Learning rate.
        momentum: $\\mu$.
        delta: $\\delta$, from 0 to $\\mu$ and with $\\mu + \\delta$ below 1; 0 is SGD on the summed loss.
        weight_decay: $\\lambda$.

    Raises:
        ValueError: If an argument is out of its range.
    """

    # `GradScaler.step` looks for what is not finite, and leaves unscaling and skipping to `step`
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        delta: float = 0.075,
        weight_decay: float = 0.0,
    ) -> None:
        self._gradients: tuple[dict[Tensor, Tensor], dict[Tensor, Tensor]] = ({}, {})
        super().__init__(params, {"lr": lr, "momentum": momentum, "delta": delta, "weight_decay": weight_decay})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._gradients = ({}, {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with what they want to have different from the defaults."""
        settings = self.defaults | param_group
        for name in ("lr", "momentum", "delta", "weight_decay"):
            if not settings[name] >= 0:
                raise ValueError(f"dot.{name} must not be negative, found {settings[name]}")
        momentum, delta = settings["momentum"], settings["delta"]
        if delta > momentum or momentum + delta >= 1:
            raise ValueError(
                "dot.momentum - dot.delta must not be negative and dot.momentum + dot.delta must be below 1, "
                f"found momentum {momentum} and delta {delta}"
            )
        super().add_param_group(param_group)

    def parameters(self) -> list[Tensor]:
        """All parameters, in the order of the groups."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def backward(
        self, task_loss: Float[Tensor, ""], kd_loss: Float[Tensor, ""] | None = None, *, last: bool = True
    ) -> None:
        """Add the gradients of both losses to what has been gathered since `zero_grad`.

        Args:
            task_loss: The loss on the labels.
            kd_loss: The loss against the teacher, its weight included; None, or one that no parameter takes part in,
                if there is none.
            last: False for the micro-batches that others follow before `step`: saves sending their gradients around.
        """
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        losses = [task_loss] if kd_loss is None or not kd_loss.requires_grad else [task_loss, kd_loss]
        for number, loss in enumerate(losses):
            more = number + 1 < len(losses)
            found = torch.autograd.grad(loss, parameters, retain_graph=more, allow_unused=True)
            gathered = self._gradients[number]
            for parameter, gradient in zip(parameters, found, strict=True):
                if gradient is not None and parameter in gathered:
                    gathered[parameter] += gradient
                elif gradient is not None:
                    gathered[parameter] = gradient.clone()  # autograd may hand out one tensor twice
        if last and world_size() > 1:
            for gathered in self._gradients:
                self._average(gathered)
        for parameter in parameters:
            parameter.grad = self._sum(parameter)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        task_gradients: Gradients | None = None,
        kd_gradients: Gradients | None = None,
        *,
        max_norm: float | None = None,
    ) -> None:
        """One step.

        Args:
            task_gradients: By parameter, or in the order of `parameters()`, None where there is none; without this and
                `kd_gradients`, those that `backward` gathered are taken.
            kd_gradients: The same for the distillation.
            max_norm: Both gradients are scaled by one factor, so that the norm of their sum is at most this.

        Raises:
            ValueError: If gradients are missing, do not fit the parameters or have been unscaled by `scaler.unscale_`,
                which knows one gradient only.
        """
        if task_gradients is not None or kd_gradients is not None:
            task, kd = self._by_parameter(task_gradients), self._by_parameter(kd_gradients)
        else:
            task, kd = self._gradients
            if not task and not kd:
                raise ValueError("dot.step found no gradients: call dot.backward first, or give them")
        factor = self._unscaling()
        if factor is None:
            return
        if max_norm is not None:
            factor = factor * self._clipping(task, kd, factor, max_norm)
        for group in self.param_groups:
            for parameter in group["params"]:
                gradients = [found.get(parameter) for found in (task, kd)]
                if isinstance(factor, Tensor):
                    gradients = [None if gradient is None else gradient * factor for gradient in gradients]
                self._move(parameter, gradients, group)

    def _move(self, parameter: Tensor, gradients: list[Tensor | None], group: dict[str, Any]) -> None:
        state, (task, kd) = self.state[parameter], gradients
        both = task is not None and kd is not None
        deltas = (-group["delta"], group["delta"]) if both else (0.0, 0.0)
        decayed = 0 if task is not None else 1
        moves = []
        for number, (name, gradient) in enumerate(zip(BUFFERS, gradients, strict=True)):
            if gradient is None:
                continue
            is_first = name not in state
            if number == decayed and group["weight_decay"] and not (number == 1 and is_first):
                gradient = gradient.add(parameter, alpha=group["weight_decay"])
            if is_first:
                state[name] = gradient.clone()
            else:
                state[name].mul_(group["momentum"] + deltas[number]).add_(gradient)
            moves.append(state[name])
        for move in moves:
            parameter.add_(move, alpha=-group["lr"])

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of both losses, and `p.grad`."""
        for gathered in self._gradients:
            gathered.clear()
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def take_over(self, other: "DOT", pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Go on with the momenta of another DOT, as after a classifier has grown by rows.

        Args:
            other: The optimiser before.
            pairs: A parameter of this one and the parameter of the other that its first rows come from; what is new
                starts at 0.
        """
        for parameter, old in pairs:
            for name in BUFFERS:
                if name in other.state[old]:
                    self.state[parameter][name] = torch.zeros_like(parameter)
                    self.state[parameter][name][tuple(map(slice, old.shape))] = other.state[old][name]

    # Gradients

    def _sum(self, parameter: Tensor) -> Tensor | None:
        task, kd = (gathered.get(parameter) for gathered in self._gradients)
        if task is None or kd is None:
            only = kd if task is None else task
            return None if only is None else only.clone()
        return task + kd

    def _by_parameter(self, gradients: Gradients | None) -> dict[Tensor, Tensor]:
        if gradients is None:
            return {}
        parameters = self.parameters()
        if not isinstance(gradients, Mapping):
            if len(gradients) != len(parameters):
                raise ValueError(f"dot has {len(parameters)} parameters, found {len(gradients)} gradients")
            gradients = dict(zip(parameters, gradients, strict=True))
        known = set(parameters)
        for parameter, gradient in gradients.items():
            if parameter not in known:
                raise ValueError(f"dot has no such parameter of shape {tuple(parameter.shape)}, but found a gradient")
            if gradient is not None and gradient.shape != parameter.shape:
                raise ValueError(f"found a gradient {tuple(gradient.shape)} of a parameter {tuple(parameter.shape)}")
        return {parameter: gradient for parameter, gradient in gradients.items() if gradient is not None}

    def _unscaling(self) -> Tensor | float | None:
        """What a `GradScaler` wants the gradients to be multiplied by; None if they are not finite."""
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is None:
            return 1.0
        scale: Tensor | None = getattr(self, "grad_scale", None)
        if scale is None:
            raise ValueError(
                "dot unscales both of its gradients: found them unscaled by scaler.unscale_(dot), which knows one; "
                "leave it out, and clip with scaler.step(dot, max_norm=...)"
            )
        return None if found_inf.item() else scale.double().reciprocal().float()

    def _clipping(
        self, task: dict[Tensor, Tensor], kd: dict[Tensor, Tensor], factor: Tensor | float, max_norm: float
    ) -> Tensor:
        sums = [task[p] + kd[p] if p in task and p in kd else task.get(p, kd.get(p)) for p in {**task, **kd}]
        norm = torch.nn.utils.get_total_norm([total for total in sums if total is not None]) * factor
        return (max_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_

    def _average(self, gathered: dict[Tensor, Tensor]) -> None:
        """The mean over the processes; where only some have a gradient, that of the others is 0."""
        parameters = self.parameters()
        device = parameters[0].device
        counts = all_reduce_sum(torch.tensor([parameter in gathered for parameter in parameters], device=device).long())
        present = [parameter for parameter, count in zip(parameters, counts.tolist(), strict=True) if count]
        for kind in dict.fromkeys((parameter.dtype, parameter.device) for parameter in present):
            some = [parameter for parameter in present if (parameter.dtype, parameter.device) == kind]
            flat = torch.cat([gathered.get(p, torch.zeros_like(p)).flatten() for p in some])
            means = torch.split(all_reduce_sum(flat) / world_size(), [p.numel() for p in some])
            gathered.update({p: mean.view_as(p) for p, mean in zip(some, means, strict=True)})
