"""The common result of all formats: splits, each a stream of named, still encoded images."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from math import floor
from pathlib import Path
from typing import Any, Literal

import numpy.typing as npt

from krrst_fast.errors import DataError

UNLABELLED = -1
MOST_CLASSES = 1_000_000
"""A larger label is no class: the names of all classes below it would fill the memory."""
MAX_PIXELS = 128_000_000
"""Enough for a photo of 108 megapixels; as RGB 366 MiB."""

Fit = Literal["crop", "pad", "squash"]
Layout = Literal["auto", "classes", "splits"]

DIGITS = "digits"
"""The source that is a word, not a path: scikit-learn's handwritten digits."""

SPLITS = ("train", "val", "test")
_SPLIT_OF = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes that lie inside a file, as those of an image in a tar."""

    path: Path
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Item:
    """One image that is not decoded yet."""

    name: str
    """What an error message calls it."""
    image: Path | Part | bytes | npt.NDArray
    """An image file, a part of a file, bytes, or pixels [H, W, C]: uint8, or floats in [0, 1]."""
    label: int = UNLABELLED


@dataclass(frozen=True)
class Split:
    """One split of a source; `items` can be walked through once."""

    name: str
    items: Iterator[Item]
    count: int | None = None


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Something that lies in the source and is not prepared, and the reason."""

    name: str
    reason: str


@dataclass(frozen=True)
class Source:
    """An image set as it lies on the disk."""

    format: str
    splits: tuple[Split, ...]
    classes: tuple[str, ...] | None = None
    """Names by label; None where the format knows integers only."""
    left_out: tuple[LeftOut, ...] = ()
    """What lies beside the images and is not read."""


def summary(reasons: Iterable[str]) -> dict[str, int]:
    """Count equal reasons: the most frequent first, then by name."""
    counts = Counter(reasons)
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


def read_lines(path: Path) -> list[str]:
    """Read the lines of a text file; DataError where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a text file ({error})") from None


def split_of(word: str) -> str | None:
    """Return the split that a folder or a file called `word` holds, if the name says it."""
    return _SPLIT_OF.get(word.lower())


def split_in(name: str) -> str | None:
    """Return the split that a word of a file name says: `imagenet-train-000003.tar` is of train."""
    words = re.split(r"[^A-Za-z]+", name)
    return next((split_of(word) for word in words if split_of(word)), None)


def by_split(files: Iterable[Path], name_of: Callable[[Path], str]) -> dict[str, list[Path]]:
    """Group files by the split that a word of their name says; train by default."""
    splits: dict[str, list[Path]] = {}
    for path in files:
        splits.setdefault(split_in(name_of(path)) or "train", []).append(path)
    return splits


def held_out_as_test(source: Source) -> Source:
    """Call the held-out split test, and put the splits in order: train, val, test.

    Where a source has both val and test, both keep their names.
    """
    names = {split.name for split in source.splits}
    rename = {"val": "test"} if "test" not in names else {}
    splits = [replace(split, name=rename.get(split.name, split.name)) for split in source.splits]
    return replace(source, splits=tuple(sorted(splits, key=lambda s: SPLITS.index(s.name))))


def hold_out(source: Source, again: Source, fraction: float) -> Source:
    """Make a test split of a fraction of each class, spread evenly; the same images every time.

    Args:
        source: With a train split alone.
        again: The same source, opened once more: its items can be walked through once.
        fraction: Between 0 and 1. Images without labels count as one class.
    """
    (train,), (test,) = source.splits, again.splits
    splits = (
        Split("train", _every(train.items, fraction, held=False)),
        Split("test", _every(test.items, fraction, held=True)),
    )
    return replace(source, splits=splits)


def _every(items: Iterator[Item], fraction: float, *, held: bool) -> Iterator[Item]:
    """Yield the images that are held out, or the others."""
    seen: Counter[int] = Counter()
    for item in items:
        # The first of a class is never held out.
        before, after = (floor((seen[item.label] + i) * fraction + 1e-9) for i in (0, 1))
        seen[item.label] += 1
        if (after > before) == held:
            yield item


def natural(text: str) -> tuple[list[Any], str]:
    """Return a sort key that puts image_10 after image_9; no two texts have the same one."""
    parts = re.split(r"(\d+)", text)
    return [_number(part) if i % 2 else part for i, part in enumerate(parts)], text


def _number(digits: str) -> tuple[int, str]:
    """Return a sort key of a number that may have more digits than Python turns into an int."""
    digits = digits.lstrip("0")
    return len(digits), digits


def sample_order(path: Path) -> tuple[tuple[int, str], tuple[list[Any], str]]:
    """Return the sort key of an image file: the last number in its name, then its path.

    The same samples then come in the same order whatever the format, and a prefix of the set holds
    every class: `n01440764_0.JPEG` of each class comes before any `n01440764_1.JPEG`.
    """
    numbers = re.findall(r"\d+", path.stem)
    return (_number(numbers[-1]) if numbers else (-1, "")), natural(path.as_posix())
