"""Fits of an estimator to rows that are not all in memory: mapped from a file, or in parts."""

from typing import Any

import numpy as np
from torch import Tensor

from krrst_fast.ops.arrays import check_finite_rows, row_blocks
from krrst_fast.ops.fitted import KRRFit
from krrst_fast.ops.per_target import TargetFit
from krrst_fast.ops.problem import working_dtype
from krrst_fast.ops.row_sums import LinearKernel, RowSums
from krrst_fast.ops.solver import Solver
from krrst_fast.ops.stream import check_settings, fit_arrays, fit_sums, result_of

_NAMES = ("X", "y")

Parts = tuple[Tensor | np.ndarray, Tensor, Tensor | None]
"""X [m, D], y [m, P], and the weights of the rows [m]."""


def fit_mapped(
    op: str,
    rows: Parts,
    ridge: float | Tensor,
    *,
    intercept: bool,
    solver: Solver,
    **kernel: Any,
) -> KRRFit | TargetFit:
    """Fit rows of which X is a memory-mapped array, for a ridge, one for each target, or none."""
    f, y, weights = rows
    assert isinstance(f, np.ndarray)
    check_settings(op, solver, kernel["bias"], intercept)
    of = LinearKernel(ridge=ridge, **kernel)
    return fit_arrays(op, _NAMES, f, y.numpy(), weights, of, intercept, solver)


class PartialRows:
    """The rows of the calls of `partial_fit`; the first call says of which kind they are.

    Raises:
        ValueError: A setting needs all rows at once.
    """

    def __init__(self, op: str, given: Any, rows: Parts, intercept: bool, solver: Solver) -> None:
        f, y, _ = rows
        self._check(op, solver, intercept)
        self._result = result_of(f)
        self._kind = _kind(given), self._result, y.device
        self._columns = y.shape[1:]
        dtype = working_dtype(self._result, solver.precision)
        self._sums = RowSums(centred=intercept, keeps=True, dtype=dtype)

    def add(
        self,
        op: str,
        given: Any,
        rows: Parts,
        ridge: float | Tensor,
        solver: Solver,
        *,
        intercept: bool,
        **kernel: Any,
    ) -> None:
        """Add rows.

        Args:
            op: The name in errors.
            given: X as it was given.
            rows: X, y [m] or [m, P] and weights, after their checks.
            ridge, solver, intercept, kernel: The settings of this call.

        Raises:
            ValueError: A shape or a setting is not that of the first call, or X holds NaN.
            TypeError: X is of another kind or dtype than that of the first call.
        """
        f, y, weights = rows
        self._check(op, solver, intercept)
        if intercept != self._sums.centred:
            raise ValueError(
                f"{op}: intercept must stay {self._sums.centred} between calls, got {intercept}; "
                "call fit to start afresh"
            )
        kind = _kind(given), result_of(f), y.device
        if kind != self._kind:
            want, got = ("{} of {} on {}".format(*x) for x in (self._kind, kind))
            raise TypeError(f"{op}: X must be {want} like in the first call, got {got}")
        if y.shape[1:] != self._columns:
            need = ", ".join(map(str, ("m", *self._columns)))
            raise ValueError(
                f"{op}: y must be [{need}] like in the first call, got shape {tuple(y.shape)}"
            )
        # Nothing is added if a row is bad.
        for first, _, block in row_blocks(f):
            check_finite_rows(op, "X", block, first)
        check_finite_rows(op, "y", _matrix(y), 0)
        weights = None if weights is None else weights.double()
        self._sums.add(
            op, _NAMES, (f, _matrix(y), weights), LinearKernel(ridge=ridge, **kernel), False
        )

    def kept(self) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Return all rows, if they are kept."""
        return self._sums.kept

    def fit(
        self, op: str, ridge: float | Tensor, solver: Solver, *, intercept: bool, **kernel: Any
    ) -> KRRFit | TargetFit:
        """Fit to the sums over all rows."""
        of = LinearKernel(ridge=ridge, **kernel)
        return fit_sums(op, self._sums, of, solver, self._result, in_place=False)

    def _check(self, op: str, solver: Solver, intercept: bool) -> None:
        check_settings(op, solver, 0.0, intercept)
        if solver.form in ("k", "w"):
            raise ValueError(f"{op}: form must be 'auto' or 'primal', got {solver.form!r}")


def targets_of(f: Any, y: np.ndarray) -> np.ndarray:
    """Return targets in the precision of f: of float16, which is computed in float32, in that."""
    return y.astype(np.float32 if f.dtype == np.float16 else f.dtype, copy=False)


def _kind(given: Any) -> str:
    return "a tensor" if isinstance(given, Tensor) else "an array"


def _matrix(y: Tensor) -> Tensor:
    return y if y.ndim == 2 else y[:, None]
