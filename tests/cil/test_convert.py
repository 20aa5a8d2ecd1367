import argparse
import json
import os
from pathlib import Path

import pytest
import torch

from cil.convert import (
    default_task_sizes,
    dkt_from_release,
    load_converted,
    load_release,
    main,
    name_here,
    name_there,
    to_release,
)
from cil.models.dkt import DKTNetwork

SHAPES = {"width": 64, "depth": 2, "mlp_ratio": 2, "stem_width": 8}


def network(*task_sizes: int, **settings: object) -> DKTNetwork:
    torch.manual_seed(0)
    arguments = {"num_heads": 2, **SHAPES} | settings
    made = DKTNetwork((3, 32, 32), **arguments).eval()  # type: ignore[arg-type]
    made.rebuild({"task_sizes": list(task_sizes)})
    with torch.no_grad():
        for value in made.state_dict().values():
            if value.is_floating_point():
                value.uniform_(0.1, 0.9)
    return made


def release(*task_sizes: int, **settings: object) -> dict[str, torch.Tensor]:
    """A state dict as the release writes it, the unused projection included."""
    dead = {"patch_embed.proj.0.weight": torch.zeros(8, 3, 3, 3), "patch_embed.proj.1.running_mean": torch.zeros(8)}
    return to_release(network(*task_sizes, **settings)) | dead


def images() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("task_sizes", [(4,), (4, 3), (4, 3, 3), (6, 2, 2, 2)])
def test_a_network_survives_the_way_out_and_in(task_sizes):
    original = network(*task_sizes)
    back = dkt_from_release(release(*task_sizes)).eval()
    assert back.task_sizes == list(task_sizes)
    assert torch.equal(back(images()).logits, original(images()).logits)


def test_the_state_dict_of_the_release_has_its_names_and_shapes():
    state = to_release(network(10, 10, width=384, num_heads=12, depth=5, mlp_ratio=4, stem_width=32))
    assert len(state) == 227 - 9  # the nine arrays of the unused projection are missing
    expected = {
        "general_token": (1, 1, 384),
        "patch_embed.proj1.weight": (32, 3, 3, 3),
        "patch_embed.proj2.running_var": (32,),
        "patch_embed.proj4.weight": (384, 32, 2, 2),
        "task_tokens.1": (1, 1, 384),
        "head.0.head.weight": (10, 384),
        "head.1.norm.bias": (384,),
        "sabs.4.attn.q.weight": (384, 384),
        "sabs.0.mlp.dwconv.weight": (1536, 1, 3, 3),
        "tabs.attnCA.proj.bias": (384,),
        "tabs.mlp.fc2.weight": (384, 1536, 1, 1),
        "tabs.mlp.bn3.num_batches_tracked": (),
    }
    assert {name: tuple(state[name].shape) for name in expected} == expected


def test_every_name_goes_there_and_back():
    for name in network(2, 2).state_dict():
        assert name_here(name_there(name)) == name


def test_the_imagenet_form_is_told_by_its_kernel():
    settings = {"stem_kernel": 7, "stem_stride": 2, "stem_padding": 2, "patch_kernel": 4}
    torch.manual_seed(0)
    original = DKTNetwork((3, 64, 64), num_heads=2, **SHAPES, **settings).eval()
    original.grow(3)
    back = dkt_from_release(to_release(original), (64, 64)).eval()
    inputs = torch.rand(2, 3, 64, 64)
    assert torch.equal(back(inputs).logits, original(inputs).logits)


def test_the_format_of_the_arrays_is_kept():
    state = {name: value.double() for name, value in release(2).items()}
    assert dkt_from_release(state).token_pool.general_token.dtype == torch.float64


@pytest.mark.parametrize(
    ("num_tasks", "num_old", "num_new", "sizes"), [(1, 7, 7, [7]), (2, 5, 3, [5, 3]), (6, 90, 10, [50] + [10] * 5)]
)
def test_task_sizes_are_those_of_equal_increments(num_tasks, num_old, num_new, sizes):
    assert default_task_sizes(num_tasks, num_old, num_new) == sizes


def test_uneven_tasks_have_to_be_told():
    state = release(2, 1, 4)
    with pytest.raises(ValueError, match="task_sizes"):
        dkt_from_release(state)
    assert dkt_from_release(state, task_sizes=[2, 1, 4]).task_sizes == [2, 1, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general_token": None}, "'general_token' is missing"),
        ({"sabs.1.attn.q.bias": None}, r"does not fit.*blocks.1.attention.q.bias"),
        ({"surprise": torch.zeros(1)}, "'surprise' is no entry of a DKT state dict"),
        ({"head.1.head.bias": None}, "found 1 and 2 tokens"),
        ({"head.1.head.weight": torch.zeros(5, 64)}, "does not fit"),
        ({"patch_embed.proj1.weight": torch.zeros(8, 3, 5, 5)}, "kernel of 3 or 7, found 5"),
    ],
)
def test_a_state_dict_that_is_not_whole_is_refused(change, message):
    state = release(3, 2) | change
    with pytest.raises(ValueError, match=message):
        dkt_from_release({name: value for name, value in state.items() if value is not None})


def checkpoint(path: Path, **changed: object) -> Path:
    torch.save({"model": release(3, 2), "epoch": 499, "args": argparse.Namespace(lr=5e-4), **changed}, path)
    return path


def test_a_checkpoint_of_the_release_becomes_two_files_that_give_the_network_back(tmp_path, capsys):
    assert main([str(checkpoint(tmp_path / "release.pth")), str(tmp_path / "out")]) == 0
    assert "5 classes in 2 tasks" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"network.safetensors", "network.json"}
    assert json.loads((tmp_path / "out" / "network.json").read_text())["structure"] == {"task_sizes": [3, 2]}
    back = load_converted(tmp_path / "out").eval()
    assert torch.equal(back(images()).logits, network(3, 2)(images()).logits)


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("evil",)


def test_no_code_of_a_checkpoint_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="mkdir"):
        load_release(checkpoint(tmp_path / "evil.pth", scaler=Evil()))
    assert not (tmp_path / "evil").exists()


def bad_files(folder: Path) -> dict[str, Path]:
    files = {name: folder / name for name in ("missing.pth", "text.pth", "empty.pth", "tensor.pth", "other.pth")}
    files["text.pth"].write_text("no checkpoint")
    files["empty.pth"].write_bytes(b"")
    torch.save(torch.zeros(3), files["tensor.pth"])
    torch.save({"model": {"fc.weight": torch.zeros(2, 2)}}, files["other.pth"])
    files["unnamed.pth"] = checkpoint(folder / "unnamed.pth", model={})
    files["evil.pth"] = checkpoint(folder / "evil.pth", scaler=Evil())
    return files


@pytest.mark.parametrize(
    "name", ["missing.pth", "text.pth", "empty.pth", "tensor.pth", "other.pth", "unnamed.pth", "evil.pth"]
)
def test_a_bad_file_ends_with_code_2_and_one_message(name, tmp_path, capsys):
    assert main([str(bad_files(tmp_path)[name]), str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_converted_network_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no converted network"):
        load_converted(tmp_path)
