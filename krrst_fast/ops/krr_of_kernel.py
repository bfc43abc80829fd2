"""Kernel ridge regression with non-linear kernels."""

import torch
from torch import Tensor

from krrst_fast import reference
from krrst_fast.backends import choose
from krrst_fast.errors import NonFiniteError
from krrst_fast.ops.autograd import needs_composite
from krrst_fast.ops.info import SolveInfo
from krrst_fast.ops.kernel import Kernel, Rows, gamma_of, mean_of, rows_of
from krrst_fast.ops.kernel_gram import kernel_gram, kernel_product
from krrst_fast.ops.problem import (
    Problem,
    finite,
    fold,
    raise_non_finite,
    readable,
    restore,
    unfold,
)
from krrst_fast.ops.ridge_solve import solve_gram
from krrst_fast.ops.solver import Solver
from krrst_fast.ops.weights import of_repeated_rows
from krrst_fast.precision import exact_arithmetic
from krrst_fast.reference import absolute_ridge, round_features
from krrst_fast.reference.kernels import kernel_matrix


def krr_of_kernel(
    op: str,
    problem: Problem,
    kernel: Kernel,
    weights: Tensor | None,
    solver: Solver,
    batch: tuple[int, ...],
    dtype: torch.dtype,
    return_info: bool,
) -> tuple[Tensor, SolveInfo | None]:
    """Compute the prediction [..., B, P], or with y_real the mean squared error [...].

    With `return_info`, return how it was done too.
    """
    check_form(op, kernel, solver)
    if return_info and (needs_composite() or solver.backend == "reference"):
        where = "with backend 'reference', in forward mode, and in nested or compiled transforms"
        raise ValueError(f"{op}: return_info must be False {where}")
    if solver.check == "flag" and solver.backend == "reference":
        raise ValueError(f"{op}: backend 'reference' has no failure to flag")
    problem = rounded(problem, solver)
    f_syn, y_syn, f_real, y_real, *_ = problem
    assert f_real is not None
    if solver.check == "raise":  # the kernel of an infinite distance is 0
        finite(op, f_syn, f_syn=f_syn)
        finite(op, f_real, f_real=f_real)
    root = None if weights is None else fold(weights.to(f_syn.dtype), batch, 1).sqrt()[..., None]
    info = None
    if solver.backend == "reference":
        prediction = _by_reference(problem, kernel, root, batch)
    else:
        mean, gamma = mean_of(kernel, f_syn), gamma_of(kernel, f_syn, batch)
        syn, real = (rows_of(kernel, f, mean) for f in (f_syn, f_real))
        alpha, info = fit_kernel(op, problem, syn, gamma, kernel, root, solver, batch)
        backend = choose(solver.backend, f_syn, op)
        prediction = problem.scale * kernel_product(real, syn, alpha, gamma, kernel, backend)
        if problem.has_bias:
            prediction = prediction + problem.bias * alpha.sum(-2, keepdim=True)
        prediction = where_finite(prediction, f_real, solver)
    value = prediction
    if y_real is not None:
        value = (prediction - y_real).square().mean((-2, -1))
    value = restore(value, batch, dtype)
    if solver.check == "raise":
        finite(op, value, f_syn=f_syn, y_syn=y_syn, f_real=f_real, y_real=y_real)
    return value, info if return_info else None


def where_finite(prediction: Tensor, f: Tensor, solver: Solver) -> Tensor:
    """Return the predictions [N?, B, P], NaN for rows of f [N?, B, D] that are not finite.

    Where nothing is read back, nothing else would say so: the kernel of an infinite distance is 0.
    """
    if solver.check == "raise" and readable(f):
        return prediction
    return prediction.masked_fill(~f.isfinite().all(-1, keepdim=True), torch.nan)


def check_form(op: str, kernel: Kernel, solver: Solver) -> None:
    """Check that no form is asked for that only a linear kernel has."""
    if solver.form not in ("auto", "k"):
        need = f"form must be 'auto' or 'k' with kernel {kernel.name!r}"
        raise ValueError(f"{op}: {need}, got {solver.form!r}")


def rounded(problem: Problem, solver: Solver) -> Problem:
    """Return the problem with the features of precision="fast"."""
    if solver.precision != "fast":
        return problem
    f_syn, f_real = round_features(problem.f_syn, problem.f_real)
    return problem._replace(f_syn=f_syn, f_real=f_real)


def fit_kernel(
    op: str,
    problem: Problem,
    rows: Rows,
    gamma: Tensor,
    kernel: Kernel,
    root: Tensor | None,
    solver: Solver,
    batch: tuple[int, ...],
) -> tuple[Tensor, SolveInfo]:
    """Return the dual coefficients of the rows as they were given [N?, M, P], and how it was done.

    root: Square roots of the row weights [N?, M, 1].
    """
    f_syn, y = problem.f_syn, problem.y_syn
    backend = choose(solver.backend, f_syn, op)
    k_ss = kernel_gram(rows, gamma, kernel, backend).to(f_syn.dtype)
    k_ss, ridge, of = _ridged(problem, k_ss, root)
    lam = absolute_ridge(k_ss, ridge, of, problem.detach_ridge)
    y = y if root is None else root * y
    try:
        alpha, *found = solve_gram(op, k_ss, y, lam, backend, solver, ("k_ss", "y_syn"))
    except NonFiniteError:
        raise_non_finite(op, f_syn=f_syn, y_syn=problem.y_syn)
    factor, lam, retries, pivot = (unfold(x, batch) for x in found)
    info = SolveInfo("gram", backend.NAME, lam, retries, pivot, factor)
    return alpha if root is None else root * alpha, info


def _ridged(problem: Problem, k: Tensor, root: Tensor | None) -> tuple[Tensor, float | Tensor, str]:
    """Return scale k + bias with the weights of the rows, and the ridge of these."""
    if isinstance(problem.scale, Tensor) or problem.scale != 1.0:
        k = problem.scale * k
    if problem.has_bias:
        k = k + problem.bias
    if root is None:
        return k, problem.ridge, problem.ridge_of
    row = root[..., 0].square()
    ridge, of = of_repeated_rows(problem.ridge, problem.ridge_of, row, problem.detach_ridge)
    return root * k * root.mT, ridge, of


def _by_reference(
    problem: Problem, kernel: Kernel, root: Tensor | None, batch: tuple[int, ...]
) -> Tensor:
    """Predict as the definition says, with LU."""
    f_syn, y, f_real, _, *_ = problem
    assert f_real is not None
    gamma = 1 / max(f_syn.shape[-1], 1) if kernel.gamma is None else kernel.gamma
    if isinstance(gamma, Tensor):
        gamma = fold(gamma.to(f_syn), batch, 0)[..., None, None]
    of = kernel.name, gamma, kernel.degree, kernel.coef0
    with exact_arithmetic(f_syn):
        k_ss, ridge, ridge_of = _ridged(problem, kernel_matrix(f_syn, f_syn, *of), root)
        y = y if root is None else root * y
        alpha = reference.ridge_solve(k_ss, y, ridge, ridge_of, problem.detach_ridge)
        alpha = alpha if root is None else root * alpha
        return (problem.scale * kernel_matrix(f_real, f_syn, *of) + problem.bias) @ alpha
