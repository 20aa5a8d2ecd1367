"""Nothing comes from outside while a run goes on: no connection is opened, no weights are fetched."""

import socket
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from cil.cli import main
from cil.loading import load
from cil.models.network import models
from tests.conftest import run_tiny_in


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a process wants from other machines; it is not let out."""
    wanted: list[Any] = []

    def refuse(*arguments: Any, **keywords: Any) -> None:
        wanted.append(arguments)
        raise OSError("no network in this test")

    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    return wanted


def test_the_fixture_hears_a_connection(asked: list[Any]) -> None:
    with pytest.raises(OSError, match="no network"):
        urllib.request.urlopen("http://192.0.2.1/")
    assert asked


def test_a_run_its_report_its_use_and_distillation_open_no_connection(tmp_path: Path, asked: list[Any]) -> None:
    overrides = ("model=timm", "model.architecture=test_resnet", "optim.epochs=1", "scenario.classes=4")
    run = run_tiny_in(tmp_path, *overrides, learner="lwf")
    assert (run / "report.html").stat().st_size
    assert len(load(run).predict(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))) == 2
    words = ["experiment=tiny_static", "model.width=4", "optim.epochs=1", "optim.schedule.milestones=[]", "name=static"]
    words += [f"runs_dir={tmp_path}", "generations=2", "kd=ban"]
    assert main(words, program="distill.py", config_name="distill") == 0
    assert not asked


def test_weights_that_are_not_here_are_refused_with_what_fetches_them(asked: list[Any], tmp_path: Path) -> None:
    words = ["experiment=tiny", "learner=finetune", "model=timm", "model.architecture=test_resnet"]
    assert main([*words, "model.pretrained=true", f"runs_dir={tmp_path}"]) == 2
    with pytest.raises(ValueError, match=r"hf download timm/test_resnet\.r160_in1k model\.safetensors"):
        models["timm"]((3, 32, 32), architecture="test_resnet", pretrained=True)
    with pytest.raises(ValueError, match="publishes no weights of coatnet_nano_cc_224"):
        models["timm"]((3, 32, 32), architecture="coatnet_nano_cc_224", pretrained=True)
    assert not asked


def test_weights_that_are_here_are_used_and_a_finished_run_does_without(
    asked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = timm.create_model("test_resnet").state_dict()
    place = tmp_path / "hub" / "models--timm--test_resnet.r160_in1k"
    (place / "snapshots" / "first").mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("first")
    save_file(kept, place / "snapshots" / "first" / "model.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        network = models["timm"]((3, 32, 32), architecture="test_resnet", pretrained=True)
        own = network.backbone.state_dict()
        assert all(own[name].equal(kept[name]) for name in own)
        words = ("model=timm", "model.architecture=test_resnet", "model.pretrained=true", "optim.epochs=1")
        run = run_tiny_in(tmp_path, *words, learner="finetune", report=False)
    assert load(run).network.num_classes == 6
    assert not asked
