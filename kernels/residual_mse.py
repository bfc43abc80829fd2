"""E = scale F W + offset - Y and the mean of E^2, from the partial sums of the product F W.

A program adds the partial sums of one block in a fixed order, subtracts Y, and writes the block of
E and its sum of squares. A last program adds the sums of squares in a fixed order, without atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from krrst_fast.kernels import tiles
from krrst_fast.kernels.common import Launch, architecture, number, per_problem, run
from krrst_fast.kernels.thin_matmul import parts_launches


@triton.jit(do_not_specialize=["n", "blocks_across", "splits"])
def _residual_kernel(
    parts_ptr,
    y_ptr,
    offset_ptr,
    scale,
    residual_ptr,
    squares_ptr,
    n,
    p,
    blocks_across,
    splits,
    stride_part,
    stride_part_row,
    stride_part_column,
    stride_y_row,
    stride_y_column,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    SCALE_IS_TENSOR: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
):
    pid = tl.program_id(0)
    rows = (pid // blocks_across).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = (pid % blocks_across).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (rows[:, None] < n) & (columns[None, :] < p)

    parts_ptr += rows[:, None] * stride_part_row + columns[None, :] * stride_part_column
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=tl.float32)
    for split in range(splits):
        start = tl.cast(split, tl.int64) * stride_part
        total += tl.load(parts_ptr + start, mask=inside, other=0.0)
    total *= number(scale, 0, 0, SCALE_IS_TENSOR)
    if HAS_OFFSET:
        total += tl.load(offset_ptr + columns, mask=columns < p, other=0.0)[None, :]
    y_ptr += rows[:, None] * stride_y_row + columns[None, :] * stride_y_column
    residual = tl.where(inside, total - tl.load(y_ptr, mask=inside, other=0.0), 0.0)
    tl.store(residual_ptr + rows[:, None] * p + columns[None, :], residual, mask=inside)
    tl.store(squares_ptr + pid, tl.sum(residual * residual))


@triton.jit(do_not_specialize=["sums"])
def _mean_kernel(sums_ptr, mean_ptr, sums, count, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, sums, BLOCK):
        total += tl.load(sums_ptr + first + offset, mask=first + offset < sums, other=0.0)
    tl.store(mean_ptr, tl.sum(total) / count)


def _residual_launches(
    parts: Tensor, y: Tensor, scale: float | Tensor, offset: Tensor | None
) -> tuple[Tensor, Tensor, list[Launch]]:
    splits, n, p = parts.shape
    tile = tiles.RESIDUAL
    blocks_across = triton.cdiv(p, tile.columns)
    programs = triton.cdiv(n, tile.rows) * blocks_across
    residual, loss = parts.new_empty((n, p)), parts.new_empty(())
    squares = parts.new_empty((programs,))
    scale, _ = per_problem(scale, 1)
    arguments = {
        "parts_ptr": parts,
        "y_ptr": y,
        "offset_ptr": y if offset is None else offset.contiguous(),
        "scale": scale,
        "residual_ptr": residual,
        "squares_ptr": squares,
        "n": n,
        "p": p,
        "blocks_across": blocks_across,
        "splits": splits,
        "stride_part": parts.stride(0),
        "stride_part_row": parts.stride(1),
        "stride_part_column": parts.stride(2),
        "stride_y_row": y.stride(0),
        "stride_y_column": y.stride(1),
        "BLOCK_ROWS": tile.rows,
        "BLOCK_COLUMNS": tile.columns,
        "SCALE_IS_TENSOR": isinstance(scale, Tensor),
        "HAS_OFFSET": offset is not None,
    }
    mean = {
        "sums_ptr": squares,
        "mean_ptr": loss,
        "sums": programs,
        "count": float(n * p),
        "BLOCK": tiles.SUM.columns,
    }
    return (
        residual,
        loss,
        [
            Launch(_residual_kernel, programs, arguments, tile),
            Launch(_mean_kernel, 1, mean, tiles.SUM),
        ],
    )


def predicted_residual_mse_launches(
    f_real: Tensor,
    w: Tensor,
    y_real: Tensor,
    scale: float | Tensor,
    offset: Tensor | None,
    input_precision: str,
    arch: int,
) -> tuple[Tensor, Tensor, list[Launch]]:
    """Return what `predicted_residual_mse` returns, not yet computed, and the launches for it."""
    if y_real.numel() == 0:
        return torch.empty_like(y_real), y_real.new_full((), torch.nan), []
    parts, launches = w.new_zeros((1, *y_real.shape)), []
    if w.shape[0] > 0:
        parts, launches = parts_launches(f_real, w, input_precision, arch)
    residual, loss, more = _residual_launches(parts, y_real, scale, offset)
    return residual, loss, [*launches, *more]


def predicted_residual_mse(
    f_real: Tensor,
    w: Tensor,
    y_real: Tensor,
    scale: float | Tensor,
    offset: Tensor | None,
    *,
    input_precision: str = "tf32x3",
) -> tuple[Tensor, Tensor]:
    """Compute `reference.predicted_residual_mse` of float32 or float16 features."""
    residual, loss, launches = predicted_residual_mse_launches(
        f_real, w, y_real, scale, offset, input_precision, architecture(y_real)
    )
    run(launches, y_real)
    return residual, loss
