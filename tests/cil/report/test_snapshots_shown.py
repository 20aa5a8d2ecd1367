"""What the page shows of a run that kept snapshots, without torch and without a browser."""

import base64
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cil.report import inside, pictures, write_report
from cil.report.drawing import THEME
from cil.report.inside import embedding_map, when_new
from cil.report.snapshots import Snapshot, read_snapshots
from tests.cil.report.conftest import write_run, write_snapshots
from tests.cil.report.test_pages import text_of

MakeRun = Callable[..., Path]
SECTIONS = (
    "Confusion between tasks",
    "Confusion between classes",
    "Accuracy of each class",
    "Class by class",
    "Map of the embeddings",
    "Distances between task tokens",
    "Right and wrong",
    "Exemplars",
)


@pytest.fixture(scope="module")
def page(with_snapshots: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(with_snapshots, tmp_path_factory.mktemp("page") / "page.html")


@pytest.fixture
def last(with_snapshots: Path) -> Snapshot:
    return read_snapshots(with_snapshots)[-1]


def test_the_page_has_every_section_of_a_snapshot(page: Path) -> None:
    text = text_of(page)
    for title in SECTIONS:
        assert title in text
    assert "✗ one, taken for zero 0.50" in text
    assert "class activation map of the answer" in text


def test_a_run_of_an_older_version_has_a_page_without_them(make_run: MakeRun) -> None:
    text = text_of(write_report(make_run()))
    assert not [title for title in SECTIONS if title in text]
    assert "Accuracy matrix" in text


def test_the_same_snapshots_give_the_same_bytes(page: Path, with_snapshots: Path, tmp_path: Path) -> None:
    assert write_report(with_snapshots, tmp_path / "page.html").read_bytes() == page.read_bytes()


def test_class_by_class_says_what_a_class_was_and_is(page: Path, with_snapshots: Path, last: Snapshot) -> None:
    (table,) = re.findall(r'<table [^>]*id="classes".*?</table>', page.read_text(), flags=re.DOTALL)
    rows = re.findall(r"<tr><td.*?</tr>", table)
    now, then = last.class_accuracy, when_new(read_snapshots(with_snapshots))
    assert len(rows) == 10
    for row, a, b in zip(rows, then, now, strict=True):
        assert f">{100 * a:.1f} %<" in row
        assert f">{100 * b:.1f} %<" in row
    wrong = last.confusion[3].copy()
    wrong[3] = 0
    assert last.class_names[int(wrong.argmax())] in rows[3]


def test_the_cells_of_a_confusion_matrix_are_told(page: Path, last: Snapshot) -> None:
    (told,) = re.findall(r'<script type="application/json">(.*?)</script>', page.read_text())
    facts = json.loads(told)
    found = np.zeros_like(last.confusion)
    for row, column, count in facts["entries"]:
        found[row, column] = count
    assert (found == last.confusion).all()
    assert facts["totals"] == [30] * 10
    left, top, right, bottom = facts["box"]
    assert 0 < left < right <= 1
    assert 0 <= top < bottom < 1


def test_names_in_data_cannot_end_the_script(tmp_path: Path) -> None:
    names = ["</script><b>", "a & b", *[str(index) for index in range(8)]]
    html = write_report(write_snapshots(write_run(tmp_path / "run"), names=names)).read_text()
    assert "</script><b>" not in html
    (told,) = re.findall(r'<script type="application/json">(.*?)</script>', html)
    assert json.loads(told)["names"][:2] == names[:2]


def test_many_classes_are_pixels_and_their_numbers_are_bounded(tmp_path: Path) -> None:
    names = [f"class {index}" for index in range(500)]
    run = write_snapshots(write_run(tmp_path / "run", stages=2), 2, names=names, per_task=250)
    page = write_report(run)
    html = page.read_text()
    assert html.count("<image ") == 1
    (told,) = re.findall(r'<script type="application/json">(.*?)</script>', html)
    assert len(json.loads(told)["entries"]) <= inside.MOST_TOLD_CELLS
    assert page.stat().st_size < 2_000_000


def test_classes_that_are_one_task_have_no_before(tmp_path: Path) -> None:
    """As in a run of static distillation."""
    run = write_snapshots(write_run(tmp_path / "run", stages=1), 1, per_task=10)
    text = text_of(write_report(run))
    assert np.isnan(when_new(read_snapshots(run))).all()
    assert "Accuracy, and the most frequent mistake" in text
    assert "Confusion between classes" in text
    assert not [words for words in ("Confusion between tasks", "old classes of", "when its task") if words in text]


def test_points_of_the_map_are_where_they_were(last: Snapshot) -> None:
    first, second = embedding_map(last), embedding_map(last)
    assert first is not None
    assert second is not None
    assert first.inline() == second.inline()


def test_pictures_are_the_images_that_were_kept(last: Snapshot) -> None:
    images = last.array("examples")
    assert images is not None
    for example, image in zip(pictures.examples(last), images, strict=True):
        found = Image.open(io.BytesIO(base64.b64decode(example.image.split(",")[1])))
        assert (np.moveaxis(np.asarray(found), 2, 0) == image).all()
    assert [(kept.name, kept.num_images) for kept in pictures.exemplars(last)] == [("zero", 2), ("one", 1)]


def test_images_of_one_channel_are_grey(last: Snapshot) -> None:
    grey = pictures._rgb(np.arange(64, dtype=np.uint8).reshape(1, 8, 8))
    assert grey.shape == (8, 8, 3)
    assert (grey[..., 0] == grey[..., 2]).all()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("facts.json", b"{", "facts.json cannot be read"),
        ("facts.json", b"[1]", "facts.json must hold a mapping, found list"),
        ("arrays.npz", b"PK", "arrays.npz cannot be read"),
        ("arrays.npz", b"", "arrays.npz cannot be read"),
    ],
)
def test_a_damaged_snapshot_is_named(
    with_snapshots: Path, tmp_path: Path, file: str, content: bytes, message: str
) -> None:
    run = shutil.copytree(with_snapshots, tmp_path / "run")
    (run / "stage_004" / "report" / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        write_report(run)


def test_a_missing_array_file_is_named(with_snapshots: Path, tmp_path: Path) -> None:
    run = shutil.copytree(with_snapshots, tmp_path / "run")
    (run / "stage_004" / "report" / "arrays.npz").unlink()
    with pytest.raises(ValueError, match=r"arrays\.npz cannot be read"):
        write_report(run)


def test_snapshots_of_another_version_are_passed_over(with_snapshots: Path, tmp_path: Path) -> None:
    run = shutil.copytree(with_snapshots, tmp_path / "run")
    path = run / "stage_004" / "report" / "facts.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    assert [snapshot.stage for snapshot in read_snapshots(run)] == [0, 1, 2, 3]


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    channels = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("theme", [0, 1])
@pytest.mark.parametrize("name", [name for name in THEME if name not in ("line", "paper")])
def test_every_colour_can_be_read_on_the_page(name: str, theme: int) -> None:
    """Text has a contrast of at least 4.5, marks of at least 3 (WCAG 2.2, AA)."""
    light, dark = sorted((luminance(THEME[name][theme]), luminance(THEME["paper"][theme])), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= (4.5 if name in ("ink", "soft") else 3)
