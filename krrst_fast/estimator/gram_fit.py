"""Fits by the Gram matrix of the rows: one that is given, or that of any kernel.

They solve in float64, for a ridge of each target too, and without one.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from krrst_fast.backends import choose
from krrst_fast.ops.kernel import Kernel, gamma_of, mean_of, rows_of
from krrst_fast.ops.kernel_fit import KernelRows, kept_rows
from krrst_fast.ops.kernel_gram import kernel_gram
from krrst_fast.ops.per_target import solve_each_target
from krrst_fast.ops.problem import finite
from krrst_fast.ops.solver import RidgeOf, Solver
from krrst_fast.reference.kernels import of_products

# Numbers of a Gram of sparse rows that are made at once.
_BLOCK = 2**22


@dataclass(frozen=True, eq=False)
class GramFit:
    """A fit of P targets by the Gram matrix of M rows.

    Attributes:
        alpha: Dual coefficients [M, P].
        intercept: The bias times their sum [P].
        ridge: The numbers added to the diagonal [P].
    """

    alpha: Tensor
    intercept: Tensor
    ridge: Tensor
    _scale: float
    _rows: "KernelRows | _SparseRows | None"

    def predict(self, f: Any) -> Any:
        """Predict [B, P] at features [B, D], dense or in CSR, or with a given Gram from [B, M]."""
        if isinstance(self._rows, KernelRows):
            return self._rows.predict("KernelRidge.predict", f)
        if isinstance(self._rows, _SparseRows):
            return self._rows.predict(f)
        return self._scale * (f @ self.alpha) + self.intercept


@dataclass(frozen=True, eq=False)
class _SparseRows:
    """Rows of a fit in CSR [M, D], their dual coefficients [M, P] and a constant [P]."""

    x: Any
    alpha: np.ndarray
    constant: np.ndarray
    kernel: Kernel

    def predict(self, rows: Any) -> np.ndarray:
        high = max(1, _BLOCK // len(self.alpha))
        firsts = range(0, max(rows.shape[0], 1), high)
        parts = [
            _sparse_kernel(rows[i : i + high], self.x, self.kernel) @ self.alpha for i in firsts
        ]
        return np.concatenate(parts) + self.constant


@torch.no_grad()
def fit_gram(
    op: str,
    x: Any,
    y: Tensor,
    kernel: Kernel | None,
    ridge: float | Tensor,
    *,
    ridge_of: RidgeOf,
    scale: float,
    bias: float,
    weights: Tensor | None,
    solver: Solver,
) -> GramFit:
    """Fit y [M, P] with ridges [] or [P], of which 0 is least squares of minimum norm.

    Args:
        op: The name in errors.
        x: Features [M, D], dense or in CSR, or the Gram [M, M].
        y: Targets.
        kernel: None if x is the Gram, else one that is no linear one.
        ridge, ridge_of, scale, bias: As for `krrst_fast.krr_fit`.
        weights: Weights of the rows [M].
        solver: Its backend computes the kernel.

    Raises:
        ValueError: A Gram is not square.
        NotPositiveDefiniteError: A ridge is too small for these rows.
    """
    if kernel is None and x.shape[0] != x.shape[1]:
        raise ValueError(f"{op}: X must be [M, M] with kernel 'precomputed', got {tuple(x.shape)}")
    gram = _gram(op, x, kernel, solver)
    k = scale * gram + bias
    root = torch.ones_like(k[:, :1]) if weights is None else weights.double().sqrt()[:, None]
    k = root * k * root.mT
    base = {"trace": k.trace(), "mean_diagonal": k.trace() / root.square().sum()}.get(ridge_of, 1.0)
    lam = torch.as_tensor(ridge, dtype=torch.float64, device=k.device).expand(y.shape[1]) * base
    alpha = root * solve_each_target(k, root * y.double(), lam)
    rounded, constant = alpha.to(y.dtype), bias * alpha.sum(0)
    rows: KernelRows | _SparseRows | None = None
    if isinstance(x, Tensor) and kernel is not None:
        mean, gamma = mean_of(kernel, x), gamma_of(kernel, x, ()).detach()
        of = rows_of(kernel, x, mean)
        rows = kept_rows(kernel, solver, of, rounded, mean, gamma, scale, bias)
    elif kernel is not None:
        rows = _SparseRows(x.copy(), scale * alpha.numpy(), constant.numpy(), kernel)
    return GramFit(rounded, constant.to(y.dtype), lam.to(y.dtype), scale, rows)


def _gram(op: str, x: Any, kernel: Kernel | None, solver: Solver) -> Tensor:
    """Return the Gram matrix [M, M] in float64."""
    if kernel is None:
        finite(op, x, X=x)
        return x.double()
    if isinstance(x, Tensor):
        finite(op, x, X=x)
        wide = x.double()
        rows = rows_of(kernel, wide, mean_of(kernel, wide))
        return kernel_gram(rows, gamma_of(kernel, x, ()), kernel, choose("auto", wide, op))
    return torch.from_numpy(_sparse_kernel(x, x, kernel))


def _sparse_kernel(x: Any, y: Any, kernel: Kernel) -> np.ndarray:
    """Compute the kernel [I, J] in float64 for rows in CSR.

    Distances are those of the rows as they are, and lose digits where rows are near each other and
    far from zero, which sparse ones are not.
    """
    gamma = 1 / x.shape[1] if kernel.gamma is None else kernel.gamma
    x, y = x.astype(np.float64), y.astype(np.float64)
    products = np.asarray((x @ y.T).toarray(), dtype=np.float64)
    squares = [np.asarray(z.multiply(z).sum(axis=1)).ravel() for z in (x, y)]
    settings = kernel.name, kernel.degree, float(kernel.coef0)
    tensors = torch.from_numpy(products), torch.from_numpy(squares[0]), torch.from_numpy(squares[1])
    values = of_products(*tensors, float(gamma), *settings)
    return (values.clamp(max=1) if kernel.name == "rbf" else values).numpy()
