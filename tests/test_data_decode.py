"""Pixels of pictures that are not plain RGB squares."""

import io

import numpy as np
import pytest
from PIL import Image

from krrst_fast.data import decode
from krrst_fast.errors import DataError

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (8, 8, 3), np.uint8)


def encoded(image: Image.Image, kind: str = "png", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(image, size: int, **options) -> np.ndarray:
    return decode.Decoder(size=size, **options).pixels(image)


def planes(array: np.ndarray) -> np.ndarray:
    return array.transpose(2, 0, 1)


def test_an_image_of_the_right_size_keeps_its_pixels():
    assert np.array_equal(pixels(encoded(Image.fromarray(RGB)), 8), planes(RGB))
    assert np.array_equal(pixels(RGB, 8), planes(RGB))


def test_grey_palette_and_16_bit_images():
    grey = RGB[..., 0]
    repeated = np.repeat(grey[None], 3, 0)
    deep = (grey.astype(np.uint16) << 8) + RGB[..., 1]
    for image, expected in [
        (Image.fromarray(grey), repeated),
        (Image.fromarray(deep), repeated),
        (Image.fromarray(grey > 127), np.repeat((grey > 127)[None] * np.uint8(255), 3, 0)),
    ]:
        assert np.array_equal(pixels(encoded(image), 8), expected), image.mode
    flat = np.zeros((8, 8, 3), np.uint8)
    flat[:4] = (200, 30, 7)
    palette = Image.fromarray(flat).quantize(4)
    assert np.array_equal(pixels(encoded(palette), 8), planes(flat))


def test_cmyk_jpegs_are_converted():
    cmyk = Image.fromarray(np.full((8, 8, 3), 128, np.uint8)).convert("CMYK")
    got = pixels(encoded(cmyk, "jpeg", quality=100), 8)
    assert np.abs(got.astype(int) - 128).max() <= 3


@pytest.mark.parametrize("size", [1, 7, 32])
def test_a_single_pixel_fills_the_square(size):
    image = Image.fromarray(np.array([[[9, 80, 200]]], np.uint8))
    expected = np.broadcast_to(np.array([9, 80, 200], np.uint8)[:, None, None], (3, size, size))
    assert np.array_equal(pixels(encoded(image), size), expected)


def test_a_huge_aspect_gives_its_centre():
    strip = np.zeros((2, 60001, 3), np.uint8)
    strip[:, 29999:30001] = 255
    got = pixels(encoded(Image.fromarray(strip)), 4)
    assert np.array_equal(got, np.full((3, 4, 4), 255))
    tall = pixels(encoded(Image.fromarray(strip.transpose(1, 0, 2).copy())), 4)
    assert np.array_equal(tall, got.transpose(0, 2, 1))


def test_the_centre_is_cut_out_and_resized_with_antialiasing():
    wide = RNG.integers(0, 256, (32, 50, 3), np.uint8)
    assert np.array_equal(pixels(wide, 32), planes(wide[:, 9:41]))
    checks = np.indices((64, 64)).sum(0) % 2 * np.uint8(255)
    got = pixels(np.repeat(checks[..., None].astype(np.uint8), 3, 2), 8)
    assert np.abs(got.astype(int) - 127).max() <= 4
    square = Image.fromarray(wide[:, 9:41]).resize((13, 13), Image.Resampling.BICUBIC)
    assert np.array_equal(pixels(wide, 13), planes(np.asarray(square)))


@pytest.mark.parametrize("keep", [0, 2, 30, 0.5, 0.97])
@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "webp"])
def test_truncated_images_are_refused(kind, keep):
    picture = Image.fromarray(RNG.integers(0, 256, (40, 40, 3), np.uint8))
    data = encoded(picture, kind)
    cut = data[: keep if isinstance(keep, int) else int(keep * len(data))]
    with pytest.raises(DataError, match="not a readable image"):
        pixels(cut, 8)


def test_random_damage_is_an_image_or_a_data_error():
    picture = Image.fromarray(RNG.integers(0, 256, (24, 24, 3), np.uint8))
    for kind in ("png", "jpeg", "gif", "bmp", "tiff", "webp"):
        data = np.frombuffer(encoded(picture, kind), np.uint8)
        for _ in range(40):
            damaged = data.copy()
            damaged[RNG.integers(0, len(data), 3)] = RNG.integers(0, 256, 3)
            try:
                assert pixels(damaged.tobytes(), 8).shape == (3, 8, 8)
            except DataError as error:
                assert "\n" not in str(error)


def test_a_decompression_bomb_is_refused_before_it_is_decoded():
    white = Image.new("1", (12000, 12000), 1)
    bomb = encoded(white)
    assert len(bomb) < 50_000
    with pytest.raises(DataError, match="declares"):
        pixels(bomb, 8)
    with pytest.raises(DataError, match="declares 200000 x 1000 = 200000000 pixels, .*--max_pix"):
        pixels(np.broadcast_to(np.zeros(1, np.uint8), (1000, 200000, 3)), 8)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((4, 4, 3), np.nan), "holds NaN or infinite pixels"),
        (np.full((4, 4, 3), np.inf), "holds NaN or infinite pixels"),
        (np.full((4, 4, 3), -1.2), r"must be in \[0, 1\], got -1.2 to -1.2; undo a normalisation"),
        (np.full((4, 4, 3), 200.0), r"must be in \[0, 1\], got 200 to 200; .*divide by 255"),
        (np.full((4, 4, 3), 7), "uint8 or floats in .* got int64"),
        (np.zeros((4, 0, 3), np.uint8), "has no pixels"),
    ],
)
def test_arrays_that_hold_no_pixels_are_refused(array, message):
    with pytest.raises(DataError, match=message):
        pixels(array, 4)


def test_floats_round_to_the_nearest_level():
    levels = np.arange(192, dtype=np.float32).reshape(8, 8, 3) / 255
    jitter = RNG.uniform(-0.4 / 255, 0.4 / 255, levels.shape).astype(np.float32)
    expected = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    assert np.array_equal(pixels(levels + jitter, 8), planes(expected))


def test_floating_point_images_are_refused():
    with pytest.raises(DataError, match="floating-point pixels"):
        pixels(encoded(Image.fromarray(np.ones((4, 4), np.float32)), "tiff"), 4)
