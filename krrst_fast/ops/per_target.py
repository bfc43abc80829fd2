"""Kernel ridge regression with a ridge of its own for each target."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from krrst_fast.ops.fit import krr_fit, predict_linear
from krrst_fast.ops.problem import check_matrices
from krrst_fast.ops.solver import DEFAULT, RidgeOf, Solver


@dataclass(frozen=True, eq=False)
class TargetFit:
    """Fits of P targets on the same rows, each with its ridge.

    Attributes:
        alpha: Dual coefficients [M, P]; None where the rows are not kept.
        weights: Primal coefficients [D, P].
        intercept: [P].
        ridge: The numbers added to the diagonal [P].
    """

    alpha: Tensor | None
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
        fit = krr_fit(f, y[:, columns], ridge=value, **kernel, **how)
        alpha[:, columns], primal[:, columns] = fit.alpha, fit.weights
        constants[columns], lam[columns] = fit.intercept, fit.info.ridge.to(lam.dtype)
    return TargetFit(alpha, primal, constants, lam, solver)
