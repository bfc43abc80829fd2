"""Contact sheets: the images of a distilled set as one PNG, every pixel a crisp square."""

import base64
import io
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from krrst_fast.distill.distilled_set import DistilledSet

Pixels = NDArray[np.uint8]

SHEET_WIDTH = 720
GREY = 128
LIMIT = 100


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A contact sheet as a data URI, with its size in pixels and what it shows in words."""

    title: str
    uri: str
    width: int
    height: int
    caption: str
    alt: str


def columns(count: int) -> int:
    """Return the number of images in a row: the sheet is almost square, and at most ten wide."""
    return max(1, min(10, count, math.ceil(math.sqrt(count * 1.2))))


def tile(images: Pixels) -> Pixels:
    """Lay images [N, H, W, 3] out in rows as RGBA [height, width, 4], clear gaps between them.

    A pixel becomes the smallest whole square that makes the sheet `SHEET_WIDTH` wide or wider.
    """
    count, height, width = images.shape[:3]
    across = columns(count)
    down = math.ceil(count / across)
    scale = max(1, math.ceil(SHEET_WIDTH / (across * (width + 1))))
    gap = max(2, scale)
    big = images.repeat(scale, axis=1).repeat(scale, axis=2)
    step_y, step_x = height * scale + gap, width * scale + gap
    sheet = np.zeros((down * step_y - gap, across * step_x - gap, 4), dtype=np.uint8)
    for index, image in enumerate(big):
        y, x = index // across * step_y, index % across * step_x
        sheet[y : y + height * scale, x : x + width * scale, :3] = image
        sheet[y : y + height * scale, x : x + width * scale, 3] = 255
    return sheet


def amplified(difference: NDArray[np.float64]) -> tuple[Pixels, float]:
    """Return a difference of pixel values (1 = the whole range) around mid-grey, and its factor.

    The factor brings the 99th percentile of the sizes to the end of the range, to two digits.
    """
    large = float(np.quantile(np.abs(difference), 0.99)) if difference.size else 0.0
    factor = float(f"{0.5 / large:.2g}") if large > 0 else 1.0
    shown = np.rint(GREY + 255 * factor * difference).clip(0, 255)
    return shown.astype(np.uint8), factor


def sheets(initial: DistilledSet | None, distilled: DistilledSet | None) -> list[Sheet]:
    """Return the sheets of the first images, the last ones, and their difference."""
    made = []
    if initial is not None:
        made.append(_of_set(initial, "At the start"))
    if distilled is not None:
        made.append(_of_set(distilled, "Now" if initial is not None else "The distilled images"))
    if initial is None or distilled is None or initial.images.shape != distilled.images.shape:
        return made
    return [*made, _of_difference(initial, distilled)]


def _of_set(images: DistilledSet, title: str) -> Sheet:
    pixels = _colour(images.pixels()[:LIMIT].numpy())
    values = _unit(images)
    half_a_level = 0.5 / 255
    outside = float(np.mean((values < -half_a_level) | (values > 1 + half_a_level)))
    caption = f"{_extent(images)}."
    if outside > 0:
        caption += f" {percent(outside)} of the values lie outside black to white and are clipped."
    alt = f"{title}: contact sheet of {len(pixels)} images of {_size(images)} pixels"
    return _encode(tile(pixels), title=title, caption=caption, alt=alt)


def _of_difference(initial: DistilledSet, distilled: DistilledSet) -> Sheet:
    change = _unit(distilled) - _unit(initial)
    shown, factor = amplified(np.moveaxis(change[:LIMIT], 1, 3))
    root = float(np.sqrt(np.mean(change**2)))
    caption = (
        f"Now minus start, times {factor:g}, around mid-grey: grey is no change. "
        f"Root mean square of the change: {percent(root)} of the range from black to white."
    )
    alt = f"Difference of each image to its start, amplified {factor:g} times around grey"
    return _encode(tile(_colour(shown)), title="Difference", caption=caption, alt=alt)


def _unit(images: DistilledSet) -> NDArray[np.float64]:
    """Return images [M, C, H, W] with black at 0 and white at 1, not clipped."""
    mean, std = (np.reshape(v, (-1, 1, 1)) for v in (images.mean, images.std))
    return images.images.detach().cpu().double().numpy() * std + mean


def _colour(images: Pixels) -> Pixels:
    """Return [N, H, W, C] as RGB: grey is repeated, channels after the third are dropped."""
    return images[..., :1].repeat(3, axis=3) if images.shape[3] < 3 else images[..., :3]


def _size(images: DistilledSet) -> str:
    height, width = images.images.shape[2:]
    return f"{width} \u00d7 {height}"


def _extent(images: DistilledSet) -> str:
    count = len(images)
    if count <= LIMIT:
        return f"All {count} images" if count > 1 else "The one image"
    return f"The first {LIMIT} of {count:,} images; {count - LIMIT:,} are not shown"


def percent(share: float) -> str:
    """Return a share in per cent, to two digits; a small share does not read as zero."""
    value = 100 * share
    digits = f"{value:.0f}" if value >= 10 else f"{value:.2g}" if value >= 0.01 else "< 0.01"
    return f"{digits}\u00a0%"


def _encode(sheet: Pixels, *, title: str, caption: str, alt: str) -> Sheet:
    """Return a tiled sheet [height, width, 4] as a PNG data URI."""
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(sheet).save(data, format="PNG", optimize=True)
    return Sheet(
        title=title,
        uri="data:image/png;base64," + base64.b64encode(data.getvalue()).decode("ascii"),
        width=sheet.shape[1],
        height=sheet.shape[0],
        caption=caption,
        alt=alt,
    )
