"""Blocks of rows, and of problems, in which kernels that are not linear are computed.

Letters: I rows x, J rows y, D features, N problems.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from krrst_fast.backends import Backend
from krrst_fast.ops.kernel import Rows
from krrst_fast.ops.problem import readable

# Numbers of a block of products: in the last cache of a CPU, and enough to fill a GPU.
_BLOCK, _BLOCK_OF_GPU = 2**19, 2**25


class Function(NamedTuple):
    """A kernel as the backends take it."""

    name: str
    degree: int
    coef0: float


def mean_row(given: Tensor, function: Function) -> Tensor:
    """Return in float64 what is subtracted from all rows [N?, 1, D]."""
    none = given.new_zeros((*given.shape[:-2], 1, given.shape[-1]), dtype=torch.float64)
    if function.name != "rbf" or given.shape[-2] == 0:
        return none
    return given.mean(-2, keepdim=True, dtype=torch.float64)


def squares(x: Tensor) -> Tensor:
    return x.square().sum(-1)


class Pair(NamedTuple):
    """Two sets of rows as they are multiplied, as their differences are taken, and their norms."""

    x: Tensor
    y: Tensor
    given_x: Tensor
    given_y: Tensor
    squares_x: Tensor
    squares_y: Tensor

    @classmethod
    def made(cls, x: Rows, y: Rows, function: Function, backend: Backend) -> "Pair":
        """Return rows for a backend: only the one of the CPU takes differences of near rows."""
        pair = cls(x.x, y.x, x.given, y.given, squares(x.x), squares(y.x))
        return pair if backend.NAME == "cpp" else pair.in_float64(function)

    def of(self, rows: slice, columns: slice = slice(None)) -> "Pair":
        """Return the pair for some of the rows x and of the rows y."""
        pair = self
        if rows != slice(None):
            x, given = self.x[..., rows, :], self.given_x[..., rows, :]
            pair = pair._replace(x=x, given_x=given, squares_x=self.squares_x[..., rows])
        if columns != slice(None):
            y, given = self.y[..., columns, :], self.given_y[..., columns, :]
            pair = pair._replace(y=y, given_y=given, squares_y=self.squares_y[..., columns])
        return pair

    def in_float64(self, function: Function) -> "Pair":
        """Return the pair in float64, from the rows as they were given."""
        given = self.given_x.double(), self.given_y.double()
        mean = mean_row(self.given_y, function)
        x, y = (rows - mean for rows in given)
        return Pair(x, y, *given, squares(x), squares(y))

    def operands(self, products: Tensor | None, gamma: Tensor, same: int) -> tuple[Any, ...]:
        """Return what the functions of a backend take; products [N?, I, J] if they are known."""
        products = self.x @ self.y.mT if products is None else products
        return products, *self[2:], gamma, same


def blocks(x: Tensor, columns: int, grad: Tensor | None = None) -> Iterator[slice]:
    """Yield the rows of x [N?, I, D] in blocks, for so many columns.

    A gradient of is_grads_batched=True has no slices.
    """
    *many, rows, _ = x.shape
    high = max(1, _numbers(x) // max(columns * (many[0] if many else 1), 1))
    if high >= rows or (grad is not None and is_batched(grad)):
        yield slice(None)
        return
    for first in range(0, rows, high):
        yield slice(first, min(first + high, rows))


def _numbers(x: Tensor) -> int:
    return _BLOCK if x.device.type == "cpu" else _BLOCK_OF_GPU


def groups_of(x: Tensor, columns: int) -> list[slice] | None:
    """Return the problems of x [N, I, D] in groups of some blocks, or None for one group."""
    if x.ndim < 3 or len(x) * x.shape[-2] * columns <= _numbers(x):
        return None
    high = max(1, _numbers(x) // max(x.shape[-2] * columns, 1))
    return [slice(first, first + high) for first in range(0, len(x), high)]


def keeps(x: Tensor, columns: int) -> bool:
    """Return whether the products of x [N?, I, D] and so many rows are no more numbers than all."""
    rows, depth = x.shape[-2:]
    return rows * columns <= (rows + columns) * depth


def is_batched(x: Tensor) -> bool:
    return torch._C._functorch.is_legacy_batchedtensor(x)


def rows_in(x: Tensor, block: slice) -> Tensor:
    """Return rows of a matrix [N?, I, K]."""
    return x if block == slice(None) else x[..., block, :]


def put(out: Tensor | None, shape: Sequence[int], block: slice, part: Tensor) -> Tensor:
    """Write a block of rows into a matrix of this shape, which is made for the first one.

    Parts that are joined at the end would lie between the freed blocks, and hold their memory.
    """
    if block == slice(None):
        return part
    out = part.new_empty(shape) if out is None else out
    out[..., block, :] = part
    return out


def add(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def joined(found: Sequence[Sequence[Tensor | None]]) -> tuple[Tensor | None, ...]:
    """Join the results of groups of problems."""
    columns = zip(*found)
    return tuple(
        None if x[0] is None else torch.cat([y for y in x if y is not None]) for x in columns
    )


def slopes_of(
    pair: Pair,
    products: Tensor | None,
    gamma: Tensor,
    same: int,
    weight: Tensor,
    function: Function,
    backend: Backend,
    needs_values: bool,
) -> tuple[Pair, tuple[Tensor, ...]]:
    """Return what `kernel_slopes` does, in float64 where float32 would lose digits, and the rows.

    Those are the ones that the slopes are to be multiplied with.
    """
    settings, single = (*function, needs_values), pair.x.dtype == torch.float32
    if not (single and is_batched(weight)):  # whose counts cannot be read
        weight = weight.to(pair.x.dtype)
        found = backend.kernel_slopes(*pair.operands(products, gamma, same), weight, *settings)
        if not (single and readable(pair.x) and found[-1].item()):
            return pair, found[:-1]
    pair = pair.in_float64(function)
    operands = pair.operands(None, gamma, same)
    return pair, backend.kernel_slopes(*operands, weight.double(), *settings)[:-1]
