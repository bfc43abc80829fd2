"""Cholesky factors of ridged Gram matrices, retries with larger ridges, and solves.

Letters: M rows of the Gram, P right-hand sides, N problems of a batch.
"""

import logging
import math
from typing import NamedTuple

import torch
from torch import Tensor

from krrst_fast import triangular
from krrst_fast.errors import NonFiniteError, NotPositiveDefiniteError
from krrst_fast.planner.sizes import FLOAT64_UP_TO

MAX_RETRIES = 3
"""The default number of retries of a factorisation whose result is read back."""

RIDGE_FACTOR = 10.0
"""The factor by which a retry raises the ridge."""

_ZERO_RIDGE = (
    "ridge_factor: the ridge{} is 0 because trace(K) is 0: the features are zero, or their squares "
    "underflow; scale them up, or pass ridge_of='absolute'"
)

_log = logging.getLogger("krrst_fast")


class Method(NamedTuple):
    """A way to factor a Gram and to solve with the factor; the backends choose it.

    Attributes:
        own_up_to: Our compiled Cholesky factors Grams of at most this many rows, torch larger ones.
        inverse: The diagonal blocks of the factor are inverted once, and a solve is products of
            blocks in place of two triangular solves, which proceed row by row.
        substitution: A solve is two triangular solves in place of `torch.cholesky_solve`, whose
            function in cuSOLVER is the slower one.
    """

    own_up_to: int
    inverse: bool
    substitution: bool

    def owns(self, rows: int) -> bool:
        """Return whether our Cholesky factors a Gram of so many rows."""
        return rows <= self.own_up_to


_ANY = 2**31 - 1

LAPACK = Method(own_up_to=0, inverse=False, substitution=False)
CPP = Method(own_up_to=FLOAT64_UP_TO, inverse=False, substitution=False)
CUDA_METHODS = {
    "torch": Method(own_up_to=0, inverse=False, substitution=True),
    "torch inverse": Method(own_up_to=0, inverse=True, substitution=True),
    "cuda": Method(own_up_to=_ANY, inverse=False, substitution=True),
    "cuda inverse": Method(own_up_to=_ANY, inverse=True, substitution=True),
}
"""The methods on a GPU, by their names in the table of measurements."""


class Factor(NamedTuple):
    """The Cholesky factor of k + ridge I, for one problem or for each of N.

    Attributes:
        factor: Lower triangular, zero above the diagonal [N?, M, M]; NaN where the factorisation
            failed.
        ridge: The number that was added to the diagonal [N?].
        retries: How often it was raised [N?] int64.
        pivot: 0, or the number, from 1, of the pivot that failed [N?] int32.
        inverse: The inverses of the diagonal blocks of the factor [N?, blocks, rows, rows], the
            last padded, if the method has them; of one block of M rows, the inverse of the factor.
    """

    factor: Tensor
    ridge: Tensor
    retries: Tensor
    pivot: Tensor
    inverse: Tensor | None


def ridge_factor(
    k: Tensor, lam: Tensor, retries: int | None, raises: bool, method: Method = LAPACK
) -> Factor:
    """Compute the lower Cholesky factor of k + lam I; retry a failure with ten times the ridge.

    Args:
        k: Symmetric [N?, M, M], one problem or a batch of N.
        lam: The ridge [N?].
        retries: The largest number of retries; None: 3, or 0 where they would always be computed.
        raises: Read the result back, stop at the first success, and raise on failure. Otherwise
            nothing is read back from the device and all retries are computed.
        method: How to factor.

    Raises:
        NonFiniteError: k or lam holds NaN or infinity.
        NotPositiveDefiniteError: lam is negative, or the factorisation fails with every ridge.
    """
    if retries is None:
        retries = MAX_RETRIES if raises else 0
    if _traced(k):
        found = Factor(*torch.ops.krrst_fast.ridge_factor(k, lam, retries, raises, *method))
        return found if method.inverse else found._replace(inverse=None)
    return factored(k, lam, retries, raises, method)


def factored(k: Tensor, lam: Tensor, retries: int, raises: bool, method: Method) -> Factor:
    """Compute `ridge_factor` for tensors that hold values (not fake or traced ones)."""
    if not raises:
        return _factor_unread(k, lam, retries, method)
    return (_factor_one if k.ndim == 2 else _factor_many)(k, lam, retries, method)


def factored_solve(y: Tensor, factor: Tensor, inverse: Tensor | None, method: Method) -> Tensor:
    """Solve (factor factor^T) x = y [N?, M, P] in the precision of the factor.

    The result is rounded to the precision of y. inverse: as in `Factor`.
    """
    if _traced(y):
        return torch.ops.krrst_fast.factored_solve(y, factor, inverse, *method)
    return solve(y, factor, inverse, method)


def _traced(x: Tensor) -> bool:
    """Return whether x has no values: meta, fake and subclass tensors, and while tracing.

    Only these go through torch's dispatcher, which costs as much as a small solve.
    """
    return torch.compiler.is_compiling() or type(x) is not Tensor or x.is_meta


def factor_dtype(k: Tensor) -> torch.dtype:
    """Return the precision that k [N?, M, M] is factored in: float64 where it is nearly free."""
    return torch.float64 if k.shape[-1] <= FLOAT64_UP_TO else k.dtype


def _factor_one(k: Tensor, lam: Tensor, retries: int, method: Method) -> Factor:
    """Factor one Gram [M, M]; raise when the last ridge fails."""
    rows, ridge, factor = k.shape[0], lam, None
    in_place = rows > FLOAT64_UP_TO and not method.owns(rows)
    for attempt in range(retries + 1):
        if in_place:
            factor, pivot = _factor_in_place(k, ridge, factor)
            inverse = triangular.inverses(factor) if method.inverse else None
        else:
            factor, pivot, inverse = _cholesky(k, ridge, method)
        value, failed = _read(lam, pivot)
        if attempt == 0 and not 0 < value < math.inf:
            require_ridge(lam, value, value, rows)
        if failed == 0:
            count = torch.full((), attempt, device=k.device)
            if attempt:
                log_raised(ridge, count)
            return Factor(factor, ridge.clone(), count, pivot, inverse)
        if attempt < retries:
            ridge = ridge * RIDGE_FACTOR
    raise failure(k, lam, ridge, retries, int(failed), factor_dtype(k))


def _read(*numbers: Tensor) -> list[float]:
    """Return the values of tensors []; on a GPU in one copy, since each copy waits."""
    if numbers[0].is_cpu:
        return list(map(Tensor.item, numbers))
    return torch.stack([x.double() for x in numbers]).tolist()


def _factor_in_place(k: Tensor, ridge: Tensor, factor: Tensor | None) -> tuple[Tensor, Tensor]:
    """Factor in the precision of the Gram, in the memory of the last try, column by column."""
    factor = k.new_empty(k.shape).mT if factor is None else factor
    factor.mT.copy_(k)
    factor.diagonal().add_(ridge)
    pivot = torch.empty((), dtype=torch.int32, device=k.device)
    torch.linalg.cholesky_ex(factor, out=(factor, pivot))
    return factor, _failed(factor, pivot)


def _failed(factor: Tensor, pivot: Tensor) -> Tensor:
    """Return the failed pivots [N?]; some builds of LAPACK take a NaN pivot for a positive one."""
    finite = factor.diagonal(dim1=-2, dim2=-1).sum(-1).isfinite()
    return torch.where(finite, pivot, pivot.clamp(min=1))


def _factor_many(k: Tensor, lam: Tensor, retries: int, method: Method) -> Factor:
    """Factor N Grams [N, M, M]; only those that fail are retried."""
    ridge, count = lam.clone(), torch.zeros_like(lam, dtype=torch.int64)
    factor, pivot, inverse = _cholesky(k, ridge, method)
    if len(k) == 0:
        return Factor(factor, ridge, count, pivot, inverse)
    least, total, failures = _read(lam.min(), lam.sum(), pivot.count_nonzero())
    require_ridge(lam, least, total, k.shape[-1])
    if failures == 0:
        return Factor(factor, ridge, count, pivot, inverse)
    for attempt in range(1, retries + 1):
        failed = pivot.nonzero().squeeze(1)
        if len(failed) == 0:
            break
        ridge[failed] *= RIDGE_FACTOR
        count[failed] = attempt
        factor[failed], pivot[failed], again = _cholesky(k[failed], ridge[failed], method)
        if inverse is not None and again is not None:
            inverse[failed] = again
    failed = pivot.nonzero().squeeze(1)
    if len(failed):
        i = int(failed[0])
        raise failure(k[i], lam[i], ridge[i], retries, int(pivot[i]), factor.dtype, i)
    log_raised(ridge, count)
    return Factor(factor, ridge, count, pivot, inverse)


def log_raised(ridge: Tensor, count: Tensor) -> None:
    """Warn where a ridge [N?] was raised, `count` times [N?]."""
    if ridge.ndim == 0 and count.item():
        _log.warning("ridge_factor: ridge raised %d times to %.3g", count.item(), ridge.item())
    elif raised := int((count > 0).sum()):
        _log.warning("ridge_factor: ridge raised in %d of %d problems", raised, len(ridge))


def _factor_unread(k: Tensor, lam: Tensor, retries: int, method: Method) -> Factor:
    """Factor [N?, M, M] without reading any value back; a failed factor becomes NaN.

    All retries are computed, because stopping early would require reading a value.
    """
    ridge, count = lam.clone(), torch.zeros_like(lam, dtype=torch.int64)
    factor, pivot, inverse = _cholesky(k, ridge, method)
    for _ in range(retries):
        failed = pivot != 0
        ridge = torch.where(failed, ridge * RIDGE_FACTOR, ridge)
        count = count + failed
        factor_again, pivot_again, inverse_again = _cholesky(k, ridge, method)
        factor = torch.where(failed[..., None, None], factor_again, factor)
        if inverse is not None and inverse_again is not None:
            inverse = torch.where(failed[..., None, None, None], inverse_again, inverse)
        pivot = torch.where(failed, pivot_again, pivot)
    failed = (pivot != 0) | (~(lam > 0) if k.shape[-1] else False)
    factor = factor.masked_fill(failed[..., None, None], math.nan)
    if inverse is not None:
        inverse = inverse.masked_fill(failed[..., None, None, None], math.nan)
    return Factor(factor, ridge, count, torch.where(failed, pivot.clamp(min=1), pivot), inverse)


def _cholesky(k: Tensor, ridge: Tensor, method: Method) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the factor of k + ridge I [N?, M, M], the failed pivots [N?] and the inverse."""
    rows, inverse = k.shape[-1], None
    if rows <= FLOAT64_UP_TO and method.owns(rows):
        if k.ndim == 3:
            factor, pivot = torch.ops.krrst_fast.batched_cholesky(k, ridge)
        else:
            factor, pivot = torch.ops.krrst_fast.batched_cholesky(k[None], ridge[None])
            factor, pivot = factor[0], pivot[0]
    elif k.ndim == 2 and method.owns(rows):
        # L^-1 I, where it is wanted, comes out of the same steps.
        columns = k.new_empty(rows, 0)
        if method.inverse:
            columns = torch.eye(rows, dtype=k.dtype, device=k.device)
        factor, inverse, pivot = torch.ops.krrst_fast.cholesky(k, ridge, columns, False)
        return factor, pivot, inverse[None] if method.inverse else None
    else:
        system = k.to(factor_dtype(k), copy=True)
        system.diagonal(dim1=-2, dim2=-1).add_(ridge[..., None])
        factor, pivot = torch.linalg.cholesky_ex(system)
        pivot = _failed(factor, pivot)
    return factor, pivot, triangular.inverses(factor) if method.inverse else None


def failure(
    k: Tensor,
    lam: Tensor,
    ridge: Tensor,
    retries: int,
    pivot: int,
    dtype: torch.dtype,
    problem: int | None = None,
) -> Exception:
    """Return the error for a Gram [M, M] that has no factor with this ridge."""
    where = "" if problem is None else f" of problem {problem}"
    if not bool(k.isfinite().all()):
        return NonFiniteError(f"ridge_factor: the gram{where} holds NaN or infinity")
    if lam.item() == 0:
        return NotPositiveDefiniteError(_ZERO_RIDGE.format(where))
    name = str(dtype).removeprefix("torch.")
    return NotPositiveDefiniteError(
        f"ridge_factor: k + {ridge.item():.3g} * I [{len(k)}, {len(k)}]{where} ({name}) has a "
        f"non-positive pivot at row {max(pivot - 1, 0)} after raising the ridge {retries} times "
        f"from {lam.item():.3g}; pass a larger ridge or float64"
    )


def require_ridge(lam: Tensor, value: float, total: float, rows: int) -> None:
    """Raise if a ridge [N?], of which the smallest value and the sum were read, is not positive."""
    if not math.isfinite(total):
        raise NonFiniteError(f"ridge_factor: the ridge is {value}: it, or the trace, is not finite")
    if value < 0:
        raise NotPositiveDefiniteError(
            f"ridge_factor: the ridge is {value:.3g}: it, or the trace of K, is negative"
        )
    if value == 0 and rows:
        where = f" of problem {int(lam.argmin())}" if lam.ndim else ""
        raise NotPositiveDefiniteError(_ZERO_RIDGE.format(where))


def solve(y: Tensor, factor: Tensor, inverse: Tensor | None, method: Method) -> Tensor:
    """Compute `factored_solve` for tensors that hold values (not fake or traced ones)."""
    if inverse is not None:
        return triangular.solve_twice(y.to(factor.dtype), factor, inverse).to(y.dtype)
    rows = factor.shape[-1]
    if method.owns(rows) and rows <= FLOAT64_UP_TO and factor.dtype == torch.float64:
        own = torch.ops.krrst_fast.batched_cholesky_solve
        return own(y, factor) if factor.ndim == 3 else own(y[None], factor[None])[0]
    by = _substitute if method.substitution else torch.cholesky_solve
    return by(y, factor) if y.dtype == factor.dtype else by(y.to(factor.dtype), factor).to(y.dtype)


def _substitute(y: Tensor, factor: Tensor) -> Tensor:
    """Solve by two triangular solves."""
    half = torch.linalg.solve_triangular(factor, y, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)
