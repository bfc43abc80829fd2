"""Large Gram matrices [N, N] that are summed up, factored and solved in the memory of one.

Only the lower triangle is summed and factored. The upper one holds the Gram for another try with a
larger ridge; an ordinary factorisation would keep both.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from krrst_fast.backends import Backend
from krrst_fast.cholesky import (
    FLOAT64_UP_TO,
    MAX_RETRIES,
    RIDGE_FACTOR,
    Factor,
    factored_solve,
    failure,
    log_raised,
    require_ridge,
    ridge_factor,
)
from krrst_fast.ops.solver import Solver

_BLOCK = 512


def add_gram_(gram: Tensor, x: Tensor, alpha: float = 1.0) -> Tensor:
    """Add alpha x x^T, for x [N, K], to the lower triangle of gram [N, N].

    In panels, which is half of the work of the whole product. What is above the diagonal changes
    within the diagonal blocks alone.
    """
    for first, last in _blocks(len(gram)):
        gram[first:last, :last].addmm_(x[first:last], x[:last].mT, alpha=alpha)
    return gram


def mirror_(gram: Tensor) -> Tensor:
    """Copy the lower triangle of gram [N, N] to the upper one."""
    for first, last in _blocks(len(gram)):
        gram[:first, first:last] = gram[first:last, :first].mT
        diagonal = gram[first:last, first:last]
        diagonal.copy_(diagonal.tril() + diagonal.tril(-1).mT)
    return gram


def solve_in_place(
    backend: Backend, solver: Solver, gram: Tensor, lam: Tensor, y: Tensor
) -> tuple[Factor, Tensor]:
    """Solve (gram + lam I) x = y [N, P] from the lower triangle of gram [N, N].

    Both are overwritten: the factor may lie in the memory of gram, x in that of y.

    Raises:
        NonFiniteError: The Gram or lam holds NaN or infinity.
        NotPositiveDefiniteError: The factorisation fails with every ridge.
    """
    raises, retries = solver.check == "raise", solver.max_retries
    if len(gram) > FLOAT64_UP_TO:
        if retries is None:
            retries = MAX_RETRIES if raises else 0
        factor = _factor_(gram, lam, retries, raises)
        return factor, _solve_(factor.factor, y)
    method = backend.cholesky_method(gram, y.shape[-1])
    factor = ridge_factor(mirror_(gram), lam, retries, raises, method)
    return factor, factored_solve(y, factor.factor, factor.inverse, method)


def _blocks(count: int) -> Iterator[tuple[int, int]]:
    for first in range(0, count, _BLOCK):
        yield first, min(first + _BLOCK, count)


def _factor_(gram: Tensor, lam: Tensor, retries: int, raises: bool) -> Factor:
    """Compute `cholesky.ridge_factor` in the memory of gram, of its lower triangle."""
    rows, ridge = len(gram), lam
    if raises:
        require_ridge(lam, lam.item(), lam.item(), rows)
    mirror_(gram)
    kept = [gram[first:last, first:last].clone() for first, last in _blocks(rows)]
    pivot = attempt = 0
    for attempt in range(retries + 1):
        if attempt:
            ridge = ridge * RIDGE_FACTOR
            _restore_(gram, kept)
        gram.diagonal().add_(ridge)
        pivot = _cholesky_(gram)
        if pivot == 0:
            break
    if pivot and raises:
        _restore_(gram, kept)
        raise failure(gram, lam, ridge, retries, pivot, gram.dtype)
    count = torch.full((), attempt, device=gram.device)
    if pivot == 0 and attempt:
        log_raised(ridge, count)
    for (first, last), _ in zip(_blocks(rows), kept):
        gram[:first, first:last] = 0
        gram[first:last, first:last].tril_()
    if pivot or not bool(lam > 0):
        pivot = max(pivot, 1)
        gram.fill_(torch.nan)
    failed = torch.full((), pivot, dtype=torch.int32, device=gram.device)
    return Factor(gram, ridge.clone(), count, failed, None)


def _restore_(gram: Tensor, kept: list[Tensor]) -> None:
    """Copy the Gram from above the diagonal, and from its diagonal blocks, back below it."""
    for (first, last), diagonal in zip(_blocks(len(gram)), kept):
        gram[first:last, :first] = gram[:first, first:last].mT
        gram[first:last, first:last] = diagonal


def _cholesky_(gram: Tensor) -> int:
    """Factor the lower triangle; return 0, or the number from 1 of the pivot that failed.

    Block after block, each subtracted from what is right of it. The diagonal blocks are factored in
    float64, which costs little.
    """
    for first, last in _blocks(len(gram)):
        diagonal = gram[first:last, first:last]
        factor, pivot = torch.linalg.cholesky_ex(diagonal.double())
        # Some builds of LAPACK take a NaN pivot for a positive one.
        if pivot or not bool(factor.diagonal().sum().isfinite()):
            return first + max(int(pivot), 1)
        diagonal.copy_(factor)
        if last < len(gram):
            below = gram[last:, first:last]
            upper = factor.to(gram.dtype).mT
            below.copy_(torch.linalg.solve_triangular(upper, below, upper=True, left=False))
            add_gram_(gram[last:, last:], below, -1.0)
    return 0


def _solve_(factor: Tensor, y: Tensor) -> Tensor:
    """Solve (factor factor^T) x = y [N, P], x in the memory of y.

    In float64, block by block: sums of so many products lose more in float32 than the factor lost.
    """
    blocks = list(_blocks(len(factor)))
    for start, end in _blocks(y.shape[1]):
        x = y[:, start:end].double()
        for first, last in blocks:
            diagonal = factor[first:last, first:last].double()
            x[first:last] = torch.linalg.solve_triangular(diagonal, x[first:last], upper=False)
            x[last:].addmm_(factor[last:, first:last].double(), x[first:last], alpha=-1)
        for first, last in reversed(blocks):
            diagonal = factor[first:last, first:last].double()
            x[first:last].addmm_(factor[last:, first:last].double().mT, x[last:], alpha=-1)
            x[first:last] = torch.linalg.solve_triangular(diagonal.mT, x[first:last], upper=True)
        y[:, start:end] = x
    return y
