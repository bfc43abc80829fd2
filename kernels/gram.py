"""Symmetric gram of the rows of x: only blocks of the lower triangle are computed.

A program of the first kernel computes one block of one split of the inner dimension and writes it
to `parts` (float32), and for a block on the diagonal the sum of its diagonal. A program of the
second adds the splits of one block in their order, applies scale, bias and ridge and writes the
block and its mirror image. Sums are float32; no atomics: the same input gives the same bits.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from krrst_fast.kernels import tiles
from krrst_fast.kernels.common import (
    Launch,
    architecture,
    banded_tile,
    lower_tile,
    number,
    per_problem,
    run,
)


@triton.jit(do_not_specialize=["n_tiles", "n_blocks", "splits", "run_depth"])
def _parts_kernel(
    x_ptr,
    parts_ptr,
    diagonal_ptr,
    n,
    depth,
    n_tiles,
    n_blocks,
    splits,
    split_depth,
    run_depth,
    stride_x_problem,
    stride_x_row,
    stride_x_depth,
    BLOCK: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    BAND: tl.constexpr,
    CLAMP: tl.constexpr,
    RUNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    block_row, block_column = banded_tile(pid % n_tiles, n_blocks, BAND)
    part = pid // n_tiles
    begin = (part % splits) * split_depth
    first_row = block_row.to(tl.int64) * BLOCK
    first_column = block_column.to(tl.int64) * BLOCK
    offset = tl.arange(0, BLOCK)
    inner = tl.arange(0, BLOCK_DEPTH)
    x_ptr += (part // splits).to(tl.int64) * stride_x_problem
    # Inside a block 32 bits are enough (see `tiles.addressable`), and take half the registers.
    rows = (n - first_row).to(tl.int32)
    columns = (n - first_column).to(tl.int32)
    left_row, right_row = offset, offset
    if CLAMP:
        # Rows that are not there are read as the last one and not written: fewer registers than a
        # mask. Where rows are contiguous, it would split what is read in one piece.
        left_row = tl.minimum(offset, rows - 1)
        right_row = tl.minimum(offset, columns - 1)
    left = left_row[:, None] * stride_x_row + inner[None, :] * stride_x_depth
    right = right_row[None, :] * stride_x_row + inner[:, None] * stride_x_depth
    left_ptr = x_ptr + first_row * stride_x_row
    right_ptr = x_ptr + first_column * stride_x_row

    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    sum_of_run = total
    last_of_run = begin + run_depth - BLOCK_DEPTH
    end = tl.minimum(begin + split_depth, depth)
    # One loop: with one for the runs around it, each run would wait for its first loads anew.
    for k in range(begin, end, BLOCK_DEPTH):
        here = tl.cast(k, tl.int64) * stride_x_depth
        there = k + inner < end
        left_mask, right_mask = there[None, :], there[:, None]
        if not CLAMP:
            left_mask = left_mask & (offset[:, None] < rows)
            right_mask = right_mask & (offset[None, :] < columns)
        a = tl.load(left_ptr + here + left, mask=left_mask, other=0.0)
        b = tl.load(right_ptr + here + right, mask=right_mask, other=0.0)
        if RUNS:
            sum_of_run = tl.dot(a, b, sum_of_run)
            if k == last_of_run:
                total += sum_of_run
                sum_of_run = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
                last_of_run += run_depth
        else:
            total = tl.dot(a, b, total, input_precision=PRECISION)
    if RUNS:
        total += sum_of_run

    parts_ptr += part.to(tl.int64) * n * n + first_row * n + first_column
    inside = (offset[:, None] < rows) & (offset[None, :] < columns)
    tl.store(parts_ptr + (offset[:, None] * n + offset[None, :]), total, mask=inside)
    if block_row == block_column:
        diagonal = (offset[:, None] == offset[None, :]) & (offset[:, None] < rows)
        on_diagonal = tl.where(diagonal, total, 0.0)
        tl.store(diagonal_ptr + part.to(tl.int64) * n_blocks + block_row, tl.sum(on_diagonal))


@triton.jit(do_not_specialize=["n_tiles", "splits", "diagonals", "stride_scale", "stride_ridge"])
def _finish_kernel(
    parts_ptr,
    diagonal_ptr,
    scale,
    ridge,
    out_ptr,
    trace_ptr,
    bias,
    divisor,
    n,
    n_tiles,
    splits,
    diagonals,
    stride_scale,
    stride_ridge,
    BLOCK: tl.constexpr,
    SCALE_IS_TENSOR: tl.constexpr,
    RIDGE_IS_TENSOR: tl.constexpr,
    RIDGE_OF: tl.constexpr,
):
    pid = tl.program_id(0)
    block_row, block_column = lower_tile(pid % n_tiles)
    problem = (pid // n_tiles).to(tl.int64)
    offset = tl.arange(0, BLOCK)
    first_row = block_row.to(tl.int64) * BLOCK
    first_column = block_column.to(tl.int64) * BLOCK
    rows = (n - first_row).to(tl.int32)
    columns = (n - first_column).to(tl.int32)
    inside = (offset[:, None] < rows) & (offset[None, :] < columns)
    inner = offset[:, None] * n + offset[None, :]

    size = tl.cast(n, tl.int64) * n
    here = first_row * n + first_column
    parts_ptr += problem * splits * size + here
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for split in range(splits):
        total += tl.load(
            parts_ptr + tl.cast(split, tl.int64) * size + inner, mask=inside, other=0.0
        )
    scale = number(scale, problem, stride_scale, SCALE_IS_TENSOR)
    k = scale * total + bias
    if block_row == block_column:
        # The terms of a product in several terms come in another order across the diagonal.
        k = tl.where(offset[:, None] >= offset[None, :], k, tl.trans(k))
        if RIDGE_OF != "":
            squares = tl.zeros((256,), dtype=tl.float32)
            for first in range(0, diagonals, 256):
                index = first + tl.arange(0, 256)
                squares += tl.load(
                    diagonal_ptr + problem * diagonals + index, mask=index < diagonals, other=0.0
                )
            trace = scale * tl.sum(squares) + bias * n
            if block_row == 0:
                tl.store(trace_ptr + problem, trace)
            added = number(ridge, problem, stride_ridge, RIDGE_IS_TENSOR)
            if RIDGE_OF != "absolute":
                added *= trace / divisor
            k += tl.where(offset[:, None] == offset[None, :], added, 0.0)

    out_ptr += problem * size
    tl.store(out_ptr + here + inner, k, mask=inside)
    if block_row != block_column:
        mirrored = (offset[:, None] < columns) & (offset[None, :] < rows)
        tl.store(out_ptr + first_column * n + first_row + inner, tl.trans(k), mask=mirrored)


def gram_launches(
    x: Tensor,
    scale: float | Tensor,
    bias: float,
    ridge: float | Tensor,
    ridge_of: str,
    input_precision: str,
    arch: int,
) -> tuple[Tensor, Tensor, list[Launch]]:
    """What `ridged_gram` returns, not yet computed, and the launches that compute it."""
    n, depth = x.shape[-2:]
    lead = x.shape[:-2]
    problems = math.prod(lead)
    flat = tiles.addressable(x.reshape(problems, n, depth))
    out = x.new_empty((problems, n, n), dtype=torch.float32)
    trace = x.new_empty((problems,), dtype=torch.float32)
    result = out.view(*lead, n, n), trace.view(lead)
    if problems * n == 0:
        trace.fill_(0.0)
        return *result, []
    kind = tiles.kind_of(x, input_precision)
    tile = tiles.gram_tile(flat, kind, arch)
    blocks = triton.cdiv(n, tile.rows)
    lower = blocks * (blocks + 1) // 2
    inner = tiles.cut(depth, lower * problems, tile, arch)
    parts = out if inner.splits == 1 else out.new_empty((problems, inner.splits, n, n))
    diagonal = out.new_empty((problems, inner.splits, blocks))
    parts_launch = Launch(
        _parts_kernel,
        lower * inner.splits * problems,
        {
            "x_ptr": flat,
            "parts_ptr": parts,
            "diagonal_ptr": diagonal,
            "n": n,
            "depth": depth,
            "n_tiles": lower,
            "n_blocks": blocks,
            "splits": inner.splits,
            "split_depth": inner.split,
            "run_depth": inner.run,
            "stride_x_problem": flat.stride(0),
            "stride_x_row": flat.stride(1),
            "stride_x_depth": flat.stride(2),
            "BLOCK": tile.rows,
            "BLOCK_DEPTH": tile.depth,
            "BAND": tiles.BAND,
            "CLAMP": flat.stride(2) == 1,
            "RUNS": kind == "half",
            "PRECISION": "ieee" if kind == "half" else kind,
        },
        tile,
    )
    finish = _finish(parts, diagonal, scale, ridge, ridge_of, out, trace, bias)
    return *result, [parts_launch, finish]


def _finish(
    parts: Tensor,
    diagonal: Tensor,
    scale: float | Tensor,
    ridge: float | Tensor,
    ridge_of: str,
    out: Tensor,
    trace: Tensor,
    bias: float,
) -> Launch:
    problems, n, _ = out.shape
    scale, stride_scale = per_problem(scale, problems)
    ridge, stride_ridge = per_problem(ridge, problems)
    blocks = triton.cdiv(n, tiles.FINISH.rows)
    lower = blocks * (blocks + 1) // 2
    arguments = {
        "parts_ptr": parts,
        "diagonal_ptr": diagonal,
        "scale": scale,
        "ridge": ridge,
        "out_ptr": out,
        "trace_ptr": trace,
        "bias": float(bias),
        "divisor": float(n if ridge_of == "mean_diagonal" else 1),
        "n": n,
        "n_tiles": lower,
        "splits": diagonal.shape[1],
        "diagonals": diagonal.shape[1] * diagonal.shape[2],
        "stride_scale": stride_scale,
        "stride_ridge": stride_ridge,
        "BLOCK": tiles.FINISH.rows,
        "SCALE_IS_TENSOR": isinstance(scale, Tensor),
        "RIDGE_IS_TENSOR": isinstance(ridge, Tensor),
        "RIDGE_OF": ridge_of,
    }
    return Launch(_finish_kernel, lower * problems, arguments, tiles.FINISH)


def gram(
    x: Tensor, scale: float | Tensor, bias: float, *, input_precision: str = "tf32x3"
) -> Tensor:
    """`reference.gram` in float32, of float32 or float16 x [..., N, D] of any strides."""
    k, _, launches = gram_launches(x, scale, bias, 0.0, "", input_precision, architecture(x))
    run(launches, x)
    return k


def ridged_gram(
    x: Tensor,
    scale: float | Tensor,
    bias: float,
    ridge: float | Tensor,
    ridge_of: str,
    *,
    input_precision: str = "tf32x3",
) -> tuple[Tensor, Tensor]:
    """`reference.ridged_gram` in float32, of float32 or float16 x [..., N, D] of any strides."""
    k, trace, launches = gram_launches(
        x, scale, bias, ridge, ridge_of, input_precision, architecture(x)
    )
    run(launches, x)
    return k, trace
