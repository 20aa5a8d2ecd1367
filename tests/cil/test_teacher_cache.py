import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cil import teacher_cache
from cil.teacher_cache import GIB, TeacherCache

IDS = torch.tensor([40, 7, 23, 5, 11, 90, 2])
FACTS = {"weights": "c0ffee", "data": "digits", "augment": {"crop": {"padding": 1}}, "precision": "fp32"}
KEY = 0x1234

Usage = namedtuple("Usage", ["total", "used", "free"])
MakeCache = Callable[..., TeacherCache]


def said(ids: Tensor = IDS, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What a teacher says: a function of the id alone, down to the last bit."""
    rows = [torch.randn(3 + 5 + 2 * 4 * 4, generator=torch.Generator().manual_seed(int(id))) for id in ids]
    logits, embedding, maps = torch.stack(rows).to(dtype).split([3, 5, 32], dim=1)
    return {"logits": logits, "embedding": embedding, "stage0.post": maps.reshape(-1, 2, 4, 4)}


NAMES = list(said())


@pytest.fixture
def make(tmp_path: Path) -> MakeCache:
    """`make(...)` is a cache of the folder of this test."""
    return lambda facts=FACTS, ids=IDS, **keys: TeacherCache(tmp_path / "teachers", facts, ids, **keys)


def fill(cache: TeacherCache, key: int = KEY, batches: tuple[Tensor, ...] = IDS.split(3), **keys: Any) -> None:
    """One pass of a run, batch after batch."""
    for ids in batches:
        cache.begin_pass(key, NAMES)
        assert cache.read(ids) is None
        cache.write(ids, said(ids, **keys))


def is_kept(cache: TeacherCache, ids: Tensor = IDS, key: int = KEY, **keys: Any) -> bool:
    """Whether a run finds all of it, down to the bit."""
    cache.begin_pass(key, NAMES)
    found = cache.read(ids)
    if found is None:
        return False
    expected = said(ids, **keys)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype
        assert value.equal(expected[name])
        assert value.is_contiguous()
    return True


def entry(cache: TeacherCache, name: str = "logits") -> Path:
    return cache.folder / f"pass_{KEY:016x}" / name


def parts(cache: TeacherCache) -> list[Path]:
    return list(cache.folder.glob(".part-*"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_another_run_reads_what_the_teacher_said_bit_for_bit(make: MakeCache, dtype: torch.dtype) -> None:
    fill(make(), dtype=dtype)
    assert is_kept(make(), dtype=dtype)


def test_bits_that_are_no_usual_numbers_come_back_too(make: MakeCache) -> None:
    odd = torch.tensor([float("nan"), -0.0, float("inf"), -float("inf"), 1e-45, 0.0, 3.0])
    cache = make()
    cache.begin_pass(KEY, ["logits"])
    cache.write(IDS, {"logits": odd})
    cache = make()
    cache.begin_pass(KEY, ["logits"])
    found = cache.read(IDS)
    assert found is not None
    assert found["logits"].view(torch.int32).equal(odd.view(torch.int32))


def test_the_order_of_the_samples_and_the_size_of_the_batches_are_free(make: MakeCache) -> None:
    fill(make(), batches=IDS[[3, 0, 6, 5, 1, 2, 4]].split(2))
    assert is_kept(make(ids=IDS.flip(0)), IDS[[5, 1, 4]])
    assert is_kept(make(), IDS.flip(0).int())


def test_maps_come_back_as_they_lay_in_memory(make: MakeCache) -> None:
    maps = said()["stage0.post"].contiguous(memory_format=torch.channels_last)
    cache = make()
    cache.begin_pass(KEY, ["last"])
    cache.write(IDS, {"last": maps})
    found = cache.read(IDS)
    assert found is not None
    assert found["last"].equal(maps)
    assert found["last"].stride() == maps.stride()


def test_a_pass_may_be_parted_into_epochs_and_is_whole_at_the_last_row(make: MakeCache) -> None:
    cache = make()
    fill(cache, batches=IDS[:6].split(2))
    assert not is_kept(make())
    assert not entry(cache).exists()
    fill(cache, batches=(IDS[6:],))
    assert is_kept(cache)
    assert is_kept(make())


def test_passes_are_kept_apart(make: MakeCache) -> None:
    fill(make())
    assert not is_kept(make(), key=KEY + 1)


def test_a_run_that_needs_less_reads_less(make: MakeCache) -> None:
    fill(make())
    cache = make()
    cache.begin_pass(KEY, {"embedding"})
    found = cache.read(IDS[:2])
    assert found is not None
    assert found.keys() == {"embedding"}


def test_a_run_that_needs_more_adds_it(make: MakeCache) -> None:
    cache = make()
    cache.begin_pass(KEY, ["logits"])
    cache.write(IDS, said())
    written = (entry(cache) / "data.bin").stat()
    fill(make())
    assert is_kept(make())
    assert (entry(cache) / "data.bin").stat().st_ino == written.st_ino


@pytest.mark.parametrize("other", [{"facts": {**FACTS, "precision": "bf16"}}, {"ids": IDS[:6]}, {"ids": IDS + 1}])
def test_other_facts_and_other_samples_have_a_folder_of_their_own(make: MakeCache, other: dict[str, Any]) -> None:
    fill(make())
    assert make(**other).folder != make().folder
    assert not is_kept(make(**other), IDS[:0])


def test_the_facts_stand_beside_for_people(make: MakeCache) -> None:
    cache = make(facts=dict(reversed(FACTS.items())))
    assert not cache.folder.exists()
    fill(cache)
    assert json.loads((cache.folder / "facts.json").read_text())["facts"] == FACTS
    assert len(cache.folder.name) == 16


@pytest.mark.parametrize("content", ["{", '{"format": 1}'])
def test_facts_that_are_not_those_of_the_folder_are_refused(make: MakeCache, content: str) -> None:
    cache = make()
    fill(cache)
    (cache.folder / "facts.json").write_text(content)
    with pytest.raises(ValueError, match=r"facts\.json: damaged or edited, .*; remove the folder"):
        make()


def test_a_resumed_run_does_not_keep_the_pass_it_is_in_but_the_next(make: MakeCache) -> None:
    cache = make()
    fill(cache, batches=IDS[4:].split(2))
    fill(cache, key=KEY + 1)
    assert not is_kept(make())
    assert is_kept(make(), key=KEY + 1)
    assert parts(cache) == []


def test_a_sample_written_twice_does_not_stand_for_a_missing_one(make: MakeCache) -> None:
    cache = make()
    fill(cache, batches=(IDS[:6], IDS[:1]))
    assert not entry(cache).exists()


@pytest.mark.parametrize("end", ["close", "forget"])
def test_an_unfinished_pass_leaves_nothing(make: MakeCache, end: str) -> None:
    cache = make()
    fill(cache, batches=(IDS[:6],))
    assert len(parts(cache)) == 3
    if end == "close":
        cache.close()
    del cache
    assert parts(make()) == []
    assert not is_kept(make())


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(make: MakeCache) -> None:
    living = make()
    fill(living, batches=(IDS[:6],))
    left = [part.with_name(f".part-1-{k}") for k, part in enumerate(parts(living))]
    for part, copy in zip(parts(living), left, strict=True):
        shutil.copytree(part, copy)  # the same files, without the lock that the system takes from the dead
    make()
    assert len(parts(living)) == 3
    assert not any(copy.exists() for copy in left)
    fill(living, batches=(IDS[6:],))
    assert is_kept(make())


def test_of_two_writers_the_first_to_end_is_kept(make: MakeCache) -> None:
    first, second = make(), make()
    fill(first, batches=(IDS[:6],))
    fill(second, batches=(IDS[:6],))
    fill(first, batches=(IDS[6:],))
    inode = (entry(first) / "data.bin").stat().st_ino
    fill(second, batches=(IDS[6:],))
    assert (entry(first) / "data.bin").stat().st_ino == inode
    assert parts(first) == []
    assert is_kept(first)
    assert is_kept(second)


def flip_a_bit(place: Path) -> None:
    content = bytearray((place / "data.bin").read_bytes())
    content[5] ^= 1
    (place / "data.bin").write_bytes(content)


def cut(place: Path) -> None:
    os.truncate(place / "data.bin", 8)


def edit(**changes: Any) -> Callable[[Path], None]:
    def damage(place: Path) -> None:
        index = json.loads((place / "index.json").read_text())
        (place / "index.json").write_text(json.dumps({**index, **changes}))

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_bit,
        cut,
        lambda place: (place / "data.bin").unlink(),
        lambda place: (place / "index.json").unlink(),
        lambda place: (place / "index.json").write_text('{"shape": [3'),
        lambda place: (place / "index.json").write_text("[]"),
        lambda place: (place / "index.json").write_bytes(b"\xff\xfe"),
        edit(shape=[4]),
        edit(dtype="float99"),
        edit(num_rows=8),
        edit(memory_order=[1]),
        edit(blake2b="0"),
    ],
)
def test_a_damaged_entry_is_told_removed_and_made_again(
    make: MakeCache, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    fill(make())
    place = entry(make())
    damage(place)
    cache = make()
    assert not is_kept(cache)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert f"{place} is damaged" in lines[0]
    assert not place.exists()
    fill(cache)
    assert is_kept(make())
    assert capsys.readouterr().err == ""


def test_every_checksum_is_verified_once(make: MakeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(make())
    verified = []
    checksum = teacher_cache._checksum
    monkeypatch.setattr(teacher_cache, "_checksum", lambda path: (verified.append(path.parent.name), checksum(path))[1])
    cache = make()
    for key in (KEY, KEY + 1, KEY):
        cache.begin_pass(key, NAMES)
    assert cache.read(IDS) is not None
    assert verified == ["logits", "embedding", "stage0%2Epost"]


def test_a_file_cut_while_it_is_read_is_an_error(make: MakeCache) -> None:
    cache = make()
    fill(cache)
    cut(entry(cache))
    with pytest.raises(OSError, match="became shorter while it was in use"):
        cache.read(IDS)


def test_names_are_folders_of_their_own_that_lead_nowhere_else(make: MakeCache) -> None:
    names = ["a/b", "a.b", "a%2Eb", "..", "../../x", ".part-1-a", "strong.logits"]
    cache = make()
    cache.begin_pass(KEY, names)
    values = {name: torch.full((len(IDS), 1), float(k)) for k, name in enumerate(names)}
    cache.write(IDS, values)
    other = make()
    other.begin_pass(KEY, names)
    found = other.read(IDS)
    assert found is not None
    assert all(found[name].equal(values[name]) for name in names)
    assert len(list(entry(cache).parent.iterdir())) == len(names)
    assert sorted(path.name for path in cache.folder.iterdir()) == sorted(["facts.json", entry(cache).parent.name])


def test_the_line_says_sizes_before_anything_is_written(make: MakeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_cache.shutil, "disk_usage", lambda _: Usage(0, 0, 5 * GIB))
    cache = make()
    assert cache.describe(said(), 3) == (
        f"teacher cache {cache.folder}: logits 12 B, embedding 20 B, stage0.post 128 B a sample, 7 samples, 3 passes; "
        "kept: logits (2.35e-07 GiB), embedding (3.91e-07 GiB), stage0.post (2.5e-06 GiB); "
        "there already 0 GiB, free on the disk 5 GiB"
    )
    assert not cache.folder.exists()


def test_a_name_without_room_in_all_passes_is_left_to_the_teacher(
    make: MakeCache, capsys: pytest.CaptureFixture[str]
) -> None:
    maps_first = dict(reversed(said().items()))
    cache = make(max_gib=1000 / GIB)
    assert "every time: stage0.post (2.5e-06 GiB is too much for max_gib=9.31323e-07)" in cache.describe(maps_first, 3)
    fill(cache)
    assert entry(cache, "logits").exists()
    assert entry(cache, "embedding").exists()
    assert not entry(cache, "stage0%2Epost").exists()
    assert capsys.readouterr().err == ""


def test_what_is_there_takes_no_new_room(make: MakeCache) -> None:
    limit = {"max_gib": 7 * 160 / GIB}
    fill(make(**limit))
    assert "kept: logits (7.82e-08 GiB), embedding (1.3e-07 GiB), stage0.post" in make(**limit).describe(said(), 1)
    assert "every time: logits" in make(**limit).describe(said(), 2)


def test_the_limit_holds_without_a_plan_too(make: MakeCache, capsys: pytest.CaptureFixture[str]) -> None:
    cache = make(max_gib=2000 / GIB)
    for key in range(KEY, KEY + 4):
        fill(cache, key)
    kept = sum(path.stat().st_size for path in cache.folder.rglob("data.bin"))
    assert kept == 7 * (160 + 3 * 32)
    lines = capsys.readouterr().err.splitlines()
    why = "no room for 8.34e-07 GiB in max_gib=1.86265e-06 or on the disk"
    assert lines == [f"teacher cache: stage0.post is not kept from now on ({why})"]


def test_the_reserve_of_the_disk_is_left_alone(make: MakeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_cache.shutil, "disk_usage", lambda _: Usage(0, 0, GIB + 300))
    cache = make()
    assert "stage0.post (8.34e-07 GiB is too much for the disk)" in cache.describe(said(), 1)
    fill(cache)
    assert sorted(path.name for path in entry(cache).parent.iterdir()) == ["embedding", "logits"]


def test_a_full_disk_ends_the_keeping_and_not_the_run(
    make: MakeCache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = make()
    fill(cache, batches=(IDS[:3],))
    monkeypatch.setattr(teacher_cache.os, "pwrite", lambda *_: 0)
    fill(cache, batches=IDS[3:].split(2))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"teacher cache: {name} is not kept from now on (No space left on device)" for name in NAMES]
    assert parts(cache) == []


def test_a_part_removed_from_outside_is_no_entry(make: MakeCache, capsys: pytest.CaptureFixture[str]) -> None:
    cache = make()
    fill(cache, batches=(IDS[:6],))
    for part in parts(cache):
        shutil.rmtree(part)
    fill(cache, batches=(IDS[6:],))
    assert len(capsys.readouterr().err.splitlines()) == 3
    assert not is_kept(make())


def test_mistakes_are_named(make: MakeCache) -> None:
    with pytest.raises(ValueError, match=r"max_gib must be above 0, found 0\.0"):
        make(max_gib=0.0)
    with pytest.raises(ValueError, match="must differ, found 8 with 7 different ones"):
        make(ids=torch.cat([IDS, IDS[:1]]))
    with pytest.raises(ValueError, match="must not be empty"):
        make().begin_pass(KEY, [""])
    cache = make()
    cache.begin_pass(KEY, NAMES)
    with pytest.raises(ValueError, match="sample 91 is none of the 7"):
        cache.write(torch.tensor([40, 91]), said(IDS[:2]))
    cache.write(IDS[:2], said(IDS[:2]))
    with pytest.raises(ValueError, match=r"they were \[3\] of torch.float32, found \[3\] of torch.float64"):
        cache.write(IDS[2:4], said(IDS[2:4], dtype=torch.float64))
