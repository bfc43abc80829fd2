"""Each batched transform against the plain computation on one image at a time."""

import colorsys
import math

import pytest
import torch
import torch.nn.functional as F

from krrst_fast.targets import transforms

B, S = 4, 9
IMAGES = torch.rand(B, 3, S, S, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
FACTOR = torch.tensor([0.0, 0.6, 1.0, 1.4], dtype=torch.float64)
LUMA = (0.2989, 0.587, 0.114)


def _close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def _grey(image: torch.Tensor) -> torch.Tensor:
    return sum(weight * channel for weight, channel in zip(LUMA, image))


def test_brightness_multiplies():
    expected = [(image * f).clamp(0, 1) for image, f in zip(IMAGES, FACTOR)]
    _close(transforms.brightness(IMAGES, FACTOR), torch.stack(expected))


def test_contrast_moves_from_the_mean_grey():
    expected = [
        (f * image + (1 - f) * _grey(image).mean()).clamp(0, 1) for image, f in zip(IMAGES, FACTOR)
    ]
    _close(transforms.contrast(IMAGES, FACTOR), torch.stack(expected))


def test_contrast_of_other_channel_counts_uses_their_mean():
    image = IMAGES[:, :1]
    expected = [(f * x + (1 - f) * x.mean()).clamp(0, 1) for x, f in zip(image, FACTOR)]
    _close(transforms.contrast(image, FACTOR), torch.stack(expected))


def test_saturation_moves_from_the_grey_of_the_pixel():
    expected = [
        (f * image + (1 - f) * _grey(image)).clamp(0, 1) for image, f in zip(IMAGES, FACTOR)
    ]
    _close(transforms.saturation(IMAGES, FACTOR), torch.stack(expected))


def test_neutral_factors_change_nothing():
    one = torch.ones(B, dtype=torch.float64)
    for transform in (transforms.brightness, transforms.contrast, transforms.saturation):
        assert torch.equal(transform(IMAGES, one), IMAGES)


def test_greyscale_takes_the_chosen_images():
    where = torch.tensor([True, False, True, False])
    got = transforms.greyscale(IMAGES, where)
    for image, grey, chosen in zip(IMAGES, got, where):
        _close(grey, _grey(image).expand(3, S, S) if chosen else image)


def test_hue_turns_as_the_standard_library_does():
    turn = torch.tensor([0.0, 0.1, -0.35, 0.5], dtype=torch.float64)
    images = IMAGES.clone()
    images[:, :, 0, 0] = 0.4  # grey has no hue
    images[:, :, 0, 1] = 0.0
    images[:, 1, 0, 2] = images[:, 0, 0, 2]
    images[:, 2, 0, 3] = images[:, 0, 0, 3]
    images[:, 2, 0, 4] = images[:, 1, 0, 4]
    got = transforms.hue(images, turn)
    for b in range(B):
        for y in range(S):
            for x in range(S):
                h, s, v = colorsys.rgb_to_hsv(*images[b, :, y, x].tolist())
                expected = colorsys.hsv_to_rgb((h + turn[b].item()) % 1.0, s, v)
                assert got[b, :, y, x].tolist() == pytest.approx(expected, abs=1e-9)


def test_flip_mirrors_the_chosen_images():
    where = torch.tensor([True, False, False, True])
    got = transforms.flip(IMAGES, where)
    for image, flipped, chosen in zip(IMAGES, got, where):
        mirrored = torch.stack([image[:, :, S - 1 - x] for x in range(S)], dim=-1)
        assert torch.equal(flipped, mirrored if chosen else image)


def test_blur_is_a_gaussian_window_over_reflected_edges():
    x = F.interpolate(IMAGES, size=45)
    sigma = torch.tensor([0.3, 1.0, 2.0, 0.7], dtype=torch.float64)
    where = torch.tensor([True, True, True, False])
    got = transforms.blur(x, sigma, where)
    radius = 3
    for b, (y0, x0) in ((0, (0, 0)), (1, (44, 20)), (2, (17, 44)), (2, (10, 11))):
        total, value = 0.0, 0.0
        for dy in range(-radius, radius + 1):
            for dx in range(-radius, radius + 1):
                weight = math.exp(-(dy**2 + dx**2) / (2 * sigma[b].item() ** 2))
                yy, xx = (44 - abs(44 - abs(p)) for p in (y0 + dy, x0 + dx))
                total, value = total + weight, value + weight * x[b, 1, yy, xx].item()
        assert got[b, 1, y0, x0].item() == pytest.approx(value / total, rel=1e-9)
    assert torch.equal(got[3], x[3])


def _sample(image: torch.Tensor, x: float, y: float, fill: str) -> torch.Tensor:
    """Bilinear interpolation at a pixel position, with the corners outside filled."""
    if fill == "border":
        x, y = (min(max(p, 0.0), S - 1.0) for p in (x, y))
    if fill == "reflection":
        x, y = (_reflected(p) for p in (x, y))
    x0, y0 = math.floor(x), math.floor(y)
    value = torch.zeros(3, dtype=torch.float64)
    for xx, wx in ((x0, x0 + 1 - x), (x0 + 1, x - x0)):
        for yy, wy in ((y0, y0 + 1 - y), (y0 + 1, y - y0)):
            if 0 <= xx < S and 0 <= yy < S:
                value += wx * wy * image[:, yy, xx]
    return value


def _reflected(p: float) -> float:
    """Reflect about the outer edges of the image, -0.5 and S - 0.5, then stay on pixel centres."""
    period = (p + 0.5) % (2 * S)
    return min(max(min(period, 2 * S - period) - 0.5, 0.0), S - 1.0)


@pytest.mark.parametrize("fill", ["zeros", "border", "reflection"])
def test_warp_samples_a_turned_rectangle(fill):
    width = torch.tensor([0.5, 0.8, 1.0, 1.6], dtype=torch.float64)
    height = torch.tensor([0.7, 0.3, 1.0, 1.5], dtype=torch.float64)
    center_x = torch.tensor([0.3, 0.6, 0.5, 0.4], dtype=torch.float64)
    center_y = torch.tensor([0.6, 0.2, 0.5, 0.7], dtype=torch.float64)
    angle = torch.tensor([0.0, 0.4, -0.7, 3.0], dtype=torch.float64)
    matrix = transforms.crop_matrix(width, height, center_x, center_y, angle)
    got = transforms.warp(IMAGES, matrix, fill)
    for b in range(B):
        cos, sin = math.cos(angle[b]), math.sin(angle[b])
        for row in range(0, S, 2):
            for column in range(0, S, 3):
                u, v = (column + 0.5) / S - 0.5, (row + 0.5) / S - 0.5
                x = center_x[b].item() + width[b].item() * (u * cos - v * sin)
                y = center_y[b].item() + height[b].item() * (u * sin + v * cos)
                expected = _sample(IMAGES[b], x * S - 0.5, y * S - 0.5, fill)
                _close(got[b, :, row, column], expected)


def test_noise_has_its_deviation_its_seed_and_stays_in_range():
    middle = torch.full((2, 3, 64, 64), 0.5)
    noisy = transforms.noise(middle, 0.1, seed=5)
    assert torch.equal(noisy, transforms.noise(middle, 0.1, seed=5))
    assert not torch.equal(noisy, transforms.noise(middle, 0.1, seed=6))
    assert (noisy - middle).std().item() == pytest.approx(0.1, rel=0.03)
    edge = transforms.noise(torch.ones(1, 3, 64, 64), 0.5, seed=0)
    assert edge.max() == 1.0 and edge.min() >= 0.0
