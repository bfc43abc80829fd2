"""Fits of arrays and of chunks of rows, without a tensor of all rows."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from krrst_fast.backends import Backend, choose
from krrst_fast.cholesky import Factor
from krrst_fast.errors import NonFiniteError
from krrst_fast.ops.arrays import check_array, check_finite_rows, read_rows, torch_dtype
from krrst_fast.ops.centring import Means, check_intercept
from krrst_fast.ops.column_sums import fit_columns
from krrst_fast.ops.fit_tensors import fit_tensors
from krrst_fast.ops.fitted import Fitted, KRRFit
from krrst_fast.ops.in_place import solve_in_place
from krrst_fast.ops.info import SolveInfo
from krrst_fast.ops.per_target import TargetFit
from krrst_fast.ops.problem import (
    Problem,
    check_dense,
    check_kernel,
    check_not_mapped,
    check_solver,
    finite,
    working_dtype,
)
from krrst_fast.ops.row_sums import LinearKernel, RowSums
from krrst_fast.ops.solver import RidgeOf, Solver
from krrst_fast.ops.spectral import solve_targets
from krrst_fast.planner import cheapest
from krrst_fast.precision import exact_arithmetic

Matrix = Tensor | np.ndarray
Names = tuple[str, str]

_NEED = "a tensor, an array, or an iterable of chunks (F, Y) or (F, Y, weights)"


def fit_stream(
    op: str,
    f: Any,
    y: Any,
    *,
    ridge: float | Tensor,
    ridge_of: RidgeOf,
    scale: float,
    bias: float,
    intercept: bool,
    weights: Any,
    solver: Solver,
) -> KRRFit:
    """Compute `krr_fit` of arrays, or of an iterable of chunks."""
    check_kernel(op, ridge, ridge_of, True, scale, bias)
    check_settings(op, solver, bias, intercept)
    if isinstance(ridge, Tensor) and ridge.ndim:
        raise ValueError(f"{op}: ridge must be a number or a tensor [], got {tuple(ridge.shape)}")
    kernel = LinearKernel(ridge, ridge_of, float(scale), float(bias))
    if isinstance(f, np.ndarray):
        fit = fit_arrays(op, ("f_syn", "y_syn"), f, y, weights, kernel, intercept, solver)
    else:
        fit = _fit_chunks(op, f, y, weights, kernel, intercept, solver)
    assert isinstance(fit, KRRFit)
    return fit


def check_settings(op: str, solver: Solver, bias: float, intercept: bool) -> None:
    """Check what is refused where not all rows are in memory.

    Raises:
        ValueError: A setting needs all rows.
    """
    check_intercept(op, intercept, bias)
    check_solver(op, solver)
    if solver.backend == "reference":
        raise ValueError(f"{op}: backend 'reference' keeps no fit")
    if solver.precision == "fast":
        raise ValueError(
            f"{op}: precision 'fast' scales by the largest of all features, and needs them in one "
            "tensor; pass 'float32'"
        )


def fit_arrays(
    op: str,
    names: Names,
    f: np.ndarray,
    y: Any,
    weights: Any,
    kernel: LinearKernel,
    intercept: bool,
    solver: Solver,
) -> KRRFit | TargetFit:
    """Fit arrays F [M, D] and Y [M, P], read block by block, with settings that were checked."""
    if not isinstance(y, np.ndarray):
        kind = type(y).__name__
        raise TypeError(f"{op}: {names[0]} and {names[1]} must both be arrays, got {kind}")
    rows = checked_rows(op, names, f, y, weights)
    (m, d), p = f.shape, y.shape[1]
    if m == 0:
        raise ValueError(f"{op}: {names[0]} must have at least one row, got {f.shape}")
    if rows[2] is not None and not rows[2].any():
        raise ValueError(f"{op}: weights must not all be zero")
    form = "primal" if m > d > 0 else cheapest(m, 0, d, p)
    form = form if solver.form == "auto" or d == 0 else solver.form
    working = working_dtype(result_of(f), solver.precision)
    if form == "primal":
        sums = RowSums(centred=intercept, keeps=False, dtype=working)
        sums.add(op, names, rows, kernel, solver.check == "raise")
        return fit_sums(op, sums, kernel, solver, result_of(f))
    targets = read_rows(y, 0, m).to(working)
    if solver.check == "raise":
        check_finite_rows(op, names[1], targets, 0)
    backend = choose(solver.backend, targets, op)
    how = kernel, intercept, backend, solver
    with exact_arithmetic(targets):
        found = fit_columns(op, names[0], f, targets, rows[2], *how)
    alpha = found.solved if found.root is None else (found.solved * found.root).to(working)
    duals, primal, constants = (x.to(result_of(f)) for x in (alpha, *found[3:5]))
    if solver.check == "raise":
        for part in (duals, primal):
            finite(op, part, **{names[1]: targets, "fit": part})
    if found.factor is None:
        return TargetFit(duals, primal, constants, found.lam.expand(p).to(duals), solver)
    means = None
    if intercept:
        means = Means(targets.new_empty(1, d), targets.new_empty(1, p), found.share)
    return KRRFit(
        intercept=constants,
        info=_info(form, backend, found.factor, working),
        _alpha=duals,
        _weights=primal,
        _fitted=Fitted(
            rows=(f if found.root is not None else targets[:0], targets),
            alpha=alpha,
            linear=(found.weights, found.constants),
            problem=_problem(kernel, targets.new_empty(0, d), found.targets),
            solver=solver,
            root=found.root,
            means=means,
            batch=(),
        ),
    )


def fit_sums(
    op: str,
    sums: RowSums,
    kernel: LinearKernel,
    solver: Solver,
    result: torch.dtype,
    in_place: bool = True,
) -> KRRFit | TargetFit:
    """Fit from sums over rows; a `TargetFit` for a ridge of each target, and for one of 0.

    Args:
        op: The name in errors.
        sums: Sums over one row at least.
        kernel, solver: Settings that were checked.
        result: The dtype of the result.
        in_place: The sums are not used any more.
    """
    sums.finish(kernel)
    if not sums.total > 0:
        raise ValueError(f"{op}: weights must not all be zero")
    gram, right, rooted = sums.system(kernel, in_place)
    backend = choose(solver.backend, right, op)
    d = gram.shape[1] - (kernel.bias > 0)
    trace = gram.square().sum() if rooted else gram.diagonal().sum()
    lam, factor = kernel.lam(trace, sums.total), None
    if not kernel.is_plain:
        solved = solve_targets(op, gram, right, lam, rooted)
    elif rooted:
        factor, solved = _solve_rooted(gram, right, lam)
    else:
        factor, solved = solve_in_place(backend, solver, gram, lam, right)
    weights, constants = solved[:d].to(sums.dtype), torch.zeros_like(solved[:1].sum(0))
    if sums.centred:
        mean_f, mean_y = sums.mean()
        # Of the rounded weights, so that it makes up for their rounding at the mean.
        constants = mean_y - mean_f @ weights.double()
    elif kernel.bias:
        constants = (kernel.bias / kernel.scale) ** 0.5 * solved[d]
    linear = weights, constants.to(sums.dtype)
    primal, constants = (x.to(result) for x in linear)
    if solver.check == "raise":
        finite(op, primal, fit=primal)
    if factor is None:
        return TargetFit(None, primal, constants, lam.expand(right.shape[1]).to(result), solver)
    empty = linear[0].new_empty(0, d), linear[0].new_empty(0, right.shape[1])
    return KRRFit(
        intercept=constants,
        info=_info("primal", backend, factor, sums.dtype),
        _alpha=None,
        _weights=primal,
        _fitted=Fitted(empty, None, linear, _problem(kernel, *empty), solver, None, None, ()),
    )


def _fit_chunks(
    op: str,
    source: Any,
    y: Any,
    weights: Any,
    kernel: LinearKernel,
    intercept: bool,
    solver: Solver,
) -> KRRFit | TargetFit:
    """Fit an iterable of chunks, which is read once."""
    if not isinstance(source, Iterable):
        raise TypeError(f"{op}: f_syn must be {_NEED}, got {type(source).__name__}")
    for name, x in (("y_syn", y), ("weights", weights)):
        if x is not None:
            raise ValueError(f"{op}: {name} must be in the chunks, got {type(x).__name__} beside")
    if solver.form in ("k", "w"):
        raise ValueError(
            f"{op}: form must be 'auto' or 'primal' for chunks that are read once, "
            f"got {solver.form!r}, which needs all rows at once"
        )
    sums, result, count = None, torch.float32, 0
    for where, rows in _chunks(op, source):
        count += 1
        if sums is None:
            first, result = rows, result_of(rows[0])
            dtype = working_dtype(result, solver.precision)
            sums = RowSums(centred=intercept, keeps=True, dtype=dtype)
        check_alike(where, rows, first)
        if len(rows[0]):
            sums.add(where, ("F", "Y"), rows, kernel, solver.check == "raise")
    if sums is None or sums.rows == 0:
        raise ValueError(f"{op}: needs at least one row, got {count} chunks without any")
    kept = sums.kept
    if kept is None:
        return fit_sums(op, sums, kernel, solver, result)
    sums.forget()
    f, targets, row_weights = kept
    del kept, sums, first, rows
    return fit_tensors(
        *(op, f, targets),
        ridge=kernel.ridge,
        ridge_of=kernel.ridge_of,
        scale=kernel.scale,
        bias=kernel.bias,
        intercept=intercept,
        weights=row_weights,
        solver=solver,
    )


def _chunks(op: str, source: Iterable[Any]) -> Iterator[tuple[str, tuple]]:
    """Yield the name of each chunk in errors, and its checked rows."""
    for number, chunk in enumerate(source):
        where = f"{op}: chunk {number}"
        if not isinstance(chunk, tuple | list) or len(chunk) not in (2, 3):
            kind = type(chunk).__name__
            kind += f" of {len(chunk)}" if isinstance(chunk, tuple | list) else ""
            raise TypeError(f"{where} must be (F, Y) or (F, Y, weights), got {kind}")
        f, y, weights = (*chunk, None)[:3]
        yield where, checked_rows(where, ("F", "Y"), f, y, weights)


def checked_rows(
    op: str, names: Names, f: Any, y: Any, weights: Any
) -> tuple[Matrix, Matrix, Tensor | None]:
    """Return F [C, D], Y [C, P] and float64 weights [C] or None, after their checks.

    Raises:
        ValueError: A shape, a device or a weight does not fit.
        TypeError: One of them is no tensor or array, or of another dtype.
        NonFiniteError: A weight is NaN or infinite.
    """
    check_not_mapped(op, f, y)
    for name, x in zip(names, (f, y)):
        if isinstance(x, Tensor):
            check_dense(op, name, x)
        else:
            check_array(op, name, x, "a tensor or an array")
        if x.ndim != 2:
            raise ValueError(f"{op}: {name} must be a matrix, got shape {tuple(x.shape)}")
    if result_of(f) != result_of(y):
        raise TypeError(
            f"{op}: {names[0]} and {names[1]} must have one dtype, got {f.dtype} and {y.dtype}"
        )
    if len(f) != len(y):
        raise ValueError(
            f"{op}: {names[0]} and {names[1]} must have the same number of rows, "
            f"got shapes {tuple(f.shape)} and {tuple(y.shape)}"
        )
    if _device(f) != _device(y):
        raise ValueError(
            f"{op}: {names[0]} and {names[1]} must be on one device, "
            f"got {_device(f)} and {_device(y)}"
        )
    return f, y, None if weights is None else _checked_weights(op, weights, f)


def _checked_weights(op: str, weights: Any, f: Matrix) -> Tensor:
    if isinstance(weights, np.ndarray) and weights.dtype.kind == "f" and weights.dtype.itemsize < 9:
        weights = torch.from_numpy(np.array(weights, dtype=np.float64))
    check_dense(op, "weights", weights)
    if weights.shape != (len(f),) or weights.device != _device(f):
        raise ValueError(
            f"{op}: weights must be [{len(f)}] on {_device(f)}, "
            f"got shape {tuple(weights.shape)} on {weights.device}"
        )
    weights = weights.detach().double()
    if not weights.isfinite().all():
        raise NonFiniteError(f"{op}: weights holds NaN or infinity")
    if (weights < 0).any():
        raise ValueError(f"{op}: weights must be zero or more, got {weights.min().item():.3g}")
    return weights


def check_alike(op: str, rows: tuple, first: tuple) -> None:
    """Check that a chunk has the columns, the precision and the device of the first one.

    Raises:
        ValueError: It has other columns, or is on another device.
        TypeError: One of the two is float64 and the other is not.
    """
    for name, x, like in zip(("F", "Y"), rows, first):
        if x.shape[1] != like.shape[1]:
            raise ValueError(
                f"{op}: {name} must have {like.shape[1]} columns like the first chunk, "
                f"got {x.shape[1]}"
            )
    if result_of(rows[0]) != result_of(first[0]):
        raise TypeError(
            f"{op}: F must be {result_of(first[0])} like the first chunk, got {rows[0].dtype}"
        )
    if _device(rows[0]) != _device(first[0]):
        raise ValueError(
            f"{op}: F must be on {_device(first[0])} like the first chunk, got {_device(rows[0])}"
        )


def result_of(x: Matrix) -> torch.dtype:
    """Return the dtype of a result: float64 if x is float64, else float32."""
    return torch.float64 if torch_dtype(x) == torch.float64 else torch.float32


def _device(x: Matrix) -> torch.device:
    return x.device if isinstance(x, Tensor) else torch.device("cpu")


def _solve_rooted(root: Tensor, right: Tensor, lam: Tensor) -> tuple[Factor, Tensor]:
    """Solve (R^T R + lam I) x = R^T z by a QR factorisation of R and sqrt(lam) I."""
    eye = torch.eye(root.shape[1], dtype=root.dtype, device=root.device)
    q, upper = torch.linalg.qr(torch.cat((root, lam.sqrt() * eye)))
    solved = torch.linalg.solve_triangular(upper, q[: len(root)].mT @ right, upper=True)
    factor = (upper * upper.diagonal().sign()[:, None]).mT.contiguous()
    zero = torch.zeros((), dtype=torch.int64, device=root.device)
    return Factor(factor, lam, zero, zero.int(), None), solved


def _info(form: str, backend: Backend, factor: Factor, dtype: torch.dtype) -> SolveInfo:
    lam = factor.ridge.to(dtype)
    return SolveInfo(form, backend.NAME, lam, factor.retries, factor.pivot, factor.factor)


def _problem(kernel: LinearKernel, f: Tensor, y: Tensor) -> Problem:
    """Return a problem without its rows."""
    numbers = kernel.scale, kernel.bias
    return Problem(f, y, None, None, kernel.ridge, kernel.ridge_of, True, *numbers)
