"""Kernel ridge regression for many ridges, from one eigendecomposition."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from krrst_fast.errors import NonFiniteError
from krrst_fast.ops.centring import Means, centred, check_intercept
from krrst_fast.ops.once import once
from krrst_fast.ops.path_fit import PathFit
from krrst_fast.ops.problem import (
    batch_of,
    check_dense,
    check_matrices,
    check_not_mapped,
    finite,
    fold,
    prepare,
    readable,
    result_dtype,
)
from krrst_fast.ops.solver import DEFAULT, RidgeOf
from krrst_fast.ops.spectrum import Spectrum, spectrum_of
from krrst_fast.ops.weights import apply_weights, constant_feature, undo_weights
from krrst_fast.precision import exact_arithmetic

_SMALLEST, _LARGEST = 1e-140, 1e140


@dataclass(frozen=True, eq=False)
class KRRPath:
    """Fits for R ridges; `...` are the leading dimensions of the call.

    What is not listed is computed when it is asked for, and kept: `weights`, `intercept` and
    `loo_residuals` of all ridges at once, in their whole size; the scores block by block.

    Attributes:
        ridges: The ridges of the call [R].
        lam: The numbers added to the diagonal [R, ...].
    """

    ridges: Tensor
    lam: Tensor
    _spectrum: Spectrum
    _features: int
    _constant: float | Tensor | None
    _means: Means | None
    _root: Tensor | None
    _as_given: tuple[Tensor, Tensor] | None
    _batch: tuple[int, ...]

    def _restore(self, x: Tensor, leading: int) -> Tensor:
        batch = self._batch
        return (x.unflatten(leading, batch) if len(batch) > 1 else x).to(self.lam.dtype)

    @once
    @torch.no_grad()
    def _all(self) -> tuple[Tensor, Tensor]:
        """Primal coefficients [R, N?, D, P] and constants [R, N?, P] of all ridges."""
        found, p = self._spectrum, self._spectrum.y.shape[-1]
        with exact_arithmetic(found.phi):
            solved = [found.coefficients(lam[..., None].expand(*lam.shape, p)) for lam in found.lam]
            pairs = [self._linear_of(one) for one in solved]
        weights, constants = zip(*pairs)
        return torch.stack(weights), torch.stack(constants)

    def _linear_of(self, solved: Tensor) -> tuple[Tensor, Tensor]:
        """Return W [N?, D, P] and constants [N?, P] from what the spectrum solves for."""
        found, d = self._spectrum, self._features
        if not found.primal:
            solved = found.scale * (found.phi.double().mT @ solved)
        linear = solved[..., :d, :]
        constants = solved.new_zeros((*solved.shape[:-2], solved.shape[-1]))
        if self._means is not None:
            constants = self._means.intercept(linear)
        if self._constant is not None:
            constants = self._constant * solved[..., d, :]
        return linear, constants

    @property
    def weights(self) -> Tensor:
        """Primal coefficients [R, ..., D, P]."""
        return self._restore(self._all[0], 1)

    @property
    def intercept(self) -> Tensor:
        """The constants [R, ..., P]."""
        return self._restore(self._all[1], 1)

    @once
    @torch.no_grad()
    def loo_residuals(self) -> Tensor:
        """Y_i minus the prediction for row i by the fit without row i [R, ..., M, P].

        As in `KRRFit.loo_residuals`.
        """
        found = self._spectrum
        left_out = found.y.new_empty((len(self.lam), *found.y.shape), dtype=torch.float64)
        with exact_arithmetic(found.phi):
            for number, block, residuals in found.left_out(torch.float64):
                left_out[number][..., block] = residuals
            if self._root is not None and self._as_given is not None:
                f, y = self._as_given
                linear, constants = self._all
                unweighted = y - (f @ linear + constants[..., None, :])
                left_out = undo_weights(self._root, left_out, unweighted)
        return self._restore(left_out, 1)

    @once
    @torch.no_grad()
    def loo_mse_per_target(self) -> Tensor:
        """Mean of the squared leave-one-out residuals [R, ..., P], over rows by their weights.

        Computed in the precision of the inputs, in blocks of targets.
        """
        found, root = self._spectrum, self._root
        *many, rows, p = found.y.shape
        scores = found.y.new_empty((len(self.lam), *many, p), dtype=torch.float64)
        with exact_arithmetic(found.phi):
            for number, block, residuals in found.left_out(self.lam.dtype):
                if root is not None:  # of a weighted row, whose square counts once
                    residuals = residuals.masked_fill(root == 0, 0)
                squares = torch.linalg.vector_norm(residuals, dim=-2).double().square()
                scores[number][..., block] = squares
            total = rows if root is None else root.double().square().sum((-2, -1))[..., None]
        return self._restore(scores / total, 1)

    @property
    def loo_mse(self) -> Tensor:
        """Mean of `loo_mse_per_target` over the targets [R, ...]; 0 without targets."""
        scores = self.loo_mse_per_target
        return scores.sum(-1) / max(scores.shape[-1], 1)

    @property
    def best(self) -> Tensor:
        """The ridge with the smallest leave-one-out error [...]."""
        return self.ridges[self.loo_mse.argmin(0)]

    @property
    def best_per_target(self) -> Tensor:
        """The ridge with the smallest leave-one-out error of each target [..., P]."""
        return self.ridges[self.loo_mse_per_target.argmin(0)]

    @torch.no_grad()
    def fit_best(self, *, per_target: bool = False) -> PathFit:
        """Fit with the best ridge, or with that of each target.

        Costs products with P columns. Where M <= D nothing of the size of the primal coefficients
        is made.
        """
        p = self._spectrum.y.shape[-1]
        if per_target:
            return self._fit(self.loo_mse_per_target.argmin(0))
        return self._fit(self.loo_mse.argmin(0)[..., None].expand(*self.lam.shape[1:], p))

    def _fit(self, chosen: Tensor) -> PathFit:
        """Fit target p with the ridge of number chosen[..., p]."""
        found, lam = self._spectrum, self._lam_of(chosen)
        weights = pair = None
        with exact_arithmetic(found.phi):
            solved = found.coefficients(lam, torch.float64 if found.primal else self.lam.dtype)
            if found.primal:
                alpha = found.duals(solved, lam)
                linear, constants = self._linear_of(solved)
                weights = self._restore(linear, 0)
            else:
                alpha, constants = solved, self._constants_of(solved)
                rows = found.phi[..., : self._features]
                pair = self._restore(rows, 0), self._restore(solved, 0)
            alpha = alpha if self._root is None else alpha * self._root
        return PathFit(
            ridge=self.ridges[chosen],
            lam=self._restore(lam, 0),
            alpha=self._restore(alpha, 0) if pair is None or self._root is not None else pair[1],
            intercept=self._restore(constants, 0),
            _scale=found.scale,
            _solved=pair,
            _weights=weights,
        )

    def _lam_of(self, chosen: Tensor) -> Tensor:
        """Return lam [N?, P] in float64 for chosen ridges [..., P]."""
        lam, p = self._spectrum.lam, chosen.shape[-1]
        index = chosen.flatten(0, -2) if len(self._batch) > 1 else chosen
        return torch.gather(lam[..., None].expand(*lam.shape, p), 0, index[None])[0]

    def _constants_of(self, alpha: Tensor) -> Tensor:
        """Return the constants [N?, P] of dual coefficients [N?, M, P] without making W."""
        found, d = self._spectrum, self._features
        if self._constant is not None:
            column = found.phi[..., d:]  # [N?, M, 1]
            return (self._constant * found.scale) * (column.double().mT @ alpha.double())[..., 0, :]
        if self._means is None:
            return torch.zeros_like(alpha[..., 0, :])
        means = self._means
        kernel = found.scale * (means.f @ found.phi.mT).double()  # [N?, 1, M]
        return (means.y.double() - kernel @ alpha.double())[..., 0, :]

    def predict(self, f: Tensor) -> Tensor:
        """Predict [R, ..., B, P] at features f [..., B, D]. No gradients are recorded.

        Raises:
            ValueError: The shape or the device of f does not match the fit.
            TypeError: F has another dtype.
            NonFiniteError: F, on the CPU, holds NaN or infinity.
        """
        op, weights = "KRRPath.predict", self.weights
        check_matrices(op, ("weights", "f"), (weights, f))
        if f.shape[-1] != weights.shape[-2]:
            need = f"f must be [..., B, {weights.shape[-2]}]"
            raise ValueError(f"{op}: {need}, got shape {tuple(f.shape)}")
        batch_of(op, f=(f, 2), weights=(weights[0], 2))
        with torch.no_grad(), exact_arithmetic(f):
            # A leading dimension that only f has goes after that of the ridges.
            extra = (len(weights), *[1] * max(0, f.ndim + 1 - weights.ndim))
            intercept = self.intercept
            intercept = intercept.reshape(*extra, *intercept.shape[1:])
            weights = weights.reshape(*extra, *weights.shape[1:])
            prediction = f.to(weights.dtype) @ weights + intercept[..., None, :]
        prediction = prediction.to(result_dtype(f))
        finite(op, prediction, f=f)
        return prediction


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
    products with P columns: little more than a single fit. Where M <= D, eigenvalues below eight
    roundings (of the precision of the inputs) of the smallest lam count as 0.

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
    kernel: dict[str, Any] = {
        "ridge_of": ridge_of,
        "scale": scale,
        "bias": bias,
        "intercept": intercept,
    }
    values = _ridges("krr_path", ridges, f_syn)
    return _path("krr_path", f_syn, y_syn, values, weights=weights, **kernel)


@torch.no_grad()
def path_of_unchanging(
    f_syn: Tensor, y_syn: Tensor, ridges: Sequence[float] | Tensor, **kernel: Any
) -> KRRPath:
    """Compute `krr_path` without a copy of the targets, which may not change while it lives."""
    values = _ridges("krr_path", ridges, f_syn)
    return _path("krr_path", f_syn, y_syn, values, copied=False, **kernel)


@torch.no_grad()
def least_squares(
    op: str,
    f_syn: Tensor,
    y_syn: Tensor,
    *,
    scale: float,
    bias: float,
    intercept: bool,
    weights: Tensor | None,
) -> PathFit:
    """Fit without a ridge: of all least squares solutions the one of minimum norm.

    Eigenvalues of the Gram below its rounding in float64 count as 0.

    Args:
        op: The name in errors.
        f_syn, y_syn, scale, bias, intercept, weights: As for `krr_path`.

    Raises:
        The errors of `krr_path`.
    """
    kernel: dict[str, Any] = {"scale": scale, "bias": bias, "intercept": intercept}
    values = torch.zeros(1, dtype=torch.float64, device=f_syn.device)
    kernel |= {"ridge_of": "absolute", "weights": weights, "ridged": False}
    path = _path(op, f_syn, y_syn, values, **kernel)
    return path._fit(torch.zeros_like(y_syn[..., 0, :], dtype=torch.int64))


def _path(
    op: str,
    f_syn: Tensor,
    y_syn: Tensor,
    values: Tensor,
    *,
    ridge_of: RidgeOf,
    scale: float,
    bias: float,
    intercept: bool,
    weights: Tensor | None,
    ridged: bool = True,
    copied: bool = True,
) -> KRRPath:
    """Decompose a problem for ridges [R] that were checked."""
    check_not_mapped(op, f_syn, y_syn)
    problem, batch, dtype = prepare(
        op, DEFAULT, (f_syn, y_syn), 1.0, ridge_of, True, scale, bias, weights
    )
    root, as_given, means = None, problem, None
    check_intercept(op, intercept, bias)
    if problem.f_syn.shape[-2] == 0:
        raise ValueError(f"{op}: f_syn must have at least one row, got {tuple(f_syn.shape)}")
    if intercept:
        problem, means = centred(problem, weights, batch)
    if weights is not None:
        problem, root = apply_weights(problem, weights, batch)
    for name, x in (("f_syn", problem.f_syn), ("y_syn", problem.y_syn)):
        finite(op, x, **{name: x})
    _check_range(op, problem.f_syn)
    given = None
    if root is not None:  # the residual of a row of weight 0 needs the row
        f, y = (fold(x.double(), batch, 2) for x in (f_syn, y_syn))
        given = _owned(f, f_syn), _owned(y, y_syn)
    # What is read later must not change with what was given.
    y = _owned(problem.y_syn, y_syn) if copied else problem.y_syn
    problem = problem._replace(f_syn=_owned(problem.f_syn, f_syn), y_syn=y)
    with exact_arithmetic(problem.f_syn):
        found = spectrum_of(problem, values, None if means is None else means.share, ridged)
    lam = found.lam.unflatten(1, batch) if len(batch) > 1 else found.lam
    return KRRPath(
        ridges=values.to(dtype),
        lam=lam.to(dtype),
        _spectrum=found,
        _features=f_syn.shape[-1],
        _constant=constant_feature(as_given.scale, as_given.bias) if as_given.has_bias else None,
        _means=means,
        _root=root,
        _as_given=given,
        _batch=batch,
    )


def _owned(x: Tensor, given: Tensor) -> Tensor:
    """Return x, as a copy if it shares the memory of what was given."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or type(given) is not Tensor:
        return x.clone()  # a tensor of another class may have no memory of its own
    shared = x.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()
    return x.clone() if shared else x.detach()


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
        device = like.device if isinstance(like, Tensor) else None  # what it is, is checked later
        values = torch.as_tensor(ridges, dtype=torch.float64, device=device)
    # RuntimeError: on the meta device torch has no values to convert.
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise TypeError(f"{op}: ridges must be numbers, or a tensor of them: {error}") from None
    check_dense(op, "ridges", values)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"{op}: ridges must be [R], R > 0, got shape {tuple(values.shape)}")
    if readable(values) and not (values.isfinite() & (values > 0)).all():
        raise ValueError(f"{op}: ridges must be positive and finite, got {values.tolist()}")
    return values
