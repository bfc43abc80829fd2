"""Fits that keep their factor, used for one or a hundred batches, and paths of ridges."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import flops
from bench.common import features, solving, targets
from bench.suite import EVERYWHERE, PLAIN, Case, Comparison, Setting, compared
from krrst_fast import krr_fit, krr_path, krr_predict


class Shape(NamedTuple):
    """A fit of M rows, P targets and D features; `queries` batches of B rows."""

    m: int
    p: int
    d: int
    b: int
    queries: int = 1


class PathShape(NamedTuple):
    """A fit of M rows, P targets and D features for R ridges; predictions of B rows."""

    m: int
    p: int
    d: int
    b: int
    r: int


ONCE = (
    Shape(1000, 512, 8192, 1024),
    Shape(1000, 10, 8192, 1024),
    Shape(5000, 512, 512, 1024),
    Shape(100, 64, 2048, 256),
)
QUICK = Shape(1000, 10, 2048, 32, 100)
OFTEN = (Shape(1000, 512, 8192, 32, 100), QUICK)


def inputs(m: int, p: int, d: int, b: int) -> list[Tensor]:
    """Draw f_syn [M, D], y_syn [M, P], f_real [B, D]."""
    f_syn, f_real = features(m, b, columns=d)
    return [f_syn, targets(m, p), f_real]


class Fit(Comparison):
    """`krr_fit`, and its predictions for one batch."""

    against = "the formula, by LU"
    params = (ONCE, EVERYWHERE, (*PLAIN, "fast"))

    def case(self, shape: Shape, how: Setting) -> Case:
        fit = partial(krr_fit, bias=1.0, **how.keywords)
        return compared(
            how.place(*inputs(*shape[:4])),
            ours=lambda f_syn, y_syn, f_real: fit(f_syn, y_syn).predict(f_real),
            plain=partial(krr_predict, bias=1.0, **solving("reference")),
            flops=flops.fit(shape.m, shape.d, shape.p) + flops.product(shape.b, shape.d, shape.p),
        )


class Reuse(Comparison):
    """One fit for a hundred batches, against the formula for each."""

    against = "the formula for each query"
    params = (OFTEN, EVERYWHERE, ("float32",))
    at_least = 2

    def solver(self, how: Setting) -> dict[str, Any]:
        """Return the keywords of the reference."""
        return solving("reference")

    def case(self, shape: Shape, how: Setting) -> Case:
        def once(f_syn: Tensor, y_syn: Tensor, f_real: Tensor) -> list[Tensor]:
            fit = krr_fit(f_syn, y_syn, bias=1.0, **how.keywords)
            return [fit.predict(batch) for batch in f_real.split(shape.b)]

        def each(f_syn: Tensor, y_syn: Tensor, f_real: Tensor) -> list[Tensor]:
            predict = partial(krr_predict, f_syn, y_syn, bias=1.0, **self.solver(how))
            return [predict(batch) for batch in f_real.split(shape.b)]

        def exact(*tensors: Tensor) -> tuple[Tensor, ...]:
            return krr_predict(*tensors, bias=1.0, **solving("reference")).split(shape.b)

        m, p, d, rows = shape.m, shape.p, shape.d, shape.queries * shape.b
        return compared(
            how.place(*inputs(m, p, d, rows)),
            ours=once,
            plain=each,
            exact=exact,
            flops=flops.fit(m, d, p) + flops.product(rows, d, p),
        )


class ReusePredict(Reuse):
    """One fit for a hundred batches, against `krr_predict` for each."""

    against = "krr_predict for each query"

    def solver(self, how: Setting) -> dict[str, Any]:
        return how.keywords


class Path(Comparison):
    """`krr_path`: thirty ridges of one problem by one eigendecomposition."""

    against = "the formula for each ridge, by LU"
    params = (
        (PathShape(1000, 100, 2048, 1024, 30), PathShape(100, 64, 2048, 256, 30)),
        ("torch", "torch-cuda"),
        PLAIN,
    )
    at_least = 2

    def case(self, shape: PathShape, how: Setting) -> Case:
        m, p, d, b, r = shape
        ridges = torch.logspace(-6, -1, r, dtype=torch.float64).tolist()
        solve = partial(krr_predict, ridge_of="mean_diagonal", **solving("reference"))
        path = partial(krr_path, ridges=ridges, ridge_of="mean_diagonal")
        # About 9 M^3 for the eigendecomposition; each ridge then adds only K_rs alpha.
        once = flops.gram(m, d) + 9 * m**3 + flops.product(b, d, m) + flops.product(m, m, p)
        return compared(
            how.place(*inputs(m, p, d, b)),
            ours=lambda f_syn, y_syn, f_real: path(f_syn, y_syn).predict(f_real),
            plain=lambda *tensors: torch.stack([solve(*tensors, ridge=x) for x in ridges]),
            flops=once + r * flops.product(b, m, p) + flops.product(b, m, m),
        )
