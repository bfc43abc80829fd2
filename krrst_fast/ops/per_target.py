"""Kernel ridge regression with a ridge of its own for each target."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from krrst_fast.ops.fit import KRRFit, krr_fit, predict_linear
from krrst_fast.ops.path import least_squares
from krrst_fast.ops.path_fit import PathFit
from krrst_fast.ops.problem import check_matrices
from krrst_fast.ops.ridge_solve import ridge_solve
from krrst_fast.ops.solver import DEFAULT, RidgeOf, Solver


@dataclass(frozen=True, eq=False)
class TargetFit:
    """Fits of P targets on the same rows, each with its ridge.

    Attributes:
        alpha: Dual coefficients [M, P].
        weights: Primal coefficients [D, P].
        intercept: [P].
        ridge: The numbers added to the diagonal [P].
    """

    alpha: Tensor
    weights: Tensor
    intercept: Tensor
    ridge: Tensor
    _solver: Solver

    def predict(self, f: Tensor) -> Tensor:
        """Predict [..., B, P] at features f [..., B, D], differentiable in f.

        Raises:
            ValueError: The shape or the device of f does not match the fit.
            TypeError: F has another dtype.
            NonFiniteError: F, on the CPU, holds NaN or infinity.
        """
        op = "TargetFit.predict"
        check_matrices(op, ("weights", "f"), (self.weights, f))
        return predict_linear(op, f, self.weights, self.intercept, self._solver)


@torch.no_grad()
def fit_each_target(
    f: Tensor,
    y: Tensor,
    ridges: Tensor,
    *,
    ridge_of: RidgeOf,
    scale: float,
    bias: float,
    intercept: bool = False,
    weights: Tensor | None = None,
    solver: Solver = DEFAULT,
) -> TargetFit:
    """Fit target p of y [M, P] on f [M, D] with ridges[p] [P], for all p.

    Targets of one ridge share a factor: the cost is that of one `krr_fit` for each different ridge.
    A ridge of 0 is least squares of minimum norm.

    Raises:
        The errors of `krrst_fast.krr_fit`.
    """
    values, group = ridges.unique(return_inverse=True)
    kernel: dict[str, Any] = {"ridge_of": ridge_of, "scale": scale, "bias": bias}
    how: dict[str, Any] = {"intercept": intercept, "weights": weights, "solver": solver}
    alpha, primal = torch.empty_like(y), y.new_empty(f.shape[-1], y.shape[-1])
    constants, lam = y.new_empty(y.shape[-1]), y.new_empty(y.shape[-1])
    for i, value in enumerate(values.tolist()):
        columns = (group == i).nonzero()[:, 0]
        fit: KRRFit | PathFit
        if value == 0:
            plain: dict[str, Any] = {
                "scale": scale,
                "bias": bias,
                "intercept": intercept,
                "weights": weights,
            }
            fit, added = least_squares("KernelRidge.fit", f, y[:, columns], **plain), 0.0
        else:
            fit = krr_fit(f, y[:, columns], ridge=value, **kernel, **how)
            added = fit.info.ridge.item()
        alpha[:, columns], primal[:, columns] = fit.alpha, fit.weights
        constants[columns], lam[columns] = fit.intercept, added
    return TargetFit(alpha, primal, constants, lam, solver)


def solve_each_target(gram: Tensor, y: Tensor, lam: Tensor) -> Tensor:
    """Solve (gram + lam[p] I) x[:, p] = y[:, p] in float64; targets of one lam share a factor.

    Of a lam of 0 the solution of minimum norm. gram [M, M], y [M, P], lam [P], all float64.

    Raises:
        NotPositiveDefiniteError: A ridge is too small for the Gram.
    """
    out, least = torch.empty_like(y), lam == 0
    if least.any():
        inverse = torch.linalg.pinv(gram, hermitian=True, rtol=len(gram) * 2.0**-52)
        out[:, least] = inverse @ y[:, least]
    for value in lam[~least].unique():
        columns = lam == value
        out[:, columns] = ridge_solve(gram, y[:, columns], ridge=value, ridge_of="absolute")
    return out
