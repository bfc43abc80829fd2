"""Kernel ridge regression with a ridge of its own for each target."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from krrst_fast.backends import choose
from krrst_fast.errors import NonFiniteError
from krrst_fast.ops.closed_forms import ridge_base
from krrst_fast.ops.fit_tensors import fit_tensors
from krrst_fast.ops.fitted import KRRFit, predict_linear
from krrst_fast.ops.path import least_squares
from krrst_fast.ops.path_fit import PathFit
from krrst_fast.ops.problem import check_matrices, result_dtype
from krrst_fast.ops.ridge_solve import solve_gram
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
    A ridge of 0 is least squares of minimum norm.

    Raises:
        The errors of `krrst_fast.krr_fit`.
    """
    values, group = ridges.unique(return_inverse=True)
    kernel: dict[str, Any] = {"ridge_of": ridge_of, "scale": scale, "bias": bias}
    how: dict[str, Any] = {"intercept": intercept, "weights": weights, "solver": solver}
    p, like = y.shape[-1], y.new_empty(0, dtype=result_dtype(y))
    alpha, primal = like.new_empty(y.shape), like.new_empty(f.shape[-1], p)
    constants, lam = like.new_empty(p), like.new_empty(p)
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
            op = "KernelRidge.fit"
            fit = fit_tensors(op, f, y[:, columns], ridge=value, **kernel, **how)
            added = fit.info.ridge.item()
        alpha[:, columns], primal[:, columns] = fit.alpha, fit.weights
        constants[columns], lam[columns] = fit.intercept, added
    return TargetFit(alpha, primal, constants, lam, solver)


def solve_each_target(
    op: str, gram: Tensor, y: Tensor, lam: Tensor, least: Tensor, solver: Solver
) -> tuple[Tensor, Tensor]:
    """Solve (gram + lam[p] I) x[:, p] = y[:, p] in float64; targets of one lam share a factor.

    Args:
        op: The name in errors.
        gram, y: [M, M], [M, P], float64.
        lam: What is added to the diagonal [P].
        least: Where least squares of minimum norm are asked for instead [P].
        solver: Its retries and checks.

    Returns:
        x [M, P], and what was added to the diagonal [P].

    Raises:
        NotPositiveDefiniteError: A ridge is too small for the Gram.
        NonFiniteError: The Gram, and so a ridge, is not finite.
    """
    out, added = torch.empty_like(y), torch.where(least, 0, lam)
    if not (gram.isfinite().all() and added.isfinite().all()):
        raise NonFiniteError(
            f"{op}: the Gram holds NaN or infinity; bring the features nearer to 1"
        )
    if least.any():
        inverse = torch.linalg.pinv(gram, hermitian=True, rtol=len(gram) * 2.0**-52)
        out[:, least] = inverse @ y[:, least]
    how = Solver(max_retries=solver.max_retries, check=solver.check)
    backend = choose("auto", gram, op)
    for value in added[~least].unique():
        columns = (added == value) & ~least
        names = "X", "y"
        found = solve_gram(op, gram, y[:, columns], value, backend, how, names)
        out[:, columns], added[columns] = found[0], found[2]
    return out, added


def ridges_added(
    ridge: float | Tensor, ridge_of: str, trace: Tensor, rows: Tensor | float, targets: int
) -> tuple[Tensor, Tensor]:
    """Return what ridges [] or [P] add to the diagonal of a Gram [P], and where they are 0 [P].

    rows: The number of rows, or the sum of their weights.
    """
    given = torch.as_tensor(ridge, dtype=torch.float64, device=trace.device).expand(targets)
    return given * ridge_base(ridge_of, trace, rows), given == 0
