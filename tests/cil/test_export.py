import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cil
from cil.export import FACTS_NAME, FORMATS, TOLERANCE, compare, export, main
from kd import Outputs
from tests.conftest import RunTiny

IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 1, 8, 8)).astype(np.uint8))
RESNET = ("model=resnet8",)
BIC = ("model=resnet8", "memory.size=60", "learner.bias_epochs=1", "learner.fraction=0.3")


def test_safetensors_and_their_json_are_loaded_again(
    whole_run: RunTiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "digits.safetensors"
    assert main([str(whole_run()), "--to", "safetensors", "-o", str(path)]) == 0
    assert "largest difference 0.0e+00 of the largest score (1e-04 is let pass)" in capsys.readouterr().out
    before, after = cil.load(whole_run()), cil.load(path)
    assert after.logits(IMAGES).equal(before.logits(IMAGES))
    assert (after.class_names, after.stage, after.part) == (before.class_names, before.stage, before.part)
    facts = json.loads(path.with_suffix(".json").read_text())
    assert facts["class_names"] == list("012345")
    assert facts["input"]["shape"] == ["batch", 1, 8, 8]
    assert facts["architecture"]["name"] == "dkt"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["digits.json", "digits.safetensors"]
    assert cil.load(path.with_suffix(".json")).predict(IMAGES) == before.predict(IMAGES)


@pytest.mark.parametrize(
    ("learner", "words"), [("icarl", RESNET), ("der", RESNET), ("foster", RESNET), ("bic", BIC), ("podnet", RESNET)]
)
def test_heads_means_and_copies_are_in_the_safetensors(
    whole_run: RunTiny, tmp_path: Path, learner: str, words: tuple[str, ...]
) -> None:
    model = cil.load(whole_run(*words, learner=learner))
    assert (model.means is not None) == (learner == "icarl")
    assert export(model, "safetensors", tmp_path / "m.safetensors") <= TOLERANCE
    assert cil.load(tmp_path / "m.safetensors").predict(IMAGES) == model.predict(IMAGES)


def test_a_traced_network_takes_any_number_of_bytes_and_knows_its_classes(whole_run: RunTiny, tmp_path: Path) -> None:
    model = cil.load(whole_run())
    path = tmp_path / "m.pt2"
    assert export(model, "torch_export", path) <= TOLERANCE
    extra = {FACTS_NAME: ""}
    module = torch.export.load(path, extra_files=extra).module()
    assert json.loads(extra[FACTS_NAME])["class_names"] == list("012345")
    with torch.no_grad():
        for size in (1, 4, 5):
            assert torch.allclose(module(IMAGES[:size]), model.logits(IMAGES[:size]), atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_onnx_runtime_says_what_the_run_says(whole_run: RunTiny, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = cil.load(whole_run("model=resnet8", learner="icarl"))
    path = tmp_path / "m.onnx"
    assert export(model, "onnx", path) <= TOLERANCE
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    facts = json.loads(session.get_modelmeta().custom_metadata_map[FACTS_NAME])
    assert facts["output"]["meaning"] == "cosines to the means of the classes"
    for size in (1, 5):
        (scores,) = session.run(["scores"], {"images": IMAGES[:size].numpy()})
        assert np.allclose(scores, model.logits(IMAGES[:size]).numpy(), atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("form", ["torch_export", "onnx"])
@pytest.mark.parametrize(
    ("learner", "words"),
    [
        ("dkt", ()),
        ("dytox", ("model=dytox_tiny", "learner.finetune_epochs=1")),
        ("der", RESNET),
        ("foster", RESNET),
        ("bic", BIC),
        ("lucir", RESNET),
        ("podnet", RESNET),
        ("memo", RESNET),
    ],
)
def test_every_kind_of_network_is_traced(
    whole_run: RunTiny, tmp_path: Path, learner: str, words: tuple[str, ...], form: str
) -> None:
    if form == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    model = cil.load(whole_run(*words, learner=learner))
    assert export(model, form, tmp_path / f"m{FORMATS[form]}") <= TOLERANCE


def test_nothing_is_written_over_unless_asked(
    whole_run: RunTiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m.safetensors"
    path.with_suffix(".json").write_text("mine")
    command = [str(whole_run()), "--to", "safetensors", "-o", str(path)]
    assert main(command) == 2
    assert "m.json exists: choose another name with -o, or --overwrite" in capsys.readouterr().err
    assert path.with_suffix(".json").read_text() == "mine"
    assert main([*command, "--overwrite"]) == 0
    assert cil.load(path).class_names == tuple("012345")


def test_what_is_written_must_say_what_the_model_says(whole_run: RunTiny) -> None:
    model = cil.load(whole_run())
    assert compare(model, model.logits) == 0
    with pytest.raises(ValueError, match="what was written says something else than the model: scores differ by"):
        compare(model, lambda images: model.logits(images) + 0.1)
    with pytest.raises(ValueError, match=r"the file gives scores of \[1, 5\], the model \[1, 6\]"):
        compare(model, lambda images: model.logits(images)[:, :5])


def test_a_network_that_looks_at_values_is_refused_with_the_reason(whole_run: RunTiny, tmp_path: Path) -> None:
    class Looks(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network, self.input_shape = network, (1, 8, 8)

        def forward(self, images: Tensor) -> Outputs:
            if images.mean() > 0:
                images = -images
            said: Outputs = self.network(images)
            return said

    model = cil.load(whole_run())
    object.__setattr__(model, "network", Looks(model.network))
    with pytest.raises(ValueError, match=r"Looks cannot be traced by torch\.export"):
        export(model, "torch_export", tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_with_its_extra(
    whole_run: RunTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main([str(whole_run()), "--to", "onnx", "-o", str(tmp_path / "m.onnx")]) == 2
    assert "needs the package onnxruntime: install the extra, pip install 'dkt-incremental[export]'" in (
        capsys.readouterr().err
    )


def test_a_changed_file_is_refused(whole_run: RunTiny, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    export(cil.load(whole_run()), "safetensors", path)
    with pytest.raises(ValueError, match="holds stage 2, not 0"):
        cil.load(path, stage=0)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"its checksum is not the one in m\.json"):
        cil.load(path)
    path.with_suffix(".json").write_text("{}")
    with pytest.raises(ValueError, match="found format None of version None"):
        cil.load(path)
    with pytest.raises(ValueError, match=r"give a run folder, or a \.safetensors file"):
        cil.load(__file__)


def test_the_name_of_safetensors_says_what_they_are(whole_run: RunTiny, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the name must end in \.safetensors"):
        export(cil.load(whole_run()), "safetensors", tmp_path / "m.bin")
