import math

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st

from cil.data import Transform, augmentations, pixels
from cil.seeding import SampleNoise

EVERY = ["crop", "flip", "randaugment", "color_jitter", "cutout", "random_erasing"]


def noise(count: int, key: int = 1, first: int = 0, view: int = 0) -> SampleNoise:
    ids = torch.arange(first, first + count)
    return SampleNoise(key, ids, torch.full_like(ids, view))


def photos(count: int, channels: int = 3, side: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, channels, side, side), generator=generator, dtype=torch.uint8)


def ramps(count: int, side: int = 8) -> torch.Tensor:
    """Images whose pixels are all different and none 0, so that a pixel says where it comes from."""
    return torch.arange(1, side * side + 1, dtype=torch.uint8).reshape(1, 1, side, side).repeat(count, 1, 1, 1)


def transform(names: list[str], channels: int = 3) -> Transform:
    settings = {"color_jitter": {"saturation": 0.5, "hue": 0.2, "contrast": 0.3}}
    chosen = [augmentations[name](**settings.get(name, {})) for name in names]
    return Transform(chosen, (0.5, 0.4, 0.3)[:channels], (0.2, 0.25, 0.3)[:channels])


def test_every_augmentation_is_registered():
    assert set(EVERY) == set(augmentations)


def test_testing_only_normalises():
    images = photos(4)
    out = transform(EVERY).test(images)
    expected = TF.normalize(images.float() / 255, [0.5, 0.4, 0.3], [0.2, 0.25, 0.3])
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=0)


def test_without_augmentation_training_equals_testing():
    images = photos(4)
    assert torch.equal(transform([]).train(images, noise(4)), transform([]).test(images))


@pytest.mark.parametrize("names", [[name] for name in EVERY] + [EVERY], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_sample_looks_the_same_in_any_batch(names, channels):
    images = photos(40, channels)
    view = transform(names, channels)
    whole = view.train(images, noise(40))
    order = torch.tensor([31, 2, 17, 5, 39, 0, 8])
    some = view.train(images[order], SampleNoise(1, order, torch.zeros_like(order)))
    assert torch.equal(some, whole[order])
    alone = torch.cat([view.train(images[k : k + 1], noise(1, first=k)) for k in range(5)])
    assert torch.equal(alone, whole[:5])


@pytest.mark.parametrize("name", EVERY)
def test_key_view_and_sample_change_the_augmentation(name):
    images = photos(1).repeat(64, 1, 1, 1)
    view = transform([name])
    base = view.train(images, noise(64))
    assert not torch.equal(base, view.train(images, noise(64, key=2)))
    assert not torch.equal(base, view.train(images, noise(64, view=1)))
    assert any(not torch.equal(base[0], base[k]) for k in range(1, 64))


@pytest.mark.parametrize("name", EVERY)
def test_the_images_given_are_not_written_to(name):
    images = photos(32)
    before = images.clone()
    transform([name]).train(images, noise(32))
    assert torch.equal(images, before)


def test_cutout_blanks_before_and_erasing_after_normalising():
    images = torch.full((50, 3, 12, 12), 255, dtype=torch.uint8)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.3])
    black = transform(["cutout"]).train(images, noise(50)).amin(dim=(0, 2, 3))
    torch.testing.assert_close(black, -mean / std)
    erased = transform(["random_erasing"]).train(images, noise(50)).amin(dim=(0, 2, 3))
    assert erased.tolist() == [0, 0, 0]


def test_a_crop_is_a_window_of_the_image_padded_with_zeros():
    images = ramps(300)
    out = augmentations["crop"](padding=2)(images, noise(300))
    windows = F.pad(images[0, 0], (2, 2, 2, 2)).unfold(0, 8, 1).unfold(1, 8, 1).reshape(25, 8, 8)
    which = (out == windows).all(dim=(2, 3)).int().argmax(dim=1)
    assert torch.equal(out[:, 0], windows[which])
    assert len(which.unique()) == 25


def test_a_flip_mirrors_about_half_of_the_images():
    images = ramps(400)
    out = augmentations["flip"]()(images, noise(400))
    flipped = (out == images.flip(3)).all(dim=(1, 2, 3))
    assert torch.equal(out[~flipped], images[~flipped])
    assert 150 < int(flipped.sum()) < 250


@pytest.mark.parametrize(("probability", "share"), [(0.0, 0), (1.0, 1)])
def test_a_certain_flip_is_certain(probability, share):
    images = ramps(20)
    out = augmentations["flip"](probability=probability)(images, noise(20))
    assert torch.equal(out, images.flip(3) if share else images)


def test_cutout_holes_are_squares_cut_off_at_the_border():
    images = torch.ones(500, 3, 10, 12)
    out = augmentations["cutout"](size=4)(images, noise(500))
    assert torch.equal(out[:, 0], out[:, 2])
    blank = out[:, 0] == 0
    tall, wide = blank.any(dim=2).sum(dim=1), blank.any(dim=1).sum(dim=1)
    assert torch.equal(blank.sum(dim=(1, 2)), tall * wide)
    assert (int(tall.min()), int(tall.max()), int(wide.min()), int(wide.max())) == (2, 4, 2, 4)


def test_cutout_centres_are_uniform_over_the_image():
    out = augmentations["cutout"](size=1)(torch.ones(8000, 1, 4, 5), noise(8000))
    counts = (out == 0).sum(dim=(0, 1)).flatten()
    assert int(counts.sum()) == 8000
    assert bool(((counts - 400).abs() < 100).all())  # 400 each, a standard deviation of 19.5


def test_a_hole_larger_than_the_image_may_blank_all_of_it():
    out = augmentations["cutout"](size=16)(torch.ones(20, 1, 8, 8), noise(20))
    assert bool((out == 0).all(dim=(1, 2, 3)).any())


def test_more_holes_blank_more():
    images = torch.ones(200, 1, 16, 16)
    shares = [(augmentations["cutout"](size=4, holes=k)(images, noise(200)) == 0).float().mean() for k in (1, 3)]
    assert shares[0] < shares[1] < 3 * shares[0] + 1e-6


def test_erased_rectangles_keep_to_area_and_ratio():
    images = torch.ones(600, 3, 32, 32)
    out = augmentations["random_erasing"](probability=1.0, scale=(0.05, 0.2), ratio=(0.5, 2.0))(images, noise(600))
    blank = out[:, 0] == 0
    tall, wide = blank.any(dim=2).sum(dim=1), blank.any(dim=1).sum(dim=1)
    assert torch.equal(blank.sum(dim=(1, 2)), tall * wide)
    share = tall * wide / (32 * 32)
    assert float(share.min()) > 0.04
    assert float(share.max()) < 0.22
    ratio = tall / wide
    assert float(ratio.min()) == pytest.approx(0.5, abs=0.1)
    assert float(ratio.max()) == pytest.approx(2.0, abs=0.4)


def test_erasing_happens_as_often_as_asked():
    out = augmentations["random_erasing"](probability=0.25)(torch.ones(2000, 1, 16, 16), noise(2000))
    share = float((out == 0).any(dim=3).any(dim=2).float().mean())
    assert share == pytest.approx(0.25, abs=0.04)


@pytest.mark.parametrize("settings", [{"scale": (0.3, 0.1)}, {"scale": (0.0, 0.1)}, {"ratio": (2.0, 1.0)}])
def test_empty_ranges_of_erasing_are_refused(settings):
    with pytest.raises(ValueError, match="of random_erasing must be two ascending"):
        augmentations["random_erasing"](**settings)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_color_jitter_draws_factors_around_one(name):
    images = photos(1).repeat(500, 1, 1, 1)
    strengths = {"brightness": 0.0} | {name: 0.4}
    out = augmentations["color_jitter"](**strengths)(images, noise(500))
    lowest, highest = (getattr(pixels, name)(images[:1], torch.tensor([factor])).int() for factor in (0.6, 1.4))
    low, high = torch.minimum(lowest, highest), torch.maximum(lowest, highest)
    assert bool(((out >= low - 1) & (out <= high + 1)).all())
    assert len({image.numpy().tobytes() for image in out}) > 100


@pytest.mark.parametrize("turn", [-0.5, -0.2, 0.1, 0.33])
def test_the_hue_turns_as_in_torchvision(turn):
    images = photos(8)
    found = pixels.hue(images, torch.full((8,), turn))
    assert int((found.int() - TF.adjust_hue(images, turn).int()).abs().max()) <= 1


def test_color_jitter_changes_the_order_of_its_operations():
    images = photos(1).repeat(50, 1, 1, 1)
    jitter = augmentations["color_jitter"](brightness=0.5, contrast=0.5)
    out = jitter(images, noise(50))
    factors = [0.5 + noise(50).uniform(f"color_jitter {name}")[:, 0] for name in ("brightness", "contrast")]
    one = pixels.contrast(pixels.brightness(images, factors[0]), factors[1])
    other = pixels.brightness(pixels.contrast(images, factors[1]), factors[0])
    is_one, is_other = ((out == order).all(dim=(1, 2, 3)) for order in (one, other))
    assert bool((is_one | is_other).all())
    assert int(is_one.sum()) > 10
    assert int(is_other.sum()) > 10


def test_grey_images_keep_their_colour():
    images = photos(10, channels=1)
    jitter = augmentations["color_jitter"](brightness=0.0, saturation=0.9, hue=0.5)
    assert torch.equal(jitter(images, noise(10)), images)


def test_color_jitter_of_nothing_is_refused():
    with pytest.raises(ValueError, match="changes nothing"):
        augmentations["color_jitter"](brightness=0.0)


def test_colours_need_one_or_three_channels():
    with pytest.raises(ValueError, match="found 2"):
        augmentations["color_jitter"](contrast=0.5)(photos(4, channels=2), noise(4))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.sampled_from([1, 3]), st.integers(5, 13), st.integers(5, 13), st.integers(0, 2**40))
def test_shape_and_type_are_kept_at_any_size(count, channels, height, width, key):
    images = torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8)
    out = transform(EVERY, channels).train(images, noise(count, key=key))
    assert out.shape == images.shape
    assert out.dtype == torch.float32
    assert math.isfinite(float(out.sum()))
