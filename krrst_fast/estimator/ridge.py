"""Kernel ridge regression as an estimator; it works with scikit-learn and without it."""

import math
import warnings
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self  # torch brings it

from krrst_fast.errors import NonFiniteError
from krrst_fast.estimator.base import (
    BaseEstimator,
    MultiOutputMixin,
    NotFittedError,
    RegressorMixin,
    as_array,
    as_tensor,
    floats,
    is_sparse,
    show_parameters,
    validated,
)
from krrst_fast.estimator.gram_fit import GramFit, fit_gram, in_dense_blocks
from krrst_fast.estimator.sparse import fit_sparse, unit_sparse_rows
from krrst_fast.ops.fit import KRRFit, krr_fit
from krrst_fast.ops.kernel import Kernel, KernelName, unit_rows
from krrst_fast.ops.path import least_squares
from krrst_fast.ops.path_fit import PathFit
from krrst_fast.ops.per_target import TargetFit, fit_each_target
from krrst_fast.ops.problem import (
    check_dense,
    check_kernel,
    check_matrices,
    raise_non_finite,
    result_dtype,
)
from krrst_fast.ops.solver import DEFAULT, RidgeOf, Solver

Fit = KRRFit | TargetFit | PathFit | GramFit


class KernelRidge(MultiOutputMixin, RegressorMixin, BaseEstimator):
    """Kernel ridge regression with the kernel `scale k(x, y) + bias`.

    With its defaults it fits what `sklearn.kernel_ridge.KernelRidge(alpha=ridge)` fits. Arrays give
    arrays; tensors give tensors, of the same device and dtype. It can be part of pipelines and
    searches of scikit-learn.

    Args:
        ridge: Positive number, or one for each target [P], an array or a tensor. 0 is least squares
            of minimum norm, by eigenvalues in float64; those that are rounding count as 0.
        ridge_of: What the ridge multiplies: 1 ("absolute"), the "trace" of K, or its
            "mean_diagonal".
        scale: Positive factor of every kernel value.
        bias: Non-negative constant that is added to every kernel value.
        kernel: "linear", "polynomial" (or "poly"), "rbf", "cosine", "arccos", as described in
            `krrst_fast.Kernel`, or "precomputed": X is then the Gram matrix [M, M] of the fit, and
            [B, M] for a prediction.
        gamma: Positive number, None for 1 / D; of the kernels "polynomial" and "rbf".
        degree, coef0: Power and constant of the kernel "polynomial".
        intercept: Fit a constant that the ridge does not penalise, as `sklearn.linear_model.Ridge`
            does; bias must then be 0. Of the kernels "linear" and "cosine".
        solver: A `krrst_fast.Solver`; None is `Solver()`. Fits of sparse rows, and without a ridge,
            are computed in float64 whatever it says; a `GramFit` takes its retries and checks.

    Attributes:
        dual_coef_: Coefficients of the rows, [M] or [M, P].
        coef_: Coefficients of the features, [D] or [P, D], for the kernel "cosine" of rows of
            length 1; no other kernel but "linear" has them.
        intercept_: `bias` times the sum of the dual coefficients, or the constant, [] or [P].
        n_features_in_: D.
        feature_names_in_: The column names, if X was a data frame.
        fit_: The `KRRFit`; a `TargetFit` with a ridge for each target, a `PathFit` without a ridge,
            a `GramFit` for the same with a non-linear kernel, and for a given Gram.
    """

    _of_unit_length = False  # of the kernel "cosine": rows are divided by their length

    def __new__(cls, *args: Any, **parameters: Any) -> Self:
        """Refuse scikit-learn's name of the ridge."""
        if "alpha" in parameters:
            raise TypeError(f"{cls.__name__}: the alpha of scikit-learn is called ridge here")
        return super().__new__(cls)

    def __init__(
        self,
        ridge: float | Tensor = 1.0,
        *,
        ridge_of: RidgeOf = "absolute",
        scale: float = 1.0,
        bias: float = 0.0,
        kernel: str = "linear",
        gamma: float | Tensor | None = None,
        degree: int = 3,
        coef0: float = 1.0,
        intercept: bool = False,
        solver: Solver | None = None,
    ) -> None:
        self.ridge = ridge
        self.ridge_of = ridge_of
        self.scale = scale
        self.bias = bias
        self.kernel = kernel
        self.gamma = gamma
        self.degree = degree
        self.coef0 = coef0
        self.intercept = intercept
        self.solver = solver

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Fit to the rows of X.

        Args:
            X: Features [M, D], an array, a tensor or a sparse matrix of SciPy, which is solved in
                float64 and not made dense.
            y: Targets [M] or [M, P], of the same kind as X.
            sample_weight: A number, or one for each row [M], zero or more: a whole number is
                equivalent to that many copies of the row.

        Raises:
            ValueError: A shape or a value of X, y, sample_weight or a parameter does not fit.
            TypeError: One of them has another type or dtype.
            NotPositiveDefiniteError: The ridge is too small for these rows.
        """
        op = "KernelRidge.fit"
        f, targets = self._training_set(op, X, y)
        weights = row_weights(op, sample_weight, targets)
        y_2d = targets if targets.ndim == 2 else targets[:, None]
        # A search over a grid of NumPy passes NumPy's numbers.
        ridge, scale, bias = map(_python, (self.ridge, self.scale, self.bias))
        ridge = _ridges(op, ridge, y_2d)
        none = not isinstance(ridge, Tensor | bool) and ridge == 0
        positive = ridge.masked_fill(ridge == 0, 1) if isinstance(ridge, Tensor) else ridge
        check_kernel(op, 1.0 if none else positive, self.ridge_of, True, scale, bias)
        of: dict[str, Any] = {"ridge_of": self.ridge_of, "scale": scale, "bias": bias}
        solver = DEFAULT if self.solver is None else self.solver
        kernel = self._kernel(op, not isinstance(f, Tensor))
        linear = kernel is not None and not kernel.of_products
        if not linear and self.intercept:
            raise ValueError(f"{op}: intercept must be False with kernel {self.kernel!r}")
        of |= {"intercept": self.intercept} if linear else {}
        if kernel is not None and kernel.name == "cosine":
            f = unit_rows(f) if isinstance(f, Tensor) else unit_sparse_rows(f)
        many = none or isinstance(ridge, Tensor)
        fit: Fit
        try:
            if kernel is None or not (linear or isinstance(f, Tensor) and not many):
                fit = fit_gram(op, f, y_2d, kernel, ridge, weights=weights, solver=solver, **of)
            elif not isinstance(f, Tensor):
                fit = fit_sparse(op, f, y_2d, ridge, weights=weights, **of)
            elif none:
                del of["ridge_of"]
                fit = least_squares(op, f, y_2d, weights=weights, **of)
            elif isinstance(ridge, Tensor):
                fit = fit_each_target(f, y_2d, ridge, weights=weights, solver=solver, **of)
            else:
                of |= {} if linear else {"kernel": kernel}
                fit = krr_fit(f, y_2d, ridge=ridge, weights=weights, solver=solver, **of)
        except NonFiniteError:
            raise_non_finite(op, X=f if isinstance(f, Tensor) else None, y=y_2d)
        # Where `precision` is not that of X, they are rounded to it.
        dtype = result_dtype(y_2d)
        found = [fit.alpha.to(dtype), fit.intercept.to(dtype)]
        found += [fit.weights.mT.to(dtype)] if not isinstance(fit, GramFit) and linear else []
        if targets.ndim == 1:
            found = [x[:, 0] if i == 0 else x[0] for i, x in enumerate(found)]
        as_given = (lambda x: x) if isinstance(X, Tensor) else as_array
        self.dual_coef_, self.intercept_, *coef = map(as_given, found)
        self.__dict__.pop("coef_", None)
        if coef:
            self.coef_ = coef[0]
        self._of_unit_length = kernel is not None and kernel.name == "cosine"
        self.fit_: Fit = fit
        self._dtype, self._working = dtype, fit.alpha.dtype
        return self

    def predict(self, X: Any) -> Any:
        """Predict [B] or [B, P], like the targets of the fit, at X [B, D].

        A tensor X must have the dtype and the device of the fit, and gives a tensor that is
        differentiable in X. An array gives an array of the dtype of the fit.

        Raises:
            NotFittedError: `fit` was not called.
            ValueError: The shape of X does not match the fit.
            TypeError: X has another dtype or device than the fit.
        """
        op = "KernelRidge.predict"
        fit = self._fitted(op)
        if isinstance(X, Tensor):
            _tensors(op, X=X)
            if X.shape[1] != self.n_features_in_:
                raise ValueError(
                    f"{op}: X must be [B, {self.n_features_in_}], got shape {tuple(X.shape)}"
                )
            if result_dtype(X) != self._dtype or X.device != fit.alpha.device:
                raise TypeError(
                    f"{op}: X must be {self._dtype} on {fit.alpha.device} like the fit, "
                    f"got {X.dtype} on {X.device}"
                )
            f = X.to(self._working)
        else:
            rows = validated(self, X, None, reset=False)[0]
            if is_sparse(rows):
                return self._predict_sparse(rows)
            f = as_tensor(rows).to(fit.alpha.device, self._working)
        if self._of_unit_length:
            f = unit_rows(f)
        try:
            prediction = fit.predict(f).to(self._dtype)
        except NonFiniteError:
            raise_non_finite(op, X=f)
        if self.dual_coef_.ndim == 1:
            prediction = prediction[:, 0]
        return prediction if isinstance(X, Tensor) else prediction.cpu().numpy()

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Compute R^2 of the predictions at X [B, D], the mean over the targets y [B] or [B, P].

        A constant target counts 1 if it is predicted exactly, and 0 otherwise. NaN, with a warning,
        for fewer than two rows.
        """
        op = "KernelRidge.score"
        prediction = self.predict(X)
        if isinstance(X, Tensor):
            _tensors(op, X=X, y=y)
            pair = prediction.detach(), y.detach()
        else:
            pair = as_tensor(prediction), as_tensor(floats(op, "y", y))
        predicted, exact = (x.double() if x.ndim == 2 else x.double()[:, None] for x in pair)
        if predicted.shape != exact.shape:
            raise ValueError(
                f"{op}: y must be of shape {tuple(prediction.shape)}, got {tuple(pair[1].shape)}"
            )
        if not exact.isfinite().all():
            raise_non_finite(op, y=exact)
        if len(exact) < 2:
            warnings.warn(f"{op}: R^2 is not defined for fewer than two rows", stacklevel=2)
            return float("nan")
        weights = row_weights(op, sample_weight, exact)
        return _r2(predicted, exact, exact.new_ones(len(exact)) if weights is None else weights)

    def _kernel(self, op: str, sparse: bool) -> Kernel | None:
        """Return the kernel, or None for "precomputed"."""
        names = (*get_args(KernelName), "poly", "precomputed")
        if not isinstance(self.kernel, str) or self.kernel not in names:
            raise ValueError(f"{op}: kernel must be one of {list(names)}, got {self.kernel!r}")
        if self.kernel == "precomputed":
            if sparse:
                raise TypeError(f"{op}: a precomputed kernel must be dense, got a sparse X")
            return None
        name: Any = "polynomial" if self.kernel == "poly" else self.kernel
        gamma, degree, coef0 = map(_python, (self.gamma, self.degree, self.coef0))
        if isinstance(gamma, Tensor | np.ndarray):
            if math.prod(gamma.shape) != 1:
                raise ValueError(f"{op}: gamma must be one number, got {gamma!r}")
            gamma = gamma.item()
        if isinstance(degree, float) and degree.is_integer():
            degree = int(degree)  # what scikit-learn allows
        return Kernel(name, gamma if name in ("polynomial", "rbf") else None, degree, coef0)

    def _predict_sparse(self, rows: Any) -> np.ndarray:
        """Predict at rows [B, D] in CSR."""
        fit = self.fit_
        if self._of_unit_length:
            rows = unit_sparse_rows(rows)
        if self.kernel == "precomputed":
            raise TypeError(
                f"KernelRidge.predict: a precomputed kernel must be dense, got {rows!r}"
            )
        if isinstance(fit, GramFit) or not hasattr(self, "coef_"):
            found = fit.predict(rows) if isinstance(fit, GramFit) else self._of_dense(rows)
            found = found[:, 0] if self.dual_coef_.ndim == 1 else found
            return found.astype(np.float64 if self._dtype == torch.float64 else np.float32)
        weights, constant = (x.cpu().double().numpy() for x in (fit.weights, fit.intercept))
        found = rows @ (weights[:, 0] if self.dual_coef_.ndim == 1 else weights)
        found = found + (constant[0] if self.dual_coef_.ndim == 1 else constant)
        return found.astype(np.float64 if self._dtype == torch.float64 else np.float32)

    def _of_dense(self, rows: Any) -> np.ndarray:
        """Predict at rows in CSR by a fit of dense ones."""
        fit = self.fit_
        return in_dense_blocks(rows, lambda block: fit.predict(block.to(self._working)).cpu())

    def _training_set(self, op: str, X: Any, y: Any) -> tuple[Any, Tensor]:
        """Return X [M, D], y [M] or [M, P] as tensors of one dtype, a sparse X in CSR.

        The estimator remembers the features.
        """
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
        if isinstance(y, Tensor):
            raise TypeError(f"{op}: X and y must both be tensors or both arrays, got y a tensor")
        X, y = validated(self, X, y, reset=True)
        targets = as_tensor(y.astype(X.dtype, copy=False))
        return (X if is_sparse(X) else as_tensor(X)), targets

    def __sklearn_tags__(self) -> Any:
        """Tell scikit-learn that sparse rows are welcome."""
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = self.kernel != "precomputed"
        tags.input_tags.pairwise = self.kernel == "precomputed"
        return tags

    def _fitted(self, op: str) -> Fit:
        if not hasattr(self, "fit_"):
            raise NotFittedError(f"{op}: there is no fit yet; call fit first")
        return self.fit_


show_parameters(KernelRidge)


def _tensors(op: str, **tensors: Any) -> None:
    """Check that X is a matrix and y a matrix or a vector, dense, floating, on one device."""
    for name, x in tensors.items():
        check_dense(op, name, x)
        if x.ndim != 2 and (name, x.ndim) != ("y", 1):
            shapes = "a matrix" if name == "X" else "[M] or [M, P]"
            raise ValueError(f"{op}: {name} must be {shapes}, got shape {tuple(x.shape)}")
    columns = [x if x.ndim == 2 else x[:, None] for x in tensors.values()]
    check_matrices(op, list(tensors), columns)


def _python(value: Any) -> Any:
    """Return a NumPy scalar as a Python one."""
    return value.item() if isinstance(value, np.generic) else value


def _ridges(op: str, ridge: Any, y: Tensor) -> Any:
    """Return a ridge as a number, or as a tensor [P] for y [M, P]."""
    if not isinstance(ridge, Tensor | np.ndarray | list | tuple):
        return ridge
    values = torch.as_tensor(ridge, dtype=torch.float64, device=y.device).detach()
    if values.numel() == 1:
        return values.item()
    if values.shape != y.shape[1:]:
        raise ValueError(
            f"{op}: ridge must be a number, or one for each of the {y.shape[1]} targets, "
            f"got shape {tuple(values.shape)}"
        )
    return values


def row_weights(op: str, sample_weight: Any, f: Tensor) -> Tensor | None:
    """Return one weight for each row of f [M, D], zero or more and not all zero, or None."""
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
    """Compute the weighted R^2 of [B, P] float64 predictions, the mean over P."""
    w = weights[:, None]
    residual = (w * (exact - predicted).square()).sum(0)  # [P]
    mean = (w * exact).sum(0) / w.sum()
    total = (w * (exact - mean).square()).sum(0)
    scores = torch.where(total > 0, 1 - residual / total, (residual == 0).double())
    return scores.mean().item()
