"""The result of `krr_fit`."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from krrst_fast.ops.arrays import check_array, predict_blocks
from krrst_fast.ops.autograd import product
from krrst_fast.ops.centring import Means
from krrst_fast.ops.info import SolveInfo
from krrst_fast.ops.kernel import unit_rows
from krrst_fast.ops.kernel_fit import KernelRows
from krrst_fast.ops.problem import (
    Problem,
    batch_of,
    cast,
    check_matrices,
    finite,
    fold,
    restore,
    result_dtype,
    unfold,
)
from krrst_fast.ops.solver import Solver
from krrst_fast.ops.weights import undo_weights
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
    _fitted: "Fitted"

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
        """Primal coefficients scale F_s^T alpha [..., D, P].

        Raises:
            AttributeError: The kernel is non-linear.
        """
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
            return predict_blocks(op, "f", f, self.predict, self.intercept)
        if fitted.of_kernel is not None:
            check_matrices(op, ("alpha", "f"), (self.alpha, f))
            return fitted.of_kernel.predict(op, f)
        check_matrices(op, ("weights", "f"), (self.weights, f))
        if fitted.of_unit_length:
            f = unit_rows(cast(f, result_dtype(f)))
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
class Fitted:
    """What a `KRRFit` computes with.

    Attributes:
        rows: F_s [..., M, D] and Y_s [..., M, P] as they were given, if there are weights.
        alpha: Dual coefficients in the precision of the computation [..., M, P]. None, and a
            problem without rows, for the primal form of arrays or chunks.
        linear: Weights and intercept likewise.
        problem: The problem as it was computed [N?].
        root: Square roots of the row weights [N?, M, 1], if there are weights.
        means: The means of the rows, if there is an intercept.
        batch: The leading dimensions of the caller.
        of_unit_length: Whether the rows were divided by their length.
        of_kernel: The rows of the fit, if the kernel is non-linear.
    """

    rows: tuple[Tensor | np.ndarray, Tensor]
    alpha: Tensor | None
    linear: tuple[Tensor, Tensor]
    problem: Problem
    solver: Solver
    root: Tensor | None
    means: Means | None
    batch: tuple[int, ...]
    of_unit_length: bool = False
    of_kernel: KernelRows | None = None


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
    prediction = restore(prediction, batch, result_dtype(f))
    if solver.check == "raise":
        finite(op, prediction, f=f, weights=weights)
    return prediction
