"""Image arrays in the layouts that files hold them in, as streams of items."""

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import numpy.typing as npt

from krrst_fast.data.source import MOST_CLASSES, UNLABELLED, Item
from krrst_fast.errors import DataError

BLOCK = 256
"""Images that are read at a time."""

Row = npt.NDArray
Labels = npt.NDArray[np.int64] | None


def items(
    name: str, blocks: Iterable[npt.NDArray], shape: tuple[int, ...], labels: Labels
) -> Iterator[Item]:
    """Yield items of an array of `shape` that comes in blocks of rows; `name[i]` is row i."""
    to_hwc = layout(name, shape)
    row = 0
    for block in blocks:
        for image in block:
            label = UNLABELLED if labels is None else int(labels[row])
            yield Item(f"{name}[{row}]", to_hwc(image), label)
            row += 1


def blocks_of(array: npt.NDArray) -> Iterator[npt.NDArray]:
    """Yield the rows of an array in memory, a block at a time."""
    return (array[i : i + BLOCK] for i in range(0, len(array), BLOCK))


def layout(name: str, shape: tuple[int, ...]) -> Callable[[Row], Row]:
    """Return a function that turns one row of an array of `shape` into [H, W, C].

    Known are [N, H, W, C], [N, C, H, W], [N, H, W] and flat rows [N, C * S * S], planar.

    Raises:
        DataError: None of them.
    """
    if len(shape) == 4 and shape[3] in (1, 3, 4):
        return lambda row: row
    if len(shape) == 4 and shape[1] in (1, 3, 4):
        return lambda row: row.transpose(1, 2, 0)
    if len(shape) == 3:
        return lambda row: row[:, :, None]
    if len(shape) == 2:
        for channels in (3, 1):
            side = math.isqrt(shape[1] // channels)
            if side > 0 and channels * side * side == shape[1]:
                planes = (channels, side, side)
                return lambda row: row.reshape(planes).transpose(1, 2, 0)
    raise DataError(
        f"{name}: images must be [N, H, W, C], [N, C, H, W], [N, H, W] or flat squares, "
        f"got {list(shape)}"
    )


def as_labels(name: str, values: npt.ArrayLike, count: int) -> npt.NDArray[np.int64]:
    """Return labels as int64 [count].

    Raises:
        DataError: They are no integers, or not one for each image.
    """
    # Lists in lists may name each other, and be far longer as an array than in their file.
    nested = isinstance(values, list) and any(isinstance(value, list) for value in values)
    labels = np.asarray([] if nested else values)
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != (count,):
        raise DataError(
            f"{name}: need one integer label for each of {count} images, "
            f"got {labels.dtype} {list(labels.shape)}"
        )
    if count and not UNLABELLED <= (low := int(labels.min())) <= int(labels.max()) < MOST_CLASSES:
        raise DataError(
            f"{name}: need labels from 0 to {MOST_CLASSES - 1}, got {low} to {int(labels.max())}"
        )
    return labels.astype(np.int64)
