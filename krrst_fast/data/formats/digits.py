"""scikit-learn's handwritten digits: real images that need no download."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from krrst_fast.data.source import Item, Source, Split
from krrst_fast.errors import ConfigError
from krrst_fast.runs.seeding import generator

TRAIN = 1200
_FULL_INK = 16


def read(size: int) -> Source:
    """Return 1200 train and 597 test digits, upsampled bilinearly from 8x8, in a fixed split.

    Raises:
        ConfigError: Scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError(
            "prepare: the digits come with scikit-learn: pip install 'krrst-fast[data]'"
        ) from None
    digits = load_digits()
    order = _stratified(digits.target)
    parts = {"train": order[:TRAIN], "test": order[TRAIN:]}
    return Source(
        "digits",
        tuple(
            Split(name, _items(digits.images, digits.target, rows, size), len(rows))
            for name, rows in parts.items()
        ),
        tuple(str(name) for name in digits.target_names),
    )


def _items(
    images: npt.NDArray, labels: npt.NDArray, rows: npt.NDArray[np.int64], size: int
) -> Iterator[Item]:
    for row in rows:
        grey = np.rint(images[row] * (255 / _FULL_INK)).astype(np.uint8)
        upsampled = Image.fromarray(grey).resize((size, size), Image.Resampling.BILINEAR)
        yield Item(f"digits[{row}]", np.asarray(upsampled)[:, :, None], int(labels[row]))


def _stratified(labels: npt.NDArray) -> npt.NDArray[np.int64]:
    """Return a fixed shuffle in which every prefix holds the classes in their proportions."""
    place = np.empty(len(labels))
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        shuffled = torch.randperm(len(rows), generator=generator(0, "digits", int(label))).numpy()
        place[rows] = (shuffled + 0.5) / len(rows)
    return np.argsort(place, kind="stable")
