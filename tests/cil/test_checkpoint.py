import os
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from safetensors.torch import load_file

from cil import checkpoint

CPU = torch.device("cpu")


def state_of(**learner: torch.Tensor) -> dict[str, Any]:
    return {"position": {"stage": 0, "epoch": 1}, "learner": dict(learner), "memory": {"exemplars": [[0, [1, 2]]]}}


def learner_of(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "network.weight": torch.randn(3, 2, generator=generator),
        "network.steps": torch.tensor(7),
        "teacher.network.weight": torch.randn(3, 2, generator=generator),
    }


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "below" / "file"
    checkpoint.write_atomically(path, lambda file: file.write(b"old"))

    def torn(file: BinaryIO) -> None:
        file.write(b"half of the n")
        assert path.read_bytes() == b"old"
        raise OSError(28, "no space left")

    with pytest.raises(OSError, match="no space"):
        checkpoint.write_atomically(path, torn)
    assert path.read_bytes() == b"old"
    checkpoint.write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (order.append("fsync"), fsync(number)))
    monkeypatch.setattr(os, "replace", lambda old, new: (order.append("replace"), replace(old, new)))
    checkpoint.write_json(tmp_path / "file", {"a": 1})
    assert order == ["fsync", "replace"]


def test_json_holds_no_nan(tmp_path: Path) -> None:
    checkpoint.write_json(tmp_path / "file.json", {"a": [1, None]})
    assert (tmp_path / "file.json").read_text() == '{\n "a": [\n  1,\n  null\n ]\n}\n'
    with pytest.raises(ValueError, match="JSON compliant"):
        checkpoint.write_json(tmp_path / "file.json", {"a": float("nan")})
    assert "null" in (tmp_path / "file.json").read_text()


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    state = state_of(**learner_of())
    checkpoint.save_state(tmp_path, 3, state)
    assert (tmp_path / "stage_003" / "state.pt").is_file()
    found = checkpoint.load_state(tmp_path, CPU)
    assert found is not None
    assert found.pop("format") == checkpoint.FORMAT
    learner, expected = found.pop("learner"), state.pop("learner")
    assert found == state
    assert {name: value.tolist() for name, value in learner.items()} == {k: v.tolist() for k, v in expected.items()}


def test_a_run_without_a_state_starts_anew(tmp_path: Path) -> None:
    assert checkpoint.load_state(tmp_path, CPU) is None
    assert checkpoint.load_state(tmp_path / "nowhere", CPU) is None


def test_a_finished_stage_keeps_the_weights_of_the_network_once(tmp_path: Path) -> None:
    learner = learner_of()
    checkpoint.save_stage(tmp_path, 0, state_of(**learner), {"stage": 0})
    stored = torch.load(tmp_path / "stage_000" / "state.pt", weights_only=True)
    assert list(stored["learner"]) == ["teacher.network.weight"]
    weights = load_file(tmp_path / "stage_000" / "network.safetensors")
    assert weights.keys() == {"weight", "steps"}
    found = checkpoint.load_state(tmp_path, CPU)
    assert found is not None
    assert found["learner"].keys() == learner.keys()
    assert all(found["learner"][name].equal(value) for name, value in learner.items())


def test_weights_that_are_no_plain_memory_are_saved_too(tmp_path: Path) -> None:
    weight = torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    checkpoint.save_stage(tmp_path, 0, state_of(**{"network.a": weight, "network.b": weight[:2].mT}), {})
    found = checkpoint.load_network(tmp_path / "stage_000", CPU)
    assert found["a"].equal(weight)
    assert found["b"].equal(weight[:2].mT)


def test_the_newest_state_counts(tmp_path: Path) -> None:
    for stage in (0, 1, 10, 2):
        checkpoint.save_state(tmp_path, stage, state_of(**learner_of(stage)))
    found = checkpoint.load_state(tmp_path, CPU)
    assert found is not None
    assert found["learner"]["network.weight"].equal(learner_of(10)["network.weight"])


@pytest.mark.parametrize("content", [b"", b"not a file of torch", b"PK\x03\x04 broken"])
def test_a_damaged_state_is_named_with_what_to_do(tmp_path: Path, content: bytes) -> None:
    checkpoint.save_state(tmp_path, 1, state_of(**learner_of()))
    path = tmp_path / "stage_001" / "state.pt"
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"state\.pt: missing or damaged \(its checksum is not .*overwrite=true begins"
    ):
        checkpoint.load_state(tmp_path, CPU)


def test_a_state_that_would_run_code_is_not_loaded(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "ran"),))

    evil = {"format": checkpoint.FORMAT, "learner": Evil()}
    checkpoint.write_checked(tmp_path / "stage_000" / "state.pt", lambda file: torch.save(evil, file))
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.load_state(tmp_path, CPU)
    assert not (tmp_path / "ran").exists()


def test_a_state_of_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    checkpoint.save_state(tmp_path, 0, state_of(**learner_of()))
    monkeypatch.undo()
    with pytest.raises(ValueError, match=f"written in format 99, this version reads format {checkpoint.FORMAT}"):
        checkpoint.load_state(tmp_path, CPU)


def test_missing_weights_of_a_finished_stage_are_named(tmp_path: Path) -> None:
    checkpoint.save_stage(tmp_path, 0, state_of(**learner_of()), {})
    path = tmp_path / "stage_000" / "network.safetensors"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match=r"network\.safetensors: missing or damaged"):
        checkpoint.load_state(tmp_path, CPU)
    path.unlink()
    with pytest.raises(ValueError, match=r"network\.safetensors: missing or damaged"):
        checkpoint.load_state(tmp_path, CPU)


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "bit flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif how == "missing":
        path.unlink()
    else:
        raise AssertionError(how)


@pytest.mark.parametrize("how", ["truncated", "bit flipped", "missing"])
def test_the_state_before_is_used_aloud_when_the_newest_is_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    for seed in (0, 1):
        checkpoint.save_state(tmp_path, 1, state_of(**learner_of(seed)))
    damage(tmp_path / "stage_001" / "state.pt", how)
    found = checkpoint.load_state(tmp_path, CPU)
    assert found is not None
    assert found["learner"]["network.weight"].equal(learner_of(0)["network.weight"])
    said = capsys.readouterr().err
    if how != "missing":
        assert "stage_001/state.pt: missing or damaged" in said
        assert "passed over for the checkpoint before it" in said


@pytest.mark.parametrize("name", ["network.safetensors", "state.pt", "checksums.json"])
def test_a_damaged_stage_leads_back_to_the_stage_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    for stage in (0, 1):
        checkpoint.save_stage(tmp_path, stage, state_of(**learner_of(stage)), {})
    damage(tmp_path / "stage_001" / name, "bit flipped" if name != "checksums.json" else "truncated")
    found = checkpoint.load_state(tmp_path, CPU)
    assert found is not None
    assert found["learner"]["network.weight"].equal(learner_of(0)["network.weight"])
    assert f"stage_001/{name}: missing or damaged" in capsys.readouterr().err


def test_a_state_of_another_protocol_or_format_is_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save_state(tmp_path, 0, {**state_of(**learner_of(0)), "protocol": "mine"})
    checkpoint.save_state(tmp_path, 0, {**state_of(**learner_of(1)), "protocol": "other"})
    found = checkpoint.load_state(tmp_path, CPU, "mine")
    assert found is not None
    assert found["protocol"] == "mine"
    assert "of protocol other, this run has mine" in capsys.readouterr().err
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    checkpoint.save_state(tmp_path, 1, state_of(**learner_of()))
    monkeypatch.undo()
    found = checkpoint.load_state(tmp_path, CPU, "mine")
    assert found is not None
    assert "written in format 99" in capsys.readouterr().err


def test_a_kill_between_any_two_steps_of_saving_leaves_a_good_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace
    for kill_at in (1, 2, 3):  # of the checksums, of the old state, of the new one
        run = tmp_path / str(kill_at)
        checkpoint.save_state(run, 0, state_of(**learner_of(0)))
        calls = 0

        def killed(old: Path, new: Path, kill_at: int = kill_at) -> None:
            nonlocal calls
            calls += 1
            if calls == kill_at:
                raise KeyboardInterrupt
            replace(old, new)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed)
            with pytest.raises(KeyboardInterrupt):
                checkpoint.save_state(run, 0, state_of(**learner_of(1)))
        found = checkpoint.load_state(run, CPU)
        assert found is not None
        assert found["learner"]["network.weight"].equal(learner_of(0)["network.weight"])
        checkpoint.save_state(run, 0, state_of(**learner_of(2)))
        found = checkpoint.load_state(run, CPU)
        assert found is not None
        assert found["learner"]["network.weight"].equal(learner_of(2)["network.weight"])


def test_two_states_are_kept_of_a_run(tmp_path: Path) -> None:
    for stage in (0, 1):
        for seed in range(3):
            checkpoint.save_state(tmp_path, stage, state_of(**learner_of(seed)))
    assert sorted(path.name for path in tmp_path.rglob("state*.pt")) == ["state.previous.pt", "state.pt", "state.pt"]
