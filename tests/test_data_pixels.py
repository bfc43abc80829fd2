"""Pictures are upright and opaque before they become squares."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from krrst_fast.data import PrepareConfig, decode, prepare
from krrst_fast.errors import ConfigError

RNG = np.random.default_rng(0)
WILD = RNG.integers(0, 256, (8, 8, 3), np.uint8)
HIDDEN = RNG.random((8, 8)) < 0.5
GROUND = (10, 200, 30)


def encoded(image: Image.Image, kind: str = "png", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pixels(image, size: int = 8, **options) -> np.ndarray:
    return decode.Decoder(size=size, **options).pixels(image)


def planes(array: np.ndarray) -> np.ndarray:
    return array.transpose(2, 0, 1)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "tiff"])
@pytest.mark.parametrize("turn", range(10))
def test_images_are_turned_as_exif_says(kind, turn):
    """All eight orientations, and two values that are none."""
    exif = Image.Exif()
    exif[0x0112] = turn
    options = {"webp": {"lossless": True}}.get(kind, {})
    data = encoded(Image.fromarray(WILD), kind, exif=exif, **options)
    with Image.open(io.BytesIO(data)) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    assert np.array_equal(pixels(data), planes(expected))
    stored = np.asarray(Image.open(io.BytesIO(encoded(Image.fromarray(WILD), kind, **options))))
    assert np.array_equal(expected, stored) == (turn in (0, 1, 9))


def test_a_turned_photo_is_turned_before_it_is_cropped():
    wide = RNG.integers(0, 256, (8, 20, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(wide), exif=exif)
    assert np.array_equal(pixels(data), planes(np.rot90(wide[:, 6:14], -1)))
    padded = pixels(data, 20, fit="pad")
    assert np.array_equal(padded[:, :, 6:14], planes(np.rot90(wide, -1)))


def with_alpha(mode: str) -> bytes:
    """A PNG whose hidden pixels have a wild colour: by alpha, or by a transparent colour."""
    alpha = Image.fromarray(np.where(HIDDEN, 0, 255).astype(np.uint8))
    image = Image.fromarray(WILD).convert({"RGBA": "RGB", "LA": "L"}[mode])
    image.putalpha(alpha)
    return encoded(image)


def test_hidden_colours_never_show():
    shown = np.where(HIDDEN[..., None], np.array(GROUND, np.uint8), WILD)
    assert np.array_equal(pixels(with_alpha("RGBA"), background=GROUND), planes(shown))
    rgba = np.concatenate([WILD, np.where(HIDDEN, 0, 255).astype(np.uint8)[..., None]], 2)
    assert np.array_equal(pixels(rgba, background=GROUND), planes(shown))
    assert np.array_equal(pixels(rgba / 255, background=GROUND), planes(shown))
    grey = np.asarray(Image.fromarray(WILD).convert("L"))[..., None].repeat(3, 2)
    shown = np.where(HIDDEN[..., None], np.array(GROUND, np.uint8), grey)
    assert np.array_equal(pixels(with_alpha("LA"), background=GROUND), planes(shown))


def test_half_transparent_pixels_are_mixed_with_the_background():
    rgba = np.full((8, 8, 4), (200, 100, 0, 128), np.uint8)
    expected = np.array([200, 100, 0]) * 128 / 255 + np.array(GROUND) * 127 / 255
    got = pixels(encoded(Image.fromarray(rgba)), background=GROUND).astype(float)
    assert np.abs(got - expected[:, None, None]).max() <= 1


@pytest.mark.parametrize("kind", ["png", "gif"])
def test_transparent_colours_of_a_palette_never_show(kind):
    levels = RNG.integers(0, 4, (8, 8), np.uint8)
    colours = RNG.integers(0, 256, (4, 3), np.uint8)
    image = Image.fromarray(levels)
    image.putpalette(colours.tobytes())
    shown = np.where((levels == 2)[..., None], np.array(GROUND, np.uint8), colours[levels])
    data = encoded(image, kind, transparency=2)
    assert np.array_equal(pixels(data, background=GROUND), planes(shown))
    alphas = encoded(image, "png", transparency=b"\xff\xff\x00\xff")
    assert np.array_equal(pixels(alphas, background=GROUND), planes(shown))


def png_by_hand(depth: int, colour: int, rows: np.ndarray, key: tuple[int, ...]) -> bytes:
    """A PNG with a transparent colour of 16 bits, which Pillow does not write."""
    height, width = rows.shape[:2]
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)),
        (b"tRNS", struct.pack(f">{len(key)}H", *key)),
        (b"IDAT", zlib.compress(raw)),
        (b"IEND", b""),
    ]
    body = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def test_a_transparent_grey_of_16_bits_never_shows():
    deep = RNG.integers(0, 1 << 16, (8, 8), np.uint16)
    deep[HIDDEN] = 40_000
    grey = (deep >> 8).astype(np.uint8)[..., None].repeat(3, 2)
    shown = np.where(HIDDEN[..., None], np.array(GROUND, np.uint8), grey)
    data = png_by_hand(16, 0, deep, (40_000,))
    assert np.array_equal(pixels(data, background=GROUND), planes(shown))


def test_a_transparent_colour_of_16_bits_never_shows():
    deep = RNG.integers(0, 1 << 16, (8, 8, 3), np.uint16)
    deep[HIDDEN] = (40_000, 3, 65_000)
    shown = np.where(HIDDEN[..., None], np.array(GROUND, np.uint8), (deep >> 8).astype(np.uint8))
    data = png_by_hand(16, 2, deep, (40_000, 3, 65_000))
    assert np.array_equal(pixels(data, background=GROUND), planes(shown))


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for kind in ("gif", "png", "webp", "tiff"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        red = pixels(data).astype(int) - np.array([255, 0, 0])[:, None, None]
        assert np.abs(red).max() <= 8, kind


def test_fit_pads_or_squashes_the_whole_image():
    wide = RNG.integers(0, 256, (8, 16, 3), np.uint8)
    padded = pixels(wide, 16, fit="pad", background=GROUND)
    assert np.array_equal(padded[:, 4:12], planes(wide))
    bars = padded[:, [0, 1, 2, 3, 12, 13, 14, 15]]
    assert np.array_equal(bars, np.broadcast_to(np.array(GROUND)[:, None, None], bars.shape))
    tall = pixels(np.ascontiguousarray(wide.transpose(1, 0, 2)), 16, fit="pad", background=GROUND)
    assert np.array_equal(tall, padded.transpose(0, 2, 1))
    squashed = Image.fromarray(wide).resize((10, 10), Image.Resampling.BICUBIC)
    assert np.array_equal(pixels(wide, 10, fit="squash"), planes(np.asarray(squashed)))
    line = pixels(np.zeros((1, 50_000, 3), np.uint8), 4, fit="pad")
    assert (line == 0).all(0).sum() == 4 and (line == 255).all(0).sum() == 12
    for fit in ("crop", "pad", "squash"):
        assert np.array_equal(pixels(WILD, 8, fit=fit), planes(WILD)), fit


def test_the_flags_reach_the_store(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGBA", (4, 8), (255, 0, 0, 0)).save(tmp_path / "a" / "0.png")

    def stored(name: str, **settings) -> np.ndarray:
        config = PrepareConfig(source=str(tmp_path / "a"), out=tmp_path / name, size=8, **settings)
        return prepare(config).images().numpy()

    assert (stored("white") == 255).all()
    blue = stored("blue", background="#0000ff", fit="pad")
    assert np.array_equal(blue[0, :, 0, 0], [0, 0, 255]) and (blue == blue[:, :, :1, :1]).all()
    with pytest.raises(ConfigError, match="background must be a colour such as .*, got 'whit'"):
        stored("none", background="whit")
    with pytest.raises(ConfigError, match="fit must be one of crop, pad, squash, got 'stretch'"):
        stored("none", fit="stretch")
