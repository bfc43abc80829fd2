"""Kernel ridge regression for many ridges, from one eigendecomposition."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from krrst_fast.errors import NonFiniteError, NotPositiveDefiniteError
from krrst_fast.ops.centring import centred, check_intercept
from krrst_fast.ops.problem import (
    Problem,
    batch_of,
    check_dense,
    check_matrices,
    check_not_mapped,
    finite,
    fold,
    prepare,
    readable,
    result_dtype,
    unfold,
)
from krrst_fast.ops.solver import RidgeOf, Solver
from krrst_fast.ops.weights import apply_weights, constant_feature, undo_weights
from krrst_fast.precision import exact_arithmetic

_EPSILON = 2.0**-52
_SMALLEST, _LARGEST = 1e-140, 1e140
_FLOAT64 = Solver(precision="float64")


@dataclass(frozen=True, eq=False)
class KRRPath:
    """Fits for R ridges; `...` are the leading dimensions of the call.

    Attributes:
        ridges: The ridges of the call [R].
        lam: The numbers added to the diagonal [R, ...].
        weights: Primal coefficients [R, ..., D, P].
        intercept: [R, ..., P].
        loo_residuals: Y_i minus the prediction for row i by the fit without row i [R, ..., M, P],
            as in `KRRFit.loo_residuals`.
    """

    ridges: Tensor
    lam: Tensor
    weights: Tensor
    intercept: Tensor
    loo_residuals: Tensor
    _row_weights: Tensor | None

    def predict(self, f: Tensor) -> Tensor:
        """Predict [R, ..., B, P] at features f [..., B, D]. No gradients are recorded.

        Raises:
            ValueError: The shape or the device of f does not match the fit.
            TypeError: F has another dtype.
            NonFiniteError: F, on the CPU, holds NaN or infinity.
        """
        op, (*_, d, _) = "KRRPath.predict", self.weights.shape
        check_matrices(op, ("weights", "f"), (self.weights, f))
        if f.shape[-1] != d:
            raise ValueError(f"{op}: f must be [..., B, {d}], got shape {tuple(f.shape)}")
        weights = self.weights
        batch_of(op, f=(f, 2), weights=(weights[0], 2))
        with torch.no_grad(), exact_arithmetic(f):
            # A leading dimension that only f has goes after that of the ridges.
            extra = (len(weights), *[1] * max(0, f.ndim + 1 - weights.ndim))
            weights = weights.reshape(*extra, *weights.shape[1:])
            intercept = self.intercept.reshape(*extra, *self.intercept.shape[1:])
            prediction = f.to(weights.dtype) @ weights + intercept[..., None, :]
        finite(op, prediction, f=f)
        return prediction.to(result_dtype(f))

    @property
    def loo_mse(self) -> Tensor:
        """Mean of the squared leave-one-out residuals [R, ...], over rows by their weights."""
        squares = self.loo_residuals.square().mean(-1)  # [R, ..., M]
        if self._row_weights is None:
            return squares.mean(-1)
        share = self._row_weights / self._row_weights.sum(-1, keepdim=True)
        return torch.where(share > 0, squares * share, 0).sum(-1)

    @property
    def best(self) -> Tensor:
        """The ridge with the smallest leave-one-out error [...]."""
        return self.ridges[self.loo_mse.argmin(0)]


@torch.no_grad()
def krr_path(
    f_syn: Tensor,
    y_syn: Tensor,
    ridges: Sequence[float] | Tensor,
    *,
    ridge_of: RidgeOf = "trace",
    scale: float = 1.0,
    bias: float = 0.0,
    intercept: bool = False,
    weights: Tensor | None = None,
) -> KRRPath:
    """Fit kernel ridge regression for each of R ridges.

    K_ss = U S U^T is decomposed once, in float64 (F_s^T F_s where M > D); each ridge then costs
    products with P columns: little more than a single fit.

    Args:
        f_syn: Features [..., M, D].
        y_syn: Targets [..., M, P].
        ridges: R positive numbers, or a tensor [R].
        ridge_of: What a ridge multiplies to give lam: the "trace" of K_ss, its "mean_diagonal", or
            1 ("absolute").
        scale: Positive factor of every inner product.
        bias: Non-negative constant that is added to every kernel value.
        intercept: Fit a constant without a penalty, as in `krrst_fast.krr_fit`.
        weights: Weights of the rows of F_s [..., M], as in `krrst_fast.krr_mse`.

    Raises:
        ValueError: Shapes, devices or values that do not fit.
        TypeError: An argument of another type or dtype.
        NonFiniteError: An input on the CPU holds NaN or infinity.
        NotPositiveDefiniteError: A ridge is below the rounding of the Gram.
    """
    op = "krr_path"
    check_not_mapped(op, f_syn, y_syn)
    problem, batch, dtype = prepare(
        op, _FLOAT64, (f_syn, y_syn), 1.0, ridge_of, True, scale, bias, weights
    )
    root, as_given, means = None, problem, None
    check_intercept(op, intercept, bias)
    if problem.f_syn.shape[-2] == 0:
        raise ValueError(f"{op}: f_syn must have at least one row, got {tuple(f_syn.shape)}")
    if intercept:
        problem, means = centred(problem, weights, batch)
    if weights is not None:
        problem, root = apply_weights(problem, weights, batch)
    values = _ridges(op, ridges, problem.f_syn)
    for name, x in (("f_syn", problem.f_syn), ("y_syn", problem.y_syn)):
        finite(op, x, **{name: x})
    _check_range(op, problem.f_syn)
    with exact_arithmetic(problem.f_syn):
        share = None if means is None else means.share
        lam, coefficients, left_out = _decomposed(problem, values, share)
    d = f_syn.shape[-1]
    linear, constants = coefficients[..., :d, :], torch.zeros_like(coefficients[..., 0, :])
    if means is not None:
        constants = means.intercept(linear)
    if as_given.has_bias:
        constants = constant_feature(as_given.scale, as_given.bias) * coefficients[..., d, :]
    row_weights = None
    if weights is not None and root is not None:
        row_weights = unfold(fold(weights.to(dtype), batch, 1), batch)
        f, y = (fold(x.double(), batch, 2) for x in (f_syn, y_syn))
        with exact_arithmetic(f):
            unweighted = y - (f @ linear + constants[..., None, :])
        left_out = undo_weights(root, left_out, unweighted)

    def restore(x: Tensor) -> Tensor:
        return (x.unflatten(1, batch) if len(batch) > 1 else x).to(dtype)

    return KRRPath(
        ridges=values.to(dtype),
        lam=restore(lam),
        weights=restore(linear),
        intercept=restore(constants),
        loo_residuals=restore(left_out),
        _row_weights=row_weights,
    )


def _check_range(op: str, f: Tensor) -> None:
    """Raise where the squares of features lie outside of the range of float64, or lose digits."""
    if not readable(f) or not f.numel():
        return
    largest = f.abs().max().item()
    if largest and not _SMALLEST < largest < _LARGEST:
        raise NonFiniteError(
            f"{op}: f_syn must have its largest entry from {_SMALLEST:g} to {_LARGEST:g}, whose "
            f"squares float64 holds, got {largest:.3g}; scale the features"
        )


def _ridges(op: str, ridges: Sequence[float] | Tensor, like: Tensor) -> Tensor:
    try:
        values = torch.as_tensor(ridges, dtype=torch.float64, device=like.device)
    # RuntimeError: on the meta device torch has no values to convert.
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise TypeError(f"{op}: ridges must be numbers, or a tensor of them: {error}") from None
    check_dense(op, "ridges", values)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"{op}: ridges must be [R], R > 0, got shape {tuple(values.shape)}")
    if readable(values) and not (values.isfinite() & (values > 0)).all():
        raise ValueError(f"{op}: ridges must be positive and finite, got {values.tolist()}")
    return values


def _decomposed(
    problem: Problem, ridges: Tensor, share: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return lam [R, N?], W [R, N?, D (+ 1), P] and leave-one-out residuals.

    Predictions are [F, constant] W. Of centred rows, share [N?, M] is the part of each in the mean.
    """
    constant = 0.0 if share is None else share
    phi, y, scale = problem.f_syn, problem.y_syn, problem.scale
    if problem.has_bias:
        column = constant_feature(scale, problem.bias) * phi.new_ones((*phi.shape[:-1], 1))
        phi = torch.cat((phi, column), -1)
    *_, m, d = phi.shape
    trace = scale * phi.square().sum((-2, -1))  # [N?]
    base = {"trace": trace, "mean_diagonal": trace / m}.get(
        problem.ridge_of, torch.ones_like(trace)
    )
    lam = ridges.reshape(-1, *[1] * trace.ndim) * (problem.ridge * base)  # [R, N?]
    if m > d:
        values, vectors = torch.linalg.eigh(scale * phi.mT @ phi)
        _above_rounding(values, lam)
        right = vectors  # [D, D]
        left = phi @ vectors  # U sqrt(S / scale) [M, D]
        target = left.mT @ y  # [D, P]
        shrunk = 1 / (values.clamp(min=0) + lam[..., None])  # [R, N?, D]
        weights = scale * right @ (shrunk[..., None] * target)
        own = 1 - scale * (left.square() @ shrunk[..., None])[..., 0]  # [R, N?, M]
        return lam, weights, _left_out(y - phi @ weights, own - constant)
    values, vectors = torch.linalg.eigh(scale * phi @ phi.mT)  # [M], [M, M]
    _above_rounding(values, lam)
    shrunk = 1 / (values.clamp(min=0) + lam[..., None])  # [R, N?, M]
    alpha = vectors @ (shrunk[..., None] * (vectors.mT @ y))  # [R, N?, M, P]
    own = (vectors.square() @ shrunk[..., None])[..., 0]  # diagonal of A^-1 [R, N?, M]
    left_out = alpha / own[..., None]
    if share is not None:
        left_out = _left_out(lam[..., None, None] * alpha, lam[..., None] * own - share)
    return lam, scale * phi.mT @ alpha, left_out


def _left_out(residual: Tensor, own: Tensor) -> Tensor:
    """Return residuals [R, N?, M, P] over 1 - h [R, N?, M]; infinite where that is rounding."""
    nothing = own <= own.shape[-1] * _EPSILON
    return (residual / own[..., None]).masked_fill(nothing[..., None], math.inf)


def _above_rounding(values: Tensor, lam: Tensor) -> None:
    """Raise for a ridge below the rounding of the decomposition: it regularises nothing."""
    floor = values.shape[-1] * _EPSILON * values[..., -1]  # [N?]
    if readable(lam) and not (lam > floor).all():
        raise NotPositiveDefiniteError(
            f"krr_path: a ridge of {lam.min().item():.3g} is below the rounding of the gram "
            f"({floor.max().item():.3g}): the features are zero, or the ridge is too small"
        )
