import numpy as np
import pytest
import torch
import torchvision.transforms.v2 as T
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from cil.data.framing import ATTEMPTS, NUM_DRAWS, Framing
from cil.seeding import SampleNoise

MIDDLE_DRAWS = [0.5] * NUM_DRAWS


def framing(image_size=24, resize=30, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), interpolation="bicubic") -> Framing:
    return Framing(image_size, resize, scale, ratio, interpolation)


def picture(width=61, height=47, seed=0) -> Image.Image:
    """Smooth in large and rough in small, so that a wrong place or a wrong filter shows."""
    generator = np.random.default_rng(seed)
    spots = Image.fromarray(generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((width, height))
    return Image.fromarray(np.clip(np.asarray(spots) + generator.normal(0, 9, (height, width, 3)), 0, 255).astype("u1"))


def draws(count: int, key: int = 3) -> list[list[float]]:
    ids = torch.arange(count)
    return SampleNoise(key, ids, torch.zeros_like(ids)).uniform("test", NUM_DRAWS).tolist()


def saved(folder, image: Image.Image, name="picture.png", **options):
    image.save(folder / name, **options)
    return folder / name


@pytest.mark.parametrize("size", [(61, 47), (47, 61), (30, 30), (24, 200), (11, 7), (97, 31)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_middle_is_that_of_torchvision(tmp_path, size, interpolation):
    image = picture(*size)
    found = framing(interpolation=interpolation).read(saved(tmp_path, image), None)
    mode = T.InterpolationMode(interpolation)
    expected = T.Compose([T.Resize(30, interpolation=mode), T.CenterCrop(24)])(image)
    np.testing.assert_array_equal(found, np.asarray(expected))


def test_a_random_window_is_cut_out_and_resized_as_in_torchvision(tmp_path):
    image, frame = picture(), framing()
    left, top, right, bottom = frame.window(image.size, draws(1)[0])
    found = frame.read(saved(tmp_path, image), draws(1)[0])
    mode = T.InterpolationMode.BICUBIC
    expected = T.functional.resized_crop(image, top, left, bottom - top, right - left, [24, 24], interpolation=mode)
    assert np.abs(found.astype(int) - np.asarray(expected).astype(int)).max() > 0  # torchvision cuts before it filters
    inside = np.s_[2:-2, 2:-2]
    np.testing.assert_allclose(found[inside].astype(int), np.asarray(expected)[inside].astype(int), atol=1)


@settings(max_examples=40)
@given(st.integers(1, 500), st.integers(1, 500), st.integers(0, 2**40), st.sampled_from([0.08, 0.5, 1.0]))
def test_a_random_window_lies_in_the_picture(width, height, key, low):
    frame = framing(scale=(low, 1.0))
    left, top, right, bottom = frame.window((width, height), draws(1, key)[0])
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_random_windows_have_the_area_and_the_shape_that_are_asked_for():
    frame = framing(scale=(0.2, 0.4), ratio=(0.5, 2.0))
    boxes = np.array([frame.window((400, 300), numbers) for numbers in draws(500)])
    sides = boxes[:, 2:] - boxes[:, :2]
    areas, ratios = sides.prod(axis=1) / 120_000, sides[:, 0] / sides[:, 1]
    assert 0.19 < areas.min() < 0.21
    assert 0.39 < areas.max() < 0.41
    assert 0.49 < ratios.min() < 0.55
    assert 1.8 < ratios.max() < 2.02
    assert abs(np.log(ratios).mean()) < 0.05
    assert len(np.unique(boxes[:, 0])) > 100
    assert boxes[:, 0].min() < 5
    assert boxes[:, 2].max() > 395


def test_a_picture_too_long_for_any_window_shows_its_middle():
    assert framing(scale=(1.0, 1.0)).window((300, 10), draws(1)[0]) == (144, 0, 157, 10)
    assert framing(scale=(1.0, 1.0)).window((10, 300), draws(1)[0]) == (0, 144, 10, 157)
    assert framing(scale=(1.0, 1.0)).window((1, 1), draws(1)[0]) == (0, 0, 1, 1)
    assert len(draws(1)[0]) == 2 * ATTEMPTS + 2


def test_a_whole_picture_of_the_right_size_stays_as_it_is(tmp_path):
    image = picture(24, 24)
    frame = framing(resize=24, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    for numbers in (None, *draws(3)):
        np.testing.assert_array_equal(frame.read(saved(tmp_path, image), numbers), np.asarray(image))


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("1", "png"), ("L", "jpg"), ("LA", "png"), ("P", "gif"), ("RGBA", "webp"), ("CMYK", "jpg"), ("YCbCr", "tif")],
)
def test_every_kind_of_pixels_becomes_rgb(tmp_path, mode, kind):
    path = saved(tmp_path, picture(30, 30).convert(mode), f"picture.{kind}")
    with Image.open(path) as opened:
        expected = opened.convert("RGB").crop((3, 3, 27, 27))
    np.testing.assert_array_equal(framing().read(path, None), np.asarray(expected))


def test_a_palette_with_transparency_is_read_in_silence(tmp_path):
    image = picture(30, 30).quantize(16)
    path = saved(tmp_path, image, transparency=bytes(range(16)))
    np.testing.assert_array_equal(framing().read(path, None), np.asarray(image.convert("RGB"))[3:27, 3:27])


def test_of_sixteen_bits_the_upper_eight_stay(tmp_path):
    levels = np.random.default_rng(0).integers(0, 1 << 16, (30, 30)).astype(np.uint16)
    for name in ("picture.png", "picture.tif"):
        found = framing().read(saved(tmp_path, Image.fromarray(levels), name), None)
        np.testing.assert_array_equal(found, np.repeat((levels >> 8)[3:27, 3:27, None], 3, axis=2))


@pytest.mark.parametrize(("pixels", "problem"), [(np.float32(0.5), "floating-point"), (np.int32(70_000), "16 bits")])
def test_pixels_without_a_known_range_are_refused(tmp_path, pixels, problem):
    path = saved(tmp_path, Image.fromarray(np.full((30, 30), pixels)), "picture.tif")
    with pytest.raises(ValueError, match=f"picture.tif cannot be read .*{problem}"):
        framing().read(path, None)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("numbers", [None, MIDDLE_DRAWS])
def test_a_photograph_stands_as_its_camera_was_held(tmp_path, orientation, numbers):
    turns = Image.Transpose
    undone = {
        2: turns.FLIP_LEFT_RIGHT,
        3: turns.ROTATE_180,
        4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE,
        6: turns.ROTATE_90,
        7: turns.TRANSVERSE,
        8: turns.ROTATE_270,
    }
    upright = picture()
    stored = upright.transpose(undone[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = framing().read(saved(tmp_path, stored, exif=exif), numbers)
    np.testing.assert_array_equal(found, framing().read(saved(tmp_path, upright, "upright.png"), numbers))


@pytest.mark.parametrize("size", [(1203, 901), (640, 480), (130, 97)])
@pytest.mark.parametrize("numbers", [None, *draws(4)])
def test_a_large_jpeg_is_decoded_small_and_looks_the_same(tmp_path, monkeypatch, size, numbers):
    asked, draft = [], JpegImageFile.draft
    path = saved(tmp_path, picture(*size), "picture.jpg", quality=95)
    whole = framing().read(saved(tmp_path, Image.open(path), "picture.png"), numbers)
    monkeypatch.setattr(JpegImageFile, "draft", lambda self, *words: asked.append(draft(self, *words)))
    found = framing().read(path, numbers)
    assert np.abs(found.astype(int) - whole.astype(int)).mean() < 2
    if numbers is None:
        assert bool(asked) == (size[1] >= 2 * 2 * 30)


@pytest.mark.parametrize("name", ["two words.jpg", "Füchse – 狐.jpg", "a\nb.jpg", "100%.jpg"])
def test_any_name_will_do(tmp_path, name):
    found = framing().read(saved(tmp_path, picture(), name), None)
    np.testing.assert_array_equal(found, framing().read(saved(tmp_path, picture(), "plain.jpg"), None))


def test_a_file_that_is_no_image_is_named_in_one_line(tmp_path):
    whole = saved(tmp_path, picture(200, 200), "whole.jpg").read_bytes()
    damaged = {
        "empty.jpg": b"",
        "words.png": b"not an image\n" * 50,
        "half.jpg": whole[: len(whole) // 2],
        "head.jpg": whole[:30],
    }
    png = saved(tmp_path, picture(200, 200), "whole.png").read_bytes()
    damaged |= {"half.png": png[: len(png) // 2], "flipped.png": png[:60] + b"????" + png[64:]}
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read as an image: ") as caught:
            framing().read(tmp_path / name, None)
        assert str(caught.value).startswith(str(tmp_path / name))
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"gone\.jpg cannot be read as an image"):
        framing().read(tmp_path / "gone.jpg", None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 31}, "data.resize must be at least data.image_size.*found 30 and 31"),
        ({"image_size": 0}, "found 30 and 0"),
        ({"scale": (0.0, 1.0)}, r"data.scale must be .* found \(0.0, 1.0\)"),
        ({"scale": (0.5, 0.4)}, "data.scale"),
        ({"scale": (0.5, 1.1)}, "data.scale"),
        ({"ratio": (2.0, 1.0)}, r"data.ratio must be .* found \(2.0, 1.0\)"),
        ({"ratio": (0.0, 1.0)}, "data.ratio"),
    ],
)
def test_a_number_out_of_range_is_refused_by_its_key(changes, message):
    with pytest.raises(ValueError, match=message):
        framing(**changes)
