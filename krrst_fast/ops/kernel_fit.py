"""Fits with a non-linear kernel: they predict through the rows of the fit."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from krrst_fast.backends import choose
from krrst_fast.ops.info import SolveInfo
from krrst_fast.ops.kernel import Kernel, Rows, gamma_of, mean_of, rows_of
from krrst_fast.ops.kernel_gram import kernel_product
from krrst_fast.ops.krr_of_kernel import check_form, fit_kernel, rounded, where_finite
from krrst_fast.ops.problem import (
    Problem,
    batch_of,
    cast,
    finite,
    fold,
    restore,
    result_dtype,
)
from krrst_fast.ops.solver import Solver
from krrst_fast.reference import round_features

# Numbers of the rows of which copies, less the mean and perhaps in float64, are made at once.
_AT_ONCE = 2**22


@dataclass(frozen=True, eq=False)
class KernelRows:
    """The rows of a fit and their dual coefficients.

    Attributes:
        kernel, solver: As of the fit.
        rows: The rows [N?, M, D].
        alpha: [N?, M, P].
        mean: What was subtracted from the rows [N?, 1, D], if anything.
        gamma: [N?].
        scale, bias: The Gram is scale k + bias.
        batch: The leading dimensions of the fit.
    """

    kernel: Kernel
    solver: Solver
    rows: Rows
    alpha: Tensor
    mean: Tensor | None
    gamma: Tensor
    scale: float | Tensor
    bias: float | Tensor
    batch: tuple[int, ...]

    def predict(self, op: str, f: Tensor) -> Tensor:
        """Predict [..., B, P] at features f [..., B, D], in blocks of rows."""
        d = self.rows.x.shape[-1]
        if f.shape[-1] != d:
            raise ValueError(f"{op}: f must be [..., B, {d}], got shape {tuple(f.shape)}")
        like = self.alpha.new_empty((*self.batch, 1, 1))
        batch = batch_of(op, f=(f, 2), fit=(like, 2))
        new = fold(cast(f, self.alpha.dtype), batch, 2)
        if self.solver.check == "raise":  # the kernel of an infinite distance is 0
            finite(op, f, f=f)
        if self.solver.precision == "fast":
            new, _ = round_features(new, None)
        rows = Rows(*(self._folded(x, batch, 2) for x in self.rows))
        alpha, gamma = self._folded(self.alpha, batch, 2), self._folded(self.gamma, batch, 0)
        mean = None if self.mean is None else self._folded(self.mean, batch, 2)
        how = alpha, gamma, self.kernel, choose(self.solver.backend, alpha, op)
        recorded = torch.is_grad_enabled() and f.requires_grad
        high = new.shape[-2] if recorded else _AT_ONCE // max(d * math.prod(batch), 1)
        parts = [
            kernel_product(rows_of(self.kernel, part, mean), rows, *how)
            for part in new.split(max(high, 1), -2)
        ]
        prediction = self.scale * (parts[0] if len(parts) == 1 else torch.cat(parts, -2))
        prediction = prediction + self.bias * alpha.sum(-2, keepdim=True)
        prediction = where_finite(prediction, new, self.solver)
        prediction = restore(prediction, batch, result_dtype(f))
        if self.solver.check == "raise":
            finite(op, prediction, f=f, alpha=alpha)
        return prediction

    def _folded(self, x: Tensor, batch: tuple[int, ...], core: int) -> Tensor:
        """Return a tensor of the fit, [N?] and core dimensions, for a prediction's batch."""
        if batch == self.batch:
            return x
        return fold(x.unflatten(0, self.batch) if len(self.batch) > 1 else x, batch, core)


def fit_rows(
    op: str,
    problem: Problem,
    kernel: Kernel,
    weights: Tensor | None,
    solver: Solver,
    batch: tuple[int, ...],
) -> tuple[KernelRows, SolveInfo]:
    """Fit a problem without f_real; row weights [..., M] are still to be applied.

    Raises:
        ValueError: The solver has a form that only linear kernels have.
        NonFiniteError: The features hold NaN or infinity.
        NotPositiveDefiniteError: The Cholesky factorisation fails with the largest ridge.
    """
    check_form(op, kernel, solver)
    problem = rounded(problem, solver)
    f = problem.f_syn
    finite(op, f, f_syn=f)
    root = None if weights is None else fold(weights.to(f.dtype), batch, 1).sqrt()[..., None]
    mean, gamma = mean_of(kernel, f), gamma_of(kernel, f, batch).detach()
    rows = rows_of(kernel, f, mean)
    alpha, info = fit_kernel(op, problem, rows, gamma, kernel, root, solver, batch)
    return kept_rows(
        kernel, solver, rows, alpha, mean, gamma, problem.scale, problem.bias, batch
    ), info


def kept_rows(
    kernel: Kernel,
    solver: Solver,
    rows: Rows,
    alpha: Tensor,
    mean: Tensor | None,
    gamma: Tensor,
    scale: float | Tensor,
    bias: float | Tensor,
    batch: tuple[int, ...] = (),
) -> KernelRows:
    """Return what predicts, with copies of rows that the caller may change."""
    if isinstance(kernel.gamma, Tensor):
        kernel = replace(kernel, gamma=kernel.gamma.detach())
    given = rows.given.clone()
    x = given if mean is None else rows.x.detach()
    kept = Rows(x, given)
    return KernelRows(kernel, solver, kept, alpha, mean, gamma.clone(), scale, bias, batch)
