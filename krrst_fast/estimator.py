"""Kernel ridge regression as an estimator; it works with scikit-learn and without it."""

import inspect
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self  # torch brings it

from krrst_fast.errors import NonFiniteError
from krrst_fast.ops.fit import KRRFit, krr_fit
from krrst_fast.ops.per_target import TargetFit, fit_each_target
from krrst_fast.ops.problem import (
    check_dense,
    check_kernel,
    check_matrices,
    raise_non_finite,
    result_dtype,
)
from krrst_fast.ops.solver import DEFAULT, RidgeOf, Solver

try:
    from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
    from sklearn.exceptions import NotFittedError
    from sklearn.utils.validation import validate_data  # since 1.6

    HAS_SKLEARN = True
except ImportError:
    HAS_SKLEARN = False

    class NotFittedError(ValueError, AttributeError):  # type: ignore[no-redef]
        """An estimator is used before it is fitted."""

    class MultiOutputMixin:  # type: ignore[no-redef]
        """A mark that only scikit-learn reads."""

    class RegressorMixin:  # type: ignore[no-redef]
        """A mark that only scikit-learn reads."""

    class BaseEstimator:  # type: ignore[no-redef]
        """Parameters are the arguments of the constructor, kept as attributes of the same names."""

        def get_params(self, deep: bool = True) -> dict[str, Any]:
            """Return the parameters by name; `deep` is for estimators that hold others."""
            return {name: getattr(self, name) for name in self._defaults()}

        def set_params(self, **params: Any) -> "BaseEstimator":
            """Change parameters by name; the next fit reads them."""
            names = list(self._defaults())
            for name in params:
                if name not in names:
                    raise ValueError(
                        f"Invalid parameter {name!r} for estimator {self!r}. "
                        f"Valid parameters are: {names!r}."
                    )
            for name, value in params.items():
                setattr(self, name, value)
            return self

        def __repr__(self) -> str:
            defaults = self._defaults()
            changed = (
                f"{name}={value!r}"
                for name, value in self.get_params().items()
                if repr(value) != repr(defaults[name])
            )
            return f"{type(self).__name__}({', '.join(changed)})"

        @classmethod
        def _defaults(cls) -> dict[str, Any]:
            parameters = inspect.signature(cls.__init__).parameters
            return {name: parameters[name].default for name in sorted(parameters) if name != "self"}


class KernelRidge(MultiOutputMixin, RegressorMixin, BaseEstimator):
    """Kernel ridge regression with the kernel `scale <x, y> + bias`.

    With its defaults it fits what `sklearn.kernel_ridge.KernelRidge(alpha=ridge)` fits. Arrays give
    arrays; tensors give tensors, of the same device and dtype. It can be part of pipelines and
    searches of scikit-learn.

    Args:
        ridge: Positive number, or one for each target [P], an array or a tensor.
        ridge_of: What the ridge multiplies: 1 ("absolute"), the "trace" of K, or its
            "mean_diagonal".
        scale: Positive factor of every inner product.
        bias: Non-negative constant that is added to every kernel value.
        intercept: Fit a constant that the ridge does not penalise, as `sklearn.linear_model.Ridge`
            does; bias must then be 0.
        solver: A `krrst_fast.Solver`; None is `Solver()`.

    Attributes:
        dual_coef_: Coefficients of the rows, [M] or [M, P].
        coef_: Coefficients of the features, [D] or [P, D].
        intercept_: `bias` times the sum of the dual coefficients, or the constant, [] or [P].
        n_features_in_: D.
        feature_names_in_: The column names, if X was a data frame.
        fit_: The `KRRFit`; with a ridge for each target the `TargetFit`.
    """

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
        intercept: bool = False,
        solver: Solver | None = None,
    ) -> None:
        self.ridge = ridge
        self.ridge_of = ridge_of
        self.scale = scale
        self.bias = bias
        self.intercept = intercept
        self.solver = solver

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Fit to the rows of X.

        Args:
            X: Features [M, D], an array or a tensor.
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
        weights = _row_weights(op, sample_weight, f)
        y_2d = targets if targets.ndim == 2 else targets[:, None]
        # A search over a grid of NumPy passes NumPy's numbers.
        ridge, scale, bias = map(_python, (self.ridge, self.scale, self.bias))
        ridge = _ridges(op, ridge, y_2d)
        check_kernel(op, ridge, self.ridge_of, True, scale, bias)
        kernel: dict[str, Any] = {"ridge_of": self.ridge_of, "scale": scale, "bias": bias}
        kernel["intercept"] = self.intercept
        solver = DEFAULT if self.solver is None else self.solver
        fit: KRRFit | TargetFit
        try:
            if isinstance(ridge, Tensor):
                fit = fit_each_target(f, y_2d, ridge, weights=weights, solver=solver, **kernel)
            else:
                fit = krr_fit(f, y_2d, ridge=ridge, weights=weights, solver=solver, **kernel)
        except NonFiniteError:
            raise_non_finite(op, X=f, y=y_2d)
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
            raise_non_finite(op, X=f)
        if self.coef_.ndim == 1:
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
            pair = _tensor(prediction), _tensor(floats(op, "y", y))
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
        weights = _row_weights(op, sample_weight, exact)
        return _r2(predicted, exact, exact.new_ones(len(exact)) if weights is None else weights)

    def _training_set(self, op: str, X: Any, y: Any) -> tuple[Tensor, Tensor]:
        """Return X [M, D] and y [M] or [M, P] as tensors of one dtype; remember the features."""
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

    def _fitted(self, op: str) -> KRRFit | TargetFit:
        if not hasattr(self, "fit_"):
            raise NotFittedError(f"{op}: there is no fit yet; call fit first")
        return self.fit_


# Not that of `__new__`, which Python would show.
KernelRidge.__signature__ = inspect.signature(KernelRidge.__init__).replace(
    parameters=list(inspect.signature(KernelRidge.__init__).parameters.values())[1:]
)


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


def _refuse_sparse(op: str, x: Any) -> None:
    """Refuse a sparse matrix of scipy instead of converting it: its Gram is dense anyway."""
    if hasattr(x, "nnz") and hasattr(x, "toarray"):
        raise TypeError(f"{op}: X is sparse ({type(x).__name__}); pass X.toarray()")


def _tensor(x: np.ndarray) -> Tensor:
    """Return the array as a tensor, copied only where torch cannot share its memory."""
    native = x.dtype.newbyteorder("=")
    return torch.from_numpy(np.require(x, native, ["C_CONTIGUOUS", "ALIGNED", "WRITEABLE"]))


def _array(x: Tensor) -> Any:
    """Return the tensor as an array, or a scalar as a NumPy number."""
    return x.numpy()[()]


def _row_weights(op: str, sample_weight: Any, f: Tensor) -> Tensor | None:
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


def validated(estimator: Any, x: Any, y: Any, *, reset: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return x [N, D] and y [N] or [N, P] as finite float arrays; integers become float64.

    With `reset` they are of a fit: the estimator remembers D, and the names of the columns of a
    data frame. Otherwise both must agree with that, and y is not looked at.
    """
    if HAS_SKLEARN:
        settings: dict[str, Any] = {"dtype": (np.float64, np.float32), "reset": reset}
        if reset:
            return validate_data(estimator, x, y, multi_output=True, y_numeric=True, **settings)
        return validate_data(estimator, x, **settings), y
    name = type(estimator).__name__
    columns = _column_names(x)
    x = floats(name, "X", x)
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"{name}: X must be a matrix of some rows and columns, got {x.shape}")
    if reset:
        y = floats(name, "y", y)
        if y.ndim not in (1, 2) or 0 in y.shape or len(y) != len(x):
            raise ValueError(f"{name}: y must be [{len(x)}] or [{len(x)}, P], got {y.shape}")
        estimator.n_features_in_ = x.shape[1]
        estimator.__dict__.pop("feature_names_in_", None)
        if columns is not None:
            estimator.feature_names_in_ = columns
    elif x.shape[1] != estimator.n_features_in_:
        raise ValueError(
            f"X has {x.shape[1]} features, but {name} is expecting "
            f"{estimator.n_features_in_} features as input"
        )
    elif columns is not None and not np.array_equal(
        columns, getattr(estimator, "feature_names_in_", columns)
    ):
        raise ValueError(f"{name}: the columns of X must have the names and the order of the fit")
    return x, y


def _column_names(x: Any) -> np.ndarray | None:
    """Return the column names of a data frame, if all of them are strings."""
    columns = list(getattr(x, "columns", ()))
    if not columns or not all(isinstance(column, str) for column in columns):
        return None
    return np.array(columns, dtype=object)


def floats(owner: str, name: str, x: Any) -> np.ndarray:
    """Return x as a finite float32 or float64 array."""
    if x is None:
        raise ValueError(f"{owner}: {name} must be an array, got None")
    array = np.asarray(x)
    if array.dtype.kind == "c":
        raise ValueError(f"{owner}: {name} must be real, got {array.dtype}")
    if array.dtype not in (np.float32, np.float64):
        try:
            array = array.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{owner}: {name} must be numbers: {error}") from None
    if not np.isfinite(array).all():
        raise NonFiniteError(f"{owner}: {name} holds NaN or infinity")
    return array
