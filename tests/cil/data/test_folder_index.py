import json
import os
import warnings
from pathlib import Path

import pytest

from cil.data import folder_index
from cil.data.folder_index import INDEX_NAME, class_folders, image_files

CLASSES = [f"class {k:02d}" for k in range(50)]


def settle(folder: Path) -> None:
    """Let every folder have been changed an hour ago."""
    for place, _, _ in os.walk(folder):
        hour_ago = os.stat(place).st_mtime_ns - 3600 * 10**9
        os.utime(place, ns=(hour_ago, hour_ago))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Twenty empty files in each of 50 classes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in CLASSES:
        (tmp_path / "data" / name).mkdir(parents=True)
        for k in range(20):
            (tmp_path / "data" / name / f"{k}.JPEG").touch()
    settle(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def listed(monkeypatch):
    """The folders that are listed, as they are."""
    found = []
    scandir = os.scandir
    monkeypatch.setattr(folder_index.os, "scandir", lambda place: found.append(Path(place).name) or scandir(place))
    return found


def test_the_second_start_lists_no_class_folder(folder, listed):
    first = image_files(folder, class_folders(folder))
    assert listed == ["data", *CLASSES]
    listed.clear()
    assert image_files(folder, class_folders(folder)) == first
    assert listed == ["data"]
    assert sum(map(len, first.values())) == 1000
    assert first["class 07"][:2] == [("class 07/0.JPEG", 0), ("class 07/1.JPEG", 0)]


def test_only_what_changed_is_listed_again(folder, listed):
    image_files(folder, CLASSES)
    listed.clear()
    (folder / "class 03" / "new.png").write_bytes(b"12345")
    (folder / "class 05" / "0.JPEG").unlink()
    found = image_files(folder, CLASSES)
    assert sorted(listed) == ["class 03", "class 05"]
    assert ("class 03/new.png", 5) in found["class 03"]
    assert len(found["class 05"]) == 19


def test_new_and_removed_classes_are_seen(folder, listed):
    image_files(folder, CLASSES)
    (folder / "class 00").rename(folder / "other")
    settle(folder / "other")
    listed.clear()
    assert class_folders(folder)[-1] == "other"
    found = image_files(folder, class_folders(folder))
    assert listed == ["data", "data", "other"]
    assert found["other"][0] == ("other/0.JPEG", 0)
    assert "class 00" not in found


def test_other_classes_of_a_folder_stay_remembered(folder, listed):
    image_files(folder, CLASSES[:10])
    image_files(folder, CLASSES[5:])
    listed.clear()
    image_files(folder, CLASSES)
    assert listed == []


def test_a_folder_that_has_just_changed_is_not_trusted(folder, listed):
    (folder / "class 03" / "new.png").touch()
    image_files(folder, CLASSES)
    listed.clear()
    image_files(folder, CLASSES)
    assert listed == ["class 03"]


def test_files_may_lie_deeper_and_others_are_passed_over(folder):
    (folder / "class 03" / "inner").mkdir()
    for name in ("inner/a.png", "notes.txt", ".hidden.png", "Thumbs.db"):
        (folder / "class 03" / name).touch()
    (folder / ".git").mkdir()
    names = [name for name, _ in image_files(folder, CLASSES)["class 03"]]
    assert names == sorted([f"class 03/{k}.JPEG" for k in range(20)] + ["class 03/inner/a.png"])
    assert class_folders(folder) == CLASSES


def test_names_of_every_kind_come_back(folder):
    names = ["Füchse – 狐.png", "a\nb.png", 'quo"te.png', os.fsdecode(b"latin-\xe9.png")]
    for name in names:
        (folder / "class 03" / name).touch()
    settle(folder)
    first = image_files(folder, CLASSES)
    assert {f"class 03/{name}" for name in names} < {name for name, _ in first["class 03"]}
    assert image_files(folder, CLASSES) == first


def test_a_link_to_a_folder_around_it_is_refused(folder):
    (folder / "class 03" / "loop").symlink_to(folder / "class 03", target_is_directory=True)
    with pytest.raises(ValueError, match=r"class 03/loop is a link to a folder that it lies in"):
        image_files(folder, CLASSES)


@pytest.mark.parametrize("damage", [b"", b"{}", b"half", b"changed"])
def test_a_damaged_index_is_made_anew_and_that_is_said(folder, listed, damage):
    first = image_files(folder, CLASSES)
    index = folder / INDEX_NAME
    content = index.read_bytes()
    index.write_bytes(
        {b"half": content[: len(content) // 2], b"changed": content.replace(b"7.JPEG", b"x.JPEG")}.get(damage, damage)
    )
    listed.clear()
    with pytest.warns(UserWarning, match=r"\.cil_index\.json is damaged: the folders are listed again"):
        assert image_files(folder, CLASSES) == first
    assert len(listed) == len(CLASSES)
    listed.clear()
    image_files(folder, CLASSES)
    assert listed == []


def test_what_cannot_be_written_beside_the_data_is_kept_in_the_cache(folder, listed, monkeypatch, tmp_path):
    write = Path.write_bytes

    def refuse(self, content):
        if self.is_relative_to(folder):
            raise PermissionError(13, "read-only", str(self))
        return write(self, content)

    monkeypatch.setattr(Path, "write_bytes", refuse)
    image_files(folder, CLASSES)
    assert not (folder / INDEX_NAME).exists()
    (kept,) = (tmp_path / "cache" / "cil").iterdir()
    assert len(json.loads(kept.read_bytes().partition(b"\n")[2])) == len(CLASSES)
    listed.clear()
    image_files(folder, CLASSES)
    assert listed == []


def test_where_nothing_can_be_written_that_is_said(folder, monkeypatch):
    def refuse(self, content):
        raise OSError(28, "no space left")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.warns(UserWarning, match="every start lists them again"):
        assert len(image_files(folder, CLASSES)) == len(CLASSES)


def test_no_half_written_file_stays(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image_files(folder, CLASSES)
    assert [path.name for path in folder.iterdir() if path.is_file()] == [INDEX_NAME]
