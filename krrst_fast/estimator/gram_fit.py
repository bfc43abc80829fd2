"""Fits by the Gram matrix of the rows: one that is given, or that of any kernel.

They solve in float64, for a ridge of each target too, and without one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from krrst_fast.backends import choose
from krrst_fast.ops.autograd import product
from krrst_fast.ops.kernel import Kernel, gamma_of, mean_of, rows_of
from krrst_fast.ops.kernel_fit import KernelRows, kept_rows
from krrst_fast.ops.kernel_gram import kernel_gram
from krrst_fast.ops.krr_of_kernel import check_form
from krrst_fast.ops.per_target import ridges_added, solve_each_target
from krrst_fast.ops.problem import check_solver, finite, result_dtype
from krrst_fast.ops.solver import RidgeOf, Solver
from krrst_fast.reference import round_features
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
    _rows: "KernelRows | _SparseRows | _GivenGram"

    @property
    def of_given_gram(self) -> bool:
        """Whether the Gram was given, and predictions are made from one."""
        return isinstance(self._rows, _GivenGram)

    def predict(self, f: Any) -> Any:
        """Predict [B, P] in float64, at features [B, D] or with a given Gram from [B, M].

        A tensor gives a tensor, differentiable if the rows of the fit are not sparse; rows in CSR
        give an array.
        """
        op, rows = "KernelRidge.predict", self._rows
        if isinstance(rows, _SparseRows):
            return rows.predict(f)
        if not isinstance(f, Tensor):
            return in_dense_blocks(f, self.predict)
        if isinstance(rows, KernelRows):
            return rows.predict(op, f.double())
        return rows.predict(op, f)


def in_dense_blocks(rows: Any, predict: Callable[[Tensor], Tensor]) -> np.ndarray:
    """Predict at rows in CSR [B, D], of which some are made dense at once."""
    high = max(1, _BLOCK // max(rows.shape[1], 1))
    firsts = range(0, max(rows.shape[0], 1), high)
    parts = [predict(torch.from_numpy(rows[i : i + high].toarray())) for i in firsts]
    return torch.cat(parts).numpy()


@dataclass(frozen=True, eq=False)
class _GivenGram:
    """Dual coefficients in float64 [M, P] times the scale, and a constant [P]."""

    alpha: Tensor
    constant: Tensor

    def predict(self, op: str, k: Tensor) -> Tensor:
        prediction = product(k.double(), self.alpha) + self.constant
        finite(op, prediction, X=k)
        return prediction


@dataclass(frozen=True, eq=False)
class _SparseRows:
    """Rows of a fit in CSR [M, D], their dual coefficients [M, P] and a constant [P]: float64."""

    x: Any
    alpha: np.ndarray
    constant: np.ndarray
    kernel: Kernel

    def predict(self, rows: Any) -> Any:
        if isinstance(rows, Tensor):
            return torch.from_numpy(self.predict(type(self.x)(rows.detach().cpu().numpy())))
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
    """Fit y [M, P] in float64 with ridges [] or [P], of which 0 is least squares of minimum norm.

    Args:
        op: The name in errors.
        x: Features [M, D], dense or in CSR, or the Gram [M, M].
        y: Targets.
        kernel: None if x is the Gram, else a non-linear one.
        ridge, ridge_of, scale, bias: As for `krrst_fast.krr_fit`.
        weights: Weights of the rows [M].
        solver: Its retries and checks; precision "fast" rounds features.

    Raises:
        ValueError: A Gram is not square, or the solver has what a Gram has not.
        NotPositiveDefiniteError: A ridge is too small for these rows.
    """
    _check(op, x, kernel, solver)
    if kernel is not None and isinstance(x, Tensor) and solver.precision == "fast":
        x, _ = round_features(x.float(), None)
    k = _gram(op, x, kernel)
    k = k if scale == 1 else scale * k
    k = k if bias == 0 else k + bias
    wanted, root = y.double(), None
    if weights is not None:
        root = weights.double().sqrt()[:, None]
        k, wanted = root * k * root.mT, root * wanted
    total = len(k) if root is None else root.square().sum()
    lam, least = ridges_added(ridge, ridge_of, k.trace(), total, y.shape[1])
    alpha, lam = solve_each_target(op, k, wanted, lam, least, solver)
    alpha = alpha if root is None else root * alpha
    constant, rounded = bias * alpha.sum(0), alpha.to(result_dtype(y))
    if solver.check == "raise":
        finite(op, rounded, X=k, y=y)
    rows: KernelRows | _SparseRows | _GivenGram = _GivenGram(scale * alpha, constant)
    if isinstance(x, Tensor) and kernel is not None:
        wide = x.double()
        mean, gamma = mean_of(kernel, wide), gamma_of(kernel, wide, ()).detach()
        of = rows_of(kernel, wide, mean)
        rows = kept_rows(kernel, solver, of, alpha, mean, gamma, scale, bias)
    elif kernel is not None:
        arrays = scale * alpha.numpy(), constant.numpy()
        rows = _SparseRows(x.astype(np.float64), *arrays, kernel)
    return GramFit(rounded, constant.to(rounded.dtype), lam.to(rounded.dtype), rows)


def _check(op: str, x: Any, kernel: Kernel | None, solver: Solver) -> None:
    check_solver(op, solver)
    if solver.backend == "reference":
        raise ValueError(f"{op}: backend 'reference' does not factor a gram")
    if kernel is not None:
        check_form(op, kernel, solver)
        return
    if x.shape[0] != x.shape[1]:
        raise ValueError(f"{op}: X must be [M, M] with kernel 'precomputed', got {tuple(x.shape)}")
    if solver.precision == "fast":
        raise ValueError(f"{op}: precision 'fast' rounds features, and a gram has none")


def _gram(op: str, x: Any, kernel: Kernel | None) -> Tensor:
    """Return the Gram matrix [M, M] in float64."""
    if not isinstance(x, Tensor):
        assert kernel is not None
        return torch.from_numpy(_sparse_kernel(x, x.astype(np.float64), kernel))
    finite(op, x, X=x)
    wide = x.double()
    if kernel is None:
        return wide
    rows = rows_of(kernel, wide, mean_of(kernel, wide))
    return kernel_gram(rows, gamma_of(kernel, wide, ()), kernel, choose("auto", wide, op))


def _sparse_kernel(x: Any, y: Any, kernel: Kernel) -> np.ndarray:
    """Compute the kernel [I, J] in float64 for rows in CSR, those of y in float64.

    Distances are those of the rows as they are: they lose digits where rows are much nearer to each
    other than to zero.
    """
    gamma = 1 / x.shape[1] if kernel.gamma is None else kernel.gamma
    x = x.astype(np.float64)
    products = np.asarray((x @ y.T).toarray(), dtype=np.float64)
    squares = [np.asarray(z.multiply(z).sum(axis=1)).ravel() for z in (x, y)]
    settings = kernel.name, kernel.degree, float(kernel.coef0)
    tensors = torch.from_numpy(products), torch.from_numpy(squares[0]), torch.from_numpy(squares[1])
    values = of_products(*tensors, float(gamma), *settings)
    return (values.clamp(max=1) if kernel.name == "rbf" else values).numpy()
