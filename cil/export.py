"""`python -m cil.export RUN --to torch_export|onnx|safetensors`: a trained network as a file for other programs.

What is written takes uint8 images as they are, [batch, channels, height, width] of 0 to 255 and any batch size:
normalisation is a part of it. It gives the scores of all known classes, or, where the nearest mean is the answer, the
cosines to the means. `torch_export` (.pt2) needs torch alone, `onnx` any ONNX runtime; `safetensors` is the weights
beside a readable .json, for `cil.load`. Each carries the names of the classes and what else has to be known.

The file is read again before it gets its name: what it says must be what `cil.load` says.
"""

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from safetensors.torch import save_file
from torch import Tensor, nn

from cil.checkpoint import CLASS_MEANS, checksum
from cil.loading import FACTS, WEIGHTS, Model, load
from kd import Outputs

FORMATS = {"torch_export": ".pt2", "onnx": ".onnx", "safetensors": WEIGHTS}
#: Largest difference of a score that is let pass, as a share of the largest score: float32 has 7 digits, and a runtime
#: may add in another order.
TOLERANCE = 1e-4
FACTS_NAME = "model.json"  # in a .pt2 file, and the name of the metadata in an .onnx file

_CHECKED = (1, 2, 7)  # batch sizes
_EXAMPLE = 3  # of the batch that is traced: 0 and 1 would be taken for constants
_OPSET = 18  # of ONNX, the lowest that torch's exporter writes without a conversion

Answer = Callable[[UInt8[Tensor, "batch channels height width"]], Tensor]


class Scorer(nn.Module):
    """From uint8 images to scores: normalisation, network, and the means of the classes where they are the answer.

    Args:
        model: What is exported.
    """

    mean: Tensor
    std: Tensor
    means: Tensor | None

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.network = model.network
        weights = next(model.network.parameters())
        self.dtype = weights.dtype
        self.register_buffer("mean", model.transform.mean.to(weights.device))
        self.register_buffer("std", model.transform.std.to(weights.device))
        self.register_buffer("means", None if model.means is None else model.means.to(weights))

    def forward(self, images: UInt8[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """As `Model.logits`."""
        outputs: Outputs = self.network(((images.to(torch.float32) / 255 - self.mean) / self.std).to(self.dtype))
        if self.means is None:
            return outputs.logits
        assert outputs.embedding is not None
        return F.normalize(outputs.embedding) @ self.means.T


def export(model: Model, form: str, path: Path, *, overwrite: bool = False) -> float:
    """Write a model to a file, and read it again to compare.

    Args:
        model: What `cil.load` gave, on the CPU.
        form: One of `FORMATS`.
        path: The file; `safetensors` writes another beside it, of the same name in .json.
        overwrite: Write over what is there.

    Returns:
        The largest difference of a score between the file and the model, as a share of the largest score.

    Raises:
        ValueError: If something is there already, the network cannot be written in this format, a package is missing,
            or the file does not say what the model says; nothing is left behind then.
    """
    if form not in FORMATS:
        raise ValueError(f"unknown format {form!r}. Known: {', '.join(FORMATS)}")
    if form == "safetensors" and path.suffix != WEIGHTS:
        raise ValueError(f"{path}: the name must end in {WEIGHTS}, which `cil.load` knows it by")
    files = [path, path.with_suffix(FACTS)] if form == "safetensors" else [path]
    for file in files:
        if file.exists() and not overwrite:
            raise ValueError(f"{file} exists: choose another name with -o, or --overwrite")
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [file.with_name(f"{file.stem}.part-{os.getpid()}{file.suffix}") for file in files]
    try:
        answer = _WRITERS[form](model, parts[0])
        difference = compare(model, answer)
        for part, file in zip(parts, files, strict=True):
            os.replace(part, file)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
    return difference


def compare(model: Model, answer: Answer) -> float:
    """The largest difference of a score, as a share of the largest score, over random images in three batch sizes.

    Args:
        model: What is right.
        answer: Gives scores of images.

    Raises:
        ValueError: If it is larger than `TOLERANCE`.
    """
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for size in _CHECKED:
        images = torch.randint(0, 256, (size, *model.network.input_shape), generator=generator, dtype=torch.uint8)
        expected = model.logits(images)
        found = answer(images).to(expected)
        if found.shape != expected.shape:
            raise ValueError(f"the file gives scores of {list(found.shape)}, the model {list(expected.shape)}")
        worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
    if not worst <= TOLERANCE:  # also where it is no number
        raise ValueError(
            f"what was written says something else than the model: scores differ by {worst:.1e} of the largest, "
            f"{TOLERANCE:.0e} is let pass"
        )
    return worst


def traced(model: Model) -> torch.export.ExportedProgram:
    """The model as a graph of torch's operators, for any batch size.

    Raises:
        ValueError: If the network cannot be traced; says why.
    """
    example = torch.zeros(_EXAMPLE, *model.network.input_shape, dtype=torch.uint8)
    try:
        with warnings.catch_warnings(action="ignore"):  # of torch about itself
            return torch.export.export(
                Scorer(model).eval(), (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), strict=False
            )
    except Exception as error:  # whatever the code of a network makes the tracer say
        kind = type(model.network).__name__
        raise ValueError(
            f"{kind} cannot be traced by torch.export ({_first_line(error)}): its forward pass must be made of tensor "
            "operations that do not look at values or at the batch size; --to safetensors works for every network"
        ) from error


def _to_torch_export(model: Model, path: Path) -> Answer:
    program = traced(model)
    with warnings.catch_warnings(action="ignore"):
        torch.export.save(program, path, extra_files={FACTS_NAME: json.dumps(model.facts(), indent=1)})
        module = torch.export.load(path).module()

    def answer(images: Tensor) -> Tensor:
        with torch.no_grad():
            scores: Tensor = module(images)
        return scores

    return answer


def _to_onnx(model: Model, path: Path) -> Answer:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - torch's exporter needs it, and says so less clearly
    except ImportError as error:
        raise ValueError(
            f"--to onnx needs the package {error.name}: install the extra, pip install 'dkt-incremental[export]'"
        ) from error
    program = traced(model)
    logging.getLogger("onnxscript").setLevel(logging.ERROR)  # its optimiser says what it leaves as it is
    try:
        with warnings.catch_warnings(action="ignore"):
            written = torch.onnx.export(
                program,
                dynamo=True,
                input_names=["images"],
                output_names=["scores"],
                opset_version=_OPSET,
                verbose=False,
            )
            assert written is not None
            written.model.metadata_props[FACTS_NAME] = json.dumps(model.facts())
            written.save(str(path))
    except Exception as error:  # operators that ONNX does not have, in the words of three packages
        raise ValueError(
            f"{type(model.network).__name__} cannot be written as ONNX ({_first_line(error)}): use --to torch_export"
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors alone
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common base class
        raise ValueError(f"ONNX Runtime does not take what was written ({_first_line(error)})") from error
    return lambda images: torch.from_numpy(session.run(["scores"], {"images": images.numpy()})[0])


def _to_safetensors(model: Model, path: Path) -> Answer:
    weights = {name: value.contiguous() for name, value in model.network.state_dict().items()}
    if model.means is not None:
        weights[CLASS_MEANS] = model.means.contiguous()
    save_file(weights, path, metadata={"format": "pt"})
    facts = model.facts() | {"blake2b": checksum(path)}
    path.with_suffix(FACTS).write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return load(path).logits


_WRITERS: dict[str, Callable[[Model, Path], Answer]] = {
    "torch_export": _to_torch_export,
    "onnx": _to_onnx,
    "safetensors": _to_safetensors,
}


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the file and print where it is; 2 and one message if that cannot be done."""
    parser = argparse.ArgumentParser(
        prog="python -m cil.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--to", required=True, choices=FORMATS, help="the format")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: model.pt2, .onnx, ... in RUN")
    parser.add_argument("--overwrite", action="store_true", help="write over FILE if it is there")
    parser.add_argument("--stage", type=int, metavar="N", help="the network after this stage; default: the last")
    chosen = parser.parse_args(arguments)
    path: Path = chosen.output or chosen.run / f"model{FORMATS[chosen.to]}"
    try:
        model = load(chosen.run, chosen.stage)
        difference = export(model, chosen.to, path, overwrite=chosen.overwrite)
    except (ValueError, OSError) as error:
        print(f"cil.export: {error}", file=sys.stderr)
        return 2
    channels, height, width = model.network.input_shape
    print(f"images  uint8 [batch, {channels}, {height}, {width}], 0 to 255")
    print(f"scores  [batch, {len(model.class_names)}]")
    print(
        f"checked against the run in batches of {', '.join(map(str, _CHECKED))}: largest difference {difference:.1e} "
        f"of the largest score ({TOLERANCE:.0e} is let pass)"
    )
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
