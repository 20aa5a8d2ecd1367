"""Randomness as a function of what it is for, never of what was drawn before it.

Every random number of a run comes from `derive(seed, ...)`: a key made of the run's seed and the place (stage, phase,
epoch or step, sample id). Nothing depends on the number of workers or processes, on the order of loading, or on
whether the run was resumed, so there is no generator state to save.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

_MULTIPLIER_1 = -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9 as a signed word: splitmix64 (Steele et al., OOPSLA 2014)
_MULTIPLIER_2 = -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
_INCREMENT = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15, the golden ratio


def derive(seed: int, *place: int | str) -> int:
    """A 63-bit key from the run's seed and a place, equal on every machine."""
    digest = hashlib.blake2b(repr((seed, *place)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def seeded(seed: int, *place: int | str) -> Iterator[None]:
    """Seed the global generators of Python, NumPy and torch for a block, and put them back after it."""
    key = derive(seed, *place)
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - third parties use the global generator
    with torch.random.fork_rng():
        torch.manual_seed(key)
        random.seed(key)
        np.random.seed(key % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


def _mix(words: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """The finaliser of splitmix64 on signed 64-bit words (shifts made logical by masks)."""
    words = (words ^ ((words >> 30) & ((1 << 34) - 1))) * _MULTIPLIER_1
    words = (words ^ ((words >> 27) & ((1 << 37) - 1))) * _MULTIPLIER_2
    return words ^ ((words >> 31) & ((1 << 33) - 1))


@dataclass(frozen=True)
class SampleNoise:
    """Random numbers of each sample of a batch, each a function of (key, sample id, view, what it is for).

    Attributes:
        key: From `derive`: seed, stage, phase and epoch or step.
        ids: Sample ids.
        views: Which repetition of the sample within the epoch (0 unless augmentation is repeated).
    """

    key: int
    ids: Int[Tensor, " batch"]
    views: Int[Tensor, " batch"]

    def word(self, purpose: str) -> int | Int[Tensor, ""]:
        """What the numbers for a purpose begin with."""
        return derive(self.key, purpose)

    def uniform(self, purpose: str, count: int = 1) -> Float[Tensor, "batch count"]:
        """`count` numbers per sample, uniform in [0, 1), float32 with 24 random bits."""
        start = _mix(self.ids * 4096 + self.views + self.word(purpose))
        steps = torch.arange(1, count + 1, device=self.ids.device) * _INCREMENT
        words = _mix(start[:, None] + steps)
        return ((words >> 40) & ((1 << 24) - 1)).float() / (1 << 24)

    def normal(self, purpose: str, count: int = 1) -> Float[Tensor, "batch count"]:
        """`count` standard normal numbers per sample (Box-Muller)."""
        radius, angle = self.uniform(purpose, 2 * count).chunk(2, dim=1)
        return torch.sqrt(-2 * torch.log1p(-radius)) * torch.cos(2 * torch.pi * angle)

    def integers(self, purpose: str, high: int, count: int = 1) -> Int[Tensor, "batch count"]:
        """`count` whole numbers per sample, uniform in 0 .. high-1."""
        return (self.uniform(purpose, count) * high).long().clamp_(max=high - 1)


_current: ContextVar[SampleNoise | None] = ContextVar("sample_noise", default=None)


@contextmanager
def sample_noise(noise: SampleNoise) -> Iterator[None]:
    """Let the layers that are random per sample (`cil.models.noise`) draw from `noise` within a block."""
    token = _current.set(noise)
    try:
        yield
    finally:
        _current.reset(token)


def current_noise() -> SampleNoise | None:
    """The noise of the batch in work, or None outside a training step."""
    return _current.get()
