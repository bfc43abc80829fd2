"""An encoded image or an array to packed pixels: uint8 RGB, [3, size, size]."""

import io
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from krrst_fast.errors import DataError

MAX_PIXELS = 89_478_485
"""Larger images are refused before they are decoded: a quarter of a GiB as RGB."""


@contextmanager
def quiet() -> Iterator[None]:
    """Drop Pillow's warnings of odd metadata, and make that of a decompression bomb an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def pixels(image: bytes | Path | npt.NDArray, size: int) -> npt.NDArray[np.uint8]:
    """Decode, centre-crop to a square and resize to `size` (bicubic, antialiased).

    An image of `size` by `size` keeps its pixels exactly. Alpha is dropped, grey is replicated,
    of 16 bits the upper 8 stay; a turn by EXIF tags is not applied.

    Returns:
        uint8 [3, size, size].

    Raises:
        DataError: Damaged, too large, or no picture at all; it says why, not which.
    """
    if isinstance(image, np.ndarray):
        return _fit(_from_array(image), size)
    data = _bytes_of(image) if isinstance(image, Path) else image
    try:
        with Image.open(io.BytesIO(data)) as opened:
            _refuse_bomb(opened.width, opened.height)
            return _fit(_rgb(opened), size)
    except (DataError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(f"declares more than {MAX_PIXELS} pixels") from None
    except Exception as error:
        # Pillow's decoders raise whatever damaged bytes lead them to: OSError, SyntaxError, ...
        reason = str(error).partition("\n")[0] or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "no image format that Pillow knows"
        raise DataError(f"not a readable image ({reason})") from error


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})") from error


def _refuse_bomb(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DataError(f"declares {width} x {height} pixels, more than {MAX_PIXELS}")
    if width * height == 0:
        raise DataError(f"has no pixels ({width} x {height})")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _from_array(_upper_byte(np.asarray(image))[:, :, None])
    if image.mode == "F":
        raise DataError("holds floating-point pixels, whose range is not known")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _upper_byte(grey: npt.NDArray) -> npt.NDArray[np.uint8]:
    """Reduce 16-bit grey [H, W] to 8 bits, as Pillow itself does for 16-bit colour."""
    if grey.min() < 0 or grey.max() > 0xFFFF:
        raise DataError(f"holds grey values from {grey.min()} to {grey.max()}, need 16 bits")
    return (grey >> 8).astype(np.uint8)


def _from_array(array: npt.NDArray) -> Image.Image:
    """Return an array [H, W, C] as an RGB image."""
    height, width, channels = array.shape
    _refuse_bomb(width, height)
    array = array if array.dtype == np.uint8 else _quantise(array)
    if channels == 1:
        array = np.broadcast_to(array, (height, width, 3))
    return Image.fromarray(np.ascontiguousarray(array[:, :, :3]), "RGB")


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


def _fit(image: Image.Image, size: int) -> npt.NDArray[np.uint8]:
    """Crop to the centre square, then resize: the other order would enlarge a 1 x 100000 image."""
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    if (width, height) != (side, side):
        image = image.crop((left, top, left + side, top + side))
    if side != size:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
