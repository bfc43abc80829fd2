"""Kernel ridge regression as a value: fit once, predict many times."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from krrst_fast.backends import Backend, BackendName, choose
from krrst_fast.ops import checks
from krrst_fast.ops.forms import Kernel, Solve, fit_dual, fit_primal
from krrst_fast.ops.krr import RidgeOf, SolveInfo
from krrst_fast.planner import Form, cheapest


@dataclass(frozen=True)
class KRRFit:
    """A fitted kernel ridge regression.

    Attributes:
        alpha: dual coefficients [M, P]: (K_ss + lam I)^-1 Y_s. In primal form (M > D) they come
            from the residual, (Y_s - F_s W) / lam, and are as exact as that difference is.
        weights: scale F_s^T alpha [D, P].
        intercept: bias * sum(alpha) [P].
        info: form, backend, ridge, retries, condition, and the Cholesky factor of K_ss + lam I
            [M, M], or in primal form of the ridged D x D system (bordered by the constant feature
            if there is a bias).
    """

    alpha: Tensor
    weights: Tensor
    intercept: Tensor
    info: SolveInfo

    def predict(self, f: Tensor) -> Tensor:
        """Predictions [B, P] at features f [B, D]; differentiable in f, not in what was fitted.

        For gradients to the fitted features and targets use `krr_predict`.

        Raises:
            ValueError, TypeError: f does not match the fit.
            NonFiniteError: f, on the CPU, holds NaN or infinity.
        """
        checks.matrices("KRRFit.predict", weights=self.weights, f=f)
        if f.shape[1] != len(self.weights):
            raise ValueError(
                f"KRRFit.predict: f must be [B, {len(self.weights)}], got shape {tuple(f.shape)}"
            )
        with checks.no_autocast(f):
            prediction = torch.addmm(self.intercept, f, self.weights)
        checks.finite("KRRFit.predict", prediction, f=f)
        return prediction


@torch.no_grad()
def krr_fit(
    f_syn: Tensor,
    y_syn: Tensor,
    *,
    ridge: float | Tensor = 1e-6,
    ridge_of: RidgeOf = "trace",
    bias: float = 0.0,
    scale: float = 1.0,
    form: Literal["auto"] | Form = "auto",
    backend: BackendName = "auto",
    max_retries: int = 3,
) -> KRRFit:
    """Fit kernel ridge regression to features [M, D] and targets [M, P], and keep the factor.

    Arguments and errors as in `krrst_fast.krr_mse`; "reference" is no backend of a fit. No
    gradients are recorded.
    """
    op = "krr_fit"
    checks.matrices(op, f_syn=f_syn, y_syn=y_syn)
    checks.same_size(op, "f_syn", f_syn, "y_syn", y_syn, 0)
    checks.kernel(op, scale, bias)
    checks.ridge(op, ridge, ridge_of)
    checks.form(op, form)
    checks.retries(op, max_retries)
    if len(f_syn) == 0:
        raise ValueError(f"{op}: f_syn must have at least one row, got {tuple(f_syn.shape)}")
    ops = choose(backend, f_syn, op)
    if isinstance(ridge, Tensor):
        ridge = ridge.to(f_syn)
    if form == "auto" or f_syn.shape[1] == 0:
        form = cheapest(len(f_syn), 0, f_syn.shape[1], y_syn.shape[1])
    kernel = Kernel(scale, bias, ridge, ridge_of, max_retries)
    fit = _primal if form == "primal" else _dual
    with checks.no_autocast(f_syn):
        solve, alpha, weights, intercept = fit(ops, kernel, f_syn, y_syn)
    checks.finite(op, alpha, f_syn=f_syn, y_syn=y_syn)
    info = SolveInfo(form, ops.name, solve.lam, solve.retries, solve.factor)
    return KRRFit(alpha, weights, intercept, info)


def _dual(
    ops: Backend, kernel: Kernel, f_syn: Tensor, y_syn: Tensor
) -> tuple[Solve, Tensor, Tensor, Tensor]:
    solve = fit_dual(ops, kernel, f_syn, y_syn)
    alpha = solve.coefficients
    weights = kernel.scale * ops.matmul(f_syn.mT, alpha)
    return solve, alpha, weights, kernel.bias * alpha.sum(0)


def _primal(
    ops: Backend, kernel: Kernel, f_syn: Tensor, y_syn: Tensor
) -> tuple[Solve, Tensor, Tensor, Tensor]:
    solve = fit_primal(ops, kernel, f_syn, y_syn)
    d = f_syn.shape[1]
    weights = kernel.scale**0.5 * solve.coefficients[:d]
    intercept = y_syn.new_zeros(y_syn.shape[1])
    if kernel.bias:
        intercept = kernel.bias**0.5 * solve.coefficients[d]
    alpha = (y_syn - torch.addmm(intercept, f_syn, weights)) / solve.lam
    return solve, alpha, weights, intercept
