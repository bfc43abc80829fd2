"""a @ b for features a [N, K] and a narrower b [K, P]; F^T x is the same product by strides.

A program computes one block of one split of the inner dimension (split-K). Where a is float16, b is
split into two float16 terms, each column scaled by its own power of two, and a block of a is read
once for both terms. A narrow b is split while it is read; for a wide b another kernel first writes
the two terms of each number next to each other; a float16 b is itself one term. A last kernel adds
the float32 partial sums of the splits in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from krrst_fast.kernels import tiles
from krrst_fast.kernels.absmax import column_absmax_launch
from krrst_fast.kernels.common import ROW_BLOCKS, Launch, architecture, run, two_terms, unit_of


@triton.jit
def _unit_of_columns(absmax_ptr, first_column, columns, BLOCK_COLUMNS: tl.constexpr):
    """Return the units of the columns of a block and their inverses, from the column maxima."""
    column = first_column + tl.arange(0, BLOCK_COLUMNS)
    block = tl.arange(0, ROW_BLOCKS).to(tl.int64)
    address = absmax_ptr + block[:, None] * columns + column[None, :]
    absmax = tl.load(address, mask=column[None, :] < columns, other=0.0)
    return unit_of(tl.max(absmax, 0))


@triton.jit
def _terms_kernel(
    b_ptr,
    absmax_ptr,
    terms_ptr,
    depth,
    p,
    width,
    stride_b_depth,
    stride_b_column,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    pid = tl.program_id(0)
    blocks_across = tl.cdiv(width, 2 * BLOCK_COLUMNS)
    first_column = (pid % blocks_across) * BLOCK_COLUMNS
    row = (pid // blocks_across).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = first_column + tl.arange(0, BLOCK_COLUMNS)
    inside = (row[:, None] < depth) & (column[None, :] < p)
    offset = row[:, None] * stride_b_depth + column[None, :].to(tl.int64) * stride_b_column
    unit, _ = _unit_of_columns(absmax_ptr, first_column, p, BLOCK_COLUMNS)
    hi, lo = two_terms(tl.load(b_ptr + offset, mask=inside, other=0.0), unit[None, :])
    both = tl.reshape(tl.join(hi, lo), (BLOCK_ROWS, 2 * BLOCK_COLUMNS))
    column = 2 * first_column + tl.arange(0, 2 * BLOCK_COLUMNS)
    inside = (row[:, None] < depth) & (column[None, :] < width)
    tl.store(terms_ptr + row[:, None] * width + column[None, :], both, mask=inside)


# blocks_across stays specialised: it is mostly 1, and sm_80 runs out of registers if that is not
# known.
@triton.jit(do_not_specialize=["blocks_down", "run_depth"])
def _product_kernel(
    a_ptr,
    b_ptr,
    absmax_ptr,
    parts_ptr,
    n,
    p,
    width,
    depth,
    blocks_down,
    blocks_across,
    split_depth,
    run_depth,
    stride_a_row,
    stride_a_depth,
    stride_b_depth,
    stride_b_column,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    CLAMP: tl.constexpr,
    TERMS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pid = tl.program_id(0)
    first_column = (pid % blocks_across).to(tl.int64) * BLOCK_COLUMNS
    first_row = (pid // blocks_across % blocks_down).to(tl.int64) * BLOCK_ROWS
    split = pid // blocks_across // blocks_down
    begin = split * split_depth
    end = tl.minimum(begin + split_depth, depth)

    down = tl.arange(0, BLOCK_ROWS)
    across = tl.arange(0, BLOCK_COLUMNS)
    inner = tl.arange(0, BLOCK_DEPTH)
    rows = (n - first_row).to(tl.int32)
    columns = (width - first_column).to(tl.int32)
    row = down
    if CLAMP:
        # Rows beyond the end are read as the last row, as in gram.py.
        row = tl.minimum(down, rows - 1)
    a_offset = row[:, None] * stride_a_row + inner[None, :] * stride_a_depth
    b_offset = inner[:, None] * stride_b_depth + across[None, :] * stride_b_column
    a_ptr += first_row * stride_a_row
    b_ptr += first_column * stride_b_column
    first = first_column.to(tl.int32)
    if TERMS == "as read":
        unit, inverse = _unit_of_columns(absmax_ptr, first, p, BLOCK_COLUMNS)

    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    sum_of_run = total
    last_of_run = begin + run_depth - BLOCK_DEPTH
    # A single loop, as in gram.py.
    for k in range(begin, end, BLOCK_DEPTH):
        step = tl.cast(k, tl.int64)
        within = k + inner < end
        a_mask = within[None, :]
        if not CLAMP:
            a_mask = a_mask & (down[:, None] < rows)
        b_mask = within[:, None] & (across[None, :] < columns)
        a = tl.load(a_ptr + step * stride_a_depth + a_offset, mask=a_mask, other=0.0)
        b = tl.load(b_ptr + step * stride_b_depth + b_offset, mask=b_mask, other=0.0)
        if TERMS == "as read":
            b, lo = two_terms(b, unit[None, :])
            sum_of_run = tl.dot(a, lo, sum_of_run)
        if TERMS == "":
            total = tl.dot(a, b, total, input_precision=PRECISION)
        else:
            sum_of_run = tl.dot(a, b, sum_of_run)
            if k == last_of_run:
                total += sum_of_run
                sum_of_run = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
                last_of_run += run_depth
    total += sum_of_run
    if TERMS == "pairs":
        hi, lo = tl.split(tl.reshape(total, (BLOCK_ROWS, BLOCK_COLUMNS // 2, 2)))
        _, inverse = _unit_of_columns(absmax_ptr, first // 2, p, BLOCK_COLUMNS // 2)
        total = hi + lo
        first_column = first_column // 2
        across = tl.arange(0, BLOCK_COLUMNS // 2)
    if TERMS == "as read" or TERMS == "pairs":
        total *= inverse[None, :]
    parts_ptr += (split.to(tl.int64) * n + first_row) * p + first_column
    inside = (down[:, None] < rows) & (across[None, :] < (p - first_column).to(tl.int32))
    tl.store(parts_ptr + (down[:, None] * p + across[None, :]), total, mask=inside)


@triton.jit(do_not_specialize=["splits"])
def _sum_kernel(parts_ptr, out_ptr, size, splits, BLOCK: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in range(splits):
        start = tl.cast(split, tl.int64) * size
        total += tl.load(parts_ptr + start + offset, mask=offset < size, other=0.0)
    tl.store(out_ptr + offset, total, mask=offset < size)


def _terms_launch(b: Tensor, absmax: Tensor) -> tuple[Tensor, Launch]:
    """Return the interleaved terms of b [K, P], not yet computed, and the launch for them.

    The terms [K, 2 P] are padded with zero columns to a multiple of 16, for reads of 16 bytes.
    """
    (depth, p), tile = b.shape, tiles.TERMS
    width = 16 * triton.cdiv(2 * p, 16)
    terms = b.new_empty((depth, width), dtype=torch.float16)
    arguments = {
        "b_ptr": b,
        "absmax_ptr": absmax,
        "terms_ptr": terms,
        "depth": depth,
        "p": p,
        "width": width,
        "stride_b_depth": b.stride(0),
        "stride_b_column": b.stride(1),
        "BLOCK_ROWS": tile.rows,
        "BLOCK_COLUMNS": tile.columns,
    }
    programs = triton.cdiv(depth, tile.rows) * triton.cdiv(width, 2 * tile.columns)
    return terms, Launch(_terms_kernel, programs, arguments, tile)


def parts_launches(
    a: Tensor, b: Tensor, input_precision: str, arch: int
) -> tuple[Tensor, list[Launch]]:
    """Return partial sums [splits, N, P] of a @ b, not yet computed, and the launches for them."""
    a, b = tiles.addressable(a), tiles.addressable(b)
    (n, depth), p = a.shape, b.shape[1]
    kind = tiles.kind_of(a, input_precision)
    absmax, launches, terms = b, [], ""
    if b.dtype == torch.float16:
        terms = "exact"
    elif kind == "half":
        terms = "as read" if p <= tiles.TERMS_AS_READ else "pairs"
        absmax, launch = column_absmax_launch(b)
        launches.append(launch)
    if terms == "pairs":
        b, launch = _terms_launch(b, absmax)
        launches.append(launch)
    width = b.shape[1]
    tile = tiles.thin_tile(a, b, kind, terms, arch)
    blocks_down, blocks_across = triton.cdiv(n, tile.rows), triton.cdiv(width, tile.columns)
    inner = tiles.cut(depth, blocks_down * blocks_across, tile, arch)
    parts = b.new_empty((inner.splits, n, p), dtype=torch.float32)
    arguments = {
        "a_ptr": a,
        "b_ptr": b,
        "absmax_ptr": absmax,
        "parts_ptr": parts,
        "n": n,
        "p": p,
        "width": width,
        "depth": depth,
        "blocks_down": blocks_down,
        "blocks_across": blocks_across,
        "split_depth": inner.split,
        "run_depth": inner.run,
        "stride_a_row": a.stride(0),
        "stride_a_depth": a.stride(1),
        "stride_b_depth": b.stride(0),
        "stride_b_column": b.stride(1),
        "BLOCK_ROWS": tile.rows,
        "BLOCK_COLUMNS": tile.columns,
        "BLOCK_DEPTH": tile.depth,
        "CLAMP": a.stride(1) == 1,
        "TERMS": terms,
        "PRECISION": "ieee" if terms else kind,
    }
    programs = blocks_down * blocks_across * inner.splits
    return parts, [*launches, Launch(_product_kernel, programs, arguments, tile)]


def thin_matmul_launches(
    a: Tensor, b: Tensor, input_precision: str, arch: int
) -> tuple[Tensor, list[Launch]]:
    """Return what `thin_matmul` returns, not yet computed, and the launches that compute it."""
    if a.shape[0] * b.shape[1] == 0 or a.shape[1] == 0:
        return torch.zeros(a.shape[0], b.shape[1], device=a.device), []
    parts, launches = parts_launches(a, b, input_precision, arch)
    splits, n, p = parts.shape
    if splits == 1:
        return parts[0], launches
    out = parts.new_empty((n, p))
    arguments = {
        "parts_ptr": parts,
        "out_ptr": out,
        "size": n * p,
        "splits": splits,
        "BLOCK": tiles.SUM.columns,
    }
    programs = triton.cdiv(n * p, tiles.SUM.columns)
    return out, [*launches, Launch(_sum_kernel, programs, arguments, tiles.SUM)]


def thin_matmul(a: Tensor, b: Tensor, *, input_precision: str = "tf32x3") -> Tensor:
    """Compute `reference.thin_matmul` in float32 for matrices of any strides.

    Args:
        a: Features [N, K], float32 or float16.
        b: Matrix [K, P], float32; where a is float16 also float16.
        input_precision: How float32 features are multiplied.
    """
    out, launches = thin_matmul_launches(a, b, input_precision, architecture(a))
    run(launches, a)
    return out
