"""Kernel ridge regression of other libraries, in the same process: fit 1000 rows, predict 1024.

A library that is not installed is n/a: pip install -c constraints.txt '.[bench]'
"""

import importlib
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from bench import flops
from bench.common import features
from bench.suite import Case, Comparison, Setting
from krrst_fast import krr_fit
from krrst_fast.seeding import generator

RIDGE = 1e-6
Predict = Callable[[Tensor, Tensor, Tensor, float], Tensor]


class Shape(NamedTuple):
    """A fit of N rows, P targets and D features; predictions of B rows."""

    n: int
    p: int
    d: int
    b: int


SHAPE = Shape(1000, 512, 8192, 1024)
SHAPES = (SHAPE, Shape(1000, 10, 2048, 1024))


def quiet_import(name: str) -> ModuleType:
    """A peer's module, without what its import warns of: it is not ours to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


@lru_cache(maxsize=1)
def _blas() -> Any:
    """What sets the threads of NumPy's and SciPy's BLAS; torch's are its own."""
    return quiet_import("threadpoolctl").ThreadpoolController()


def fit_and_predict(model: Any, x: Tensor, y: Tensor, new: Tensor) -> Tensor:
    """Predictions of an estimator on NumPy arrays, with as many threads as torch has."""
    with _blas().limit(limits=torch.get_num_threads(), user_api="blas"):
        return torch.from_numpy(model.fit(x.numpy(), y.numpy()).predict(new.numpy()))


def scikit_learn(x: Tensor, y: Tensor, new: Tensor, ridge: float) -> Tensor:
    """sklearn.kernel_ridge.KernelRidge: SciPy's Cholesky on NumPy arrays."""
    model = quiet_import("sklearn.kernel_ridge").KernelRidge(alpha=ridge)
    return fit_and_predict(model, x, y, new)


def himalaya(x: Tensor, y: Tensor, new: Tensor, ridge: float) -> Tensor:
    """himalaya.kernel_ridge.KernelRidge by eigenvalues on NumPy, the fastest of its ways here."""
    quiet_import("himalaya.backend").set_backend("numpy")
    model = quiet_import("himalaya.kernel_ridge").KernelRidge(alpha=ridge, solver="eigenvalues")
    return fit_and_predict(model, x, y, new)


def linear_operator(x: Tensor, y: Tensor, new: Tensor, ridge: float) -> Tensor:
    """linear_operator (GPyTorch's) as it comes: conjugate gradients above 800 rows."""
    k = quiet_import("linear_operator").to_linear_operator(x @ x.mT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the conjugate gradients did not converge
        return (new @ x.mT) @ k.add_diagonal(torch.tensor(ridge, dtype=x.dtype)).solve(y)


def linear_operator_cholesky(x: Tensor, y: Tensor, new: Tensor, ridge: float) -> Tensor:
    """The same, told to take Cholesky at any size."""
    settings = quiet_import("linear_operator.settings")
    with settings.max_cholesky_size(10**9):
        return linear_operator(x, y, new, ridge)


def formula(x: Tensor, y: Tensor, new: Tensor, ridge: float) -> Tensor:
    """What all of them compute."""
    k = x @ x.mT
    return (new @ x.mT) @ torch.linalg.solve(k + ridge * torch.eye(len(k), dtype=k.dtype), y)


def ours(x: Tensor, y: Tensor, new: Tensor, ridge: float, *, how: Setting) -> Tensor:
    """krrst_fast: fit and predict."""
    fit = krr_fit(x, y, ridge=ridge, ridge_of="absolute", backend=how.backend, **how.options)
    return fit.predict(new)


# Every peer is asked the same.
@lru_cache(maxsize=8)
def problem(shape: Shape, seed: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """Features [N, D], targets [N, P], new features [B, D] and an absolute ridge."""
    x, new = features(shape.n, shape.b, columns=shape.d, seed=seed)
    y = torch.randn(shape.n, shape.p, generator=generator(seed, "targets"))
    return x, y, new, RIDGE * x.double().square().sum().item()


@lru_cache(maxsize=8)
def exact(shape: Shape, seed: int) -> Sequence[Tensor]:
    """The predictions [B, P] in float64."""
    *tensors, ridge = problem(shape, seed)
    return _listed(formula, *(x.double() for x in tensors), ridge)


def _listed(predict: Predict, *arguments: object) -> Sequence[Tensor]:
    return (predict(*arguments),)  # type: ignore[arg-type]


def peer_case(shape: Shape, how: Setting, *, module: str, predict: Predict, seed: int = 0) -> Case:
    """Predictions [B, P] of a fit. All of them get the same absolute ridge.

    Raises:
        ImportError: the peer, by the name of its `module`, is not installed.
    """
    quiet_import(module)
    x, y, new, ridge = problem(shape, seed)
    return Case(
        ours=partial(_listed, partial(ours, how=how), x, y, new, ridge),
        reference=partial(_listed, predict, x, y, new, ridge),
        exact=partial(exact, shape, seed),
        flops=flops.fit(shape.n, shape.d, shape.p) + flops.product(shape.b, shape.d, shape.p),
    )


class Peer(Comparison):
    """`krr_fit` and its predictions, on the CPU, where all the peers compute."""

    params = (SHAPES, ("cpp", "torch"), ("float32",))
    module: ClassVar[str]

    @staticmethod
    @abstractmethod
    def predict(x: Tensor, y: Tensor, new: Tensor, ridge: float) -> Tensor:
        """The peer's predictions [B, P]."""

    def case(self, shape: Shape, how: Setting) -> Case:
        return peer_case(shape, how, module=self.module, predict=self.predict)


class ScikitLearn(Peer):
    """Fit and predict."""

    against = "scikit-learn's KernelRidge"
    module = "sklearn"
    predict = staticmethod(scikit_learn)


class Himalaya(Peer):
    """Fit and predict."""

    against = "himalaya's KernelRidge"
    module = "himalaya"
    predict = staticmethod(himalaya)


class LinearOperator(Peer):
    """Fit and predict."""

    against = "linear_operator as it comes"
    module = "linear_operator"
    predict = staticmethod(linear_operator)


class LinearOperatorCholesky(Peer):
    """Fit and predict."""

    against = "linear_operator by Cholesky"
    module = "linear_operator"
    predict = staticmethod(linear_operator_cholesky)


PEERS: tuple[type[Peer], ...] = (ScikitLearn, Himalaya, LinearOperatorCholesky, LinearOperator)
