"""`closing_matmul` of wide matrices: one kernel writes float16 terms, another multiplies them.

The terms [2, rows, width] hold alpha, beta, v and w below one another, each scaled by its own power
of two; `width` is the inner dimension, padded with zeros to whole steps. A program computes one
block of the output in one loop over the steps of alpha v^T and then of beta w^T, with the three
largest of the four products of terms in each step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from krrst_fast.kernels import tiles
from krrst_fast.kernels.absmax import BLOCKS
from krrst_fast.kernels.common import Launch, Tile, number, two_terms, unit_of


@triton.jit
def unit_of_matrix(absmax_ptr, row_blocks):
    """Return the unit of a matrix and its inverse from the maxima of its row blocks."""
    block = tl.arange(0, BLOCKS)
    return unit_of(tl.max(tl.load(absmax_ptr + block, mask=block < row_blocks, other=0.0), 0))


@triton.jit
def _write_terms(
    x_ptr,
    absmax_ptr,
    terms_ptr,
    block,
    rows,
    all_rows,
    depth,
    width,
    row_blocks,
    stride_x_row,
    stride_x_column,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Write one block of the terms of a matrix; lo lies `all_rows` rows below hi."""
    across = width // BLOCK_COLUMNS
    row = (block // across).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (block % across) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    offset = row[:, None] * stride_x_row + column[None, :].to(tl.int64) * stride_x_column
    inside = (row[:, None] < rows) & (column[None, :] < depth)
    unit, _ = unit_of_matrix(absmax_ptr, row_blocks)
    hi, lo = two_terms(tl.load(x_ptr + offset, mask=inside, other=0.0), unit)
    terms_ptr += row[:, None] * width + column[None, :]
    tl.store(terms_ptr, hi, mask=row[:, None] < rows)
    tl.store(terms_ptr + tl.cast(all_rows, tl.int64) * width, lo, mask=row[:, None] < rows)


@triton.jit(do_not_specialize=["rows", "all_rows", "row_blocks", "blocks"])
def _closing_terms_kernel(
    first_ptr,
    second_ptr,
    first_absmax_ptr,
    second_absmax_ptr,
    terms_ptr,
    rows,
    all_rows,
    depth,
    width,
    row_blocks,
    blocks,
    stride_first_row,
    stride_first_column,
    stride_second_row,
    stride_second_column,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    pid = tl.program_id(0)
    if pid < blocks:
        _write_terms(
            *(first_ptr, first_absmax_ptr, terms_ptr, pid, rows, all_rows, depth, width),
            *(row_blocks, stride_first_row, stride_first_column, BLOCK_ROWS, BLOCK_COLUMNS),
        )
    else:
        terms_ptr += tl.cast(rows, tl.int64) * width
        pid -= blocks
        _write_terms(
            *(second_ptr, second_absmax_ptr, terms_ptr, pid, rows, all_rows, depth, width),
            *(row_blocks, stride_second_row, stride_second_column, BLOCK_ROWS, BLOCK_COLUMNS),
        )


@triton.jit(do_not_specialize=["m", "row_blocks", "blocks_across", "run_steps"])
def _closing_product_kernel(
    terms_ptr,
    absmax_ptr,
    scale,
    out_ptr,
    m,
    d,
    width,
    row_blocks,
    blocks_across,
    run_steps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    SCALE_IS_TENSOR: tl.constexpr,
):
    pid = tl.program_id(0)
    first_row = (pid // blocks_across).to(tl.int64) * BLOCK_ROWS
    first_column = (pid % blocks_across).to(tl.int64) * BLOCK_COLUMNS
    rows = (m - first_row).to(tl.int32)
    columns = (d - first_column).to(tl.int32)
    down = tl.arange(0, BLOCK_ROWS)
    across = tl.arange(0, BLOCK_COLUMNS)
    inner = tl.arange(0, BLOCK_DEPTH)
    # Rows beyond the end are read as the last row, as in gram.py.
    left = tl.minimum(down, rows - 1)[:, None] * width + inner[None, :]
    right = tl.minimum(across, columns - 1)[None, :] * width + inner[:, None]
    left_ptr = terms_ptr + first_row * width
    right_ptr = terms_ptr + (2 * tl.cast(m, tl.int64) + first_column) * width
    to_lo = (2 * tl.cast(m, tl.int64) + 2 * tl.cast(d, tl.int64)) * width

    _, alpha = unit_of_matrix(absmax_ptr, row_blocks)
    _, v = unit_of_matrix(absmax_ptr + row_blocks, row_blocks)
    _, beta = unit_of_matrix(absmax_ptr + 2 * row_blocks, row_blocks)
    _, w = unit_of_matrix(absmax_ptr + 3 * row_blocks, row_blocks)
    steps = 3 * (width // BLOCK_DEPTH)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    sum_of_run = total
    last_of_run = tl.minimum(run_steps, steps) - 1
    for step in range(0, 2 * steps):
        second = step >= steps
        k = tl.where(second, step - steps, step)
        term = k % 3
        shift = tl.cast(k // 3 * BLOCK_DEPTH, tl.int64)
        a_ptr = left_ptr + shift + tl.where(second, m, 0).to(tl.int64) * width
        b_ptr = right_ptr + shift + tl.where(second, d, 0).to(tl.int64) * width
        a = tl.load(a_ptr + tl.where(term == 0, to_lo, 0) + left)
        b = tl.load(b_ptr + tl.where(term == 1, to_lo, 0) + right)
        sum_of_run = tl.dot(a, b, sum_of_run)
        if step == last_of_run:
            total += sum_of_run * tl.where(second, -beta, alpha) * tl.where(second, w, v)
            sum_of_run = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
            end = tl.where(step + 1 >= steps, 2 * steps, steps)
            last_of_run = tl.minimum(last_of_run + run_steps, end - 1)
    total *= number(scale, 0, 0, SCALE_IS_TENSOR)
    inside = (down[:, None] < rows) & (across[None, :] < columns)
    out_ptr += first_row * d + first_column
    tl.store(out_ptr + (down[:, None] * d + across[None, :]), total, mask=inside)


def _terms_launch(
    first: Tensor, second: Tensor, absmax: Tensor, terms: Tensor, tile: Tile
) -> Launch:
    (rows, depth), width = first.shape, terms.shape[-1]
    blocks = triton.cdiv(rows, tile.rows) * (width // tile.columns)
    arguments = {
        "first_ptr": first,
        "second_ptr": second,
        "first_absmax_ptr": absmax[0],
        "second_absmax_ptr": absmax[2],
        "terms_ptr": terms,
        "rows": rows,
        "all_rows": terms.stride(0) // width,
        "depth": depth,
        "width": width,
        "row_blocks": absmax.shape[1],
        "blocks": blocks,
        "stride_first_row": first.stride(0),
        "stride_first_column": first.stride(1),
        "stride_second_row": second.stride(0),
        "stride_second_column": second.stride(1),
        "BLOCK_ROWS": tile.rows,
        "BLOCK_COLUMNS": tile.columns,
    }
    return Launch(_closing_terms_kernel, 2 * blocks, arguments, tile)


def closing_terms_launches(
    named: dict[str, Tensor],
    absmax: Tensor,
    scale: float | Tensor,
    out: Tensor,
    arch: int,
) -> list[Launch]:
    """Return the launches that compute `out` from matrices and the maxima of their row blocks."""
    tile = tiles.CLOSING["terms", tiles.generation(arch)][0]
    (m, d), depth = out.shape, named["alpha"].shape[1]
    width = triton.cdiv(depth, tiles.TERMS.columns) * tiles.TERMS.columns
    terms = out.new_empty((2, 2 * m + 2 * d, width), dtype=torch.float16)
    blocks_across = triton.cdiv(d, tile.columns)
    arguments = {
        "terms_ptr": terms,
        "absmax_ptr": absmax,
        "scale": scale,
        "out_ptr": out,
        "m": m,
        "d": d,
        "width": width,
        "row_blocks": absmax.shape[1],
        "blocks_across": blocks_across,
        "run_steps": 3 * tiles.runs(width, tile.depth) // tile.depth,
        "BLOCK_ROWS": tile.rows,
        "BLOCK_COLUMNS": tile.columns,
        "BLOCK_DEPTH": tile.depth,
        "SCALE_IS_TENSOR": isinstance(scale, Tensor),
    }
    programs = triton.cdiv(m, tile.rows) * blocks_across
    below = terms[:, 2 * m :]
    return [
        _terms_launch(named["alpha"], named["beta"], absmax, terms, tiles.TERMS),
        _terms_launch(named["v"], named["w"], absmax[1:], below, tiles.TERMS),
        Launch(_closing_product_kernel, programs, arguments, tile),
    ]
