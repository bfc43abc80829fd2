"""Largest magnitudes of a float32 matrix, from which the unit of its two float16 terms follows.

A program reads one of PEAKS blocks of rows and writes the largest magnitude of each column
[PEAKS, P], or of the whole block [PEAKS]. A maximum does not depend on the order.
"""

import triton
import triton.language as tl
from torch import Tensor

from krrst_fast.kernels.common import PEAKS, Launch, Tile

_BLOCK = Tile(32, 64, 1, 4, 1)


@triton.jit
def _peaks_kernel(
    x_ptr,
    peaks_ptr,
    rows,
    columns,
    rows_of_block,
    stride_x_row,
    stride_x_column,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BY_COLUMN: tl.constexpr,
):
    pid = tl.program_id(0)
    if BY_COLUMN:
        blocks = tl.cdiv(columns, BLOCK_COLUMNS)
        block = pid // blocks
        first_column = (pid % blocks) * BLOCK_COLUMNS
        last_column = first_column + BLOCK_COLUMNS
    else:
        block = pid
        first_column = 0
        last_column = columns
    begin = block.to(tl.int64) * rows_of_block
    end = tl.minimum(begin + rows_of_block, rows)
    down = tl.arange(0, BLOCK_ROWS)
    across = tl.arange(0, BLOCK_COLUMNS)
    largest = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    for column in range(first_column, last_column, BLOCK_COLUMNS):
        c = tl.cast(column, tl.int64) + across
        for row in range(begin, end, BLOCK_ROWS):
            r = tl.cast(row, tl.int64) + down
            here = x_ptr + r[:, None] * stride_x_row + c[None, :] * stride_x_column
            x = tl.load(here, mask=(r[:, None] < end) & (c[None, :] < columns), other=0.0)
            largest = tl.maximum(largest, tl.abs(x))
    by_column = tl.max(largest, 0)
    if BY_COLUMN:
        c = tl.cast(first_column, tl.int64) + across
        tl.store(peaks_ptr + block.to(tl.int64) * columns + c, by_column, mask=c < columns)
    else:
        tl.store(peaks_ptr + block, tl.max(by_column, 0))


def peaks_launch(x: Tensor, by_column: bool) -> tuple[Tensor, Launch]:
    """The largest magnitudes [PEAKS, P] or [PEAKS] of x [N, P], and the launch that finds them."""
    rows, columns = x.shape
    peaks = x.new_empty((PEAKS.value, columns) if by_column else (PEAKS.value,))
    arguments = {
        "x_ptr": x,
        "peaks_ptr": peaks,
        "rows": rows,
        "columns": columns,
        "rows_of_block": triton.cdiv(rows, PEAKS.value),
        "stride_x_row": x.stride(0),
        "stride_x_column": x.stride(1),
        "BLOCK_ROWS": _BLOCK.rows,
        "BLOCK_COLUMNS": _BLOCK.columns,
        "BY_COLUMN": by_column,
    }
    programs = PEAKS.value * (triton.cdiv(columns, _BLOCK.columns) if by_column else 1)
    return peaks, Launch(_peaks_kernel, programs, arguments, _BLOCK)
