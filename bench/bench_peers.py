"""Kernel ridge regression of other libraries, in the same process: fit 1000 rows, predict 1024.

A library that is not installed is n/a: pip install -c constraints.txt '.[bench]'
"""

import importlib
import warnings
from abc import abstractmethod
from functools import cache, partial
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from bench import flops
from bench.common import features, targets
from bench.suite import Case, Comparison, Setting, compared
from krrst_fast import krr_fit


class Shape(NamedTuple):
    """A fit of N rows, P targets and D features; predictions of B rows."""

    n: int
    p: int
    d: int
    b: int


SHAPE = Shape(1000, 512, 8192, 1024)


def quiet_import(name: str) -> ModuleType:
    """Import a module of another library without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


@cache
def blas() -> Any:
    """Return the controller of the threads of NumPy's and SciPy's BLAS; torch has its own."""
    return quiet_import("threadpoolctl").ThreadpoolController()


def fit_and_predict(model: Any, x: Tensor, y: Tensor, new: Tensor) -> Tensor:
    """Predict by an estimator on NumPy arrays, with as many threads as torch has."""
    with blas().limit(limits=torch.get_num_threads(), user_api="blas"):
        return torch.from_numpy(model.fit(x.numpy(), y.numpy()).predict(new.numpy()))


def formula(x: Tensor, y: Tensor, new: Tensor, ridge: float) -> Tensor:
    """Predict by the formula, by LU."""
    k = x @ x.mT
    return (new @ x.mT) @ torch.linalg.solve(k + ridge * torch.eye(len(k), dtype=k.dtype), y)


class Peer(Comparison):
    """`krr_fit` and its predictions, on the CPU, where all the peers compute."""

    params = ((SHAPE, Shape(1000, 10, 2048, 1024)), ("cpp", "torch"), ("float32",))
    module: ClassVar[str]

    @staticmethod
    @abstractmethod
    def predict(x: Tensor, y: Tensor, new: Tensor, ridge: float) -> Tensor:
        """Predict [B, P] by the peer, from features [N, D], targets [N, P] and new rows [B, D]."""

    def case(self, shape: Shape, how: Setting) -> Case:
        quiet_import(self.module)
        n, p, d, b = shape
        x, new = features(n, b, columns=d, seed=self.seed)
        # An absolute ridge, which is the same for every library.
        ridge = 1e-6 * x.double().square().sum().item()
        fit = partial(krr_fit, ridge=ridge, ridge_of="absolute", **how.keywords)
        return compared(
            [x, targets(n, p, seed=self.seed), new],
            ours=lambda x, y, new: fit(x, y).predict(new),
            plain=partial(self.predict, ridge=ridge),
            exact=partial(formula, ridge=ridge),
            flops=flops.fit(n, d, p) + flops.product(b, d, p),
        )


class ScikitLearn(Peer):
    """Fit and predict, against SciPy's Cholesky on NumPy arrays."""

    against = "scikit-learn's KernelRidge"
    module = "sklearn"

    @staticmethod
    def predict(x: Tensor, y: Tensor, new: Tensor, ridge: float) -> Tensor:
        model = quiet_import("sklearn.kernel_ridge").KernelRidge(alpha=ridge)
        return fit_and_predict(model, x, y, new)


class Himalaya(Peer):
    """Fit and predict, against eigenvalues on NumPy arrays, himalaya's fastest way on a CPU."""

    against = "himalaya's KernelRidge"
    module = "himalaya"

    @staticmethod
    def predict(x: Tensor, y: Tensor, new: Tensor, ridge: float) -> Tensor:
        quiet_import("himalaya.backend").set_backend("numpy")
        ridge_model = quiet_import("himalaya.kernel_ridge").KernelRidge
        return fit_and_predict(ridge_model(alpha=ridge, solver="eigenvalues"), x, y, new)


class LinearOperator(Peer):
    """Fit and predict, against GPyTorch's solver: conjugate gradients above 800 rows."""

    against = "linear_operator as it comes"
    module = "linear_operator"

    @staticmethod
    def predict(x: Tensor, y: Tensor, new: Tensor, ridge: float) -> Tensor:
        k = quiet_import("linear_operator").to_linear_operator(x @ x.mT)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the conjugate gradients did not converge
            return (new @ x.mT) @ k.add_diagonal(torch.tensor(ridge, dtype=x.dtype)).solve(y)


class LinearOperatorCholesky(LinearOperator):
    """Fit and predict, against the same solver by Cholesky at any size."""

    against = "linear_operator by Cholesky"

    @staticmethod
    def predict(x: Tensor, y: Tensor, new: Tensor, ridge: float) -> Tensor:
        with quiet_import("linear_operator.settings").max_cholesky_size(10**9):
            return LinearOperator.predict(x, y, new, ridge)


PEERS: tuple[type[Peer], ...] = (ScikitLearn, Himalaya, LinearOperatorCholesky, LinearOperator)
