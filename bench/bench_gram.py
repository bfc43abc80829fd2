"""The gram alone, and with its gradient."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bench.common import Case, Comparison, features
from krrst_fast.backends import BackendName
from krrst_fast.ops.gram import gram


class Shape(NamedTuple):
    """Rows and columns of the features, transposed (the D x D gram of the primal form) or not."""

    n: int
    d: int
    transposed: bool = False


SHAPES = (
    Shape(1000, 8192),
    Shape(2000, 8192),
    Shape(5000, 512, transposed=True),
    Shape(256, 2049),
    Shape(10, 25088),
)


def value(backend: BackendName, x: Tensor) -> Sequence[Tensor]:
    """K [N, N]."""
    return (gram(x, scale=1.0, bias=1.0, backend=backend),)


def gradient(backend: BackendName, x: Tensor) -> Sequence[Tensor]:
    """The gradient [N, D] of |K|^2 / 2."""
    k = gram(x, scale=1.0, bias=1.0, backend=backend)
    return torch.autograd.grad(k, x, grad_outputs=k.detach())


class Gram(Comparison):
    """K = X X^T + 1."""

    params = (SHAPES, ("cpp", "torch"))

    def case(self, shape: Shape, backend: BackendName) -> Case:
        (x,) = features(shape.n, columns=shape.d)
        x = x.mT if shape.transposed else x
        return Case(
            ours=partial(value, backend, x),
            reference=partial(value, "reference", x),
            exact=partial(value, "reference", x.double()),
        )


class GramGradient(Comparison):
    """Forward and backward pass of |K|^2 / 2."""

    params = (SHAPES, ("cpp", "torch"))

    def case(self, shape: Shape, backend: BackendName) -> Case:
        (x,) = features(shape.n, columns=shape.d)
        x = (x.mT if shape.transposed else x).requires_grad_()
        return Case(
            ours=partial(gradient, backend, x),
            reference=partial(gradient, "reference", x),
            exact=partial(gradient, "reference", x.detach().double().requires_grad_()),
        )
