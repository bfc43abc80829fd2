"""The dual form of an array that is read block by block: its M x M Gram is a sum over columns.

Letters: M rows, D features, P targets.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from krrst_fast.backends import Backend
from krrst_fast.cholesky import FLOAT64_UP_TO, Factor
from krrst_fast.ops.arrays import check_finite_rows, read_columns, row_blocks, rows_for
from krrst_fast.ops.in_place import add_gram_, solve_in_place
from krrst_fast.ops.row_sums import LinearKernel
from krrst_fast.ops.solver import Solver
from krrst_fast.ops.spectral import solve_targets

# Columns and numbers of a block of columns. Of a row of the file, whole pages are read.
_WIDEST = 8192
_BLOCK = 2**27
_PAGE = 1024
# Rows that are weighted and centred at a time, in float64.
_ROWS = 64


class ColumnFit(NamedTuple):
    """What the dual form finds.

    Attributes:
        factor: The factor of the ridged Gram, or None for a ridge of each target.
        lam: The number that was added to the diagonal, [] or [P].
        solved: Coefficients of the rows as they were solved, weighted and centred [M, P].
        weights, constants: [D, P], [P].
        targets: Y as it was solved for [M, P].
        root: Square roots of the row weights [M, 1], or None.
        share: The share of each row in the means [M] float64.
    """

    factor: Factor | None
    lam: Tensor
    solved: Tensor
    weights: Tensor
    constants: Tensor
    targets: Tensor
    root: Tensor | None
    share: Tensor


def fit_columns(
    op: str,
    name: str,
    f: np.ndarray,
    y: Tensor,
    weights: Tensor | None,
    kernel: LinearKernel,
    centred: bool,
    backend: Backend,
    solver: Solver,
) -> ColumnFit:
    """Fit targets y [M, P], in the precision of the computation, on the rows of f [M, D].

    In memory are the Gram [M, M], the targets three times, the result [D, P], and blocks.

    Args:
        op, name: The names in errors.
        f, y: Features, which are read twice, and targets.
        weights: Row weights [M] float64, or None.
        kernel: The kernel and its ridge.
        centred: Whether there is an intercept.
        backend, solver: How the system is solved.

    Raises:
        NonFiniteError: F holds NaN or infinity.
        NotPositiveDefiniteError: The ridge is too small for these rows.
    """
    many = y.new_ones(len(y), dtype=torch.float64) if weights is None else weights
    total, root = many.sum().item(), None if weights is None else weights.sqrt()[:, None]
    share = many / total
    gram, mean_f = _gram(op, name, f, y.dtype, root, share if centred else None, solver)
    gram.mul_(kernel.scale)
    if kernel.bias:
        column = y.new_ones(len(y), 1) if root is None else root
        add_gram_(gram, column.to(gram.dtype), kernel.bias)
    mean_y = share @ y.double()
    targets = (y.double() - mean_y).to(y.dtype) if centred else y
    targets = targets if root is None else (targets * root).to(y.dtype)
    lam = kernel.lam(gram.diagonal().sum(dtype=torch.float64), total)
    factor = None
    if not kernel.is_plain:
        solved = solve_targets(op, gram, targets, lam)
    else:
        factor, solved = solve_in_place(backend, solver, gram, lam.to(gram.dtype), targets.clone())
    del gram
    of_features = _weights(f, solved, root, mean_f).mul_(kernel.scale)
    if centred:
        constants = mean_y - _product(mean_f, of_features)
    else:
        by_row = solved.double() if root is None else solved * root
        constants = kernel.bias * by_row.sum(0)
    return ColumnFit(
        *(factor, lam, solved, of_features, constants.to(y.dtype), targets, root, share)
    )


def _gram(
    op: str,
    name: str,
    f: np.ndarray,
    dtype: torch.dtype,
    root: Tensor | None,
    share: Tensor | None,
    solver: Solver,
) -> tuple[Tensor, Tensor | None]:
    """Return the lower triangle of the Gram [M, M] of weighted rows, and the means [D].

    share: Given, the rows are centred.
    """
    m, d = f.shape
    gram = torch.zeros(m, m, dtype=torch.float64 if m <= FLOAT64_UP_TO else dtype)
    wide = max(_PAGE, min(_WIDEST, _BLOCK // m) // _PAGE * _PAGE)
    buffer = torch.empty(m * min(wide, d), dtype=dtype)
    means = None if share is None else torch.empty(d, dtype=torch.float64)
    for first in range(0, d, wide):
        last = min(first + wide, d)
        block = read_columns(f, first, buffer[: m * (last - first)].view(m, last - first))
        if solver.check == "raise":
            check_finite_rows(op, name, block, 0)
        if share is not None and means is not None:
            mean = sum(share[i:j] @ block[i:j].double() for i, j in _pieces(m))
            means[first:last] = mean
        _as_solved_(block, root, None if means is None else means[first:last])
        add_gram_(gram, block.to(gram.dtype))
    return gram, means


def _pieces(rows: int) -> Iterator[tuple[int, int]]:
    return ((i, min(i + _ROWS, rows)) for i in range(0, rows, _ROWS))


def _as_solved_(block: Tensor, root: Tensor | None, mean: Tensor | None) -> None:
    """Centre and weigh rows in place, each number rounded once."""
    if root is None and mean is None:
        return
    for i, j in _pieces(len(block)):
        rows = block[i:j].double()
        rows = rows if mean is None else rows.sub_(mean)
        block[i:j] = rows if root is None else rows.mul_(root[i:j])


def _weights(f: np.ndarray, solved: Tensor, root: Tensor | None, mean: Tensor | None) -> Tensor:
    """Return (weighted and centred rows)^T solved [D, P]."""
    out = solved.new_zeros(f.shape[1], solved.shape[1])
    for first, last, block in row_blocks(f, rows_for(solved.shape[1])):
        block = block.to(solved.dtype)
        _as_solved_(block, None if root is None else root[first:last], mean)
        out.addmm_(block.mT, solved[first:last])
        del block  # before the next one is read
    return out


def _product(mean: Tensor | None, weights: Tensor) -> Tensor:
    """Return mean @ weights [P] in float64, without weights [D, P] in float64."""
    assert mean is not None
    out, many = mean.new_zeros(weights.shape[1]), max(1, 2**22 // max(weights.shape[1], 1))
    for first in range(0, len(mean), many):
        out += mean[first : first + many] @ weights[first : first + many].double()
    return out
