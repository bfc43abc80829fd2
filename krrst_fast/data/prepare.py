"""`krrst prepare`: decode an image set once into a packed store that the other commands read."""

import os
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from krrst_fast.config import require
from krrst_fast.data.source import Item, Source, Split
from krrst_fast.data.store import INDEX, ImageStore, StoreWriter, open_store
from krrst_fast.errors import ConfigError, DataError
from krrst_fast.files import atomic_folder, refuse_existing

Pixels = npt.NDArray[np.uint8]

MAX_SIZE = 4096
_CHUNK = 256
_NAMED = 20


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """One image set, one store."""

    source: str
    """A folder or file of images in any known format, or the word `digits`."""
    out: Path
    """Folder of the store."""
    size: int = 32
    """Height and width of the stored images."""
    on_error: Literal["refuse", "skip"] = "refuse"
    """What to do about an image that cannot be decoded: stop, or leave it out and name it."""
    limit: int | None = None
    """Take the first images of each split only."""
    overwrite: bool = False
    """Replace a store that is at `out` already."""

    def __post_init__(self) -> None:
        require(bool(self.source), self, "source", "a path, or digits")
        require(1 <= self.size <= MAX_SIZE, self, "size", f"from 1 to {MAX_SIZE}")
        require(self.on_error in ("refuse", "skip"), self, "on_error", "refuse or skip")
        require(self.limit is None or self.limit >= 1, self, "limit", "at least 1")


@dataclass
class _Skips:
    """Images left out, and the warning about them."""

    rows: list[dict[str, str]] = field(default_factory=list)

    def warn(self, total: int) -> None:
        if self.rows:
            names = "; ".join(f"{row['name']}: {row['reason']}" for row in self.rows[:3])
            more = f"; and {len(self.rows) - 3} more" if len(self.rows) > 3 else ""
            message = f"skipped {len(self.rows)} of {total} images: {names}{more}"
            print(f"krrst: warning: prepare: {message}", file=sys.stderr)


def prepare(config: PrepareConfig, *, progress: bool = False) -> ImageStore:
    """Decode every image of the source and write the store, whole or not at all.

    Raises:
        DataError: the source is missing, empty or damaged.
        ConfigError: `out` exists.
    """
    _refuse_output(config)
    source = _open_source(config)
    skips = _Skips()
    with atomic_folder(config.out, overwrite=config.overwrite, marker=INDEX) as folder:
        writer = StoreWriter(folder, config.size, source.classes)
        with warnings.catch_warnings(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            # Pillow warns of a decompression bomb before it raises; to us both are an error.
            warnings.filterwarnings("error", module="PIL")
            for split in source.splits:
                items = _shown(islice(split.items, config.limit), split, config, progress)
                while chunk := list(islice(items, _CHUNK)):
                    writer.add(split.name, _decoded(chunk, config, pool, skips))
        if writer.count == 0:
            raise DataError(_nothing_left(config, source, skips))
        writer.finish(_about(config, source, skips))
    skips.warn(writer.count + len(skips.rows))
    return open_store(config.out)


def _refuse_output(config: PrepareConfig) -> None:
    """What may be replaced is a store, never the images it is made from."""
    refuse_existing(config.out, overwrite=config.overwrite, marker=INDEX)
    source, out = Path(config.source).resolve(), config.out.resolve()
    if source == out or out in source.parents:
        raise ConfigError(f"{config.out}: the source {config.source} lies in the output folder")


def _open_source(config: PrepareConfig) -> Source:
    try:
        # Pillow is needed to prepare a store, not to read one.
        from krrst_fast.data import formats
    except ImportError as error:
        raise ConfigError(
            f"prepare: {error}; pip install 'krrst-fast[data]' brings what decodes images"
        ) from None
    return formats.open_source(config.source, config.size)


def _shown(
    items: Iterator[Item], split: Split, config: PrepareConfig, progress: bool
) -> Iterator[Item]:
    if not progress:
        return items
    from tqdm import tqdm

    total = split.count if config.limit is None else min(config.limit, split.count or config.limit)
    return iter(tqdm(items, desc=f"prepare {split.name}", unit="img", total=total, miniters=_CHUNK))


def _decoded(
    chunk: list[Item], config: PrepareConfig, pool: ThreadPoolExecutor, skips: _Skips
) -> list[tuple[Pixels, int]]:
    """Pixels and labels of the images that can be decoded, in their order."""
    good = []
    for item, result in zip(chunk, pool.map(lambda item: _attempt(item, config.size), chunk)):
        if not isinstance(result, DataError):
            good.append((result, item.label))
        elif config.on_error == "refuse":
            raise DataError(f"prepare: {item.name}: {result}") from result
        else:
            skips.rows.append({"name": item.name, "reason": str(result)})
    return good


def _attempt(item: Item, size: int) -> Pixels | DataError:
    from krrst_fast.data import decode

    try:
        return decode.pixels(item.image, size)
    except DataError as error:
        return error


def _nothing_left(config: PrepareConfig, source: Source, skips: _Skips) -> str:
    if skips.rows:
        first = skips.rows[0]
        return (
            f"prepare: {config.source}: none of {len(skips.rows)} images can be decoded; "
            f"the first, {first['name']}: {first['reason']}"
        )
    others = f", only {source.ignored[0]} and the like" if source.ignored else ""
    return f"prepare: {config.source}: there is no image{others}"


def _about(config: PrepareConfig, source: Source, skips: _Skips) -> dict[str, object]:
    return {
        "source": {"path": config.source, "format": source.format},
        "skipped": skips.rows,
        "ignored": {"count": len(source.ignored), "first": list(source.ignored[:_NAMED])},
    }
