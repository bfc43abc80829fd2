"""Fits with a kernel that is no linear one: they predict through the rows of the fit."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from krrst_fast.backends import choose
from krrst_fast.ops.info import SolveInfo
from krrst_fast.ops.kernel import Kernel, mean_row, operands, root_gamma
from krrst_fast.ops.kernel_gram import kernel_product
from krrst_fast.ops.krr_of_kernel import check_form, fit_kernel, rounded
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

# Numbers of the rows that are converted to float64 at once.
_AT_ONCE = 2**22


@dataclass(frozen=True, eq=False)
class KernelRows:
    """The rows of a fit and their dual coefficients.

    Attributes:
        kernel, solver: As of the fit.
        x: Rows as `kernel.operands` returns them [N?, M, D].
        alpha: [N?, M, P].
        mean, root: What was subtracted from the rows [N?, 1, D], and what they were multiplied by.
        scale, bias: The Gram is scale k + bias.
        batch: The leading dimensions of the fit.
    """

    kernel: Kernel
    solver: Solver
    x: Tensor
    alpha: Tensor
    mean: Tensor | None
    root: float | Tensor
    scale: float | Tensor
    bias: float | Tensor
    batch: tuple[int, ...]

    def predict(self, op: str, f: Tensor) -> Tensor:
        """Predict [..., B, P] at features f [..., B, D], in blocks of rows."""
        d = self.x.shape[-1]
        if f.shape[-1] != d:
            raise ValueError(f"{op}: f must be [..., B, {d}], got shape {tuple(f.shape)}")
        like = self.alpha.new_empty((*self.batch, 1, 1))
        batch = batch_of(op, f=(f, 2), fit=(like, 2))
        rows = fold(cast(f, self.alpha.dtype), batch, 2)
        x, alpha = (self._folded(y, batch) for y in (self.x, self.alpha))
        recorded = torch.is_grad_enabled() and f.requires_grad
        high = rows.shape[-2] if recorded else _AT_ONCE // max(d * math.prod(batch), 1)
        backend = choose(self.solver.backend, alpha, op)
        parts = [
            kernel_product(self._operand(part, batch), x, alpha, self.kernel, backend)
            for part in rows.split(max(high, 1), -2)
        ]
        prediction = self.scale * (parts[0] if len(parts) == 1 else torch.cat(parts, -2))
        prediction = prediction + self.bias * alpha.sum(-2, keepdim=True)
        if self.solver.check == "raise":
            finite(op, f, f=f)
            finite(op, prediction, f=f, alpha=alpha)
        return restore(prediction, batch, result_dtype(f))

    def _operand(self, rows: Tensor, batch: tuple[int, ...]) -> Tensor:
        """Return rows [N?, B, D] as `kernel.operands` does."""
        if self.solver.precision == "fast":
            rows, _ = round_features(rows, None)
        x = rows.double()
        if self.mean is not None:
            x = x - self._folded(self.mean, batch)
        root = self.root
        return x * (self._folded(root, batch) if isinstance(root, Tensor) else root)

    def _folded(self, x: Tensor, batch: tuple[int, ...]) -> Tensor:
        """Return a tensor [N?, ., .] of the fit for the leading dimensions of a prediction."""
        if batch == self.batch or x.ndim < 3:
            return fold(x, batch, 2) if batch and x.ndim < 3 else x
        return fold(x.unflatten(0, self.batch), batch, 2)


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
    x, _ = operands(kernel, f, None, batch)
    alpha, info = fit_kernel(op, problem, x, kernel, root, solver, batch)
    scaled = kernel.name in ("rbf", "polynomial")
    kept = KernelRows(
        kernel=kernel,
        solver=solver,
        x=x.detach().clone() if x.data_ptr() == f.data_ptr() else x.detach(),
        alpha=alpha,
        mean=mean_row(f.double()) if kernel.name == "rbf" else None,
        root=root_gamma(kernel, f, batch) if scaled else 1.0,
        scale=problem.scale,
        bias=problem.bias,
        batch=batch,
    )
    return kept, info
