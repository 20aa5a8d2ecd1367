import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cil
from cil.predict import Prediction, Unreadable, main, predict
from tests.conftest import RunTiny

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 8, 8)).astype(np.uint8)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three pictures of the network's own size, one of them in a folder below."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for path, pixels in zip(("a.png", "b.png", "more/c.bmp"), PIXELS, strict=True):
        Image.fromarray(pixels).save(folder / path)
    return folder


def test_confidences_sum_to_one_and_order_the_classes_as_the_scores_do(whole_run: RunTiny) -> None:
    model = cil.load(whole_run())
    images = PIXELS[:, None]
    shares = model.predict_proba(images)
    assert torch.allclose(shares.sum(dim=1), torch.ones(3))
    assert shares.argsort(dim=1).equal(model.logits(images).argsort(dim=1))
    assert [best[0][0] for best in model.top_k(images, 2)] == model.predict(images)
    assert [len(best) for best in model.top_k(images, 99)] == [6, 6, 6]
    with pytest.raises(ValueError, match="k must be at least 1, found 0"):
        model.top_k(images, 0)


def test_the_confidence_of_a_nearest_mean_is_the_softmax_of_minus_the_squared_distance(whole_run: RunTiny) -> None:
    model = cil.load(whole_run("model=resnet8", learner="icarl"))
    images = torch.from_numpy(PIXELS[:, None])
    assert model.means is not None
    with torch.no_grad():
        features = torch.nn.functional.normalize(model.network(model.transform.test(images)).embedding)
    distances = torch.cdist(features, model.means).square()
    assert torch.allclose(model.predict_proba(images), torch.softmax(-distances, dim=1), atol=1e-6)


def test_files_and_arrays_of_the_same_pixels_get_the_same_answer(whole_run: RunTiny, pictures: Path) -> None:
    model = cil.load(whole_run())
    np.savez(pictures / "x.npz", x=PIXELS)
    np.save(pictures / "x.npy", PIXELS[..., None])
    files = [pictures / "a.png", pictures / "b.png", pictures / "more/c.bmp", pictures / "x.npz", pictures / "x.npy"]
    found = list(predict(model, files, top_k=3, batch_size=2))
    assert all(isinstance(one, Prediction) for one in found)
    expected = model.top_k(PIXELS[:, None], 3)
    for one, best in zip(found, [*expected, *expected, *expected], strict=True):
        assert isinstance(one, Prediction)
        assert [name for name, _, _ in one.classes] == [name for name, _ in best]
        assert [share for _, _, share in one.classes] == pytest.approx([share for _, share in best], abs=1e-6)
    assert [Path(one.source).name for one in found[3:5]] == ["x.npz[0]", "x.npz[1]"]


def test_damaged_files_are_named_and_do_not_stop_the_others(
    whole_run: RunTiny, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "a.png").write_bytes(b"no image")
    np.save(pictures / "floats.npy", PIXELS / 255)
    (pictures / "damaged.npz").write_bytes(b"no archive")
    arrays = [str(pictures / "floats.npy"), str(pictures / "damaged.npz")]
    assert main([str(whole_run()), str(pictures), *arrays, "--format", "json"]) == 1
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert [Path(one["image"]).name for one in found["predictions"]] == ["b.png", "c.bmp"]
    assert [Path(one["image"]).name for one in found["unreadable"]] == ["a.png", "floats.npy", "damaged.npz"]
    assert "a.png cannot be read as an image" in said.err
    assert "holds float64 [3, 8, 8, 1], the network of the run takes uint8 [images, 8, 8]" in said.err
    assert said.err.splitlines()[-1] == "cil.predict: 3 of 5 files could not be read"


def test_the_table_the_json_and_the_csv_say_the_same(
    whole_run: RunTiny, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(whole_run()), str(pictures), "--top-k", "2"]
    for name in ("out.json", "out.csv"):  # the format is that of the name
        assert main([*command, "-o", str(tmp_path / name)]) == 0
    assert main(command) == 0
    table = capsys.readouterr().out
    found = json.loads((tmp_path / "out.json").read_text())
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    assert found["class_names"] == list("012345")
    assert found["stage"] == 2
    for number, one in enumerate(found["predictions"]):
        assert len(one["classes"]) == 2
        best, row = one["classes"][0], rows[2 * number]
        assert (row["image"], row["rank"], row["class"]) == (one["image"], "1", best["class"])
        assert float(row["confidence"]) == pytest.approx(best["confidence"], abs=1e-6)
        assert f"{one['image']}" in table
        assert f"{best['confidence']:.3f}" in table


def test_an_earlier_stage_knows_fewer_classes(
    whole_run: RunTiny, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(whole_run()), str(pictures), "--stage", "0", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["stage"] == 0
    assert {one["class"] for image in found["predictions"] for one in image["classes"]} == {"0", "1"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.png"], "there is no file or folder nowhere.png"),
        (["."], "holds no image files"),
        (["a.png", "--top-k", "0"], "top-k and batch-size must be at least 1, found 0 and 64"),
        (["a.png", "--stage", "9"], "stage 9 is not there"),
        (["a.png", "-o", "there.csv"], "there.csv exists: choose another name, or --overwrite"),
    ],
)
def test_mistakes_are_one_message_and_code_2(
    whole_run: RunTiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    run = whole_run().resolve()
    monkeypatch.chdir(tmp_path)
    if words[0] != ".":
        Image.fromarray(PIXELS[0]).save("a.png")
    Path("there.csv").write_text("mine")
    assert main([str(run), *words]) == 2
    assert message in capsys.readouterr().err
    assert Path("there.csv").read_text() == "mine"


def test_only_unreadable_files_are_a_failure_without_a_prediction(whole_run: RunTiny, tmp_path: Path) -> None:
    (tmp_path / "bad.png").touch()
    (found,) = predict(cil.load(whole_run()), [tmp_path / "bad.png"])
    assert isinstance(found, Unreadable)
