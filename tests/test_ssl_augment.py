"""Pairs of random views: neutral settings, generators, ranges, frequencies, refusals."""

import dataclasses
import math

import pytest
import torch

from krrst_fast.errors import ConfigError
from krrst_fast.targets import SSLAugmentConfig, augment_pair
from krrst_fast.targets.augment import augment, check_channels

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
IMAGES = torch.randint(
    0, 256, (20, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
INDEX = torch.tensor([3, 19, 0, 7, 3])
NEUTRAL = SSLAugmentConfig(
    scale=(1, 1),
    ratio=(1, 1),
    flip=0,
    brightness=0,
    contrast=0,
    saturation=0,
    hue=0,
    greyscale=0,
)
EVERYTHING = SSLAugmentConfig(rotation=20, blur=0.5, noise=0.05)


def _source(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _normalised(index: torch.Tensor = INDEX) -> torch.Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return (IMAGES[index].float() / 255 - mean) / std


def _pixels(view: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    return view * std + mean


def test_neutral_settings_give_the_normalised_image_exactly():
    first, second = augment_pair(IMAGES, INDEX, NEUTRAL, MEAN, STD, _source())
    assert torch.equal(first, _normalised()) and torch.equal(second, _normalised())


def test_a_neutral_crop_alone_interpolates_nothing():
    """A warp over the whole image, reached through a rotation of zero width, is the image."""
    config = dataclasses.replace(NEUTRAL, rotation=1e-6)
    first, _ = augment_pair(IMAGES, INDEX, config, MEAN, STD, _source())
    torch.testing.assert_close(first, _normalised(), rtol=0, atol=1e-4)


def test_views_depend_on_the_generator_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a = augment_pair(IMAGES, INDEX, EVERYTHING, MEAN, STD, _source())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    b = augment_pair(IMAGES, INDEX, EVERYTHING, MEAN, STD, _source())
    c = augment_pair(IMAGES, INDEX, EVERYTHING, MEAN, STD, _source(1))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    assert not torch.equal(a[0], a[1]) and not torch.equal(a[0], c[0])


def test_a_generator_goes_on_where_its_state_was_saved():
    source = _source()
    augment_pair(IMAGES, INDEX, EVERYTHING, MEAN, STD, source)
    state = source.get_state()
    expected = augment_pair(IMAGES, INDEX, EVERYTHING, MEAN, STD, source)
    again = torch.Generator()
    again.set_state(state)
    got = augment_pair(IMAGES, INDEX, EVERYTHING, MEAN, STD, again)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_the_store_is_not_written_to():
    before = IMAGES.clone()
    augment_pair(IMAGES, torch.arange(20), EVERYTHING, MEAN, STD, _source())
    augment_pair(IMAGES, torch.arange(20), NEUTRAL, MEAN, STD, _source())
    assert torch.equal(IMAGES, before)


@pytest.mark.parametrize("fill", ["zeros", "border", "reflection"])
def test_pixels_stay_between_black_and_white(fill):
    config = dataclasses.replace(
        EVERYTHING, fill=fill, scale=(0.1, 3), rotation=180, brightness=1, contrast=1, hue=0.5
    )
    index = torch.arange(200) % 20
    for view in augment_pair(IMAGES, index, config, MEAN, STD, _source()):
        assert view.shape == (200, 3, 12, 12) and view.dtype == torch.float32
        pixels = _pixels(view)
        assert pixels.min() >= -1e-6 and pixels.max() <= 1 + 1e-6


def test_flips_come_as_often_as_asked_for():
    index = torch.arange(20).repeat(50)
    config = dataclasses.replace(NEUTRAL, flip=0.3)
    view, _ = augment_pair(IMAGES, index, config, MEAN, STD, _source())
    plain = _normalised(index)
    flipped = (view == plain.flip(-1)).flatten(1).all(1)
    assert (flipped | (view == plain).flatten(1).all(1)).all()
    assert flipped.float().mean().item() == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / 1000))


def test_jitter_leaves_the_other_images_alone():
    config = dataclasses.replace(NEUTRAL, jitter=0.5, brightness=0.4, hue=0.2)
    x = torch.rand(1000, 3, 2, 2, generator=_source(9)) * 0.5
    y = augment(x.clone(), config, _source())
    same = ((y - x).abs().flatten(1).amax(1) < 1e-6).float().mean().item()
    assert same == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / 1000))


def test_brightness_factors_are_uniform_in_their_range():
    config = dataclasses.replace(NEUTRAL, jitter=1, brightness=0.4)
    factors = augment(torch.full((4000, 3, 1, 1), 0.5), config, _source())[:, 0, 0, 0] / 0.5
    assert 0.6 <= factors.min() < 0.605 and 1.395 < factors.max() <= 1.4 + 1e-6
    assert factors.mean().item() == pytest.approx(1.0, abs=4 * 0.8 / math.sqrt(12 * 4000))


def _ramp(batch: int) -> torch.Tensor:
    """Images whose first two channels are their own x and y position, 0 to 1 between edges."""
    position = (torch.arange(64) + 0.5) / 64
    x = position.expand(64, 64)
    return torch.stack([x, x.T, x * 0]).repeat(batch, 1, 1, 1)


def test_crops_lie_in_the_image_and_have_the_area_asked_for():
    config = dataclasses.replace(NEUTRAL, scale=(0.25, 0.25), ratio=(0.5, 2.0))
    view = augment(_ramp(500), config, _source())
    width = (view[:, 0, :, -2] - view[:, 0, :, 1]).mean(1) * 64 / 61
    height = (view[:, 1, -2] - view[:, 1, 1]).mean(1) * 64 / 61
    torch.testing.assert_close(width * height, torch.full((500,), 0.25), rtol=0, atol=0.005)
    ratio = (width / height).log()
    assert ratio.min() == pytest.approx(math.log(0.5), abs=0.05)
    assert ratio.max() == pytest.approx(math.log(2.0), abs=0.05)
    center = view[:, 0].mean((1, 2))
    assert (center - width / 2).min() >= -0.01 and (center + width / 2).max() <= 1.01
    assert (center - width / 2).min() < 0.02 and (center + width / 2).max() > 0.98


def test_zooming_out_keeps_the_whole_image():
    """Only the border around it is new, so with black outside the sum of the pixels is kept."""
    config = dataclasses.replace(NEUTRAL, scale=(4, 4), fill="zeros")
    x = torch.ones(50, 3, 16, 16)
    total = augment(x, config, _source()).sum((2, 3))
    torch.testing.assert_close(total, torch.full((50, 3), 16 * 16 / 4.0), rtol=0, atol=1e-3)


def test_impossible_settings_are_named():
    for settings, message in [
        ({"scale": (0.0, 1.0)}, r"scale must be 0 < low <= high <= 4, got \(0.0, 1.0\)"),
        ({"scale": (0.9, 0.5)}, "scale must be"),
        ({"ratio": (2.0, 0.5)}, "ratio must be 0 < low <= high"),
        ({"rotation": 200.0}, "rotation must be 0 to 180"),
        ({"fill": "mirror"}, "fill must be one of zeros, border, reflection"),
        ({"flip": 1.5}, "flip must be a probability"),
        ({"brightness": -0.1}, "brightness must be 0 to 1"),
        ({"hue": 0.6}, "hue must be 0 to 0.5"),
        ({"blur_sigma": (0.0, 1.0)}, "blur_sigma must be"),
        ({"noise": 2.0}, "noise must be 0 to 1"),
    ]:
        with pytest.raises(ConfigError, match=f"SSLAugmentConfig: {message}"):
            SSLAugmentConfig(**settings)


def test_colours_need_three_channels():
    with pytest.raises(ConfigError, match="saturation needs images of 3 channels, got 1"):
        check_channels(SSLAugmentConfig(), 1)
    check_channels(NEUTRAL, 1)
    one = augment_pair(IMAGES[:, :1], INDEX, NEUTRAL, (0.5,), (0.5,), _source())[0]
    assert torch.equal(one, (IMAGES[INDEX, :1].float() / 255 - 0.5) / 0.5)
