"""What keeps its factor: a fit that is used once, or a hundred times, and a path of ridges."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bench import flops
from bench.common import features
from bench.suite import EVERYWHERE, PLAIN, Case, Comparison, Setting, compared
from krrst_fast import krr_fit, krr_predict
from krrst_fast.backends import BackendName
from krrst_fast.seeding import generator


class Shape(NamedTuple):
    """A fit of M rows, P targets and D features; `queries` batches of B rows."""

    m: int
    p: int
    d: int
    b: int
    queries: int = 1


ONCE = (
    Shape(1000, 512, 8192, 1024),
    Shape(1000, 10, 8192, 1024),
    Shape(5000, 512, 512, 1024),
    Shape(100, 64, 2048, 256),
)
OFTEN = (Shape(1000, 512, 8192, 32, 100), Shape(1000, 10, 2048, 32, 100))
QUICK = OFTEN[1]
FORMULA_EACH, PREDICT_EACH = "the formula for each query", "krr_predict for each query"
FLOORS = {FORMULA_EACH: 20.0, PREDICT_EACH: 20.0}
"""How many times as fast `QUICK` has to be as each of these."""


def inputs(shape: Shape) -> list[Tensor]:
    """f_syn [M, D], y_syn [M, P], f_real [queries * B, D]."""
    f_syn, f_real = features(shape.m, shape.queries * shape.b, columns=shape.d)
    return [f_syn, torch.randn(shape.m, shape.p, generator=generator(0, "targets")), f_real]


def fit_and_predict(f_syn: Tensor, y_syn: Tensor, f_real: Tensor, *, how: Setting) -> Tensor:
    """Predictions [B, P] of a fit that is made for them."""
    return krr_fit(f_syn, y_syn, bias=1.0, backend=how.backend, **how.options).predict(f_real)


class Fit(Comparison):
    """`krr_fit`, and its predictions for one batch."""

    against = "the formula, by LU"
    params = (ONCE, EVERYWHERE, (*PLAIN, "float32, refined", "fast"))

    def case(self, shape: Shape, how: Setting) -> Case:
        return compared(
            how,
            inputs(shape),
            ours=partial(fit_and_predict, how=how),
            plain=partial(krr_predict, bias=1.0, backend="reference"),
            flops=flops.fit(shape.m, shape.d, shape.p) + flops.product(shape.b, shape.d, shape.p),
        )


def fit_once(
    f_syn: Tensor, y_syn: Tensor, queries: Sequence[Tensor], *, how: Setting
) -> list[Tensor]:
    """Predictions [B, P] for each query, of one fit."""
    fit = krr_fit(f_syn, y_syn, bias=1.0, backend=how.backend, **how.options)
    return [fit.predict(query) for query in queries]


def solve_each(
    f_syn: Tensor, y_syn: Tensor, queries: Sequence[Tensor], *, backend: BackendName
) -> list[Tensor]:
    """The same, solved anew for each."""
    return [krr_predict(f_syn, y_syn, query, bias=1.0, backend=backend) for query in queries]


def solved_once_in_double(f_syn: Tensor, y_syn: Tensor, f_real: Tensor, size: int) -> list[Tensor]:
    """The same, in float64."""
    wide = [x.double() for x in (f_syn, y_syn, f_real)]
    return list(krr_predict(*wide, bias=1.0, backend="reference").split(size))


def reuse_case(shape: Shape, how: Setting, *, reference: str) -> Case:
    """A fit and its predictions [B, P] for each query."""
    f_syn, y_syn, f_real = how.place(inputs(shape))
    queries = f_real.split(shape.b)
    rows = shape.queries * shape.b
    backend: BackendName = "reference" if reference == FORMULA_EACH else how.backend
    return Case(
        ours=partial(fit_once, f_syn, y_syn, queries, how=how),
        reference=partial(solve_each, f_syn, y_syn, queries, backend=backend),
        exact=partial(solved_once_in_double, f_syn, y_syn, f_real, shape.b),
        flops=flops.fit(shape.m, shape.d, shape.p) + flops.product(rows, shape.d, shape.p),
    )


class Reuse(Comparison):
    """One fit for a hundred queries."""

    against = FORMULA_EACH
    params = (OFTEN, EVERYWHERE, ("float32",))
    at_least = 2

    def case(self, shape: Shape, how: Setting) -> Case:
        return reuse_case(shape, how, reference=FORMULA_EACH)
