"""Kernel ridge regression that chooses its ridge, as an estimator."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from typing_extensions import Self

from krrst_fast.errors import NonFiniteError
from krrst_fast.estimator.base import as_array, refuse_sparse, row_weights, show_parameters
from krrst_fast.estimator.ridge import KernelRidge
from krrst_fast.ops.path import path_of_unchanging
from krrst_fast.ops.path_fit import PathFit
from krrst_fast.ops.problem import raise_non_finite, result_dtype
from krrst_fast.ops.solver import RidgeOf


class KernelRidgeCV(KernelRidge):
    """`KernelRidge` with the ridge of the smallest leave-one-out error, for all targets or each.

    The errors are exact, from one eigendecomposition in float64, and computed in blocks of targets.
    Where M <= D nothing of the size of the features' coefficients [P, D] is made before `coef_` is
    asked for. A weighted row is left out with its whole weight.

    Args:
        ridges: Positive numbers.
        per_target: Choose a ridge for each target, as himalaya does, instead of one for all.
        ridge_of, scale, bias, intercept: As for `KernelRidge`.

    Attributes:
        ridge_: The ridge [], or with `per_target` those of the targets [P].
        loo_mse_: Mean squared leave-one-out errors [R], or [R, P].
        dual_coef_, coef_, intercept_, n_features_in_, feature_names_in_: As of `KernelRidge`.
        fit_: The `PathFit`.
    """

    kernel = "linear"  # not a parameter: eigenvectors of another Gram give no coefficients

    def __init__(
        self,
        ridges: Sequence[float] | Tensor = (0.1, 1.0, 10.0),
        *,
        per_target: bool = False,
        ridge_of: RidgeOf = "absolute",
        scale: float = 1.0,
        bias: float = 0.0,
        intercept: bool = False,
    ) -> None:
        self.ridges = ridges
        self.per_target = per_target
        self.ridge_of = ridge_of
        self.scale = scale
        self.bias = bias
        self.intercept = intercept

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Choose the ridge, and fit to the rows of X; arguments and errors as of `KernelRidge`."""
        op = "KernelRidgeCV.fit"
        if not isinstance(self.per_target, bool):
            raise TypeError(f"{op}: per_target must be True or False, got {self.per_target!r}")
        refuse_sparse(op, X)
        f, targets = self._training_set(op, X, y)
        weights = row_weights(op, sample_weight, targets)
        y_2d = targets if targets.ndim == 2 else targets[:, None]
        kernel: dict[str, Any] = {"ridge_of": self.ridge_of, "scale": self.scale, "bias": self.bias}
        try:
            path = path_of_unchanging(
                f, y_2d, self.ridges, weights=weights, intercept=self.intercept, **kernel
            )
        except NonFiniteError:
            raise_non_finite(op, X=f, y=y_2d)
        fit = path.fit_best(per_target=self.per_target)
        scores = path.loo_mse_per_target if self.per_target else path.loo_mse
        ridge = fit.ridge if self.per_target else path.best
        alpha, intercept = fit.alpha, fit.intercept
        if targets.ndim == 1:
            alpha, intercept = alpha[:, 0], intercept[0]
            ridge, scores = ridge.reshape(()), scores.reshape(-1)
        found = ridge, scores, alpha, intercept
        self._as_given = "tensor" if isinstance(X, Tensor) else "array"
        found = found if isinstance(X, Tensor) else tuple(map(as_array, found))
        self.ridge_, self.loo_mse_, self.dual_coef_, self.intercept_ = found
        self.fit_, self._dtype = fit, result_dtype(f)
        self._working = self._dtype
        return self

    @property
    def partial_fit(self) -> Any:
        """Raise AttributeError: leave-one-out errors need all rows."""
        raise AttributeError("KernelRidgeCV: has no partial_fit: the choice needs all rows")

    @property
    def coef_(self) -> Any:
        """Coefficients of the features, [D] or [P, D]; made when they are asked for."""
        fit = self._fitted("KernelRidgeCV.coef_")
        assert isinstance(fit, PathFit)
        coef = fit.weights.mT
        coef = coef[0] if self.dual_coef_.ndim == 1 else coef
        return coef if self._as_given == "tensor" else as_array(coef)

    def __sklearn_tags__(self) -> Any:
        """Tell scikit-learn that sparse rows are refused."""
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = False
        tags.input_tags.pairwise = False
        return tags


show_parameters(KernelRidgeCV)
