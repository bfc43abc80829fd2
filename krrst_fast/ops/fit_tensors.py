"""Fits of tensors, which keep their rows."""

from typing import Any

import torch
from torch import Tensor

from krrst_fast.backends import Backend, choose
from krrst_fast.errors import NonFiniteError
from krrst_fast.ops.centring import centred, check_intercept
from krrst_fast.ops.closed_forms import fit_dual, fit_primal, primal_readout
from krrst_fast.ops.fitted import Fitted, KRRFit
from krrst_fast.ops.info import SolveInfo
from krrst_fast.ops.kernel import LINEAR, Kernel, of_unit_length
from krrst_fast.ops.kernel_fit import fit_rows
from krrst_fast.ops.problem import (
    Problem,
    check_not_mapped,
    finite,
    fold,
    prepare,
    raise_non_finite,
    restore,
    unfold,
)
from krrst_fast.ops.solver import DEFAULT, RidgeOf, Solver
from krrst_fast.ops.uneven import exact_primal
from krrst_fast.ops.weights import apply_weights, constant_feature
from krrst_fast.planner import cheapest
from krrst_fast.precision import exact_arithmetic
from krrst_fast.reference import round_features


@torch.no_grad()
def fit_tensors(
    op: str,
    f_syn: Tensor,
    y_syn: Tensor,
    *,
    ridge: float | Tensor,
    ridge_of: RidgeOf = "trace",
    scale: float = 1.0,
    bias: float = 0.0,
    kernel: Kernel = LINEAR,
    intercept: bool = False,
    weights: Tensor | None = None,
    solver: Solver = DEFAULT,
) -> KRRFit:
    """Fit as `krrst_fast.krr_fit` does; `op` is the name in errors."""
    check_not_mapped(op, f_syn, y_syn, ridge, weights, kernel.gamma)
    tensors, of = (f_syn, y_syn), (scale, bias, weights)
    problem, batch, dtype = prepare(op, solver, tensors, ridge, ridge_of, True, *of, kernel.gamma)
    check_intercept(op, intercept, bias)
    (*_, m, d), (*_, p) = problem.f_syn.shape, problem.y_syn.shape
    if m == 0:
        raise ValueError(f"{op}: f_syn must have at least one row, got {tuple(f_syn.shape)}")
    if solver.backend == "reference":
        raise ValueError(f"{op}: backend 'reference' keeps no fit")
    if kernel.of_products:
        if intercept:
            raise ValueError(f"{op}: intercept must be False with kernel {kernel.name!r}")
        return _fit_of_kernel(op, problem, tensors, kernel, weights, solver, batch, dtype)
    if kernel.name == "cosine":
        problem = of_unit_length(problem)
    root, as_given, means = None, problem, None
    if intercept:
        problem, means = centred(problem, weights, batch)
    if weights is not None:
        problem, root = apply_weights(problem, weights, batch)
        d = problem.f_syn.shape[-1]
    if solver.precision == "fast":
        problem = problem._replace(f_syn=round_features(problem.f_syn, None)[0])
    form = cheapest(m, 0, d, p) if solver.form == "auto" or d == 0 else solver.form
    if form == "primal":
        form, problem = exact_primal(problem, solver)
    backend = choose(solver.backend, problem.f_syn, op)
    fit = _fit_primal if form == "primal" else _fit_dual
    with exact_arithmetic(problem.f_syn):
        try:
            factor, info, alpha, coefficients, constants = fit(backend, solver, problem)
        except NonFiniteError:
            raise_non_finite(op, f_syn=problem.f_syn)
    if root is not None:
        alpha = alpha * root
        if as_given.has_bias:  # the constant was a column of the weighted features
            constant = constant_feature(as_given.scale, as_given.bias)
            constants = constant * coefficients[..., -1, :]
            coefficients = coefficients[..., :-1, :]
    if means is not None:
        constants = means.intercept(coefficients)
    results = alpha, coefficients, constants
    rounded, primal, rounded_constants = (restore(x, batch, dtype) for x in results)
    if solver.check == "raise":
        for part in (rounded, primal, rounded_constants):
            finite(op, part, f_syn=problem.f_syn, y_syn=problem.y_syn)
    lam, retries, pivot = (unfold(x, batch) for x in info)
    linear = unfold(coefficients, batch), unfold(constants, batch)
    # `loo_residuals` reads these later, when the caller may have changed what was given.
    kept = problem._replace(
        f_syn=_kept(problem.f_syn, form == "primal" and root is None),
        y_syn=problem.y_syn.detach(),
    )
    rows = _kept(f_syn, root is not None), _kept(y_syn, root is not None)
    return KRRFit(
        intercept=rounded_constants,
        info=SolveInfo(form, backend.NAME, lam, retries, pivot, unfold(factor, batch)),
        _alpha=rounded,
        _weights=primal,
        _fitted=Fitted(
            *(rows, unfold(alpha, batch), linear, kept, solver, root, means, batch),
            of_unit_length=kernel.name == "cosine",
        ),
    )


def _fit_of_kernel(
    op: str,
    problem: Problem,
    rows: tuple[Tensor, Tensor],
    kernel: Kernel,
    weights: Tensor | None,
    solver: Solver,
    batch: tuple[int, ...],
    dtype: torch.dtype,
) -> KRRFit:
    """Return the fit with a non-linear kernel."""
    detached: list[Any] = [x.detach() if isinstance(x, Tensor) else x for x in problem]
    problem = Problem(*detached)
    kept, info = fit_rows(op, problem, kernel, weights, solver, batch)
    alpha = restore(kept.alpha, batch, dtype)
    if solver.check == "raise":
        finite(op, alpha, f_syn=problem.f_syn, y_syn=problem.y_syn)
    root, weighted = None, weights is not None
    rows = _kept(rows[0], weighted), _kept(rows[1], weighted)
    if weights is not None:
        root = fold(weights.to(kept.alpha.dtype), batch, 1).sqrt()[..., None]
    none = problem.f_syn.new_empty(0)
    return KRRFit(
        intercept=restore(problem.bias * kept.alpha.sum(-2), batch, dtype),
        info=info,
        _alpha=alpha,
        _weights=None,
        _fitted=Fitted(
            *(rows, unfold(kept.alpha, batch), (none, none), problem, solver, root, None, batch),
            of_kernel=kept,
        ),
    )


def _kept(x: Tensor, copied: bool) -> Tensor:
    """Return x without its graph, as a copy where it is read again."""
    return x.detach().clone() if copied else x.detach()


_Parts = tuple[Tensor, tuple[Tensor, Tensor, Tensor], Tensor, Tensor, Tensor]


def _fit_dual(backend: Backend, solver: Solver, problem: Problem) -> _Parts:
    """Return the factor, (lam, retries, pivot), alpha, weights and intercept."""
    solve = fit_dual(backend, solver, problem)
    alpha = solve.coefficients
    weights = problem.scale * backend.matmul(problem.f_syn.mT, alpha)
    return solve.factor, solve[1:4], alpha, weights, problem.bias * alpha.sum(-2)


def _fit_primal(backend: Backend, solver: Solver, problem: Problem) -> _Parts:
    """Return the same from the D x D system."""
    solve, d = fit_primal(backend, solver, problem), problem.f_syn.shape[-1]
    weights = problem.scale**0.5 * solve.coefficients[..., :d, :]
    intercept = torch.zeros_like(solve.coefficients[..., 0, :])
    if problem.has_bias:
        intercept = problem.bias**0.5 * solve.coefficients[..., d, :]
    readout = primal_readout(problem, problem.f_syn, solve.coefficients)
    residual = problem.y_syn - readout.prediction(backend)
    return solve.factor, solve[1:4], residual / solve.lam[..., None, None], weights, intercept
