"""Symmetric Gram of the rows of x, of which only the lower triangle of blocks is computed.

A program of the first kernel computes one block of one split of the inner dimension and writes it
to `parts` (float32). A program of the second adds the splits of one block in their order, applies
scale and bias and writes the block and its mirror image. Sums are float32 and there are no atomics,
so that equal inputs give equal bits.
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
    # Within a block 32 bits are enough (see `tiles.addressable`), with half the registers.
    rows = (n - first_row).to(tl.int32)
    columns = (n - first_column).to(tl.int32)
    left_row, right_row = offset, offset
    if CLAMP:
        # Rows beyond the end are read as the last row and never written: this takes fewer registers
        # than a mask, which would also split wide loads of contiguous rows.
        left_row = tl.minimum(offset, rows - 1)
        right_row = tl.minimum(offset, columns - 1)
    left = left_row[:, None] * stride_x_row + inner[None, :] * stride_x_depth
    right = right_row[None, :] * stride_x_row + inner[:, None] * stride_x_depth
    left_ptr = x_ptr + first_row * stride_x_row
    right_ptr = x_ptr + first_column * stride_x_row

    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    sum_of_run = total
    next_run = begin + run_depth
    end = tl.minimum(begin + split_depth, depth)
    # A single loop: nested in a loop over runs, each run would wait for its first loads again. A
    # run is added before the first product of the next run: behind its own last product, the
    # addition makes ptxas serialize the wgmma instructions of some layouts.
    for k in range(begin, end, BLOCK_DEPTH):
        shift = tl.cast(k, tl.int64) * stride_x_depth
        within = k + inner < end
        left_mask, right_mask = within[None, :], within[:, None]
        if not CLAMP:
            left_mask = left_mask & (offset[:, None] < rows)
            right_mask = right_mask & (offset[None, :] < columns)
        a = tl.load(left_ptr + shift + left, mask=left_mask, other=0.0)
        b = tl.load(right_ptr + shift + right, mask=right_mask, other=0.0)
        if RUNS:
            if k == next_run:
                total += sum_of_run
                sum_of_run = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
                next_run += run_depth
            sum_of_run = tl.dot(a, b, sum_of_run)
        else:
            total = tl.dot(a, b, total, input_precision=PRECISION)
    if RUNS:
        total += sum_of_run

    parts_ptr += part.to(tl.int64) * n * n + first_row * n + first_column
    inside = (offset[:, None] < rows) & (offset[None, :] < columns)
    tl.store(parts_ptr + (offset[:, None] * n + offset[None, :]), total, mask=inside)


@triton.jit(do_not_specialize=["n_tiles", "splits", "stride_scale"])
def _finish_kernel(
    parts_ptr,
    scale,
    out_ptr,
    bias,
    n,
    n_tiles,
    splits,
    stride_scale,
    BLOCK: tl.constexpr,
    SCALE_IS_TENSOR: tl.constexpr,
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
    corner = first_row * n + first_column
    parts_ptr += problem * splits * size + corner
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for split in range(splits):
        total += tl.load(
            parts_ptr + tl.cast(split, tl.int64) * size + inner, mask=inside, other=0.0
        )
    scale = number(scale, problem, stride_scale, SCALE_IS_TENSOR)
    k = scale * total + bias
    if block_row == block_column:
        # Mirrored entries add the products of their terms in another order: copy the lower half.
        k = tl.where(offset[:, None] >= offset[None, :], k, tl.trans(k))

    out_ptr += problem * size
    tl.store(out_ptr + corner + inner, k, mask=inside)
    if block_row != block_column:
        mirrored = (offset[:, None] < columns) & (offset[None, :] < rows)
        tl.store(out_ptr + first_column * n + first_row + inner, tl.trans(k), mask=mirrored)


def gram_launches(
    x: Tensor, scale: float | Tensor, bias: float, input_precision: str, arch: int
) -> tuple[Tensor, list[Launch]]:
    """Return what `gram` returns, not yet computed, and the launches that compute it."""
    n, depth = x.shape[-2:]
    lead = x.shape[:-2]
    problems = math.prod(lead)
    flat = tiles.addressable(x.reshape(problems, n, depth))
    kind = tiles.kind_of(x, input_precision)
    if kind == "tf32x3" and flat.stride(2) != 1 and depth > 1:
        # The tensor cores read TF32 along the inner dimension only. A copy is cheaper than turning
        # each block: 8192 rows of 10000 take 8.8 ms with it on an H200, and 19.3 without.
        flat = flat.contiguous()
    out = x.new_empty((problems, n, n), dtype=torch.float32)
    result = out.view(*lead, n, n)
    if problems * n == 0:
        return result, []
    tile = tiles.gram_tile(flat, kind, arch)
    blocks = triton.cdiv(n, tile.rows)
    lower = blocks * (blocks + 1) // 2
    inner = tiles.cut(depth, lower * problems, tile, arch, tiles.RUN_OF_GRAM)
    parts = out if inner.splits == 1 else out.new_empty((problems, inner.splits, n, n))
    parts_launch = Launch(
        _parts_kernel,
        lower * inner.splits * problems,
        {
            "x_ptr": flat,
            "parts_ptr": parts,
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
    return result, [parts_launch, _finish(parts, inner.splits, scale, bias, out)]


def _finish(parts: Tensor, splits: int, scale: float | Tensor, bias: float, out: Tensor) -> Launch:
    problems, n, _ = out.shape
    scale, stride_scale = per_problem(scale, problems)
    blocks = triton.cdiv(n, tiles.FINISH.rows)
    lower = blocks * (blocks + 1) // 2
    arguments = {
        "parts_ptr": parts,
        "scale": scale,
        "out_ptr": out,
        "bias": float(bias),
        "n": n,
        "n_tiles": lower,
        "splits": splits,
        "stride_scale": stride_scale,
        "BLOCK": tiles.FINISH.rows,
        "SCALE_IS_TENSOR": isinstance(scale, Tensor),
    }
    return Launch(_finish_kernel, lower * problems, arguments, tiles.FINISH)


def gram(
    x: Tensor, scale: float | Tensor, bias: float, *, input_precision: str = "tf32x3"
) -> Tensor:
    """Compute `reference.gram` in float32 for float32 or float16 x [..., N, D] of any strides."""
    k, launches = gram_launches(x, scale, bias, input_precision, architecture(x))
    run(launches, x)
    return k
