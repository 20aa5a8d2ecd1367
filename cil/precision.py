"""Number formats: which one a device computes well in, and the autocast that goes with it."""

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch

PrecisionName = Literal["auto", "fp32", "bf16", "fp16", "fp64"]
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

_NEVER = 2**31 - 1  # steps until a scale grows


def has_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 matrices in hardware (AVX-512 BF16 or AMX on a CPU)."""
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return False


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU; of several processes each takes its own CUDA device.

    Raises:
        ValueError: If the device does not exist here.
    """
    own = f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"
    if name == "auto":
        return torch.device(own if torch.cuda.is_available() else "cpu")
    if name == "cuda":
        name = own
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={name}: not usable here ({reason}); use device=auto or device=cpu") from None
    return device


def repeat_exactly(device: torch.device) -> None:
    """Let a device give the same numbers for the same work, so that a resumed run is the run; a processor does anyway.

    Some operations of CUDA add in any order unless they are told not to. Those that know no other way warn.
    """
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product is computed
        torch.backends.cudnn.deterministic = True
        torch.use_deterministic_algorithms(True, warn_only=True)
        # or new memory is filled with NaN, to no end here; an attribute that torch makes at run time, unseen by mypy
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Precision:
    """The format a run computes in.

    Attributes:
        name: `fp32`, `bf16`, `fp16` or `fp64`; never `auto`.
        device: Where it computes.
    """

    name: str
    device: torch.device

    @classmethod
    def resolve(cls, name: PrecisionName, device: torch.device) -> "Precision":
        """`auto` is bf16 where the hardware has it, else fp32."""
        if name == "auto":
            name = "bf16" if has_bf16(device) else "fp32"
        return cls(name, device)

    @property
    def dtype(self) -> torch.dtype:
        """The format of weights and inputs."""
        return torch.float64 if self.name == "fp64" else torch.float32

    def autocast(self) -> AbstractContextManager[object]:
        """The context of every forward pass."""
        if self.name in _AUTOCAST:
            return torch.autocast(self.device.type, _AUTOCAST[self.name])
        return nullcontext()

    def scaler(self, *, skips: bool = False) -> torch.amp.GradScaler:
        """Loss scaling, which leaves out a step whose gradients are not finite; switched on for fp16.

        Args:
            skips: Leave such steps out in other formats too. The scale is 1 then, and half of that after each:
                powers of two, which change no digit.
        """
        if self.name == "fp16" or not skips:
            return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")
        return torch.amp.GradScaler(self.device.type, init_scale=1.0, growth_interval=_NEVER)
