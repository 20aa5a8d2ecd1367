from dataclasses import replace
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch
from einops import rearrange
from einops.layers.torch import Reduce
from PIL import Image
from torch import nn

import cil
from cil.build import open_data
from cil.cam import class_chooser, contact_sheet, draw, explain, heated, main, of_files, of_test_set
from cil.config import Data
from cil.loading import Model
from cil.models.backbones.timm_model import TimmNetwork
from cil.models.network import BackboneNetwork, TapPaths
from kd.cam import overlay
from tests.conftest import RunTiny

TOP, LEFT, SIDE = 4, 10, 3  # of the bright patch, in an image of 16 x 16


@pytest.fixture(scope="module")
def run(whole_run: RunTiny) -> Path:
    """Three tasks of two digits."""
    return whole_run("model=resnet8", learner="replay")


@pytest.fixture(scope="module")
def model(run: Path) -> Model:
    return cil.load(run)


@pytest.fixture(scope="module")
def dkt_run(whole_run: RunTiny) -> Path:
    return whole_run()


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    """The run in a folder of its own, to write into."""
    return copytree(run, tmp_path / "run")


def brightness_model(model: Model, *, pooled: bool = True) -> Model:
    """A network made by hand: one class is bright, the other dark, by the mean grey."""
    maps: nn.Module = nn.Identity() if pooled else nn.AvgPool2d(16)
    backbone = nn.Sequential(maps, Reduce("b c h w -> b c", "mean"))
    network = BackboneNetwork((1, 16, 16), backbone, 1, taps=TapPaths({"last": "backbone.0"}))
    network.grow(2)
    network.head.assign(torch.tensor([[1.0], [-1.0]]), torch.zeros(2))
    return replace(model, network=network, class_names=("bright", "dark"), class_labels=(0, 1))


def patch(side: int = 16) -> np.ndarray:
    """A bright patch on dark ground."""
    image = np.zeros((side, side), dtype=np.uint8)
    image[TOP : TOP + SIDE, LEFT : LEFT + SIDE] = 255
    return image


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def pictures_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_maps_point_at_the_evidence_of_a_network_made_by_hand(model: Model, tmp_path: Path) -> None:
    by_hand = brightness_model(model)
    (found,) = explain(by_hand, of_files(by_hand, [save(tmp_path / "patch.png", patch())]))
    heat = overlay(found.maps[None], (16, 16))[0]
    inside = torch.from_numpy(patch() > 0)
    assert heat[0][inside].eq(1).all()
    assert heat[0][~inside].eq(0).all()
    assert heat[1].equal(1 - heat[0])


def test_a_picture_is_red_at_the_evidence_and_blue_elsewhere() -> None:
    grey = np.full((16, 16, 3), 128, dtype=np.uint8)
    shown = heated(grey, torch.from_numpy(patch() / 255.0)).astype(int)
    red_over_blue = shown[..., 0] - shown[..., 2]
    assert (red_over_blue[patch() > 0] > 40).all()
    assert (red_over_blue[patch() == 0] < 0).all()


def test_panels_are_the_enlarged_image_and_one_map_for_each_class(model: Model, tmp_path: Path) -> None:
    by_hand = brightness_model(model)
    (found,) = explain(by_hand, of_files(by_hand, [save(tmp_path / "patch.png", patch())]))
    alone, both = (draw(found, classes, by_hand.class_names) for classes in ([], [0, 1]))
    enlarged = patch().repeat(12, axis=0).repeat(12, axis=1)  # 192 pixels
    image = both[-10 - 192 : -10, 10 : 10 + 192]
    assert (image == enlarged[..., None]).all()
    assert both.shape == (alone.shape[0], alone.shape[1] + 2 * (192 + 10), 3)


def test_map_means_and_biases_are_what_the_probabilities_are_made_of(model: Model) -> None:
    found = [one for one, _ in zip(explain(model, of_test_set(model)), range(20), strict=False)]
    assert found[0].maps.shape == (6, 2, 2)
    for one in found:
        scores = one.maps.mean((1, 2)) + model.network.head.bias
        torch.testing.assert_close(scores.softmax(0), one.probabilities, rtol=1e-4, atol=1e-6)
        names = model.predict(one.example.pixels[None])
        assert [model.class_names[one.predicted]] == names


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_test_images_are_those_of_the_classes_known_so_far_each_once(run: Path, stage: int) -> None:
    model = cil.load(run, stage)
    test = open_data(model.config).test
    examples = list(of_test_set(model))
    ids = [int(example.name.removeprefix("test_")) for example in examples]
    assert sorted(ids) == [i for i, label in enumerate(test.labels.tolist()) if label in model.class_labels]
    assert ids != sorted(ids)
    for index, example in zip(ids, examples, strict=True):
        assert model.class_labels[example.label] == test.labels[index]  # type: ignore[index]
        assert example.pixels.equal(test.fetch(torch.tensor([index]))[0])


@pytest.mark.parametrize(("word", "right"), [("test:right", True), ("test:wrong", False)])
def test_right_and_wrong_predictions_get_their_pictures(
    copied: Path, model: Model, word: str, right: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(copied), word, "--count", "3"]) == 0
    folder = copied / "cam" / word.replace(":", "_")
    assert capsys.readouterr().out == f"{folder / 'overview.png'}\n"
    names = pictures_in(folder)
    assert len(names) == 4
    data = open_data(model.config)
    for name in names[1:]:
        index = torch.tensor([int(name[5:10])])
        truth = data.class_names[int(data.test.labels[index])]
        assert (model.predict(data.test.fetch(index)) == [truth]) is right
        # image and predicted class, and the true class where it is another
        assert pixels_of(folder / name).shape[1] == 10 + (2 if right else 3) * (192 + 10)


def test_all_images_are_taken_where_there_are_fewer(
    run: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [example for example, _ in zip(of_test_set(model), range(12), strict=False)]
    wrong = [f"{one.example.name}.png" for one in explain(model, few) if not one.is_right]
    assert 0 < len(wrong) < 12
    monkeypatch.setattr("cil.cam.of_test_set", lambda model: iter(few))
    assert main([str(run), "test:wrong", "--count", "12", "-o", str(tmp_path)]) == 0
    assert pictures_in(tmp_path) == ["overview.png", *sorted(wrong)]


def test_the_same_command_writes_the_same_bytes_over_its_own_pictures(run: Path, tmp_path: Path) -> None:
    command = [str(run), "test", "--count", "2", "-o", str(tmp_path)]
    assert main(command) == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(command) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_overview_shows_every_picture(run: Path, tmp_path: Path) -> None:
    assert main([str(run), "test", "--count", "2", "-o", str(tmp_path)]) == 0
    overview, first, second = (pixels_of(path) for path in sorted(tmp_path.iterdir()))
    sheets = [contact_sheet(pair) for pair in ([first, second], [second, first])]  # whichever was drawn first
    assert any(np.array_equal(overview, sheet) for sheet in sheets)


def test_a_contact_sheet_goes_row_by_row_on_white() -> None:
    pictures = [np.full((2, width, 3), grey, dtype=np.uint8) for grey, width in [(10, 2), (20, 2), (30, 1)]]
    assert contact_sheet(pictures)[..., 0].tolist() == [
        [10, 10, 20, 20],
        [10, 10, 20, 20],
        [30, 255, 255, 255],
        [30, 255, 255, 255],
    ]


def test_files_and_folders_of_any_size_and_kind(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (30, 50, 3)).astype(np.uint8)
    single = save(tmp_path / "single.webp", photo)
    save(tmp_path / "folder" / "b" / "grey.png", photo[..., 0])
    save(tmp_path / "folder" / "a.JPG", photo)
    save(tmp_path / "folder" / "clear.png", photo[..., [0, 1, 2, 0]])
    (tmp_path / "folder" / "notes.txt").write_text("no image")
    assert main([str(run), str(single), str(tmp_path / "folder"), "-o", str(tmp_path / "out")]) == 0
    expected = ["000_single.png", "001_a.png", "002_grey.png", "003_clear.png", "overview.png"]
    assert pictures_in(tmp_path / "out") == expected
    assert pixels_of(tmp_path / "out" / "001_a.png").shape[1] == 10 + 2 * (192 + 10)
    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'overview.png'}\n"


def test_what_the_count_leaves_out_is_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "abc":
        save(tmp_path / "in" / f"{name}.png", patch())
    assert main([str(run), str(tmp_path / "in"), "--count", "2", "-o", str(tmp_path / "out")]) == 0
    assert pictures_in(tmp_path / "out") == ["000_a.png", "001_b.png", "overview.png"]
    assert capsys.readouterr().out.startswith("1 more images were left out; --count shows more\n")


def test_a_file_of_the_input_size_is_seen_as_it_is(model: Model, tmp_path: Path) -> None:
    test = open_data(model.config).test.fetch(torch.arange(3))
    files = [save(tmp_path / f"{i}.png", image[0].numpy()) for i, image in enumerate(test)]
    assert all(example.pixels.equal(image) for example, image in zip(of_files(model, files), test, strict=True))


def test_files_of_a_run_on_image_folders_are_framed_by_its_config(model: Model, tmp_path: Path) -> None:
    parameters = {"name": "image_folder", "path": "elsewhere", "image_size": 16, "resize": 32}
    config = model.config.model_copy(update={"data": Data(**parameters)})
    network = BackboneNetwork((3, 16, 16), nn.Identity(), 1)
    photo = np.random.default_rng(0).integers(0, 256, (32, 64, 3)).astype(np.uint8)
    file = save(tmp_path / "photo.png", photo)
    (example,) = of_files(replace(model, config=config, network=network), [file])
    assert rearrange(example.pixels, "c h w -> h w c").numpy().tolist() == photo[8:24, 24:40].tolist()


def test_classes_are_chosen_by_name(model: Model) -> None:
    index = {name: i for i, name in enumerate(model.class_names)}
    assert class_chooser(model, ["3", "predicted", "0", "label"]) == [index["3"], "predicted", index["0"], "label"]


def test_named_classes_are_shown_beside_each_other_and_once(run: Path, tmp_path: Path) -> None:
    file = save(tmp_path / "patch.png", patch())
    out = tmp_path / "out"
    assert main([str(run), str(file), "-o", str(out), "--classes", "0", "1", "2", "0"]) == 0
    assert pixels_of(out / "000_patch.png").shape[1] == 10 + 4 * (192 + 10)


def test_a_static_run_has_pictures_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cil.cli import main as train

    monkeypatch.setattr("cil.report.write_report", lambda folder: folder / "report.html")
    settings = ["optim.epochs=1", "optim.schedule.milestones=[]", "precision=fp32", f"runs_dir={tmp_path}", "name=run"]
    assert train(["data=digits", "student=resnet8", *settings], "distill.py", "distill") == 0
    assert main([str(tmp_path / "run"), "test:wrong", "--count", "1"]) == 0
    assert len(pictures_in(tmp_path / "run" / "cam" / "test_wrong")) == 2


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one message of a command that is refused."""
    capsys.readouterr()
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("cil.cam: ")
    assert said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.png"], "there is no file or folder nowhere.png: give image files, folders of them, or one of test"),
        (["test:bad"], "there is no file or folder test:bad"),
        (["test", "a.png"], "test stands alone, found it with 1 more"),
        (["test", "--count", "0"], "--count must be at least 1, found 0"),
        (["test", "--stage", "3"], "stage 3 is not there; stages 0 to 2 are finished"),
        (["test", "--classes", "seven"], "--classes: unknown class 'seven'"),
        (["a.png", "--classes", "label"], "--classes label: nobody knows the classes of files"),
        (["test", "--device", "abacus"], "device=abacus: not usable here"),
    ],
)
def test_mistakes_are_refused_in_one_sentence(
    run: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal([str(run), *words], capsys)
    assert not (run / "cam").exists()


def test_what_is_no_image_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty holds no image files (.jpg" in refusal([str(run), str(tmp_path / "empty")], capsys)
    (tmp_path / "text.png").write_text("no image")
    assert "text.png cannot be read as an image" in refusal([str(run), str(tmp_path / "text.png")], capsys)
    assert "no run with a finished stage" in refusal([str(tmp_path), "test"], capsys)


def test_a_network_without_a_pooled_map_is_refused(dkt_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal([str(dkt_run), "test"], capsys)
    assert "need a network whose linear head reads the mean of a feature map; DKTNetwork has none" in message


def timm_model(model: Model, architecture: str) -> Model:
    torch.manual_seed(0)
    network = TimmNetwork((3, 64, 64), architecture=architecture).eval()
    network.grow(6)
    return replace(model, network=network)


def test_convolutional_networks_of_timm_have_maps(model: Model, tmp_path: Path) -> None:
    of_timm = timm_model(model, "resnet18")
    (found,) = explain(of_timm, of_files(of_timm, [save(tmp_path / "patch.png", patch())]))
    assert found.maps.shape == (6, 2, 2)
    assert isinstance(of_timm.network, TimmNetwork)
    scores = found.maps.mean((1, 2)) + of_timm.network.head.bias
    torch.testing.assert_close(scores.softmax(0), found.probabilities)


@pytest.mark.parametrize("architecture", ["test_vit", "test_convnext"])
def test_transformers_and_norms_behind_the_mean_are_refused(model: Model, architecture: str) -> None:
    with pytest.raises(ValueError, match="TimmNetwork has none, as is so of transformers"):
        next(explain(timm_model(model, architecture), of_test_set(model)))


def test_maps_of_a_single_place_are_refused(model: Model, tmp_path: Path) -> None:
    by_hand = brightness_model(model, pooled=False)
    with pytest.raises(ValueError, match="have a single place at an input of 16 x 16 pixels"):
        list(explain(by_hand, of_files(by_hand, [save(tmp_path / "patch.png", patch())])))


def test_another_data_set_than_that_of_the_run_is_refused(model: Model) -> None:
    with pytest.raises(ValueError, match="the data set digits is no longer that of the run"):
        list(of_test_set(brightness_model(model)))


def test_files_need_a_square_input(model: Model, tmp_path: Path) -> None:
    network = BackboneNetwork((1, 8, 16), nn.Identity(), 1)
    with pytest.raises(ValueError, match="files are brought to a square, the network of the run takes 8 x 16 pixels"):
        list(of_files(replace(model, network=network), [save(tmp_path / "patch.png", patch())]))


def test_nothing_wrong_leaves_no_picture(
    model: Model, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = [one.example for one in explain(model, of_test_set(model)) if one.is_right]
    monkeypatch.setattr("cil.cam.of_test_set", lambda model: iter(right))
    message = refusal([str(run), "test:wrong", "-o", str(tmp_path / "out")], capsys)
    assert "test:wrong: every prediction is right, so there is no image" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"mine", None])
def test_files_of_others_are_never_overwritten(
    run: Path, tmp_path: Path, content: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "overview.png"
    if content is None:
        save(mine, patch())
    else:
        mine.write_bytes(content)
    before = mine.read_bytes()
    message = refusal([str(run), "test", "--count", "1", "-o", str(tmp_path)], capsys)
    assert "overview.png exists and was not written by cil.cam: choose another folder with -o" in message
    assert pictures_in(tmp_path) == ["overview.png"]
    assert mine.read_bytes() == before
