"""An encoded image or an array to packed pixels: uint8 RGB, [3, size, size]."""

import io
import math
import re
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageColor

from krrst_fast.data.kinds import FORMATS
from krrst_fast.data.source import MAX_PIXELS, Fit, Part
from krrst_fast.errors import ConfigError, DataError

_ALONE = 32_000_000
"""Images of more pixels are decoded one at a time, or eight threads would hold eight of them."""
_ONE_AT_A_TIME = threading.Lock()
_MOST_BYTES = 1 << 30

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each value of the EXIF orientation."""


@contextmanager
def quiet(max_pixels: int = MAX_PIXELS) -> Iterator[None]:
    """Drop Pillow's warnings of odd metadata, and replace its own limit of pixels by ours.

    Pillow warns of images above its limit and refuses those of twice as many pixels, also where
    one lies inside another file, as in an icon.
    """
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")
            warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def colour(text: str) -> tuple[int, int, int]:
    """Return the RGB values of a colour's name or #rrggbb; ConfigError if it is none."""
    try:
        return ImageColor.getrgb(text)[:3]
    except ValueError:
        raise ConfigError(
            f"prepare: background must be a colour such as white or #808080, got {text!r}"
        ) from None


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """How images become squares of one size.

    Images are turned as their EXIF orientation says. What is transparent (alpha, or a transparent
    colour) is composited onto `background`. Grey is replicated, of 16 bits the upper 8 stay, CMYK
    is converted without a colour profile, of several frames or pages the first is taken. Then
    `fit` makes a square, by bicubic, antialiased resizing. An opaque, upright image of `size` by
    `size` keeps its pixels exactly.
    """

    size: int
    fit: Fit = "crop"
    background: tuple[int, int, int] = (255, 255, 255)
    max_pixels: int = MAX_PIXELS

    def pixels(self, image: Path | Part | bytes | npt.NDArray) -> npt.NDArray[np.uint8]:
        """Decode one image.

        Returns:
            uint8 [3, size, size].

        Raises:
            DataError: Damaged, too large, or no picture at all; it says why, not which.
        """
        if isinstance(image, np.ndarray):
            square = self._square(self._from_array(image))
        else:
            with _opened(image) as file:
                square = self._from_file(file)
        return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))

    def _from_file(self, file: BinaryIO) -> Image.Image:
        try:
            with Image.open(file, formats=FORMATS) as opened:
                self._refuse_bomb(opened.width, opened.height)
                large = opened.width * opened.height > _ALONE
                with _ONE_AT_A_TIME if large else nullcontext():
                    return self._square(self._rgb(opened))
        except (DataError, MemoryError):
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            found = re.search(r"\d+", str(error))
            raise DataError(self._too_large("", int(found[0]) if found else 0)) from None
        except Exception as error:
            # Pillow's decoders raise whatever damaged bytes lead them to: OSError, SyntaxError, ...
            reason = str(error).partition("\n")[0] or type(error).__name__
            if isinstance(error, Image.UnidentifiedImageError):
                reason = "no image format that Pillow knows"
            raise DataError(f"not a readable image ({reason})") from error

    def _refuse_bomb(self, width: int, height: int) -> None:
        if width * height > self.max_pixels:
            raise DataError(self._too_large(f"{width} x {height} = ", width * height))
        if width * height == 0:
            raise DataError(f"has no pixels ({width} x {height})")

    def _too_large(self, shape: str, count: int) -> str:
        return (
            f"declares {shape}{count} pixels, more than {self.max_pixels}; "
            f"--max_pixels {count} takes it"
        )

    def _rgb(self, image: Image.Image) -> Image.Image:
        deep = any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))
        # Loaded first: Pillow turns a TIFF itself then, and clears its orientation.
        image.load()
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
        transparent = image.info.get("transparency")
        if image.mode == "F":
            raise DataError("holds floating-point pixels, whose range is not known")
        if image.mode.startswith("I"):
            levels = np.asarray(image)
            if image.mode == "I" and 0 < levels.max() < 256:
                raise DataError(
                    "holds 32-bit integers of which none is above 255: whether they are of 8 or of "
                    "16 bits is not known"
                )
            image = Image.fromarray(_upper_byte(levels))
            if isinstance(transparent, int):
                alpha = Image.fromarray(np.where(levels == transparent, 0, 255).astype(np.uint8))
                image = Image.merge("LA", (image, alpha))
        elif deep and isinstance(transparent, tuple):
            # Pillow keeps the upper byte of the pixels, and all of the colour that is transparent.
            image.info["transparency"] = tuple(level >> 8 for level in transparent)
        image = self._opaque(image)
        return image if turn is None else image.transpose(turn)

    def _opaque(self, image: Image.Image) -> Image.Image:
        """Convert to RGB, and show the background where the image is transparent."""
        if not image.has_transparency_data:
            return image.convert("RGB")
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (*self.background, 255))
        return Image.alpha_composite(ground, image).convert("RGB")

    def _from_array(self, array: npt.NDArray) -> Image.Image:
        """Return an array [H, W, C] as an RGB image; a fourth channel is alpha."""
        height, width, channels = array.shape
        self._refuse_bomb(width, height)
        array = array if array.dtype == np.uint8 else _quantise(array)
        if channels == 1:
            array = np.broadcast_to(array, (height, width, 3))
        return self._opaque(Image.fromarray(np.ascontiguousarray(array)))

    def _square(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        if self.fit == "pad":
            return self._padded(image)
        if self.fit == "crop" and width != height:
            # Cropped, then resized: the other order would enlarge a 1 x 100000 image.
            side = min(width, height)
            left, top = (width - side) // 2, (height - side) // 2
            image = image.crop((left, top, left + side, top + side))
        return self._resized(image, self.size, self.size)

    def _padded(self, image: Image.Image) -> Image.Image:
        """Fit the whole image into the square, in its middle, with background at two sides."""
        scale = self.size / max(image.size)
        width, height = (max(1, round(length * scale)) for length in image.size)
        square = Image.new("RGB", (self.size, self.size), self.background)
        corner = ((self.size - width) // 2, (self.size - height) // 2)
        square.paste(self._resized(image, width, height), corner)
        return square

    def _resized(self, image: Image.Image, width: int, height: int) -> Image.Image:
        if image.size == (width, height):
            return image
        return image.resize((width, height), Image.Resampling.BICUBIC)


@contextmanager
def _opened(image: Path | Part | bytes) -> Iterator[BinaryIO]:
    """Open the bytes of an image; DataError where they are not those of a regular file."""
    if isinstance(image, bytes):
        yield io.BytesIO(image)
        return
    path = image.path if isinstance(image, Part) else image
    try:
        found = path.stat()
        # To open a FIFO waits until something writes to it.
        if not stat.S_ISREG(found.st_mode):
            raise DataError(f"cannot be read ({_kind(found.st_mode)})")
        start, length = 0, found.st_size
        if isinstance(image, Part):
            start, length = image.offset, image.length
        if length > _MOST_BYTES:
            raise DataError(f"is {length} bytes long, and an image file has at most {_MOST_BYTES}")
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(length)
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})") from error
    yield io.BytesIO(data)


def _kind(mode: int) -> str:
    kinds = {
        stat.S_ISFIFO: "a FIFO",
        stat.S_ISSOCK: "a socket",
        stat.S_ISCHR: "a device",
        stat.S_ISBLK: "a device",
        stat.S_ISDIR: "a folder",
    }
    name = next((name for is_kind, name in kinds.items() if is_kind(mode)), "something else")
    return f"{name}, need a file"


def _upper_byte(grey: npt.NDArray) -> npt.NDArray[np.uint8]:
    """Reduce 16-bit grey [H, W] to 8 bits, as Pillow itself does for 16-bit colour."""
    if grey.min() < 0 or grey.max() > 0xFFFF:
        raise DataError(f"holds grey values from {grey.min()} to {grey.max()}, need 16 bits")
    return (grey >> 8).astype(np.uint8)


def _quantise(array: npt.NDArray) -> npt.NDArray[np.uint8]:
    """Round floats in [0, 1] to the nearest of 256 levels."""
    if not np.issubdtype(array.dtype, np.floating):
        raise DataError(f"pixels must be uint8 or floats in [0, 1], got {array.dtype}")
    low, high = float(array.min()), float(array.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise DataError("holds NaN or infinite pixels")
    levels = np.rint(array.astype(np.float64) * 255)
    if levels.min() < 0 or levels.max() > 255:
        raise DataError(
            f"float pixels must be in [0, 1], got {low:.4g} to {high:.4g}; "
            "undo a normalisation first (x * std + mean), or divide by 255"
        )
    return levels.astype(np.uint8)
