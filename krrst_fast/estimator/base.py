"""What the estimators share with scikit-learn, where it is installed, and with NumPy."""

import functools
import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor

from krrst_fast.errors import NonFiniteError
from krrst_fast.ops.arrays import is_mapped

# What is computed in float32 where it is not copied.
_STREAMED = (np.float32, np.float16)

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


def show_parameters(cls: type) -> None:
    """Set the signature that help and scikit-learn show: of `__init__`, not of `__new__`."""
    signature = inspect.signature(cls.__init__)  # type: ignore[misc]
    cls.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=list(signature.parameters.values())[1:]
    )


class of_linear_kernels:
    """A method that an estimator with another kernel does not have, as scikit-learn expects."""

    def __init__(self, method: Any) -> None:
        self.method = method
        functools.update_wrapper(self, method)  # type: ignore[arg-type]

    def __get__(self, estimator: Any, owner: type) -> Any:
        if estimator is None:
            return self.method
        if estimator.kernel != "linear":
            name = f"{owner.__name__}.{self.method.__name__}"
            raise AttributeError(f"{name}: kernel must be 'linear', got {estimator.kernel!r}")
        return self.method.__get__(estimator, owner)


def is_sparse(x: Any) -> bool:
    """Return whether x is a sparse matrix or array of SciPy."""
    return hasattr(x, "nnz") and hasattr(x, "tocsr")


def refuse_sparse(op: str, x: Any) -> None:
    """Refuse a sparse matrix of SciPy instead of converting it: what it is for is dense."""
    if is_sparse(x):
        raise TypeError(f"{op}: X is sparse ({type(x).__name__}); pass X.toarray()")


def as_tensor(x: np.ndarray) -> Tensor:
    """Return the array as a tensor, copied only where torch cannot share its memory."""
    native = x.dtype.newbyteorder("=")
    return torch.from_numpy(np.require(x, native, ["C_CONTIGUOUS", "ALIGNED", "WRITEABLE"]))


def as_array(x: Tensor) -> Any:
    """Return the tensor as an array, or a scalar as a NumPy number."""
    return x.numpy()[()]


def validated(
    estimator: Any, x: Any, y: Any, *, reset: bool, mapped: bool = False
) -> tuple[np.ndarray, Any]:
    """Return x [N, D] and y [N] or [N, P] as finite float arrays; integers become float64.

    With `reset` they are of a fit: the estimator remembers D, and the names of the columns of a
    data frame. Otherwise both must agree with that, and y is looked at if it is not None.

    With `mapped` a memory-mapped x is not read: it may hold NaN, and may be float16.
    """
    mapped = mapped and is_mapped(x)
    if HAS_SKLEARN:
        settings: dict[str, Any] = {"dtype": (np.float64, np.float32), "reset": reset}
        settings["accept_sparse"] = "csr"
        if mapped:
            settings |= {"dtype": (np.float64, *_STREAMED), "ensure_all_finite": False}
        if reset or y is not None:
            return validate_data(estimator, x, y, multi_output=True, y_numeric=True, **settings)
        return validate_data(estimator, x, **settings), y
    name = type(estimator).__name__
    columns = _column_names(x)
    if is_sparse(x):
        x = x.tocsr()
        x = x if x.dtype in (np.float32, np.float64) else x.astype(np.float64)
        floats(name, "X", x.data)
    elif not mapped or x.dtype not in (np.float64, *_STREAMED):
        x = floats(name, "X", x)
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"{name}: X must be a matrix of some rows and columns, got {x.shape}")
    if reset or y is not None:
        y = floats(name, "y", y)
        if y.ndim not in (1, 2) or 0 in y.shape or len(y) != x.shape[0]:
            raise ValueError(
                f"{name}: y must be [{x.shape[0]}] or [{x.shape[0]}, P], got {y.shape}"
            )
    if reset:
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


def r2(predicted: Tensor, exact: Tensor, weights: Tensor) -> float:
    """Compute the weighted R^2 of [B, P] float64 predictions, the mean over P."""
    w = weights[:, None]
    residual = (w * (exact - predicted).square()).sum(0)  # [P]
    mean = (w * exact).sum(0) / w.sum()
    total = (w * (exact - mean).square()).sum(0)
    scores = torch.where(total > 0, 1 - residual / total, (residual == 0).double())
    return scores.mean().item()
