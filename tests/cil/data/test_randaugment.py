import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment

from cil.data.randaugment import OPERATIONS, RandAugment
from cil.seeding import SampleNoise

TIMM_NAMES = {
    "auto_contrast": "AutoContrast",
    "equalize": "Equalize",
    "invert": "Invert",
    "rotate": "Rotate",
    "posterize": "PosterizeIncreasing",
    "solarize": "SolarizeIncreasing",
    "solarize_add": "SolarizeAdd",
    "color": "ColorIncreasing",
    "contrast": "ContrastIncreasing",
    "brightness": "BrightnessIncreasing",
    "sharpness": "SharpnessIncreasing",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateXRel",
    "translate_y": "TranslateYRel",
}
GEOMETRY = {"rotate", "shear_x", "shear_y", "translate_x", "translate_y"}
FILL = (129, 124, 112)


def noise(count: int, key: int = 1) -> SampleNoise:
    ids = torch.arange(count)
    return SampleNoise(key, ids, torch.zeros_like(ids))


def varied_images(count: int, channels: int, height: int = 16, width: int = 20) -> torch.Tensor:
    """Smooth, noisy, low-contrast, two-coloured and constant images."""
    generator = torch.Generator().manual_seed(channels)
    noisy = torch.randint(0, 256, (count, channels, height, width), generator=generator)
    smooth = torch.nn.functional.interpolate(noisy[..., ::5, ::5].float(), (height, width), mode="bilinear").long()
    kinds = [noisy, smooth, 90 + noisy // 8, 255 * (noisy > 128).long(), torch.full_like(noisy, 7)]
    return torch.stack([kinds[k % len(kinds)][k] for k in range(count)]).to(torch.uint8)


def as_pillow(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).contiguous().numpy())


def as_tensor(image: Image.Image, shape: torch.Size) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).reshape(shape[1], shape[2], shape[0]).permute(2, 0, 1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", list(OPERATIONS))
def test_an_operation_gives_the_pixels_of_timm(name, channels, monkeypatch):
    images = varied_images(40, channels)
    fill = FILL[:channels]
    generator = torch.Generator().manual_seed(5)
    strengths = torch.rand(40, generator=generator)
    signs = torch.where(torch.rand(40, generator=generator) < 0.5, 1.0, -1.0)
    found = OPERATIONS[name](images, strengths * signs, torch.tensor(fill, dtype=torch.uint8))
    assert found.dtype == torch.uint8
    settings = {"img_mean": fill if channels == 3 else fill[0], "interpolation": Image.Resampling.BICUBIC}
    expected = []
    for image, strength, sign in zip(images, strengths.tolist(), signs.tolist(), strict=True):
        monkeypatch.setattr(auto_augment, "_randomly_negate", lambda value, sign=sign: value * sign)
        operation = auto_augment.AugmentOp(TIMM_NAMES[name], prob=1.0, magnitude=10 * strength, hparams=settings)
        expected.append(as_tensor(operation(as_pillow(image)), image.shape))
    difference = (found.int() - torch.stack(expected).int()).abs()
    if name in GEOMETRY:  # Pillow counts in float64, and rounding down turns the last digit into a level here and there
        assert int(difference.max()) <= 1
        assert float((difference > 0).float().mean()) < 1e-3
    else:
        assert int(difference.max()) == 0


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_an_operation_treats_every_image_by_itself(name):
    images = varied_images(10, 3)
    levels = torch.linspace(-1, 1, 10)
    fill = torch.tensor(FILL, dtype=torch.uint8)
    whole = OPERATIONS[name](images, levels, fill)
    single = [OPERATIONS[name](images[k : k + 1], levels[k : k + 1], fill) for k in range(10)]
    assert torch.equal(whole, torch.cat(single))


@pytest.mark.parametrize("name", sorted(GEOMETRY | {"color", "contrast", "brightness", "sharpness", "solarize_add"}))
def test_no_strength_is_no_change(name):
    images = varied_images(10, 3)
    assert torch.equal(OPERATIONS[name](images, torch.zeros(10), torch.tensor(FILL, dtype=torch.uint8)), images)


def test_posterize_at_full_strength_leaves_black():
    images = varied_images(4, 3)
    fill = torch.tensor(FILL, dtype=torch.uint8)
    assert int(OPERATIONS["posterize"](images, torch.ones(4), fill).max()) == 0
    assert torch.equal(OPERATIONS["posterize"](images, torch.full((4,), 0.9), fill), images & 128)


def test_grey_images_have_no_colour_to_change():
    images = varied_images(6, 1)
    fill = torch.tensor(FILL[:1], dtype=torch.uint8)
    assert torch.equal(OPERATIONS["color"](images, torch.full((6,), 0.9), fill), images)


def test_the_set_of_operations_is_the_one_of_timm():
    assert [TIMM_NAMES[name] for name in OPERATIONS] == auto_augment._RAND_INCREASING_TRANSFORMS


def test_moved_images_are_filled_with_the_mean_colour():
    augmentation = RandAugment().prepared((0.5071, 0.4867, 0.4408))
    assert augmentation.fill == FILL
    out = OPERATIONS["translate_x"](
        torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.ones(1), torch.tensor(FILL, dtype=torch.uint8)
    )
    assert out[0, :, 0, -1].tolist() == list(FILL)


def test_a_given_colour_is_kept_and_checked():
    assert RandAugment(fill=(0, 0, 0)).prepared((0.5, 0.5, 0.5)).fill == (0, 0, 0)
    with pytest.raises(ValueError, match="must have 1 channels"):
        RandAugment(fill=(0, 0, 0)).prepared((0.5,))


def test_preparing_leaves_the_original_as_it_was():
    augmentation = RandAugment()
    augmentation.prepared((0.5,))
    assert augmentation.fill is None


def test_each_turn_applies_an_operation_half_of_the_time():
    image = 20 + varied_images(1, 3) // 2  # noise that every operation changes
    images = image.repeat(4000, 1, 1, 1)
    out = RandAugment(num_ops=1, magnitude=9.0, magnitude_std=0.0).prepared((0.5,) * 3)(images, noise(4000))
    changed = float((out != images).flatten(1).any(dim=1).float().mean())
    assert changed == pytest.approx(0.5, abs=0.03)
    # The image itself, six operations that have one direction, nine that have two.
    assert len({image.numpy().tobytes() for image in out}) == 1 + 6 + 2 * 9


def test_without_probability_nothing_changes():
    images = varied_images(20, 3)
    augmentation = RandAugment(probability=0.0).prepared((0.5,) * 3)
    assert torch.equal(augmentation(images, noise(20)), images)


def test_magnitudes_are_normal_and_cut_off():
    images = torch.full((6000, 1, 4, 4), 100, dtype=torch.uint8)
    augmentation = RandAugment(num_ops=1, probability=1.0).prepared((0.5,))
    out = augmentation(images, noise(6000))[:, 0, 0, 0].int()
    chosen = noise(6000).integers("randaugment operation", 15, 1)[:, 0] == list(OPERATIONS).index("brightness")
    brighter = out[chosen][out[chosen] > 100]  # factor 1 + 0.09 magnitude, the direction that brightens
    magnitudes = (brighter / 100 - 1) / 0.09
    assert float(magnitudes.mean()) == pytest.approx(9, abs=0.2)
    assert float(magnitudes.std()) == pytest.approx(0.45, abs=0.15)  # 0.5, less what is cut off at 10
    assert float(magnitudes.max()) <= 10
