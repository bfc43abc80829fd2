"""Cholesky factors of ridged grams: the ladder of larger ridges, and the solves with them.

Letters: M rows of the gram, P right-hand sides, N problems side by side.
"""

import logging
import math
from typing import NamedTuple

import torch
from torch import Tensor

from krrst_fast import reference
from krrst_fast.errors import NonFiniteError, NotPositiveDefiniteError

RIDGE_FACTOR = 10.0
"""By how much a retry raises the ridge."""

FLOAT64_UP_TO = 512
"""Grams of at most this many rows are factored in float64, whatever their own precision."""

_log = logging.getLogger("krrst_fast")

# Rows of a gram that are taken to float64 at a time for a residual.
_RESIDUAL_ROWS = 1024


class Solver(NamedTuple):
    """Who factors a gram, and how systems are solved with the factor.

    Attributes:
        own: on a GPU our own Cholesky in place of torch's. (On the CPU ours takes what is small.)
        inverse: the inverse of the factor is computed once, and a solve is two products with it
            instead of two triangular solves, which wait for one row after the other.
    """

    own: bool
    inverse: bool


SOLVERS = {
    "torch": Solver(own=False, inverse=False),
    "torch inverse": Solver(own=False, inverse=True),
    "cuda": Solver(own=True, inverse=False),
    "cuda inverse": Solver(own=True, inverse=True),
}


class Factor(NamedTuple):
    """The Cholesky factor of k + ridge I, for one problem or for each of N.

    Attributes:
        factor: lower triangular, zero above the diagonal [N?, M, M]; NaN where there is none.
        ridge: the number that was added to the diagonal [N?].
        retries: how often it was raised [N?] int64.
        pivot: 0, or the number, from 1, of the pivot that failed [N?] int32.
        inverse: of the factor [N?, M, M], if the solver wants it.
    """

    factor: Tensor
    ridge: Tensor
    retries: Tensor
    pivot: Tensor
    inverse: Tensor | None


class _Try(NamedTuple):
    """What one ridge gave: factor, failed pivots and inverse as in `Factor`."""

    factor: Tensor
    pivot: Tensor
    inverse: Tensor | None


def factor_dtype(k: Tensor) -> torch.dtype:
    """The precision k [N?, M, M] is factored in: float64 where it costs nothing beside k."""
    return torch.float64 if k.shape[-1] <= FLOAT64_UP_TO else k.dtype


def factor_one(k: Tensor, lam: Tensor, retries: int, solver: Solver) -> Factor:
    """`ridge_factor` of one gram [M, M], which raises when the last ridge fails."""
    ridge = lam.clone()
    factor = None
    for attempt in range(retries + 1):
        if k.shape[0] > FLOAT64_UP_TO and not solver.own:
            factor, pivot = _in_place(k, ridge, factor)
            tried = _Try(factor, pivot, _inverse(factor, solver.inverse))
        else:
            tried = _cholesky(k, ridge, solver)
        value, failed = _read(lam, tried.pivot)
        if attempt == 0:
            _require_ridge(lam, value, value, k.shape[-1])
        if failed == 0:
            if attempt:
                _log.warning("ridge_factor: ridge raised %d times to %.3g", attempt, ridge.item())
            count = torch.full((), attempt, device=k.device)
            return Factor(tried.factor, ridge, count, tried.pivot, tried.inverse)
        if attempt < retries:
            ridge = ridge * RIDGE_FACTOR
    raise _failure(k, lam, ridge, retries, int(failed), factor_dtype(k))


def _read(*numbers: Tensor) -> list[float]:
    """The values of tensors []: from a GPU in one copy, as each would wait for all that runs."""
    if numbers[0].is_cpu:
        return [x.item() for x in numbers]
    return torch.stack([x.double() for x in numbers]).tolist()


def _in_place(k: Tensor, ridge: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    """Factor in the precision of the gram, in the memory of the last try, column by column."""
    factor = k.new_empty(k.shape).mT if factor is None else factor
    factor.mT.copy_(k)
    factor.diagonal().add_(ridge)
    pivot = torch.empty((), dtype=torch.int32, device=k.device)
    torch.linalg.cholesky_ex(factor, out=(factor, pivot))
    return factor, _failed(factor, pivot)


def _failed(factor: Tensor, pivot: Tensor) -> Tensor:
    """The pivots [N?] that failed: NaN passes the test of a pivot in some builds of LAPACK."""
    finite = factor.diagonal(dim1=-2, dim2=-1).sum(-1).isfinite()
    return torch.where(finite, pivot, pivot.clamp(min=1))


def factor_many(k: Tensor, lam: Tensor, retries: int, solver: Solver) -> Factor:
    """`ridge_factor` of N grams [N, M, M]: only those that fail are tried again."""
    ridge, count = lam.clone(), torch.zeros_like(lam, dtype=torch.int64)
    factor, pivot, inverse = _cholesky(k, ridge, solver)
    if len(k) == 0:
        return Factor(factor, ridge, count, pivot, inverse)
    least, total, failures = _read(lam.min(), lam.sum(), pivot.count_nonzero())
    _require_ridge(lam, least, total, k.shape[-1])
    if failures == 0:
        return Factor(factor, ridge, count, pivot, inverse)
    for attempt in range(1, retries + 1):
        failed = pivot.nonzero().squeeze(1)
        if len(failed) == 0:
            break
        ridge[failed] *= RIDGE_FACTOR
        count[failed] = attempt
        again = _cholesky(k[failed], ridge[failed], solver)
        factor[failed], pivot[failed] = again.factor, again.pivot
        if inverse is not None and again.inverse is not None:
            inverse[failed] = again.inverse
    failed = pivot.nonzero().squeeze(1)
    if len(failed):
        i = int(failed[0])
        raise _failure(k[i], lam[i], ridge[i], retries, int(pivot[i]), factor.dtype, i)
    raised = int((count > 0).sum())
    if raised:
        _log.warning("ridge_factor: ridge raised in %d of %d problems", raised, len(k))
    return Factor(factor, ridge, count, pivot, inverse)


def factor_unread(k: Tensor, lam: Tensor, retries: int, solver: Solver) -> Factor:
    """`ridge_factor` of [N?, M, M] without a look at any value: what has no factor becomes NaN.

    The whole ladder is climbed, whether it is needed or not: a decision would be a look.
    """
    ridge, count = lam.clone(), torch.zeros_like(lam, dtype=torch.int64)
    factor, pivot, inverse = _cholesky(k, ridge, solver)
    for _ in range(retries):
        failed = pivot != 0
        ridge = torch.where(failed, ridge * RIDGE_FACTOR, ridge)
        count = count + failed
        again = _cholesky(k, ridge, solver)
        factor = torch.where(failed[..., None, None], again.factor, factor)
        if inverse is not None and again.inverse is not None:
            inverse = torch.where(failed[..., None, None], again.inverse, inverse)
        pivot = torch.where(failed, again.pivot, pivot)
    failed = (pivot != 0) | (~(lam > 0) if k.shape[-1] else False)
    factor = factor.masked_fill(failed[..., None, None], math.nan)
    if inverse is not None:
        inverse = inverse.masked_fill(failed[..., None, None], math.nan)
    return Factor(factor, ridge, count, torch.where(failed, pivot.clamp(min=1), pivot), inverse)


def _cholesky(k: Tensor, ridge: Tensor, solver: Solver) -> _Try:
    """Factors of k + ridge I [N?, M, M] and failed pivots [N?], without a look at any value."""
    if k.shape[-1] <= FLOAT64_UP_TO:
        factors = torch.ops.krrst_fast if solver.own or k.is_cpu else reference
        if k.ndim == 3:
            factor, pivot = factors.batched_cholesky(k, ridge)
        else:
            factor, pivot = (x[0] for x in factors.batched_cholesky(k[None], ridge[None]))
        return _Try(factor, pivot, _inverse(factor, solver.inverse))
    if k.ndim == 2 and solver.own:
        return _own(k, ridge, solver)
    system = k.to(factor_dtype(k), copy=True)
    system.diagonal(dim1=-2, dim2=-1).add_(ridge[..., None])
    factor, pivot = torch.linalg.cholesky_ex(system)
    return _Try(factor, _failed(factor, pivot), _inverse(factor, solver.inverse))


def _own(k: Tensor, ridge: Tensor, solver: Solver) -> _Try:
    """A large gram by our Cholesky: L^-1 I, where it is wanted, comes out of the same steps."""
    columns = k.new_empty(len(k), 0)
    if solver.inverse:
        columns = torch.eye(len(k), dtype=k.dtype, device=k.device)
    factor, half, pivot = torch.ops.krrst_fast.cholesky(k, ridge, columns, False)
    return _Try(factor, pivot, half if solver.inverse else None)


def _inverse(factor: Tensor, wanted: bool) -> Tensor | None:
    """L^-1 [N?, M, M], if it is wanted."""
    if not wanted:
        return None
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)


def _failure(
    k: Tensor,
    lam: Tensor,
    ridge: Tensor,
    retries: int,
    pivot: int,
    dtype: torch.dtype,
    problem: int | None = None,
) -> Exception:
    """Why there is no factor of k [M, M] with this ridge."""
    where = "" if problem is None else f" of problem {problem}"
    if not bool(k.isfinite().all()):
        return NonFiniteError(f"ridge_factor: the gram{where} holds NaN or infinity")
    if lam.item() == 0:
        return NotPositiveDefiniteError(
            f"ridge_factor: the ridge{where} is 0, and so the trace it follows: the features are "
            "zero, or their squares underflow; scale them up, or pass ridge_of='absolute'"
        )
    name = str(dtype).removeprefix("torch.")
    return NotPositiveDefiniteError(
        f"ridge_factor: k + {ridge.item():.3g} * I [{len(k)}, {len(k)}]{where} ({name}) has a "
        f"non-positive pivot at row {max(pivot - 1, 0)} after raising the ridge {retries} times "
        f"from {lam.item():.3g}; pass a larger ridge or float64"
    )


def _require_ridge(lam: Tensor, value: float, total: float, rows: int) -> None:
    """Raise what is wrong with a ridge [N?], of which the least and the sum were read."""
    if not math.isfinite(total):
        raise NonFiniteError(f"ridge_factor: the ridge is {value}: it, or the trace, is not finite")
    if value < 0:
        raise NotPositiveDefiniteError(
            f"ridge_factor: the ridge is {value:.3g}: it, or the trace it follows, is negative"
        )
    if value == 0 and rows:
        where = f" of problem {int(lam.argmin())}" if lam.ndim else ""
        raise NotPositiveDefiniteError(
            f"ridge_factor: the ridge{where} is 0, and so the trace it follows: the features are "
            "zero, or their squares underflow; scale them up, or pass ridge_of='absolute'"
        )


def cholesky_solve(y: Tensor, factor: Tensor, inverse: Tensor | None, own: bool) -> Tensor:
    """(factor factor^T)^-1 y [N?, M, P] in the precision of the factor, rounded to that of y.

    inverse: as in `Factor`; own: as in `Solver`.
    """
    if inverse is not None:
        return (inverse.mT @ (inverse @ y.to(factor.dtype))).to(y.dtype)
    on_cpu = y.is_cpu
    small = factor.dtype == torch.float64 and factor.shape[-1] <= FLOAT64_UP_TO
    if small and (own or on_cpu):
        many = torch.ops.krrst_fast.batched_cholesky_solve
        return many(y, factor) if factor.ndim == 3 else many(y[None], factor[None])[0]
    solve = torch.cholesky_solve if on_cpu else _by_substitution
    if y.dtype == factor.dtype:
        return solve(y, factor)
    return solve(y.to(factor.dtype), factor).to(y.dtype)


def _by_substitution(y: Tensor, factor: Tensor) -> Tensor:
    """Two triangular solves: cuSOLVER's own function for both is the slower one."""
    half = torch.linalg.solve_triangular(factor, y, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)


def residual(k: Tensor, ridge: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """y - (k + ridge I) x in float64 for k [N?, M, M] of any precision and float64 x [N?, M, P].

    The gram is taken to float64 a block of rows at a time.
    """
    out = y.double() - ridge.double()[..., None, None] * x
    for first in range(0, k.shape[-2], _RESIDUAL_ROWS):
        rows = slice(first, first + _RESIDUAL_ROWS)
        out[..., rows, :] -= k[..., rows, :].double() @ x
    return out
