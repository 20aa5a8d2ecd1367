"""Side-by-side measurements: `make bench`, or `python -m benchmarks.bench [ROW ...]`.

Every row measures one thing of this project and the same thing done in a plain way: the plain form of our own code
(`fast=off precision=fp32`), or what the published releases do. Both sides run in turn in one process, so that what else
the machine does hits both; the median counts. The table goes to standard output and to benchmarks/latest.json, that of
a GPU (`--device cuda`) to benchmarks/latest-cuda.json.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from benchmarks import reading, steps  # noqa: F401 - they enter their rows
from benchmarks.measuring import Measured, measure_on, row, rows, side_by_side, threads
from cil.models.dytox import DyToxNetwork
from cil.precision import resolve_device
from kd import Batch, Outputs
from kd.feature.crd import CRD
from kd.feature.crd_sampling import ClassBlocks

LATEST = Path(__file__).with_name("latest.json")
#: Beginnings of the names of rows that a GPU is measured by.
_ON_A_GPU = (
    "dkt_step",
    "dytox_step",
    "static_step",
    "finetuning",
    "evaluation",
    "crop_flip",
    "randaugment",
    "imagenet",
)
#: What would take a CPU minutes.
_NOT_ON_A_CPU = ("imagenet",)


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

    with threads(1):
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

    with threads(1):
        return side_by_side(lambda: crd(student, teacher, batch).backward(), released, repetitions=3)


def _dytox_decoder(num_tasks: int) -> Measured:
    """The decoder of DyTox on 32 images, forward and backward; as published it runs once per task over all tokens."""
    network = DyToxNetwork((3, 32, 32))
    for _ in range(num_tasks):
        network.grow(1)
    maps = network.encode(torch.randn(32, 3, 32, 32)).detach().requires_grad_()
    patches = rearrange(maps, "b d h w -> b (h w) d")

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

    with threads(1):
        return side_by_side(lambda: network.decode(maps).square().sum().backward(), published, repetitions=5)


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
    parser.add_argument(
        "rows",
        nargs="*",
        metavar="ROW",
        help=f"of {', '.join(rows)}; without any: all that the device can be measured by",
    )
    parser.add_argument("--device", default="cpu", help="where networks and augmentations compute; default cpu")
    given = parser.parse_args(arguments)
    where = resolve_device(given.device)
    measure_on(where)
    on_a_gpu = where.type != "cpu"
    path = LATEST.with_name(f"latest-{where.type}.json") if on_a_gpu else LATEST
    usual = [name for name in rows if (name.startswith(_ON_A_GPU) if on_a_gpu else not name.startswith(_NOT_ON_A_CPU))]
    chosen = given.rows or usual
    if strangers := [name for name in chosen if name not in rows]:
        parser.error(f"unknown rows {', '.join(strangers)}; known: {', '.join(rows)}")
    print(f"{'row':<22} {'value':>10} {'unit':<8} {'baseline':>10} {'ratio':>8}")
    latest = json.loads(path.read_text()) if path.exists() else {}
    for name in chosen:
        measured = rows[name]()
        print(
            f"{name:<22} {measured.value:>10.3f} {measured.unit:<8} {measured.baseline:>10.3f} {measured.ratio:>7.2f}x",
            flush=True,
        )
        latest[name] = asdict(measured)
        path.write_text(json.dumps({name: latest[name] for name in rows if name in latest}, indent=1) + "\n")


if __name__ == "__main__":
    main()
