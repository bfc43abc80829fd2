"""Kernel ridge regression as an estimator by scikit-learn's conventions, which it does not need."""

import warnings
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self  # torch brings it

from krrst_fast.backends import BackendName
from krrst_fast.errors import NonFiniteError
from krrst_fast.estimator_base import (
    BaseEstimator,
    MultiOutputMixin,
    NotFittedError,
    RegressorMixin,
    floats,
    validated,
)
from krrst_fast.krr import KRRFit, krr_fit
from krrst_fast.ops import checks, options
from krrst_fast.ops.options import FitOptions, Precision, RidgeOf
from krrst_fast.ops.prepare import result_dtype
from krrst_fast.planner import Form


class KernelRidge(MultiOutputMixin, RegressorMixin, BaseEstimator):
    """Kernel ridge regression with the kernel `scale <x, y> + bias`.

    With its defaults it fits what `sklearn.kernel_ridge.KernelRidge(alpha=ridge)` fits. Arrays in,
    arrays out; tensors in, tensors out, of the same device and dtype. The parameters are those of
    `krrst_fast.krr_fit`. scikit-learn's pipelines, searches and `clone` take it, where installed.

    Attributes:
        dual_coef_: coefficients of the rows, [M] or [M, P].
        coef_: coefficients of the features, [D] or [P, D].
        intercept_: `bias` times the sum of the dual coefficients, [] or [P].
        n_features_in_: D.
        feature_names_in_: the column names, if X was a data frame.
        fit_: the `KRRFit`.
    """

    def __init__(
        self,
        ridge: float | Tensor = 1.0,
        *,
        ridge_of: RidgeOf = "absolute",
        scale: float = 1.0,
        bias: float = 0.0,
        precision: Precision | None = None,
        refine: int = 0,
        form: Literal["auto"] | Form = "auto",
        backend: BackendName = "auto",
        max_retries: int | None = 3,
    ) -> None:
        self.ridge = ridge
        self.ridge_of = ridge_of
        self.scale = scale
        self.bias = bias
        self.precision = precision
        self.refine = refine
        self.form = form
        self.backend = backend
        self.max_retries = max_retries

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Fit to the rows of X.

        Args:
            X: features [M, D], an array or a tensor.
            y: targets [M] or [M, P], of the same kind as X.
            sample_weight: a number, or one for each row [M], zero or more: a whole one does what
                that many copies of its row do.

        Raises:
            ValueError, TypeError: X, y, sample_weight or a parameter does not fit.
            NotPositiveDefiniteError: the ridge is too small for these rows.
        """
        op = "KernelRidge.fit"
        f, targets = self._training_set(op, X, y)
        weights = _row_weights(op, sample_weight, f)
        y_2d = targets if targets.ndim == 2 else targets[:, None]
        # A search over a grid of NumPy hands in NumPy's numbers.
        given = {
            name: value.item() if isinstance(value, np.generic) else value
            for name, value in self.get_params(deep=False).items()
        }
        options.read(op, given, FitOptions)
        try:
            fit = krr_fit(f, y_2d, weights=weights, **given)
        except NonFiniteError:
            checks.blame(op, X=f, y=y_2d)
        # Where `precision` is not that of X, they are rounded to it.
        dtype = result_dtype(f)
        alpha, coef, intercept = (x.to(dtype) for x in (fit.alpha, fit.weights.mT, fit.intercept))
        if targets.ndim == 1:
            alpha, coef, intercept = alpha[:, 0], coef[0], intercept[0]
        as_given = (lambda x: x) if isinstance(X, Tensor) else _array
        self.dual_coef_, self.coef_, self.intercept_ = map(as_given, (alpha, coef, intercept))
        self.fit_, self._dtype = fit, dtype
        return self

    def predict(self, X: Any) -> Any:
        """Predictions [B] or [B, P], like the targets of the fit, at X [B, D].

        Of a tensor they are a tensor, differentiable in X, which must have the dtype and the device
        of the fit. Of an array they are an array of the dtype of the fit.

        Raises:
            NotFittedError, ValueError, TypeError: there is no fit, or X does not match it.
        """
        op = "KernelRidge.predict"
        fit = self._fitted(op)
        if isinstance(X, Tensor):
            _tensors(op, X=X)
            if X.shape[1] != self.n_features_in_:
                raise ValueError(
                    f"{op}: X must be [B, {self.n_features_in_}], got shape {tuple(X.shape)}"
                )
            if result_dtype(X) != self._dtype or X.device != fit.weights.device:
                raise TypeError(
                    f"{op}: X must be {self._dtype} on {fit.weights.device} like the fit, "
                    f"got {X.dtype} on {X.device}"
                )
            f = X.to(fit.weights.dtype)
        else:
            _refuse_sparse(op, X)
            f = _tensor(validated(self, X, None, reset=False)[0]).to(fit.weights)
        try:
            prediction = fit.predict(f).to(self._dtype)
        except NonFiniteError:
            checks.blame(op, X=f)
        if self.coef_.ndim == 1:
            prediction = prediction[:, 0]
        return prediction if isinstance(X, Tensor) else prediction.cpu().numpy()

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """R^2 of the predictions at X [B, D], the mean over the targets y [B] or [B, P].

        A target that does not vary counts 1 if it is met exactly, and 0 otherwise. NaN, with a
        warning, for fewer than two rows.
        """
        op = "KernelRidge.score"
        prediction = self.predict(X)
        if isinstance(X, Tensor):
            _tensors(op, X=X, y=y)
            pair = prediction.detach(), y.detach()
        else:
            pair = _tensor(prediction), _tensor(floats(op, "y", y))
        predicted, exact = (x.double() if x.ndim == 2 else x.double()[:, None] for x in pair)
        if predicted.shape != exact.shape:
            raise ValueError(
                f"{op}: y must be of shape {tuple(prediction.shape)}, got {tuple(pair[1].shape)}"
            )
        if not exact.isfinite().all():
            checks.blame(op, y=exact)
        if len(exact) < 2:
            warnings.warn(f"{op}: R^2 is not defined for fewer than two rows", stacklevel=2)
            return float("nan")
        weights = _row_weights(op, sample_weight, exact)
        return _r2(predicted, exact, exact.new_ones(len(exact)) if weights is None else weights)

    def _training_set(self, op: str, X: Any, y: Any) -> tuple[Tensor, Tensor]:
        """X [M, D] and y [M] or [M, P] as tensors of one dtype, and what X says of the features."""
        if isinstance(X, Tensor):
            _tensors(op, X=X, y=y)
            if len(X) == 0 or len(X) != len(y):
                raise ValueError(
                    f"{op}: X and y must have the same number of rows, one or more, "
                    f"got shapes {tuple(X.shape)} and {tuple(y.shape)}"
                )
            self.n_features_in_ = X.shape[1]
            self.__dict__.pop("feature_names_in_", None)
            return X.detach(), y.detach()
        _refuse_sparse(op, X)
        if isinstance(y, Tensor):
            raise TypeError(f"{op}: X and y must both be tensors or both arrays, got y a tensor")
        X, y = validated(self, X, y, reset=True)
        return _tensor(X), _tensor(y.astype(X.dtype, copy=False))

    def _fitted(self, op: str) -> KRRFit:
        if not hasattr(self, "fit_"):
            raise NotFittedError(f"{op}: there is no fit yet; call fit first")
        return self.fit_


def _tensors(op: str, **tensors: Any) -> None:
    """X is a matrix, y a matrix or a vector; both are dense, floating, alike and on one device."""
    for name, x in tensors.items():
        checks.dense(op, name, x)
        if x.ndim != 2 and (name, x.ndim) != ("y", 1):
            shapes = "a matrix" if name == "X" else "[M] or [M, P]"
            raise ValueError(f"{op}: {name} must be {shapes}, got shape {tuple(x.shape)}")
    checks.matrices(op, **{name: x if x.ndim == 2 else x[:, None] for name, x in tensors.items()})


def _refuse_sparse(op: str, x: Any) -> None:
    """A sparse matrix of scipy is named, not converted: its gram is dense anyway."""
    if hasattr(x, "nnz") and hasattr(x, "toarray"):
        raise TypeError(f"{op}: X is sparse ({type(x).__name__}); pass X.toarray()")


def _tensor(x: np.ndarray) -> Tensor:
    """The array as a tensor, copied only where torch cannot share its memory."""
    native = x.dtype.newbyteorder("=")
    return torch.from_numpy(np.require(x, native, ["C_CONTIGUOUS", "ALIGNED", "WRITEABLE"]))


def _array(x: Tensor) -> Any:
    """The tensor as an array, or as a number of NumPy if it is one."""
    return x.numpy()[()]


def _row_weights(op: str, sample_weight: Any, f: Tensor) -> Tensor | None:
    """One weight for each row of f [M, D], zero or more and not all zero, or None."""
    if sample_weight is None:
        return None
    weights = sample_weight
    if not isinstance(weights, Tensor):
        weights = torch.from_numpy(np.array(weights, dtype=np.float64)).to(f.device)
    if weights.ndim == 0:
        weights = weights.expand(len(f))
    if weights.shape != f.shape[:1] or weights.device != f.device:
        raise ValueError(
            f"{op}: sample_weight must be a number or [{len(f)}] on {f.device}, "
            f"got shape {tuple(weights.shape)} on {weights.device}"
        )
    weights = weights.detach().to(torch.float64 if f.dtype == torch.float64 else torch.float32)
    if not weights.isfinite().all():
        raise NonFiniteError(f"{op}: sample_weight holds NaN or infinity")
    if (weights < 0).any() or not weights.any():
        raise ValueError(f"{op}: no sample_weight may be negative, and not all may be zero")
    return weights


def _r2(predicted: Tensor, exact: Tensor, weights: Tensor) -> float:
    """Weighted R^2 of [B, P] float64 predictions, the mean over P."""
    w = weights[:, None]
    residual = (w * (exact - predicted).square()).sum(0)  # [P]
    mean = (w * exact).sum(0) / w.sum()
    total = (w * (exact - mean).square()).sum(0)
    scores = torch.where(total > 0, 1 - residual / total, (residual == 0).double())
    return scores.mean().item()
