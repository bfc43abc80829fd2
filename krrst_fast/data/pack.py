"""A source's images, decoded by a few threads and written as a store."""

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from krrst_fast.data import decode
from krrst_fast.data.source import Item, Source, Split, summary
from krrst_fast.data.store import StoreWriter
from krrst_fast.errors import DataError
from krrst_fast.runs.progress import progress_bar

_CHUNK = 256
_NAMED = 20

Pixels = npt.NDArray[np.uint8]


@dataclass
class Packer:
    """Options for packing the images of a source, and the images that were left out."""

    decoder: decode.Decoder
    on_error: Literal["refuse", "skip"]
    limit: int | None
    progress: bool
    skipped: list[dict[str, str]] = field(default_factory=list)

    def pack(self, source: Source, where: str, folder: Path) -> None:
        """Write the store of a source, which lies at `where`, into `folder`.

        Only a chunk of the images is in memory at a time.

        Raises:
            DataError: There is no image, or one cannot be decoded.
        """
        writer = StoreWriter(folder, self.decoder.size, source.classes)
        limit = self.decoder.max_pixels
        with decode.quiet(limit), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for split in source.splits:
                items = self._wanted(split)
                while chunk := list(islice(items, _CHUNK)):
                    writer.add(split.name, self._decoded(chunk, pool))
        if writer.count == 0:
            raise DataError(self._nothing_left(source, where))
        missed = source.left_out
        writer.finish(
            {
                "source": {"path": where, "format": source.format},
                "skipped": self.skipped,
                "pixels": {
                    "fit": self.decoder.fit,
                    "background": list(self.decoder.background),
                    "upright": True,
                },
                "ignored": {"count": len(missed), "first": [e.name for e in missed[:_NAMED]]},
                "left_out": summary(
                    [*(e.reason for e in missed), *["cannot be decoded"] * len(self.skipped)]
                ),
            }
        )
        self._warn(writer.count + len(self.skipped))

    def _wanted(self, split: Split) -> Iterator[Item]:
        total = split.count if self.limit is None else min(self.limit, split.count or self.limit)
        with progress_bar(
            self.progress, total=total, desc=f"prepare {split.name}", unit="image"
        ) as bar:
            for item in islice(split.items, self.limit):
                yield item
                bar.update()

    def _decoded(self, chunk: list[Item], pool: ThreadPoolExecutor) -> list[tuple[Pixels, int]]:
        """Return pixels and labels of the images that can be decoded, in their order."""
        good = []
        for item, result in zip(chunk, pool.map(self._attempt, chunk)):
            if not isinstance(result, DataError):
                good.append((result, item.label))
            elif self.on_error == "refuse":
                hint = "--on_error skip leaves such images out"
                raise DataError(f"prepare: {item.name}: {result}; {hint}") from result
            else:
                self.skipped.append({"name": item.name, "reason": str(result)})
        return good

    def _attempt(self, item: Item) -> Pixels | DataError:
        try:
            return self.decoder.pixels(item.image)
        except DataError as error:
            return error

    def _nothing_left(self, source: Source, where: str) -> str:
        if self.skipped:
            first = self.skipped[0]
            return (
                f"prepare: {where}: none of {len(self.skipped)} images can be decoded; "
                f"the first, {first['name']}: {first['reason']}"
            )
        others = f", only {source.left_out[0].name} and the like" if source.left_out else ""
        return f"prepare: {where}: there is no image{others}"

    def _warn(self, total: int) -> None:
        if self.skipped:
            names = "; ".join(f"{row['name']}: {row['reason']}" for row in self.skipped[:3])
            more = f"; and {len(self.skipped) - 3} more" if len(self.skipped) > 3 else ""
            message = f"skipped {len(self.skipped)} of {total} images: {names}{more}"
            print(f"krrst: warning: prepare: {message}", file=sys.stderr)
