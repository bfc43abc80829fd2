"""Kernel ridge regression as an estimator; it works with scikit-learn and without it."""

import warnings
from typing import Any

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
    of_linear_kernels,
    r2,
    refuse_sparse,
    row_weights,
    show_parameters,
    validated,
)
from krrst_fast.estimator.gram_fit import GramFit, fit_gram, in_dense_blocks
from krrst_fast.estimator.partial import PartialRows, fit_mapped, targets_of
from krrst_fast.estimator.settings import Settings, settings_of
from krrst_fast.estimator.sparse import fit_sparse, unit_sparse_rows
from krrst_fast.ops.arrays import is_mapped, predict_blocks
from krrst_fast.ops.fit import krr_fit
from krrst_fast.ops.fitted import KRRFit
from krrst_fast.ops.kernel import unit_rows
from krrst_fast.ops.path import least_squares
from krrst_fast.ops.path_fit import PathFit
from krrst_fast.ops.per_target import TargetFit, fit_each_target
from krrst_fast.ops.problem import (
    check_dense,
    check_matrices,
    raise_non_finite,
    result_dtype,
)
from krrst_fast.ops.solver import RidgeOf, Solver

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
                float64 and not made dense. A memory-mapped array is read in blocks, float16 is
                then computed in float32, and where M > D there is no `dual_coef_`.
            y: Targets [M] or [M, P], of the same kind as X.
            sample_weight: A number, or one for each row [M], zero or more: a whole number is
                equivalent to that many copies of the row.

        Raises:
            ValueError: A shape or a value of X, y, sample_weight or a parameter does not fit.
            TypeError: One of them has another type or dtype.
            NotPositiveDefiniteError: The ridge is too small for these rows.
        """
        op = "KernelRidge.fit"
        f, targets = self._training_set(op, X, y, mapped=self.kernel == "linear")
        weights = row_weights(op, sample_weight, targets)
        self.__dict__.pop("_partial", None)
        of = settings_of(op, self, _matrix(targets), is_sparse(f))
        fit = self._fit(op, f, _matrix(targets), weights, of)
        return self._store(fit, targets, isinstance(X, Tensor), of)

    @of_linear_kernels
    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Fit to the rows of X and to those of all calls before, since the last `fit`.

        Only with the linear kernel. The rows are kept until they are more than the features; from
        then on only sums over them are, in float64, [D, D] and [D, P], and there is no
        `dual_coef_`. A ridge, or what it is relative to, may change between calls; `intercept` may
        not. Rows of a `fit` are not kept.

        Args:
            X: Features [m, D], an array or a tensor, of the same kind and dtype in all calls.
            y: Targets [m] or [m, P], of the same kind as X.
            sample_weight: As for `fit`.

        Raises:
            ValueError: A shape or a value of X, y, sample_weight or a parameter does not fit.
            TypeError: One of them has another type or dtype, or X is sparse.
            NotPositiveDefiniteError: The ridge is too small for these rows, which count as added.
        """
        op = "KernelRidge.partial_fit"
        refuse_sparse(op, X)
        known: PartialRows | None = self.__dict__.get("_partial")
        f, targets = self._training_set(op, X, y, mapped=True, reset=known is None)
        rows = f, targets, row_weights(op, sample_weight, targets)
        of = settings_of(op, self, _matrix(targets), False)
        if known is None:
            known = PartialRows(op, X, rows, self.intercept, of.solver)
        known.add(op, X, rows, of.ridge, of.solver, **of.numbers)
        self._partial = known
        kept = known.kept()
        if kept is None:
            fit: Fit = known.fit(op, of.ridge, of.solver, **of.numbers)
        else:
            fit = self._fit(op, *kept, of)
        return self._store(fit, targets, isinstance(X, Tensor), of)

    def _fit(self, op: str, f: Any, y: Tensor, weights: Tensor | None, of: Settings) -> Fit:
        """Fit y [M, P] on f [M, D]: a tensor, a memory-mapped array, or sparse in CSR."""
        ridge, kernel, numbers, solver = of
        many = of.without_ridge or isinstance(ridge, Tensor)
        if of.of_unit_length:
            f = unit_rows(f) if isinstance(f, Tensor) else unit_sparse_rows(f)
        try:
            if not of.linear and (kernel is None or many or not isinstance(f, Tensor)):
                how: dict[str, Any] = {**numbers, "weights": weights, "solver": solver}
                return fit_gram(op, f, y, kernel, ridge, **how)
            if isinstance(f, np.ndarray):
                return fit_mapped(op, (f, y, weights), ridge, solver=solver, **numbers)
            if not isinstance(f, Tensor):
                return fit_sparse(op, f, y, ridge, weights=weights, **numbers)
            if of.without_ridge:
                del numbers["ridge_of"]
                return least_squares(op, f, y, weights=weights, **numbers)
            how = {**numbers, "weights": weights, "solver": solver}
            if isinstance(ridge, Tensor):
                return fit_each_target(f, y, ridge, **how)
            how |= {} if of.linear else {"kernel": kernel}
            return krr_fit(f, y, ridge=ridge, **how)
        except NonFiniteError:
            if isinstance(f, np.ndarray):
                raise
            raise_non_finite(op, X=f if isinstance(f, Tensor) else None, y=y)

    def _store(self, fit: Fit, targets: Tensor, tensors: bool, of: Settings) -> Self:
        """Keep a fit of targets [M] or [M, P], and its coefficients as they were given."""
        # Where `precision` is not that of X, they are rounded to it.
        dtype, first = result_dtype(targets), 0 if targets.ndim == 1 else slice(None)
        alpha = getattr(fit, "alpha", None)  # not where rows are not kept
        found = {"intercept_": fit.intercept[first]}
        if of.linear and not isinstance(fit, GramFit):
            found["coef_"] = fit.weights.mT[first]
        found |= {} if alpha is None else {"dual_coef_": alpha[:, first]}
        for name in ("coef_", "dual_coef_"):
            self.__dict__.pop(name, None)
        for name, x in found.items():
            setattr(self, name, x.to(dtype) if tensors else as_array(x.to(dtype)))
        self.fit_: Fit = fit
        self._dtype, self._working = dtype, fit.intercept.dtype
        self._of_unit_length = of.of_unit_length
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
            device = fit.intercept.device
            if result_dtype(X) != self._dtype or X.device != device:
                raise TypeError(
                    f"{op}: X must be {self._dtype} on {device} like the fit, "
                    f"got {X.dtype} on {X.device}"
                )
            f = X.to(self._working)
        else:
            rows = validated(self, X, None, reset=False, mapped=True)[0]
            if is_sparse(rows):
                return self._predict_sparse(rows)
            if is_mapped(rows):
                like, working = fit.intercept, self._working
                found = predict_blocks(op, "X", rows, self._of_rows, like, working).to(self._dtype)
                return (found if self.intercept_.ndim else found[:, 0]).cpu().numpy()
            f = as_tensor(rows).to(fit.intercept.device, self._working)
        try:
            prediction = self._of_rows(f).to(self._dtype)
        except NonFiniteError:
            raise_non_finite(op, X=f)
        if self.intercept_.ndim == 0:
            prediction = prediction[:, 0]
        return prediction if isinstance(X, Tensor) else prediction.cpu().numpy()

    def _of_rows(self, f: Tensor) -> Tensor:
        """Predict [B, P] at rows [B, D] on the device of the fit."""
        return self.fit_.predict(unit_rows(f) if self._of_unit_length else f)

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
        return r2(predicted, exact, exact.new_ones(len(exact)) if weights is None else weights)

    def _predict_sparse(self, rows: Any) -> np.ndarray:
        """Predict at rows [B, D] in CSR."""
        fit = self.fit_
        if self._of_unit_length:
            rows = unit_sparse_rows(rows)
        if isinstance(fit, GramFit) and fit.of_given_gram:
            raise TypeError(
                f"KernelRidge.predict: a precomputed kernel must be dense, got {rows!r}"
            )
        if isinstance(fit, GramFit) or "coef_" not in self.__dict__:
            found = fit.predict(rows) if isinstance(fit, GramFit) else self._of_dense(rows)
            found = found if self.intercept_.ndim else found[:, 0]
            return found.astype(np.float64 if self._dtype == torch.float64 else np.float32)
        weights, constant = (x.cpu().double().numpy() for x in (fit.weights, fit.intercept))
        first = slice(None) if self.intercept_.ndim else 0
        found = rows @ weights[:, first] + constant[first]
        return found.astype(np.float64 if self._dtype == torch.float64 else np.float32)

    def _of_dense(self, rows: Any) -> np.ndarray:
        """Predict at rows in CSR by a fit of dense ones."""
        return in_dense_blocks(rows, lambda block: self._of_rows(block.to(self._working)).cpu())

    def _training_set(
        self, op: str, X: Any, y: Any, *, mapped: bool = False, reset: bool = True
    ) -> tuple[Any, Tensor]:
        """Return X [M, D], y [M] or [M, P] as tensors of one dtype, a sparse X in CSR.

        The estimator remembers the features, or if `reset` is False compares them.

        mapped: A memory-mapped X is returned as it is, and not read.
        """
        if isinstance(X, Tensor):
            _tensors(op, X=X, y=y)
            if len(X) == 0 or len(X) != len(y):
                raise ValueError(
                    f"{op}: X and y must have the same number of rows, one or more, "
                    f"got shapes {tuple(X.shape)} and {tuple(y.shape)}"
                )
            if reset:
                self.n_features_in_ = X.shape[1]
                self.__dict__.pop("feature_names_in_", None)
            elif X.shape[1] != self.n_features_in_:
                need = f"X must be [m, {self.n_features_in_}]"
                raise ValueError(f"{op}: {need}, got shape {tuple(X.shape)}")
            return X.detach(), y.detach()
        if isinstance(y, Tensor):
            raise TypeError(f"{op}: X and y must both be tensors or both arrays, got y a tensor")
        if y is None and not reset:
            raise ValueError(f"{op}: y must be an array, got None")
        X, y = validated(self, X, y, reset=reset, mapped=mapped)
        targets = as_tensor(targets_of(X, y))
        stays = is_sparse(X) or mapped and is_mapped(X)
        return (X if stays else as_tensor(X)), targets

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


def _matrix(y: Tensor) -> Tensor:
    """Return targets [M] or [M, P] as a matrix."""
    return y if y.ndim == 2 else y[:, None]
