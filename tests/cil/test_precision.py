import os

import pytest
import torch
from torch import nn

from cil.precision import Precision, has_bf16, repeat_exactly, resolve_device

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({}, False),
        ({"avx2": True, "avx512": True}, False),
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
    ],
)
def test_auto_is_bf16_where_the_processor_has_it_in_hardware(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert has_bf16(CPU) is expected
    assert Precision.resolve("auto", CPU).name == ("bf16" if expected else "fp32")


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16", "fp64"])
def test_a_named_format_is_taken_as_it_is(name: str) -> None:
    assert Precision.resolve(name, CPU).name == name


@pytest.mark.parametrize(
    ("name", "weights", "products"),
    [
        ("fp32", torch.float32, torch.float32),
        ("bf16", torch.float32, torch.bfloat16),
        ("fp16", torch.float32, torch.float16),
        ("fp64", torch.float64, torch.float64),
    ],
)
def test_weights_keep_their_format_and_products_are_narrow(
    name: str, weights: torch.dtype, products: torch.dtype
) -> None:
    precision = Precision.resolve(name, CPU)
    layer = nn.Linear(4, 4).to(precision.dtype)
    with precision.autocast():
        product = layer(torch.ones(2, 4, dtype=precision.dtype))
    assert (layer.weight.dtype, product.dtype) == (weights, products)


def test_only_fp16_scales_its_loss() -> None:
    assert [Precision(name, CPU).scaler().is_enabled() for name in ("fp32", "bf16", "fp16", "fp64")] == [
        False,
        False,
        True,
        False,
    ]


def test_auto_is_the_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto").type == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == CPU


def test_cuda_is_told_to_add_in_a_fixed_order_and_a_processor_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    torch.use_deterministic_algorithms(False)
    repeat_exactly(torch.device("cpu"))
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic
    try:
        repeat_exactly(torch.device("cuda"))
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.backends.cudnn.deterministic
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "", "cpu:x"])
def test_a_device_that_is_not_there_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(ValueError, match=r"not usable here .*; use device=auto or device=cpu") as caught:
        resolve_device(name)
    assert "\n" not in str(caught.value)
