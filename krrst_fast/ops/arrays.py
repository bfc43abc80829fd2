"""NumPy arrays, in particular memory-mapped ones, that are read block by block.

A page of a mapped file that was read counts as resident memory of the process until it is dropped.
"""

import mmap
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from krrst_fast.errors import NonFiniteError
from krrst_fast.ops.problem import finite

# Numbers of a block of rows, and the rows that a product with weights [D, P] has at least, if it
# has as many columns: with fewer rows the weights are read too often.
_BLOCK = 2**22
_LEAST_ROWS = 256
# Bytes of a file from which a block of columns is gathered before pages are dropped.
_SPAN = 2**25


def is_mapped(x: Any) -> bool:
    """Return whether x is a view of a memory-mapped file."""
    return _memmap(x) is not None


def check_array(op: str, name: str, x: Any, need: str = "an array") -> None:
    """Check that x is a matrix of floating-point numbers.

    Raises:
        TypeError: It is no array, a masked one, or of another dtype.
        ValueError: It is no matrix.
    """
    if not isinstance(x, np.ndarray) or isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{op}: {name} must be {need}, got {type(x).__name__}")
    if x.dtype.kind != "f" or x.dtype.itemsize > 8:
        raise TypeError(f"{op}: {name} must be float16, float32 or float64, got {x.dtype}")
    if x.ndim != 2:
        raise ValueError(f"{op}: {name} must be a matrix, got shape {x.shape}")


def torch_dtype(x: Tensor | np.ndarray) -> torch.dtype:
    """Return the dtype of a tensor, or of an array of floating-point numbers."""
    if isinstance(x, Tensor):
        return x.dtype
    return {2: torch.float16, 4: torch.float32, 8: torch.float64}[x.dtype.itemsize]


def read_rows(x: Tensor | np.ndarray, first: int, last: int) -> Tensor:
    """Return rows first to last - 1 of x [M, D]: of an array a copy, whose pages are dropped."""
    if isinstance(x, Tensor):
        return x[first:last].detach()
    block = torch.empty((max(0, min(last, len(x)) - first), *x.shape[1:]), dtype=torch_dtype(x))
    return _copied(x[first:last], block)


def row_blocks(x: Tensor | np.ndarray, least: int = 1) -> Iterator[tuple[int, int, Tensor]]:
    """Yield x [M, D] in blocks of rows: the numbers of the first and of the next row, and rows.

    least: Rows of a block, if there are so many.
    """
    many = max(least, _BLOCK // max(x.shape[1], 1))
    for first in range(0, len(x), many):
        last = min(first + many, len(x))
        yield first, last, read_rows(x, first, last)


def rows_for(targets: int) -> int:
    """Return how many rows a block has at least for products with weights [D, targets].

    It is then no larger than the weights.
    """
    return max(1, min(_LEAST_ROWS, targets))


def read_columns(x: np.ndarray, first: int, out: Tensor) -> Tensor:
    """Copy the columns of x [M, D] from the first on into out [M, columns], on the CPU.

    At no time are more pages resident than those of a few rows.
    """
    return _copied(x[:, first : first + out.shape[1]], out)


def _copied(x: np.ndarray, out: Tensor) -> Tensor:
    """Copy x [M, .] into out, and drop its pages every few rows."""
    target, stride = out.numpy(), abs(x.strides[0]) if len(x) else 0
    many = max(1, _SPAN // max(stride, 1))
    for row in range(0, len(x), many):
        target[row : row + many] = x[row : row + many]
        drop_pages(x[row : row + many])
    return out


def check_finite_rows(op: str, name: str, block: Tensor, first: int) -> None:
    """Raise NonFiniteError if rows, of which the first has this number, hold NaN or infinity."""
    try:
        finite(op, block, **{name: block})
    except NonFiniteError:
        row = int((~block.isfinite()).any(-1).nonzero()[0]) + first
        raise NonFiniteError(f"{op}: {name} holds NaN or infinity, first in row {row}") from None


def predict_blocks(
    op: str,
    name: str,
    x: np.ndarray,
    predict: Callable[[Tensor], Tensor],
    like: Tensor,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return predict(rows) [..., B, P] for the rows of x [B, D], read block by block.

    Args:
        op, name: The names in errors.
        x: Features, checked.
        predict: Predicts for rows, as a tensor.
        like: A tensor [..., P] on the device of the fit.
        dtype: The dtype that the rows are converted to; None: they keep theirs.
    """
    out = None
    for first, last, rows in row_blocks(x, rows_for(like.shape[-1])):
        try:
            part = predict(rows.to(like.device, dtype))
        except NonFiniteError:
            check_finite_rows(op, name, rows, first)
            raise
        if out is None:
            if last == len(x):
                return part
            out = part.new_empty((*part.shape[:-2], len(x), part.shape[-1]))
        out[..., first:last, :] = part
        del rows  # before the next ones are read
    if out is None:
        return predict(torch.empty(x.shape, dtype=dtype or torch_dtype(x), device=like.device))
    return out


def drop_pages(x: np.ndarray) -> None:
    """Drop the pages of x from resident memory, if it is a view of a mapped file.

    The file keeps what was written to them. A private copy (mode "c") would lose it, and stays.
    """
    mapped = _memmap(x)
    advise = getattr(mmap, "MADV_DONTNEED", None)
    if mapped is None or advise is None or mapped.mode == "c" or not x.size:
        return
    file = mapped._mmap  # type: ignore[attr-defined]
    start = np.frombuffer(file, np.uint8).__array_interface__["data"][0]
    strides = [stride * (size - 1) for stride, size in zip(x.strides, x.shape)]
    begin = x.__array_interface__["data"][0] - start
    end = begin + sum(max(0, stride) for stride in strides) + x.itemsize
    begin = (begin + sum(min(0, stride) for stride in strides)) // mmap.PAGESIZE * mmap.PAGESIZE
    with suppress(OSError):  # a hint: some systems refuse it for some mappings
        file.madvise(advise, begin, end - begin)


def _memmap(x: Any) -> np.memmap | None:
    """Return the memory-mapped array whose memory x shares, or None."""
    while isinstance(x, np.ndarray):
        if isinstance(x, np.memmap) and getattr(x, "_mmap", None) is not None:
            return x
        x = x.base
    return None
