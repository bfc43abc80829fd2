"""Kernel ridge regression for many ridges from one eigendecomposition."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import Unpack

from krrst_fast.errors import NotPositiveDefiniteError
from krrst_fast.exact import exact_arithmetic
from krrst_fast.ops import checks
from krrst_fast.ops.options import PathOptions, read, takes
from krrst_fast.ops.prepare import Problem, fold, prepare, result_dtype, unfold

_EPSILON = 2.0**-52


@dataclass(frozen=True)
class KRRPath:
    """Fits for R ridges; `...` are the leading dimensions of the call.

    Attributes:
        ridges: as they were given [R].
        lam: the numbers added to the diagonal [R, ...].
        weights: primal coefficients [R, ..., D, P].
        intercept: [R, ..., P].
        loo_residuals: y_i minus the prediction for row i by the fit without row i [R, ..., M, P],
            as in `KRRFit.loo_residuals`.
    """

    ridges: Tensor
    lam: Tensor
    weights: Tensor
    intercept: Tensor
    loo_residuals: Tensor
    _row_weights: Tensor | None

    def predict(self, f: Tensor) -> Tensor:
        """Predictions [R, ..., B, P] at features f [..., B, D]. No gradients are recorded.

        Raises:
            ValueError, TypeError: f does not match the fit.
            NonFiniteError: f, on the CPU, holds NaN or infinity.
        """
        op, (*_, d, _) = "KRRPath.predict", self.weights.shape
        checks.matrices(op, weights=self.weights, f=f)
        if f.shape[-1] != d:
            raise ValueError(f"{op}: f must be [..., B, {d}], got shape {tuple(f.shape)}")
        weights = self.weights
        checks.batch_of(op, f=(f, 2), weights=(weights[0], 2))
        with torch.no_grad(), exact_arithmetic(f):
            # A leading dimension that only f has comes after that of the ridges.
            extra = (len(weights), *[1] * max(0, f.ndim + 1 - weights.ndim))
            weights = weights.reshape(*extra, *weights.shape[1:])
            intercept = self.intercept.reshape(*extra, *self.intercept.shape[1:])
            prediction = f.to(weights.dtype) @ weights + intercept[..., None, :]
        checks.finite(op, prediction, f=f)
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


@takes(PathOptions)
@torch.no_grad()
def krr_path(
    f_syn: Tensor, y_syn: Tensor, ridges: Sequence[float] | Tensor, **options: Unpack[PathOptions]
) -> KRRPath:
    """Kernel ridge regression for each of R ridges, for little more than the price of one.

    K_ss = U S U^T is decomposed once, in float64 (F_s^T F_s where M > D); every ridge then costs
    products with P columns.

    Args:
        f_syn: features [..., M, D].
        y_syn: targets [..., M, P].
        ridges: R positive numbers, or a tensor [R].
        **options: see `krrst_fast.ops.options.PathOptions`.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options that do not fit.
        NonFiniteError: an input on the CPU holds NaN or infinity.
        NotPositiveDefiniteError: a ridge is below the rounding of the Gram.
    """
    op = "krr_path"
    chosen = read(op, options, PathOptions)
    checks.not_mapped(op, *(x for x in (f_syn, y_syn) if isinstance(x, Tensor)))
    chosen = chosen._replace(ridge=1.0, precision="float64")
    problem = prepare(op, chosen, f_syn, y_syn)
    if problem.f_syn.shape[-2] == 0:
        raise ValueError(f"{op}: f_syn must have at least one row, got {tuple(f_syn.shape)}")
    values = _ridges(op, ridges, problem.f_syn)
    for name, x in (("f_syn", problem.f_syn), ("y_syn", problem.y_syn)):
        checks.finite(op, x, **{name: x})
    with exact_arithmetic(problem.f_syn):
        lam, coefficients, left_out = _decomposed(problem, values)
    batch, dtype, d = problem.batch, problem.dtype, f_syn.shape[-1]
    weights, intercept = coefficients[..., :d, :], torch.zeros_like(coefficients[..., 0, :])
    if chosen.bias:
        intercept = (chosen.bias / problem.scale) ** 0.5 * coefficients[..., d, :]
    row_weights = None
    if problem.root is not None and chosen.weights is not None:
        row_weights = unfold(fold(chosen.weights.to(dtype), batch, 1), batch)
        f, y = (fold(x.double(), batch, 2) for x in (f_syn, y_syn))
        with exact_arithmetic(f):
            there = y - (f @ weights + intercept[..., None, :])
        # A row of weight 0 is left out already.
        left_out = torch.where(problem.root > 0, left_out / problem.root, there)

    def restore(x: Tensor) -> Tensor:
        return (x.unflatten(1, batch) if len(batch) > 1 else x).to(dtype)

    return KRRPath(
        ridges=values.to(dtype),
        lam=restore(lam),
        weights=restore(weights),
        intercept=restore(intercept),
        loo_residuals=restore(left_out),
        _row_weights=row_weights,
    )


def _ridges(op: str, ridges: Sequence[float] | Tensor, like: Tensor) -> Tensor:
    try:
        values = torch.as_tensor(ridges, dtype=torch.float64, device=like.device)
    # The last is what torch raises for what has no values to convert, on the meta device.
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise TypeError(f"{op}: ridges must be numbers, or a tensor of them: {error}") from None
    checks.dense(op, "ridges", values)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"{op}: ridges must be [R], R > 0, got shape {tuple(values.shape)}")
    if checks.readable(values) and not (values.isfinite() & (values > 0)).all():
        raise ValueError(f"{op}: ridges must be positive and finite, got {values.tolist()}")
    return values


def _decomposed(problem: Problem, ridges: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """lam [R, N?], W [R, N?, D (+ 1), P] so that predictions are [F, constant] W, residuals."""
    phi, y, bias, scale = problem.f_syn, problem.y_syn, problem.bias, problem.scale
    if bias:
        column = phi.new_full((*phi.shape[:-1], 1), (bias / scale) ** 0.5)
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
        return lam, weights, _left_out(y - phi @ weights, own)
    values, vectors = torch.linalg.eigh(scale * phi @ phi.mT)  # [M], [M, M]
    _above_rounding(values, lam)
    shrunk = 1 / (values.clamp(min=0) + lam[..., None])  # [R, N?, M]
    alpha = vectors @ (shrunk[..., None] * (vectors.mT @ y))  # [R, N?, M, P]
    own = (vectors.square() @ shrunk[..., None])[..., 0]  # diagonal of A^-1 [R, N?, M]
    return lam, scale * phi.mT @ alpha, alpha / own[..., None]


def _left_out(residual: Tensor, own: Tensor) -> Tensor:
    """Residuals [R, N?, M, P] over 1 - h [R, N?, M]; infinite where that is rounding."""
    nothing = own <= own.shape[-1] * _EPSILON
    return (residual / own[..., None]).masked_fill(nothing[..., None], math.inf)


def _above_rounding(values: Tensor, lam: Tensor) -> None:
    """Below the rounding of the decomposition a ridge regularises nothing."""
    floor = values.shape[-1] * _EPSILON * values[..., -1]  # [N?]
    if checks.readable(lam) and not (lam > floor).all():
        raise NotPositiveDefiniteError(
            f"krr_path: a ridge of {lam.min().item():.3g} is below the rounding of the gram "
            f"({floor.max().item():.3g}): the features are zero, or the ridge is too small"
        )
