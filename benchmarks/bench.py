"""Side-by-side measurements: `make bench`, or `python -m benchmarks.bench [ROW ...]`.

Every row measures one thing of this project and the same thing done as the published releases do it. Both sides run on
one thread, in turn, so that what else the machine does hits both; the median counts. The table goes to standard output
and to benchmarks/latest.json.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from cil.models.dytox import DyToxNetwork
from kd import Batch, Outputs
from kd.feature.crd import CRD
from kd.feature.crd_sampling import ClassBlocks

LATEST = Path(__file__).with_name("latest.json")


@dataclass
class Measured:
    """One row: ours, what it is compared with, and how many times better ours is."""

    value: float
    unit: str
    baseline: float
    ratio: float


rows: dict[str, Callable[[], Measured]] = {}


def row(function: Callable[[], Measured]) -> Callable[[], Measured]:
    """Decorator that enters a measurement under the name of its function."""
    rows[function.__name__] = function
    return function


def side_by_side(ours: Callable[[], object], baseline: Callable[[], object], repetitions: int = 15) -> Measured:
    """Median milliseconds of two functions that are called in turn, after one call each that does not count."""
    sides = (ours, baseline)
    seconds: tuple[list[float], list[float]] = ([], [])
    for repetition in range(-1, repetitions):
        for side, taken in zip(sides, seconds, strict=True):
            start = time.perf_counter()
            side()
            if repetition >= 0:
                taken.append(time.perf_counter() - start)
    value, other = (1000 * statistics.median(taken) for taken in seconds)
    return Measured(value, "ms", other, other / value)


@row
def crd_sampling() -> Measured:
    """16 384 negatives for each of 64 samples of 50 000 in 100 classes; the release permutes the other classes."""
    num_negatives, labels = 16384, torch.arange(100).repeat_interleave(500)
    batch = torch.randint(len(labels), (64,), generator=torch.Generator().manual_seed(0))
    blocks, generator = ClassBlocks.of(labels), torch.Generator().manual_seed(0)
    random = np.random.RandomState(0)  # as released
    others = {label: np.flatnonzero(labels.numpy() != label) for label in set(labels[batch].tolist())}

    def released() -> torch.Tensor:
        chosen = [random.choice(others[label], num_negatives, replace=False) for label in labels[batch].tolist()]
        return torch.from_numpy(np.stack(chosen))

    return side_by_side(lambda: blocks.negatives(batch, num_negatives, generator), released)


@row
def crd_step() -> Measured:
    """Forward and backward of CRD at the same size, widths 256 to 128; the release gathers every row compared with."""
    labels = torch.arange(100).repeat_interleave(500)
    crd = CRD()
    student, teacher = (Outputs(torch.zeros(64, 1), torch.randn(64, 256)) for _ in range(2))
    crd.connect(student, teacher)
    crd.remember(torch.arange(50_000), labels)
    batch = Batch(torch.zeros(64, 1, 1, 1), labels[:64], torch.arange(64))
    candidates = torch.randint(50_000, (64, 1 + crd.num_negatives))
    banks = {side: crd.memory.bank(side) for side in ("student", "teacher")}
    noise = crd.num_negatives / 50_000

    def released() -> None:
        v = [
            F.normalize(crd.embeds[side](outputs.embedding), dim=1)
            for side, outputs in (("student", student), ("teacher", teacher))
        ]
        losses = []
        for own, bank in zip(v, (banks["teacher"], banks["student"]), strict=True):
            scores = torch.exp(torch.bmm(bank[candidates], own[:, :, None])[..., 0] / crd.temperature) / 50_000
            told = (scores[:, 0] / (scores[:, 0] + noise + crd.eps)).log().sum()
            losses.append(-(told + (noise / (scores[:, 1:] + noise + crd.eps)).log().sum()) / 64)
        sum(losses[1:], losses[0]).backward()

    return side_by_side(lambda: crd(student, teacher, batch).backward(), released, repetitions=3)


def _dytox_decoder(num_tasks: int) -> Measured:
    """The decoder of DyTox on 32 images, forward and backward; as published it runs once per task over all tokens."""
    network = DyToxNetwork((3, 32, 32))
    for _ in range(num_tasks):
        network.grow(1)
    patches = torch.randn(32, *network.position.shape[1:], requires_grad=True)

    def published() -> None:
        answers = []
        for token in network.task_tokens:
            answer = token.expand(len(patches), -1, -1)
            for block in network.decoder:
                sequence = block.norm1(torch.cat([answer, patches], dim=1))
                asked = block.attention
                q, k, v = (
                    rearrange(layer(x), "b n (head d) -> b head n d", head=asked.num_heads)
                    for layer, x in ((asked.q, sequence[:, :1]), (asked.k, sequence), (asked.v, sequence))
                )
                told = rearrange(F.scaled_dot_product_attention(q, k, v), "b head n d -> b n (head d)")
                answer = answer + asked.proj(told)
                answer = answer + block.mlp(block.norm2(answer))
            answers.append(answer)
        torch.cat(answers, dim=1).square().sum().backward()

    return side_by_side(lambda: network.decode(patches).square().sum().backward(), published, repetitions=5)


@row
def dytox_decoder_10() -> Measured:
    """The decoder of DyTox with 10 tasks."""
    return _dytox_decoder(10)


@row
def dytox_decoder_20() -> Measured:
    """The decoder of DyTox with 20 tasks."""
    return _dytox_decoder(20)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the rows, print the table, write it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(rows)}; all without any")
    chosen = parser.parse_args(arguments).rows or list(rows)
    if strangers := [name for name in chosen if name not in rows]:
        parser.error(f"unknown rows {', '.join(strangers)}; known: {', '.join(rows)}")
    torch.set_num_threads(1)
    print(f"{'row':<20} {'value':>10} {'unit':<5} {'baseline':>10} {'ratio':>8}")
    latest = json.loads(LATEST.read_text()) if LATEST.exists() else {}
    for name in chosen:
        measured = rows[name]()
        print(
            f"{name:<20} {measured.value:>10.3f} {measured.unit:<5} {measured.baseline:>10.3f} {measured.ratio:>7.1f}x",
            flush=True,
        )
        latest[name] = asdict(measured)
    LATEST.write_text(json.dumps({name: latest[name] for name in rows if name in latest}, indent=1) + "\n")


if __name__ == "__main__":
    main()
