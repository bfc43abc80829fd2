"""Calls that together reach every configuration of the kernels, as launches that are not run."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from krrst_fast.kernels import gram, tiles
from krrst_fast.kernels.common import Launch

KINDS = {"half": torch.float16, "tf32x3": torch.float32, "ieee": torch.float32}


def _matrix(rows: int, columns: int, dtype: torch.dtype, layout: str = "rows") -> Tensor:
    """No numbers, only a shape: row by row, column by column, or rows that start anywhere."""
    if layout == "columns":
        return torch.empty(columns, rows, dtype=dtype, device="meta").mT
    if layout == "odd":
        return torch.empty(rows, columns + 1, dtype=dtype, device="meta")[:, 1:]
    return torch.empty(rows, columns, dtype=dtype, device="meta")


def _gram(arch: int) -> Iterator[tuple[str, list[Launch]]]:
    for kind, dtype in KINDS.items():
        for rows, layout in ((100, "rows"), (1000, "rows"), (8192, "columns"), (1000, "odd")):
            x = _matrix(rows, 8192, dtype, layout)
            call = x, 1.0, 1.0, 1e-6, "trace", kind, arch
            yield f"gram {kind} {rows} {layout}", gram.gram_launches(*call)[2]
    x, scale = _matrix(1000, 8192, torch.float32), torch.empty((), device="meta")
    for what, ridge_of in (("plain", ""), ("absolute", "absolute")):
        call = x, scale, 1.0, scale, ridge_of, "tf32x3", arch
        yield f"gram {what} of tensors", gram.gram_launches(*call)[2][1:]


def cases(arch: int) -> Iterator[tuple[str, Launch]]:
    """Each launch with the name of the call that makes it."""
    for part in (_gram,):
        for label, launches in part(arch):
            yield from ((label, launch) for launch in launches)


def untested(launched: Sequence[tuple[int, Launch]]) -> list[Any]:
    """Entries of the table that no launch was made with."""
    seen = {(tiles.generation(arch), launch.tile) for arch, launch in launched}
    return [
        (name, kind, generation, tile)
        for name, table in tiles.TABLES.items()
        for (kind, generation), choices in table.items()
        for tile in choices
        if (generation, tile) not in seen
    ]
