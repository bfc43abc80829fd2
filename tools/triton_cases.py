"""Calls that together reach every configuration of the kernels, as launches that are not run."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from krrst_fast.kernels import (
    closing_matmul,
    gram,
    kernel_functions,
    residual_mse,
    thin_matmul,
    tiles,
    views,
)
from krrst_fast.kernels.common import Launch

KINDS = {"half": torch.float16, "tf32x3": torch.float32, "ieee": torch.float32}


def _matrix(rows: int, columns: int, dtype: torch.dtype, layout: str = "rows") -> Tensor:
    """Return a meta tensor, stored by rows, by columns, or with unaligned rows."""
    if layout == "columns":
        return torch.empty(columns, rows, dtype=dtype, device="meta").mT
    if layout == "odd":
        return torch.empty(rows, columns + 1, dtype=dtype, device="meta")[:, 1:]
    return torch.empty(rows, columns, dtype=dtype, device="meta")


def _gram(arch: int) -> Iterator[tuple[str, list[Launch]]]:
    for kind, dtype in KINDS.items():
        for rows, layout in ((100, "rows"), (1000, "rows"), (8192, "columns"), (1000, "odd")):
            x = _matrix(rows, 8192, dtype, layout)
            launches = gram.gram_launches(x, 1.0, 1.0, kind, arch)[1]
            yield f"gram {kind} {rows} {layout}", launches
    x, scale = _matrix(1000, 8192, torch.float32), torch.empty((), device="meta")
    yield "gram of a tensor scale", gram.gram_launches(x, scale, 1.0, "tf32x3", arch)[1][1:]


def _thin_matmul(arch: int) -> Iterator[tuple[str, list[Launch]]]:
    for kind in ("half", "tf32x3"):
        for columns in (10, 64, 512):
            a = _matrix(1000, 8192, KINDS[kind])
            b = _matrix(8192, columns, torch.float32)
            for label, left in (("rows", a), ("columns", _matrix(1000, 8192, a.dtype, "columns"))):
                launches = thin_matmul.thin_matmul_launches(left, b, kind, arch)[1]
                yield f"thin_matmul {kind} {columns} {label}", launches
            left, b = _matrix(8192, 1000, a.dtype, "columns"), _matrix(1000, columns, b.dtype)
            launches = thin_matmul.thin_matmul_launches(left, b, kind, arch)[1]
            yield f"thin_matmul {kind} {columns} transposed", launches
        if kind == "half":
            for columns, layout in ((10, "columns"), (64, "rows"), (1024, "columns")):
                features = _matrix(8192, columns, a.dtype, layout)
                launches = thin_matmul.thin_matmul_launches(a, features, kind, arch)[1]
                yield f"thin_matmul {kind} {columns} features", launches
            features = _matrix(1024, 8192, a.dtype, "odd").mT
            launches = thin_matmul.thin_matmul_launches(a, features, kind, arch)[1]
            yield f"thin_matmul {kind} odd features", launches
        odd, b = _matrix(1000, 8192, a.dtype, "odd"), _matrix(8192, 512, b.dtype, "columns")
        for label, left in (("rows", a), ("odd", odd)):
            launches = thin_matmul.thin_matmul_launches(left, b, kind, arch)[1]
            yield f"thin_matmul {kind} {label} by columns", launches


def _residual_mse(arch: int) -> Iterator[tuple[str, list[Launch]]]:
    f, w, y = (_matrix(*s, torch.float32) for s in ((1024, 8192), (8192, 512), (1024, 512)))
    tensor = torch.empty((), device="meta")
    for what, scale, offset in (("", 1.0, None), (" of a tensor scale, offset", tensor, y[0])):
        call = f, w, y, scale, offset, "tf32x3", arch
        launches = residual_mse.predicted_residual_mse_launches(*call)[2]
        yield f"predicted_residual_mse{what}", launches[-2:]


def _closing_matmul(arch: int) -> Iterator[tuple[str, list[Launch]]]:
    scale = torch.empty((), device="meta")
    for precision in ("fp16x3", "tf32x3"):
        for columns, factor in ((512, 1.0), (64, 1.0), (10, scale)):
            left, right = (_matrix(n, columns, torch.float32) for n in (1000, 8192))
            call = left, right, left, right, factor, precision, arch
            launches = closing_matmul.closing_matmul_launches(*call)[1]
            yield f"closing_matmul {precision} {columns}", launches
        for columns in (512, 64):
            left, right = (_matrix(n, columns, torch.float32, "columns") for n in (1000, 8192))
            call = left, right, left, right, 1.0, precision, arch
            launches = closing_matmul.closing_matmul_launches(*call)[1]
            yield f"closing_matmul {precision} {columns} by columns", launches


def _views(arch: int) -> Iterator[tuple[str, list[Launch]]]:
    index = torch.empty(1024, dtype=torch.int64, device="meta")
    offset, flip = torch.empty(1024, 2, dtype=torch.int64, device="meta"), index.bool()
    for channels, size in ((3, 32), (3, 64), (1, 28)):
        shape = (50000, channels, size, size)
        images = torch.empty(shape, dtype=torch.uint8, device="meta")
        call = images, index, offset, flip, 4, (0.5,) * channels, (0.25,) * channels
        yield f"views {channels} {size}", views.views_launches(*call)[1]


def _kernel_functions(arch: int) -> Iterator[tuple[str, list[Launch]]]:
    products = _matrix(1000, 1024, torch.float64)
    squares = products[:, 0], products[0]
    gamma = torch.empty((), dtype=torch.float64, device="meta")
    for name, degree in (("rbf", 1), ("polynomial", 2), ("polynomial", 7), ("arccos", 1)):
        call = products, squares, gamma, 0
        for weight, values in ((None, True), (products, True), (products, False)):
            of = weight, (name, degree, 1.0), values
            launches = kernel_functions.functions_launches(*call, *of)[1]
            what = "values" if weight is None else f"slopes{' and values' * values}"
            yield f"{what} of {name} {degree}", launches


def cases(arch: int) -> Iterator[tuple[str, Launch]]:
    """Yield each launch with the name of the call that makes it."""
    parts = _gram, _thin_matmul, _residual_mse, _closing_matmul, _views, _kernel_functions
    for part in parts:
        for label, launches in part(arch):
            yield from ((label, launch) for launch in launches)


def untested(launched: Sequence[tuple[int, Launch]]) -> list[Any]:
    """Return the entries of the tables of blocks that no launch uses."""
    seen = {(tiles.generation(arch), launch.tile) for arch, launch in launched}
    return [
        (name, kind, generation, tile)
        for name, table in tiles.TABLES.items()
        for (kind, generation), choices in table.items()
        for tile in choices
        if (generation, tile) not in seen
    ]
