"""Kernel ridge regression as a value: fit once, predict many times."""

import math
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from krrst_fast.backends import Backend, choose
from krrst_fast.errors import NonFiniteError
from krrst_fast.ops.arrays import check_array, predict_blocks
from krrst_fast.ops.autograd import product
from krrst_fast.ops.centring import Means, centred, check_intercept
from krrst_fast.ops.closed_forms import fit_dual, fit_primal, primal_readout
from krrst_fast.ops.info import SolveInfo
from krrst_fast.ops.problem import (
    Problem,
    batch_of,
    cast,
    check_matrices,
    check_not_mapped,
    finite,
    fold,
    prepare,
    raise_non_finite,
    restore,
    result_dtype,
    unfold,
)
from krrst_fast.ops.solver import DEFAULT, RidgeOf, Solver
from krrst_fast.ops.uneven import exact_primal
from krrst_fast.ops.weights import apply_weights, constant_feature, undo_weights
from krrst_fast.planner import cheapest
from krrst_fast.precision import exact_arithmetic
from krrst_fast.reference import round_features

_GONE = "the rows of arrays and chunks in primal form (M > D) are not kept"


@dataclass(frozen=True, eq=False)
class KRRFit:
    """A fitted kernel ridge regression, or a batch of them [...].

    Attributes:
        intercept: Bias * sum(alpha), or the constant without a penalty [..., P].
        info: Form, backend, ridge, retries, condition, and the Cholesky factor of K_ss + lam I
            [..., M, M], or in primal form of the ridged D x D system (bordered by the constant
            feature if there is a bias). With row weights, of the system of the weighted rows.
    """

    intercept: Tensor
    info: SolveInfo
    _alpha: Tensor | None
    _weights: Tensor | None
    _fitted: "_Fitted"

    @property
    def alpha(self) -> Tensor:
        """Dual coefficients [..., M, P]: (K_ss + lam I)^-1 Y_s.

        In primal form (M > D) they come from the residual, (Y_s - F_s W) / lam, and are as exact as
        that difference is.

        Raises:
            AttributeError: The fit is the primal form of arrays or chunks, and keeps no rows.
        """
        if self._alpha is None:
            raise AttributeError(f"KRRFit.alpha: {_GONE}")
        return self._alpha

    @property
    def weights(self) -> Tensor:
        """Primal coefficients scale F_s^T alpha [..., D, P]."""
        if self._weights is None:
            raise AttributeError("KRRFit.weights: only the linear kernel has them")
        return self._weights

    def predict(self, f: Tensor | np.ndarray) -> Tensor:
        """Predict [..., B, P] at features f [..., B, D].

        Differentiable in f, not in what was fitted: for gradients to the fitted features and
        targets use `krr_predict`. An array f [B, D] is read in blocks of rows, and gives a tensor.

        Raises:
            ValueError: The shape or the device of f does not match the fit.
            TypeError: F is float64 and the fit is not, or the other way round.
            NonFiniteError: F, on the CPU, holds NaN or infinity.
        """
        op, fitted = "KRRFit.predict", self._fitted
        if isinstance(f, np.ndarray):
            check_array(op, "f", f)
            return predict_blocks(op, "f", f, self.predict, self.weights)
        check_matrices(op, ("weights", "f"), (self.weights, f))
        return predict_linear(op, f, *fitted.linear, fitted.solver)

    @property
    def condition(self) -> Tensor:
        """Estimate from below of the condition number of the solved system [...]."""
        return self.info.condition

    @property
    @torch.no_grad()
    def loo_residuals(self) -> Tensor:
        """y_i minus the prediction for row i by the fit without row i, for all i [..., M, P].

        In closed form from the factor, alpha_i / (A^-1)_ii, with the ridge lam of the whole fit:
        where the ridge follows the trace, a fit without a row would have another one. A weighted
        row is left out with its whole weight. Infinite where, to float64 rounding, no other row
        determines the prediction for a row, and the ridge is below that.

        Raises:
            AttributeError: The fit is the primal form of arrays or chunks, and keeps no rows.
        """
        fitted, batch, alpha = self._fitted, self._fitted.batch, self._fitted.alpha
        if alpha is None:
            raise AttributeError(f"KRRFit.loo_residuals: {_GONE}")
        factor = fold(self.info.factor, batch, 2)
        with exact_arithmetic(fitted.problem.f_syn):
            diagonal = _inverse_diagonal(fitted.problem, self.info, factor, batch)
        if fitted.means is not None:
            # The constant too follows the row that is left out: 1 - h less the share of the row.
            lam = fold(self.info.ridge, batch, 0).to(diagonal.dtype)[..., None]
            free = lam * diagonal - fitted.means.share.to(diagonal.dtype)
            rounding = factor.shape[-1] * torch.finfo(diagonal.dtype).eps
            diagonal = torch.where(free > rounding, free / lam, 0)
        diagonal = diagonal[..., None]
        left_out = fold(alpha, batch, 2).to(diagonal.dtype)
        if fitted.root is not None:
            left_out = left_out / fitted.root
        left_out = (left_out / diagonal).masked_fill(diagonal == 0, math.inf)
        if fitted.root is None:
            return unfold(left_out.to(self.alpha.dtype), batch)
        f, y = fitted.rows
        unweighted = y - self.predict(f)
        root = unfold(fitted.root, batch)
        return undo_weights(root, unfold(left_out, batch), unweighted).to(self.alpha.dtype)


@dataclass(frozen=True, eq=False)
class _Fitted:
    """The private part of a `KRRFit`.

    Attributes:
        rows: F_s [..., M, D] and Y_s [..., M, P] as they were given, if there are weights.
        alpha: Dual coefficients in the precision of the computation [..., M, P]. None, and a
            problem without rows, for the primal form of arrays or chunks.
        linear: Weights and intercept likewise.
        problem: The problem as it was computed [N?].
        root: Square roots of the row weights [N?, M, 1], if there are weights.
        means: The means of the rows, if there is an intercept.
        batch: The leading dimensions of the caller.
    """

    rows: tuple[Tensor | np.ndarray, Tensor]
    alpha: Tensor | None
    linear: tuple[Tensor, Tensor]
    problem: Problem
    solver: Solver
    root: Tensor | None
    means: Means | None
    batch: tuple[int, ...]


def _inverse_diagonal(
    problem: Problem, info: SolveInfo, factor: Tensor, batch: tuple[int, ...]
) -> Tensor:
    """Return the diagonal of A^-1 [N?, M], where A = K_ss + lam I."""
    if info.form != "primal":
        eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        return torch.linalg.solve_triangular(factor, eye, upper=False).square().sum(-2)
    # (1 - h_i) / lam with h the diagonal of Phi M^-1 Phi^T; where 1 - h_i is rounding, 0.
    phi = problem.scale**0.5 * problem.f_syn
    if problem.has_bias:
        constant = problem.bias**0.5 * phi.new_ones((*phi.shape[:-1], 1))
        phi = torch.cat((phi, constant), -1)
    half = torch.linalg.solve_triangular(factor, phi.to(factor.dtype).mT, upper=False)
    share = 1 - half.square().sum(-2)
    rounding = factor.shape[-1] * torch.finfo(factor.dtype).eps
    lam = fold(info.ridge, batch, 0).to(factor.dtype)[..., None]
    return torch.where(share > rounding, share / lam, 0)


def predict_linear(
    op: str, f: Tensor, weights: Tensor, intercept: Tensor, solver: Solver
) -> Tensor:
    """Compute F W + intercept [..., B, P], differentiably, in the dtype of f.

    Args:
        op: The name in errors.
        f: Features [..., B, D], in any precision.
        weights: [..., D, P], in the precision of the computation.
        intercept: [..., P].
        solver: Solver of the fit: precision="fast" rounds f as the fit did, and check="raise"
            raises for a result that is not finite.
    """
    d = weights.shape[-2]
    if f.shape[-1] != d:
        raise ValueError(f"{op}: f must be [..., B, {d}], got shape {tuple(f.shape)}")
    batch = batch_of(op, f=(f, 2), weights=(weights, 2))
    rows = fold(cast(f, weights.dtype), batch, 2)
    if solver.precision == "fast":
        rows, _ = round_features(rows, None)
    prediction = product(rows, fold(weights, batch, 2)) + fold(intercept[..., None, :], batch, 2)
    if solver.check == "raise":
        finite(op, prediction, f=f, weights=weights)
    return restore(prediction, batch, result_dtype(f))


@torch.no_grad()
def krr_fit(
    f_syn: Tensor | Iterable[Any],
    y_syn: Tensor | np.ndarray | None = None,
    *,
    ridge: float | Tensor = 1e-6,
    ridge_of: RidgeOf = "trace",
    scale: float = 1.0,
    bias: float = 0.0,
    intercept: bool = False,
    weights: Tensor | np.ndarray | None = None,
    solver: Solver = DEFAULT,
) -> KRRFit:
    """Fit kernel ridge regression and keep the factor. No gradients are recorded.

    Rows that do not fit in memory can be NumPy arrays, as `np.memmap` and `np.load(mmap_mode="r")`
    make them, or come in chunks. Nothing of their size M x D is made: in memory are a Gram and
    blocks of rows or columns. Where M > D that is the D x D Gram in float64, and the fit has no
    `alpha` and no `loo_residuals`. Chunks are kept until there are more rows than columns.

    Args:
        f_syn: Features [..., M, D], float32, float64, or half precision (computed in float32).
            Leading dimensions are a batch of problems; they broadcast. Or an array [M, D], which
            gives tensors on the CPU. Or an iterable of chunks (F, Y) or (F, Y, weights), of tensors
            or arrays [m, D], [m, P], [m], which is read once; rows without weights have weight 1.
        y_syn: Targets [..., M, P], for an array an array; None for chunks.
        ridge: Positive number, or a tensor [...].
        ridge_of: What the ridge multiplies to give lam: the "trace" of K_ss, its "mean_diagonal",
            or 1 ("absolute").
        scale: Positive factor of every inner product.
        bias: Non-negative constant that is added to every kernel value.
        intercept: Fit a constant for each target, which the ridge does not penalise: features and
            targets are centred, the trace too is that of the centred Gram, and bias must be 0.
        weights: Weights of the rows of F_s [..., M], as in `krrst_fast.krr_mse`; None for chunks.
        solver: How the system is solved; the backend "reference" is refused, for arrays and chunks
            also precision="fast", and for chunks the forms "k" and "w".

    Raises:
        The errors of `krrst_fast.krr_mse`.
    """
    op = "krr_fit"
    if not isinstance(f_syn, Tensor):
        from krrst_fast.ops.stream import fit_stream  # which needs what is defined above

        kernel: dict[str, Any] = {"ridge": ridge, "ridge_of": ridge_of, "scale": scale}
        kernel |= {"bias": bias, "intercept": intercept, "weights": weights}
        return fit_stream(op, f_syn, y_syn, **kernel, solver=solver)
    y_syn, weights = typing.cast(Tensor, y_syn), typing.cast(Tensor | None, weights)
    check_not_mapped(op, f_syn, y_syn)
    problem, batch, dtype = prepare(
        op, solver, (f_syn, y_syn), ridge, ridge_of, True, scale, bias, weights
    )
    check_intercept(op, intercept, bias)
    (*_, m, d), (*_, p) = problem.f_syn.shape, problem.y_syn.shape
    if m == 0:
        raise ValueError(f"{op}: f_syn must have at least one row, got {tuple(f_syn.shape)}")
    if solver.backend == "reference":
        raise ValueError(f"{op}: backend 'reference' keeps no fit")
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
    rounded = restore(alpha, batch, dtype)
    if solver.check == "raise":
        finite(op, rounded, f_syn=problem.f_syn, y_syn=problem.y_syn)
    lam, retries, pivot = (unfold(x, batch) for x in info)
    linear = unfold(coefficients, batch), unfold(constants, batch)
    # `loo_residuals` reads these later, when the caller may have changed what was given.
    kept = problem._replace(
        f_syn=_kept(problem.f_syn, form == "primal" and root is None),
        y_syn=problem.y_syn.detach(),
    )
    rows = _kept(f_syn, root is not None), _kept(y_syn, root is not None)
    return KRRFit(
        intercept=restore(constants, batch, dtype),
        info=SolveInfo(form, backend.NAME, lam, retries, pivot, unfold(factor, batch)),
        _alpha=rounded,
        _weights=restore(coefficients, batch, dtype),
        _fitted=_Fitted(rows, unfold(alpha, batch), linear, kept, solver, root, means, batch),
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
