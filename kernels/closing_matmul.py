"""scale (alpha v^T - beta w^T): the last product of the gradient, of four float32 matrices.

A program computes one block [rows of alpha, rows of v] over the whole inner dimension, without
concatenating the matrices; tensor cores accumulate short runs, which are added in float32. In
"fp16x3" each matrix is scaled by one power of two and split into two float16 terms; the smallest of
the four products of terms is left out. Narrow matrices are split while they are read. Wide ones are
split by a kernel of their own (`closing_terms`), since here every block would split them again.
"""

import triton
import triton.language as tl
from torch import Tensor

from krrst_fast.kernels import tiles
from krrst_fast.kernels.absmax import absmax_launch
from krrst_fast.kernels.closing_terms import closing_terms_launches, unit_of_matrix
from krrst_fast.kernels.common import (
    Launch,
    architecture,
    number,
    per_problem,
    run,
    two_terms,
)


@triton.jit
def _unit(absmax_ptr, row_blocks, THREE_PRODUCTS: tl.constexpr):
    """Return the unit of a matrix and its inverse, or 1 and 1 where terms need none."""
    if THREE_PRODUCTS:
        return unit_of_matrix(absmax_ptr, row_blocks)
    else:
        return 1.0, 1.0


@triton.jit
def _add_product(
    total,
    sign,
    a_ptr,
    b_ptr,
    absmax_ptr,
    row_blocks,
    rows,
    columns,
    depth,
    run_depth,
    a_offset,
    b_offset,
    stride_a_depth,
    stride_b_depth,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    CLAMP: tl.constexpr,
    THREE_PRODUCTS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return total + sign a b^T for one block."""
    down = tl.arange(0, BLOCK_ROWS)
    across = tl.arange(0, BLOCK_COLUMNS)
    inner = tl.arange(0, BLOCK_DEPTH)
    a_unit, a_inverse = _unit(absmax_ptr, row_blocks, THREE_PRODUCTS)
    b_unit, b_inverse = _unit(absmax_ptr + row_blocks, row_blocks, THREE_PRODUCTS)
    for first in range(0, depth, run_depth):
        sum_of_run = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
        for k in range(first, tl.minimum(first + run_depth, depth), BLOCK_DEPTH):
            step = tl.cast(k, tl.int64)
            within = k + inner < depth
            a_mask, b_mask = within[None, :], within[:, None]
            if not CLAMP:
                a_mask = a_mask & (down[:, None] < rows)
                b_mask = b_mask & (across[None, :] < columns)
            a = tl.load(a_ptr + step * stride_a_depth + a_offset, mask=a_mask, other=0.0)
            b = tl.load(b_ptr + step * stride_b_depth + b_offset, mask=b_mask, other=0.0)
            if THREE_PRODUCTS:
                a_hi, a_lo = two_terms(a, a_unit)
                b_hi, b_lo = two_terms(b, b_unit)
                sum_of_run = tl.dot(a_lo, b_hi, sum_of_run)
                sum_of_run = tl.dot(a_hi, b_lo, sum_of_run)
                sum_of_run = tl.dot(a_hi, b_hi, sum_of_run)
            else:
                sum_of_run = tl.dot(a, b, sum_of_run, input_precision=PRECISION)
        total += sum_of_run * (sign * a_inverse) * b_inverse
    return total


# run_depth stays specialised: steps start at its multiples, and loads of 16 bytes need to know
# that 16 divides them.
@triton.jit(do_not_specialize=["row_blocks", "blocks_across"])
def _closing_kernel(
    alpha_ptr,
    v_ptr,
    beta_ptr,
    w_ptr,
    absmax_ptr,
    scale,
    out_ptr,
    m,
    d,
    depth,
    row_blocks,
    blocks_across,
    run_depth,
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
    BLOCK_DEPTH: tl.constexpr,
    CLAMP: tl.constexpr,
    THREE_PRODUCTS: tl.constexpr,
    PRECISION: tl.constexpr,
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
    row, column = down, across
    if CLAMP:
        # Rows beyond the end are read as the last row, as in gram.py.
        row = tl.minimum(down, rows - 1)
        column = tl.minimum(across, columns - 1)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    total = _add_product(
        total,
        1.0,
        alpha_ptr + first_row * stride_alpha_row,
        v_ptr + first_column * stride_v_row,
        absmax_ptr,
        row_blocks,
        rows,
        columns,
        depth,
        run_depth,
        row[:, None] * stride_alpha_row + inner[None, :] * stride_alpha_column,
        column[None, :] * stride_v_row + inner[:, None] * stride_v_column,
        stride_alpha_column,
        stride_v_column,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
        BLOCK_DEPTH,
        CLAMP,
        THREE_PRODUCTS,
        PRECISION,
    )
    total = _add_product(
        total,
        -1.0,
        beta_ptr + first_row * stride_beta_row,
        w_ptr + first_column * stride_w_row,
        absmax_ptr + 2 * row_blocks,
        row_blocks,
        rows,
        columns,
        depth,
        run_depth,
        row[:, None] * stride_beta_row + inner[None, :] * stride_beta_column,
        column[None, :] * stride_w_row + inner[:, None] * stride_w_column,
        stride_beta_column,
        stride_w_column,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
        BLOCK_DEPTH,
        CLAMP,
        THREE_PRODUCTS,
        PRECISION,
    )
    total *= number(scale, 0, 0, SCALE_IS_TENSOR)
    inside = (down[:, None] < rows) & (across[None, :] < columns)
    out_ptr += first_row * d + first_column
    tl.store(out_ptr + (down[:, None] * d + across[None, :]), total, mask=inside)


def closing_matmul_launches(
    alpha: Tensor,
    v: Tensor,
    beta: Tensor,
    w: Tensor,
    scale: float | Tensor,
    input_precision: str,
    arch: int,
) -> tuple[Tensor, list[Launch]]:
    """Return what `closing_matmul` returns, not yet computed, and the launches that compute it."""
    (m, depth), d = alpha.shape, v.shape[0]
    if m * d * depth == 0:
        return alpha.new_zeros((m, d)), []
    out = alpha.new_empty((m, d))
    named = dict(zip(("alpha", "v", "beta", "w"), map(tiles.addressable, (alpha, v, beta, w))))
    three_products = input_precision == "fp16x3"
    scale, _ = per_problem(scale, 1)
    absmax, launches = out, []
    if three_products:
        absmax, launch = absmax_launch(named)
        launches.append(launch)
        if depth > tiles.TERMS_AS_READ:
            return out, [*launches, *closing_terms_launches(named, absmax, scale, out, arch)]
    tile = tiles.closing_tile(list(named.values()), input_precision, arch)
    blocks_across = triton.cdiv(d, tile.columns)
    arguments = {
        **{f"{name}_ptr": x for name, x in named.items()},
        "absmax_ptr": absmax,
        "scale": scale,
        "out_ptr": out,
        "m": m,
        "d": d,
        "depth": depth,
        "row_blocks": absmax.shape[1],
        "blocks_across": blocks_across,
        "run_depth": tiles.runs(depth, tile.depth),
        **{f"stride_{name}_row": x.stride(0) for name, x in named.items()},
        **{f"stride_{name}_column": x.stride(1) for name, x in named.items()},
        "BLOCK_ROWS": tile.rows,
        "BLOCK_COLUMNS": tile.columns,
        "BLOCK_DEPTH": tile.depth,
        "CLAMP": all(x.stride(1) == 1 for x in named.values()),
        "THREE_PRODUCTS": three_products,
        "PRECISION": "ieee" if three_products else input_precision,
        "SCALE_IS_TENSOR": isinstance(scale, Tensor),
    }
    programs = triton.cdiv(m, tile.rows) * blocks_across
    return out, [*launches, Launch(_closing_kernel, programs, arguments, tile)]


def closing_matmul(
    alpha: Tensor,
    v: Tensor,
    beta: Tensor,
    w: Tensor,
    scale: float | Tensor,
    *,
    input_precision: str = "fp16x3",
) -> Tensor:
    """Compute `reference.closing_matmul` of float32 matrices of any strides."""
    arch = architecture(alpha)
    out, launches = closing_matmul_launches(alpha, v, beta, w, scale, input_precision, arch)
    run(launches, alpha)
    return out
