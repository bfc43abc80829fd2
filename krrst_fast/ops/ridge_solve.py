"""Solve with a ridged positive semi-definite gram."""

import torch
from torch import Tensor

from krrst_fast.library import RIDGE_FACTOR, factored_solve, ridge_factor
from krrst_fast.ops import checks
from krrst_fast.ops.krr import RidgeOf
from krrst_fast.ops.once import once_differentiable
from krrst_fast.reference import absolute_ridge


def ridge_solve(
    k: Tensor,
    y: Tensor,
    *,
    ridge: float | Tensor = 1e-6,
    ridge_of: RidgeOf = "trace",
    max_retries: int = 3,
) -> Tensor:
    """alpha = (k + lam I)^-1 y by Cholesky, differentiable once in k, y and ridge.

    Args:
        k: symmetric positive semi-definite [M, M]; symmetry is taken, not checked.
        y: right-hand sides [M, P].
        ridge: positive; a scalar tensor may be learnt.
        ridge_of: lam is `ridge` times "trace" of k, its "mean_diagonal", or 1 ("absolute"); the
            gradient goes through the trace.
        max_retries: how often a failed factorisation is tried again with ten times the ridge.

    Returns:
        alpha [M, P]. The gradient to k is symmetric.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or settings that do not fit.
        NonFiniteError: an input on the CPU holds NaN or infinity.
        NotPositiveDefiniteError: no factor even with the largest ridge.
    """
    op = "ridge_solve"
    checks.matrices(op, k=k, y=y)
    if k.shape[0] != k.shape[1]:
        raise ValueError(f"{op}: k must be square, got shape {tuple(k.shape)}")
    checks.same_size(op, "k", k, "y", y, 0)
    checks.ridge(op, ridge, ridge_of)
    checks.retries(op, max_retries)
    lam = absolute_ridge(k, ridge, ridge_of, detach_ridge=False)
    alpha = _RidgeSolve.apply(k, y, lam, max_retries)
    checks.finite(op, alpha, k=k, y=y)
    return alpha


class _RidgeSolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k: Tensor, y: Tensor, lam: Tensor, max_retries: int) -> Tensor:  # type: ignore[no-untyped-def]
        factor, _, retries = ridge_factor(k, lam, max_retries)
        alpha = factored_solve(y, factor)
        ctx.save_for_backward(factor, alpha, retries)
        return alpha

    @staticmethod
    @once_differentiable("ridge_solve")
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:  # type: ignore[no-untyped-def]
        factor, alpha, retries = ctx.saved_tensors
        beta = factored_solve(grad, factor)
        d_k = None
        if ctx.needs_input_grad[0]:
            with checks.no_autocast(grad):
                outer = beta @ alpha.mT
            d_k = (outer + outer.mT).mul_(-0.5)
        d_lam = -(alpha * beta).sum() * RIDGE_FACTOR**retries
        return d_k, beta, d_lam, None
