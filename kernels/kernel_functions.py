"""Kernels as functions of inner products, and their derivatives, element by element, in float64.

A program computes one block, and writes what its rows, its columns and all of it add up to; the
partial sums are added afterwards, in a fixed order. A number in a kernel is a float32 unless
`_wide` makes it a float64.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from krrst_fast.kernels import tiles
from krrst_fast.kernels.common import Launch, run

# So many bits has the largest degree of `krrst_fast.Kernel`.
_BITS = tl.constexpr(7)
_PI = tl.constexpr(3.14159265358979323846)


@triton.jit
def _wide(value: tl.constexpr):
    """Return a number in float64."""
    return tl.full((), value, tl.float64)


@triton.jit
def _power(base, EXPONENT: tl.constexpr):
    """Return base^EXPONENT by squares."""
    tl.static_assert(EXPONENT < 128, "a power of more than seven bits")
    # Not 0 times something, which would be NaN where that is not finite.
    result = tl.zeros_like(base) + 1.0
    square = base
    for bit in tl.static_range(_BITS):
        if (EXPONENT >> bit) % 2 == 1:
            result *= square
        if EXPONENT >> (bit + 1) > 0:
            square *= square
    return result


@triton.jit
def _angle(cosine):
    """Return the angle of a cosine, from -1 to 1, to 3e-16; as csrc/cpu/kernel_functions.inc."""
    size = tl.abs(cosine)
    wide = size < 0.5
    z = tl.where(wide, cosine * cosine, 0.5 - 0.5 * size)
    s = tl.where(wide, size, tl.sqrt(z))
    p = _wide(0.03187962140081283943)
    p = p * z - _wide(0.01618739227159913321)
    p = p * z + _wide(0.019513468251252168)
    p = p * z + _wide(0.006529302004736569282)
    p = p * z + _wide(0.01217013859239172629)
    p = p * z + _wide(0.01388484282640208075)
    p = p * z + _wide(0.01735977964134998007)
    p = p * z + _wide(0.02237174973316405413)
    p = p * z + _wide(0.03038195969768513823)
    p = p * z + _wide(0.04464285680599893842)
    p = p * z + _wide(0.07500000000385201673)
    p = p * z + _wide(0.1666666666666494118)
    sine = (p * z + 1.0) * s
    sharp = tl.where(wide, _wide(_PI) / 2 - sine, 2.0 * sine)
    return tl.where(cosine < 0.0, _wide(_PI) - sharp, sharp)


@triton.jit
def _cosine(product, square_x, square_y):
    """Return |x| |y| and the cosine of the angle, 0 where a norm is 0."""
    lengths = tl.sqrt(square_x) * tl.sqrt(square_y)
    none = lengths == 0.0
    cosine = tl.where(none, 0.0, product / tl.where(none, 1.0, lengths))
    # Not by minimum and maximum, which may lose NaN.
    cosine = tl.where(cosine > 1.0, 1.0, cosine)
    return lengths, tl.where(cosine < -1.0, -1.0, cosine)


@triton.jit(do_not_specialize=["row_blocks", "column_blocks", "same"])
def _functions_kernel(
    products_ptr,
    squares_x_ptr,
    squares_y_ptr,
    gamma_ptr,
    coef0_ptr,
    weight_ptr,
    values_ptr,
    slope_ptr,
    own_ptr,
    column_ptr,
    change_ptr,
    rows,
    columns,
    row_blocks,
    column_blocks,
    same,
    KIND: tl.constexpr,
    DEGREE: tl.constexpr,
    VALUES: tl.constexpr,
    SLOPES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    column_block = pid % column_blocks
    row_block = pid // column_blocks % row_blocks
    problem = pid // column_blocks // row_blocks
    i = row_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    j = column_block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = (i[:, None] < rows) & (j[None, :] < columns)
    at = (problem * rows + i[:, None]) * columns + j[None, :]
    product = tl.load(products_ptr + at, mask=inside, other=0.0)
    square_x = tl.load(squares_x_ptr + problem * rows + i, mask=i < rows, other=0.0)[:, None]
    square_y = tl.load(squares_y_ptr + problem * columns + j, mask=j < columns, other=0.0)[None, :]
    gamma = tl.load(gamma_ptr + problem)
    itself = i[:, None] + same == j[None, :]
    if same < 0:
        itself = itself & False
    weight = tl.zeros_like(product)
    if SLOPES:
        weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
    turn = tl.zeros_like(product)
    change = turn
    slope = turn
    if KIND == "rbf":
        distance = square_x + square_y - 2.0 * product
        value = tl.exp(-gamma * distance)
        value = tl.where(value > 1.0, 1.0, value)
        value = tl.where(itself, 0.0 * value + 1.0, value)
        weighted = tl.where(itself, 0.0, weight * value)
        slope = 2.0 * gamma * weighted
        change = -weighted * distance
    elif KIND == "polynomial":
        base = gamma * product + tl.load(coef0_ptr)
        if SLOPES:
            below = _power(base, DEGREE - 1)
            value = below * base
            change = weight * below * product * DEGREE
            slope = weight * below * gamma * DEGREE
        else:
            value = _power(base, DEGREE)
    else:
        lengths, cosine = _cosine(product, square_x, square_y)
        sine = tl.sqrt((1.0 - cosine) * (1.0 + cosine))
        rest = _wide(_PI) - _angle(cosine)
        value = lengths * (sine + rest * cosine) / _wide(_PI)
        slope = weight * rest / _wide(_PI)
        turn = weight * lengths * sine / _wide(_PI)
    if VALUES:
        tl.store(values_ptr + at, value, mask=inside)
    if SLOPES:
        tl.store(slope_ptr + at, slope, mask=inside)
        if KIND == "rbf":
            turn = tl.where(inside, -slope, 0.0)
        own_at = own_ptr + (problem * column_blocks + column_block) * rows + i
        tl.store(own_at, tl.sum(turn, 1), mask=i < rows)
        column_at = column_ptr + (problem * row_blocks + row_block) * columns + j
        tl.store(column_at, tl.sum(turn, 0), mask=j < columns)
        tl.store(change_ptr + pid, tl.sum(tl.where(inside, change, 0.0)))


def functions_launches(
    products: Tensor,
    squares: tuple[Tensor, Tensor],
    gamma: Tensor,
    same: int,
    weight: Tensor | None,
    kernel: tuple[str, int, float],
    needs_values: bool,
) -> tuple[dict[str, Tensor], list[Launch]]:
    """Return values, slope and the partial sums by name, not yet computed, and the launches."""
    *many, rows, columns = products.shape
    name, degree, coef0 = kernel
    tile, problems = tiles.FUNCTION, many[0] if many else 1
    row_blocks, column_blocks = triton.cdiv(rows, tile.rows), triton.cdiv(columns, tile.columns)
    programs = problems * row_blocks * column_blocks
    none = products.new_empty(0)
    out = {"values": torch.empty_like(products) if needs_values else none}
    sums = {"slope": none, "own": none, "column": none, "change": none}
    if weight is not None:
        sums["slope"] = torch.empty_like(products)
        sums["own"] = products.new_empty((*many, column_blocks, rows))
        sums["column"] = products.new_empty((*many, row_blocks, columns))
        shape = *many, row_blocks * column_blocks
        sums["change"] = products.new_empty(shape, dtype=torch.float64)
    out |= sums
    if programs == 0:
        return out, []
    arguments: dict[str, Any] = {
        "products_ptr": products,
        "squares_x_ptr": squares[0].contiguous(),
        "squares_y_ptr": squares[1].contiguous(),
        "gamma_ptr": gamma.contiguous(),
        "coef0_ptr": gamma.new_full((), coef0),
        "weight_ptr": products if weight is None else weight.contiguous(),
        **{f"{name}_ptr": x for name, x in out.items()},
        "rows": rows,
        "columns": columns,
        "row_blocks": row_blocks,
        "column_blocks": column_blocks,
        "same": same,
        "KIND": name,
        "DEGREE": degree if name == "polynomial" else 1,
        "VALUES": needs_values,
        "SLOPES": weight is not None,
        "BLOCK_ROWS": tile.rows,
        "BLOCK_COLUMNS": tile.columns,
    }
    return out, [Launch(_functions_kernel, programs, arguments, tile)]


def kernel_values(
    products: Tensor,
    x: Tensor,
    y: Tensor,
    squares_x: Tensor,
    squares_y: Tensor,
    gamma: Tensor,
    same: int,
    kernel: str,
    degree: int,
    coef0: float,
) -> Tensor:
    """Compute `reference.kernels.kernel_values` in float64."""
    squares, of = (squares_x, squares_y), (kernel, degree, coef0)
    products = products.contiguous()
    out, launches = functions_launches(products, squares, gamma, same, None, of, True)
    run(launches, products)
    return out["values"]


def kernel_slopes(
    products: Tensor,
    x: Tensor,
    y: Tensor,
    squares_x: Tensor,
    squares_y: Tensor,
    gamma: Tensor,
    same: int,
    weight: Tensor,
    kernel: str,
    degree: int,
    coef0: float,
    needs_values: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute `reference.kernels.kernel_slopes` in float64."""
    squares, of = (squares_x, squares_y), (kernel, degree, coef0)
    products = products.contiguous()
    out, launches = functions_launches(products, squares, gamma, same, weight, of, needs_values)
    run(launches, products)
    own, column = out["own"].sum(-2), out["column"].sum(-2)
    if kernel == "arccos":
        own = torch.where(squares_x > 0, own / squares_x, 0)
        column = torch.where(squares_y > 0, column / squares_y, 0)
    near = torch.zeros((), dtype=torch.int64, device=products.device)
    return out["values"], out["slope"], own, column, out["change"].sum(-1), near
