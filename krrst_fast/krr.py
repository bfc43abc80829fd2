"""Kernel ridge regression as a value: fit once, predict many times."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Unpack

from krrst_fast.backends import Backend, choose
from krrst_fast.errors import NonFiniteError
from krrst_fast.exact import exact_arithmetic
from krrst_fast.ops import checks
from krrst_fast.ops.forms import Kernel, Solve, features, fit_dual, fit_primal
from krrst_fast.ops.info import SolveInfo
from krrst_fast.ops.options import FitOptions, read, takes
from krrst_fast.ops.prepare import Problem, cast, fold, prepare, result_dtype, rounded, unfold
from krrst_fast.ops.product import product
from krrst_fast.planner import cheapest
from krrst_fast.reference import round_features


@dataclass(frozen=True)
class KRRFit:
    """A fitted kernel ridge regression, or several side by side [...].

    Attributes:
        alpha: dual coefficients [..., M, P]: (K_ss + lam I)^-1 Y_s. In primal form (M > D) they
            come from the residual, (Y_s - F_s W) / lam, and are as exact as that difference is.
        weights: scale F_s^T alpha [..., D, P].
        intercept: bias * sum(alpha) [..., P].
        info: form, backend, ridge, retries, condition, and the Cholesky factor of K_ss + lam I
            [..., M, M], or in primal form of the ridged D x D system (bordered by the constant
            feature if there is a bias). With row weights, of the system of the weighted rows.
    """

    alpha: Tensor
    weights: Tensor
    intercept: Tensor
    info: SolveInfo
    _fitted: "_Fitted"

    def predict(self, f: Tensor) -> Tensor:
        """Predictions [..., B, P] at features f [..., B, D].

        Differentiable once in f, not in what was fitted: for gradients to the fitted features and
        targets use `krr_predict`.

        Raises:
            ValueError, TypeError: f does not match the fit.
            NonFiniteError: f, on the CPU, holds NaN or infinity.
        """
        op, fitted = "KRRFit.predict", self._fitted
        checks.matrices(op, weights=self.weights, f=f)
        rounds, raises = fitted.rounds, fitted.kernel.raises
        return predict_linear(op, f, *fitted.linear, rounds=rounds, raises=raises)

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
        row is left out with its whole weight. Infinite where no other row says anything of a row,
        to float64 rounding, and the ridge is below that.
        """
        left_out, there = self._fitted.loo_residuals(self.alpha, self.info), self._fitted.zero
        if there is None:
            return left_out
        # A row of weight 0 is left out already.
        f, y = self._fitted.rows
        return torch.where(there, y - self.predict(f), left_out)


@dataclass(frozen=True)
class _Fitted:
    """What `KRRFit` keeps for itself: what was fitted, its kernel, and who computes.

    Attributes:
        rows: F_s [..., M, D] and Y_s [..., M, P] as they were given.
        linear: weights and intercept in the precision of the computation.
        problem: the same as it was computed [N?].
        rounds: whether features are rounded as those of the fit were.
    """

    rows: tuple[Tensor, Tensor]
    linear: tuple[Tensor, Tensor]
    problem: Problem
    kernel: Kernel
    backend: Backend
    rounds: bool

    @property
    def zero(self) -> Tensor | None:
        """Which rows have weight 0 [..., M, 1], if there are weights."""
        root = self.problem.root
        return None if root is None else unfold(root == 0, self.problem.batch)

    @torch.no_grad()
    def loo_residuals(self, alpha: Tensor, info: SolveInfo) -> Tensor:
        f_syn, root, batch = self.problem.f_syn, self.problem.root, self.problem.batch
        factor = fold(info.factor, batch, 2)
        with exact_arithmetic(f_syn):
            own = _own(self.kernel, f_syn, info, factor, batch)[..., None]  # [M, 1]
        # With weights w_i: alpha is that of the rows as given, (alpha_i / root_i) / own_i / root_i.
        own = own if root is None else root.square() * own
        left_out = fold(alpha, batch, 2).to(own.dtype) / own
        return unfold(left_out.masked_fill(own == 0, math.inf).to(alpha.dtype), batch)


def _own(
    kernel: Kernel, f_syn: Tensor, info: SolveInfo, factor: Tensor, batch: tuple[int, ...]
) -> Tensor:
    """Diagonal of A^-1 [N?, M]."""
    if info.form != "primal":
        eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        return torch.linalg.solve_triangular(factor, eye, upper=False).square().sum(-2)
    # (1 - h_i) / lam with h the diagonal of Phi M^-1 Phi^T; where 1 - h_i is rounding, 0.
    phi = _phi(kernel, f_syn).to(factor.dtype)  # [M, D (+ 1)]
    half = torch.linalg.solve_triangular(factor, phi.mT, upper=False)
    own = 1 - half.square().sum(-2)
    rounding = factor.shape[-1] * torch.finfo(factor.dtype).eps
    lam = fold(info.ridge, batch, 0).to(factor.dtype)[..., None]
    return torch.where(own > rounding, own / lam, 0)


def predict_linear(
    op: str, f: Tensor, weights: Tensor, intercept: Tensor, *, rounds: bool, raises: bool
) -> Tensor:
    """F W + intercept [..., B, P] for f [..., B, D], differentiable once, in the dtype of f.

    Args:
        op: the name in errors.
        f: features, in whatever precision.
        weights: [..., D, P], in the precision of the computation.
        intercept: [..., P].
        rounds: round the features as precision="fast" did when the weights were fitted.
        raises: trace a result that is not finite to its input.
    """
    d = weights.shape[-2]
    if f.shape[-1] != d:
        raise ValueError(f"{op}: f must be [..., B, {d}], got shape {tuple(f.shape)}")
    batch = checks.batch_of(op, f=(f, 2), weights=(weights, 2))
    rows = fold(cast(f, weights.dtype), batch, 2)
    if rounds:
        rows, _ = round_features(rows, None)
    prediction = product(rows, fold(weights, batch, 2)) + fold(intercept[..., None, :], batch, 2)
    if raises:
        checks.finite(op, prediction, f=f, weights=weights)
    return cast(unfold(prediction, batch), result_dtype(f))


def _phi(kernel: Kernel, f: Tensor) -> Tensor:
    """[sqrt(scale) F, sqrt(bias)] [N?, M, D (+ 1)]."""
    f = kernel.scale**0.5 * f
    if not kernel.bias:
        return f
    return torch.cat((f, f.new_full((*f.shape[:-1], 1), kernel.bias**0.5)), -1)


@takes(FitOptions)
@torch.no_grad()
def krr_fit(f_syn: Tensor, y_syn: Tensor, **options: Unpack[FitOptions]) -> KRRFit:
    """Fit kernel ridge regression to features [..., M, D] and targets [..., M, P], keep the factor.

    Options (`krrst_fast.ops.options.FitOptions`) and errors as in `krrst_fast.krr_mse`; "reference"
    is no backend of a fit. No gradients are recorded.
    """
    op = "krr_fit"
    chosen = read(op, options, FitOptions)
    checks.not_mapped(op, *(x for x in (f_syn, y_syn) if isinstance(x, Tensor)))
    problem = prepare(op, chosen, f_syn, y_syn)
    if chosen.precision == "fast":
        problem = rounded(problem)
    (*_, m, d), (*_, p) = problem.f_syn.shape, problem.y_syn.shape
    if m == 0:
        raise ValueError(f"{op}: f_syn must have at least one row, got {tuple(f_syn.shape)}")
    ops = choose(chosen.backend, problem.f_syn, op)
    form = cheapest(m, 0, d, p) if chosen.form == "auto" or d == 0 else chosen.form
    kernel = Kernel(
        *(problem.scale, problem.bias, problem.ridge, problem.ridge_of),
        *(chosen.retries, chosen.raises, chosen.refine),
    )
    fit = _primal if form == "primal" else _dual
    with exact_arithmetic(problem.f_syn):
        try:
            solve, alpha, weights, intercept = fit(ops, kernel, problem.f_syn, problem.y_syn)
        except NonFiniteError:
            checks.blame(op, f_syn=problem.f_syn)
    if problem.root is not None:
        alpha = alpha * problem.root
        if chosen.bias:  # it was a column of its own
            constant = (chosen.bias / problem.scale) ** 0.5
            weights, intercept = weights[..., :-1, :], constant * weights[..., -1, :]
    if chosen.raises:
        checks.finite(op, alpha, f_syn=problem.f_syn, y_syn=problem.y_syn)
    batch = problem.batch
    factor, lam, retries, pivot = (unfold(x, batch) for x in solve[:4] if x is not None)
    linear = unfold(weights, batch), unfold(intercept, batch)
    # What `loo_residuals` looks at later must not change with what was given.
    weighted = problem.root is not None
    rows = _kept(f_syn, weighted), _kept(y_syn, weighted)
    problem = problem._replace(
        f_syn=_kept(problem.f_syn, form == "primal" and not weighted),
        y_syn=_kept(problem.y_syn, False),
    )
    return KRRFit(
        alpha=problem.restore(alpha),
        weights=problem.restore(weights),
        intercept=problem.restore(intercept),
        info=SolveInfo(form, ops.name, lam, retries, pivot, factor),
        _fitted=_Fitted(rows, linear, problem, kernel, ops, chosen.precision == "fast"),
    )


def _kept(x: Tensor, needed: bool) -> Tensor:
    """x as it is now, without its graph; a copy where it is looked at again."""
    return x.detach().clone() if needed else x.detach()


def _dual(
    ops: Backend, kernel: Kernel, f_syn: Tensor, y_syn: Tensor
) -> tuple[Solve, Tensor, Tensor, Tensor]:
    solve = fit_dual(ops, kernel, f_syn, y_syn)
    alpha = solve.coefficients
    weights = kernel.scale * ops.matmul(f_syn.mT, alpha)
    return solve, alpha, weights, kernel.bias * alpha.sum(-2)


def _primal(
    ops: Backend, kernel: Kernel, f_syn: Tensor, y_syn: Tensor
) -> tuple[Solve, Tensor, Tensor, Tensor]:
    solve = fit_primal(ops, kernel, f_syn, y_syn)
    d = f_syn.shape[-1]
    weights = kernel.scale**0.5 * solve.coefficients[..., :d, :]
    intercept = torch.zeros_like(solve.coefficients[..., 0, :])
    if kernel.bias:
        intercept = kernel.bias**0.5 * solve.coefficients[..., d, :]
    error = y_syn - features(ops, kernel, f_syn, solve.coefficients)
    return solve, error / solve.lam[..., None, None], weights, intercept
