"""Solve with a ridged positive semi-definite Gram matrix."""

from typing import Any

import torch
from torch import Tensor

from krrst_fast.backends import Backend, choose, for_backward
from krrst_fast.backends.torch import matmul
from krrst_fast.cholesky import RIDGE_FACTOR, factored_solve, ridge_factor
from krrst_fast.ops import composite
from krrst_fast.ops.autograd import (
    Batched,
    Tensors,
    gradients,
    mark_constant,
    needs_composite,
)
from krrst_fast.ops.problem import (
    batch_of,
    check_kernel,
    check_matrices,
    check_same_size,
    check_solver,
    finite,
    fold,
    keepable,
    ready_ridge,
    restore,
    working_dtype,
)
from krrst_fast.ops.solver import DEFAULT, RidgeOf, Solver
from krrst_fast.precision import exact_arithmetic
from krrst_fast.reference import absolute_ridge


def ridge_solve(
    k: Tensor,
    y: Tensor,
    *,
    ridge: float | Tensor = 1e-6,
    ridge_of: RidgeOf = "trace",
    solver: Solver = DEFAULT,
) -> Tensor:
    """Compute alpha = (k + lam I)^-1 y by Cholesky, differentiable in k, y and ridge.

    Args:
        k: Symmetric positive semi-definite [..., M, M]; symmetry is assumed, not checked.
        y: Right-hand sides [..., M, P].
        ridge: Positive number, or a tensor [...], which may require a gradient.
        ridge_of: What the ridge multiplies to give lam: the "trace" of k, its "mean_diagonal", or
            1 ("absolute"). The gradient goes through the trace.
        solver: How the system is solved; its `form` does not matter, and precision "fast" is
            refused, since a Gram has no features to round.

    Returns:
        alpha [..., M, P]. The gradient to k is symmetric.

    Raises:
        ValueError: Shapes, devices or values that do not fit.
        TypeError: An argument of another type or dtype.
        NonFiniteError: An input on the CPU holds NaN or infinity.
        NotPositiveDefiniteError: The Cholesky factorisation fails with the largest ridge.
    """
    op = "ridge_solve"
    check_kernel(op, ridge, ridge_of, False, 1.0, 0.0)
    check_solver(op, solver)
    dtype = check_matrices(op, ("k", "y"), (k, y))
    check_gram(op, "k", k, solver)
    check_same_size(op, "k", k, "y", y, -2)
    scalar = ridge if isinstance(ridge, Tensor) else None
    batch = batch_of(op, k=(k, 2), y=(y, 2), ridge=(scalar, 0))
    working = working_dtype(dtype, solver.precision)
    ridge = ready_ridge(ridge, batch, working, k)
    k, y = (fold(x.to(working), batch, 2) for x in (k, y))
    lam = absolute_ridge(k, ridge, ridge_of, detach_ridge=False)
    backend = choose_for_gram(op, solver, k)
    alpha, *_ = solve_gram(op, k, y, lam, backend, solver, ("k", "y"))
    narrowed, alpha = alpha.dtype != dtype, restore(alpha, batch, dtype)
    if narrowed and solver.check == "raise":
        finite(op, alpha, k=k, y=y)
    return alpha


def check_gram(op: str, name: str, k: Tensor, solver: Solver) -> None:
    """Check that k is square and that the precision is not "fast"."""
    if k.shape[-2] != k.shape[-1]:
        raise ValueError(f"{op}: {name} must be square, got shape {tuple(k.shape)}")
    if solver.precision == "fast":
        raise ValueError(f"{op}: precision 'fast' rounds features, and a gram has none")


def choose_for_gram(op: str, solver: Solver, k: Tensor) -> Backend:
    """Return the backend that factors a given Gram."""
    if solver.backend == "reference":
        raise ValueError(f"{op}: backend 'reference' does not factor a given gram")
    return choose(solver.backend, k, op)


def solve_gram(
    op: str,
    k: Tensor,
    y: Tensor,
    lam: Tensor,
    backend: Backend,
    solver: Solver,
    names: tuple[str, str],
) -> tuple[Tensor, ...]:
    """Return alpha [N?, M, P], factor, lam, retries, pivot for k [N?, M, M] and y [N?, M, P]."""
    lam = lam.expand(k.shape[:-2])
    if needs_composite():
        alpha, factor = composite.ridge_solve(op, k, y, lam, solver.check)
        if solver.check == "raise":
            finite(op, alpha, **dict(zip(names, (k, y))))
        retries, pivot = (torch.zeros_like(lam, dtype=x) for x in (torch.int64, torch.int32))
        return alpha, factor, lam, retries, pivot
    alpha, *found, _ = _RidgeSolve.apply(k, y, lam, backend, solver, op, names)
    return alpha, *found


class _RidgeSolve(Batched):
    @staticmethod
    def forward(
        k: Tensor,
        y: Tensor,
        lam: Tensor,
        backend: Backend,
        solver: Solver,
        op: str,
        names: tuple[str, str],
    ) -> tuple[Tensor | None, ...]:
        with exact_arithmetic(k):
            method = backend.cholesky_method(k, y.shape[-1])
            found = ridge_factor(k, lam, solver.max_retries, solver.check == "raise", method)
            alpha = factored_solve(y, found.factor, found.inverse, method)
        if solver.check == "raise":
            finite(op, alpha, **dict(zip(names, (k, y))))
        return alpha, *found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        alpha, factor, lam, retries, pivot, inverse = output
        # K, y and the ridge are for a second derivative.
        ctx.save_for_backward(*keepable(*inputs[:3]), alpha, factor, retries, inverse)
        ctx.backend, ctx.op = inputs[3], inputs[5]
        ctx.set_materialize_grads(False)
        mark_constant(ctx, factor, lam, retries, pivot, inverse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Tensors:
        if grad is None:
            return (None,) * 7
        settings = (ctx.needs_input_grad[0], ctx.backend, ctx.op)
        grads = gradients(_backward, _again, ctx, settings, grad)
        return (*grads[:3], *(None,) * 4)


def _backward(
    settings: tuple[bool, Backend, str],
    k: Tensor,
    y: Tensor,
    lam: Tensor,
    alpha: Tensor,
    factor: Tensor,
    retries: Tensor,
    inverse: Tensor | None,
    grad: Tensor,
) -> Tensors:
    needs_k, backend, _ = settings
    backend = for_backward(backend, grad)
    with exact_arithmetic(grad):
        method = backend.cholesky_method(factor, grad.shape[-1])
        beta = factored_solve(grad, factor, inverse, method)
        d_k = None
        if needs_k:
            outer = matmul(beta, alpha.mT)
            d_k = (outer + outer.mT).mul_(-0.5)
        d_lam = -(alpha * beta).sum((-2, -1)) * RIDGE_FACTOR**retries
    return d_k, beta, d_lam


def _again(
    settings: tuple[bool, Backend, str], k: Tensor, y: Tensor, lam: Tensor, *left: Tensor
) -> Tensor:
    _, factor, retries, _ = left
    raised = lam * RIDGE_FACTOR ** retries.to(lam.dtype)
    return composite.ridge_solve(settings[-1], k, y, raised, "raise", factor)[0]
