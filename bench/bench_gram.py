"""The gram alone, and with its gradient."""

from functools import partial
from typing import NamedTuple

from torch import Tensor

from bench import flops
from bench.common import features
from bench.suite import EVERYWHERE, PLAIN, Case, Comparison, Setting, compared
from krrst_fast import gram, reference


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


def plain_gram(x: Tensor) -> Tensor:
    """X X^T + 1 as the specification has it."""
    return reference.gram(x, 1.0, 1.0)


def gram_case(shape: Shape, how: Setting, *, gradient: bool) -> Case:
    """The gram [N, N]; with its gradient, that of |K|^2 / 2."""
    (x,) = features(shape.n, columns=shape.d)
    x = (x.mT if shape.transposed else x).requires_grad_(gradient)
    rows, columns = x.shape
    backward = flops.product(rows, rows, columns) if gradient else 0.0
    return compared(
        how,
        [x],
        ours=partial(gram, scale=1.0, bias=1.0, backend=how.backend, **how.options),
        plain=plain_gram,
        flops=flops.gram(rows, columns) + backward,
    )


class Gram(Comparison):
    """K = X X^T + 1."""

    against = "the full product"
    params = (SHAPES, EVERYWHERE, (*PLAIN, "fast"))

    def case(self, shape: Shape, how: Setting) -> Case:
        return gram_case(shape, how, gradient=False)


class GramGradient(Comparison):
    """Forward and backward pass of |K|^2 / 2."""

    against = "the full product and autograd"
    params = (SHAPES, EVERYWHERE, (*PLAIN, "fast"))

    def case(self, shape: Shape, how: Setting) -> Case:
        return gram_case(shape, how, gradient=True)
