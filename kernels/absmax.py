"""Largest absolute values of float32 matrices, which scale their split into two float16 terms.

A program reads one block of rows and writes the maximum of each of its columns, or of the whole
block. A maximum does not depend on the order, so that equal inputs give equal bits.
"""

import triton
import triton.language as tl
from torch import Tensor

from krrst_fast.kernels.common import ROW_BLOCKS, Launch, Tile

_BLOCK = Tile(32, 64, 1, 4, 1)
# Largest number of row blocks of a matrix; the rows of a longer block are read in pieces.
BLOCKS = tl.constexpr(256)


@triton.jit
def _largest(
    x_ptr,
    block,
    blocks,
    rows,
    first_column,
    last_column,
    stride_x_row,
    stride_x_column,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Return BLOCK_COLUMNS maxima of |x| over row block `block` of `blocks`.

    Value j is the maximum of the columns first_column + j, first_column + j + BLOCK_COLUMNS, ...
    """
    rows_of_block = tl.cdiv(rows, blocks)
    begin = block.to(tl.int64) * rows_of_block
    end = tl.minimum(begin + rows_of_block, rows)
    down = tl.arange(0, BLOCK_ROWS)
    across = tl.arange(0, BLOCK_COLUMNS)
    largest = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    for column in range(first_column, last_column, BLOCK_COLUMNS):
        c = tl.cast(column, tl.int64) + across
        for row in range(begin, end, BLOCK_ROWS):
            r = tl.cast(row, tl.int64) + down
            address = x_ptr + r[:, None] * stride_x_row + c[None, :] * stride_x_column
            x = tl.load(address, mask=(r[:, None] < end) & (c[None, :] < last_column), other=0.0)
            largest = tl.maximum(largest, tl.abs(x))
    return tl.max(largest, 0)


@triton.jit(do_not_specialize=["rows"])
def _column_absmax_kernel(
    x_ptr,
    absmax_ptr,
    rows,
    columns,
    stride_x_row,
    stride_x_column,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    pid = tl.program_id(0)
    across = tl.cdiv(columns, BLOCK_COLUMNS)
    block = pid // across
    first = (pid % across) * BLOCK_COLUMNS
    last = tl.minimum(first + BLOCK_COLUMNS, columns)
    largest = _largest(
        *(x_ptr, block, ROW_BLOCKS, rows, first, last),
        *(stride_x_row, stride_x_column, BLOCK_ROWS, BLOCK_COLUMNS),
    )
    c = first + tl.arange(0, BLOCK_COLUMNS)
    tl.store(absmax_ptr + block.to(tl.int64) * columns + c, largest, mask=c < columns)


@triton.jit(do_not_specialize=["m", "d", "blocks"])
def _absmax_kernel(
    alpha_ptr,
    v_ptr,
    beta_ptr,
    w_ptr,
    absmax_ptr,
    m,
    d,
    columns,
    blocks,
    stride_alpha_row,
    stride_alpha_column,
    stride_v_row,
    stride_v_column,
    stride_beta_row,
    stride_beta_column,
    stride_w_row,
    stride_w_column,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    pid = tl.program_id(0)
    matrix, block = pid // blocks, pid % blocks
    largest = tl.zeros((BLOCK_COLUMNS,), dtype=tl.float32)
    if matrix == 0:
        largest = _largest(
            *(alpha_ptr, block, blocks, m, 0, columns),
            *(stride_alpha_row, stride_alpha_column, BLOCK_ROWS, BLOCK_COLUMNS),
        )
    elif matrix == 1:
        largest = _largest(
            *(v_ptr, block, blocks, d, 0, columns),
            *(stride_v_row, stride_v_column, BLOCK_ROWS, BLOCK_COLUMNS),
        )
    elif matrix == 2:
        largest = _largest(
            *(beta_ptr, block, blocks, m, 0, columns),
            *(stride_beta_row, stride_beta_column, BLOCK_ROWS, BLOCK_COLUMNS),
        )
    else:
        largest = _largest(
            *(w_ptr, block, blocks, d, 0, columns),
            *(stride_w_row, stride_w_column, BLOCK_ROWS, BLOCK_COLUMNS),
        )
    tl.store(absmax_ptr + pid, tl.max(largest, 0))


def column_absmax_launch(x: Tensor) -> tuple[Tensor, Launch]:
    """Return column maxima of |x| [ROW_BLOCKS, P], not yet computed, and the launch for them."""
    rows, columns = x.shape
    absmax = x.new_empty((ROW_BLOCKS.value, columns))
    arguments = {
        "x_ptr": x,
        "absmax_ptr": absmax,
        "rows": rows,
        "columns": columns,
        "stride_x_row": x.stride(0),
        "stride_x_column": x.stride(1),
        "BLOCK_ROWS": _BLOCK.rows,
        "BLOCK_COLUMNS": _BLOCK.columns,
    }
    programs = ROW_BLOCKS.value * triton.cdiv(columns, _BLOCK.columns)
    return absmax, Launch(_column_absmax_kernel, programs, arguments, _BLOCK)


def absmax_launch(named: dict[str, Tensor]) -> tuple[Tensor, Launch]:
    """Return the maxima [4, blocks] of alpha, v, beta and w, not yet computed, and the launch."""
    (m, columns), d = named["alpha"].shape, named["v"].shape[0]
    blocks = min(triton.cdiv(max(m, d), _BLOCK.rows), BLOCKS.value)
    absmax = named["alpha"].new_empty((4, blocks))
    arguments = {
        **{f"{name}_ptr": x for name, x in named.items()},
        "absmax_ptr": absmax,
        "m": m,
        "d": d,
        "columns": columns,
        "blocks": blocks,
    }
    for name, x in named.items():
        arguments |= {f"stride_{name}_row": x.stride(0), f"stride_{name}_column": x.stride(1)}
    arguments |= {"BLOCK_ROWS": _BLOCK.rows, "BLOCK_COLUMNS": _BLOCK.columns}
    return absmax, Launch(_absmax_kernel, 4 * blocks, arguments, _BLOCK)
