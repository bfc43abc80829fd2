"""The parameters of `KernelRidge`, checked."""

import math
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from krrst_fast.ops.kernel import Kernel, KernelName
from krrst_fast.ops.problem import check_kernel
from krrst_fast.ops.solver import DEFAULT, Solver


class Settings(NamedTuple):
    """Parameters as the fits take them.

    Attributes:
        ridge: A number, or a tensor [P].
        kernel: None for "precomputed".
        numbers: ridge_of, scale, bias, and of a linear kernel intercept.
        solver: How the system is solved.
    """

    ridge: Any
    kernel: Kernel | None
    numbers: dict[str, Any]
    solver: Solver

    @property
    def without_ridge(self) -> bool:
        """Whether the ridge is 0 for all targets."""
        return not isinstance(self.ridge, Tensor | bool) and self.ridge == 0

    @property
    def linear(self) -> bool:
        """Whether the kernel is linear, in the rows or in rows of length 1."""
        return self.kernel is not None and not self.kernel.of_products

    @property
    def of_unit_length(self) -> bool:
        """Whether rows are divided by their length."""
        return self.kernel is not None and self.kernel.name == "cosine"


def settings_of(op: str, estimator: Any, y: Tensor, sparse: bool) -> Settings:
    """Check the parameters of an estimator for targets y [M, P].

    Raises:
        ValueError: A value does not fit.
        TypeError: A value has another type.
    """
    # A search over a grid of NumPy passes NumPy's numbers.
    given = estimator.ridge, estimator.scale, estimator.bias
    ridge, scale, bias = map(_python, given)
    ridge = _ridges(op, ridge, y)
    positive = ridge.masked_fill(ridge == 0, 1) if isinstance(ridge, Tensor) else ridge
    numbers = {"ridge_of": estimator.ridge_of, "scale": scale, "bias": bias}
    solver = DEFAULT if estimator.solver is None else estimator.solver
    found = Settings(ridge, _kernel(op, estimator, sparse), numbers, solver)
    if found.without_ridge:
        positive = 1.0
    check_kernel(op, positive, estimator.ridge_of, True, scale, bias)
    if found.linear:
        numbers["intercept"] = estimator.intercept
    elif estimator.intercept:
        raise ValueError(f"{op}: intercept must be False with kernel {estimator.kernel!r}")
    return found


def _kernel(op: str, estimator: Any, sparse: bool) -> Kernel | None:
    """Return the kernel, or None for "precomputed"."""
    given, names = estimator.kernel, (*get_args(KernelName), "poly", "precomputed")
    if not isinstance(given, str) or given not in names:
        raise ValueError(f"{op}: kernel must be one of {list(names)}, got {given!r}")
    if given == "precomputed":
        if sparse:
            raise TypeError(f"{op}: a precomputed kernel must be dense, got a sparse X")
        return None
    name: Any = "polynomial" if given == "poly" else given
    gamma, degree, coef0 = map(_python, (estimator.gamma, estimator.degree, estimator.coef0))
    if isinstance(gamma, Tensor | np.ndarray):
        if math.prod(gamma.shape) != 1:
            raise ValueError(f"{op}: gamma must be one number, got {gamma!r}")
        gamma = gamma.item()
    if isinstance(degree, float) and degree.is_integer():
        degree = int(degree)  # what scikit-learn allows
    return Kernel(name, gamma if name in ("polynomial", "rbf") else None, degree, coef0)


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
