"""A path of ridges from one eigendecomposition."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import flops
from bench.common import features
from bench.suite import PLAIN, Case, Comparison, Setting, compared
from krrst_fast import krr_predict
from krrst_fast.seeding import generator


class Shape(NamedTuple):
    """A fit of M rows, P targets and D features for R ridges; predictions of B rows."""

    m: int
    p: int
    d: int
    b: int
    r: int


def ridges(count: int) -> list[float]:
    """From 1e-6 to 1e-1 of the mean diagonal."""
    return torch.logspace(-6, -1, count, dtype=torch.float64).tolist()


def path(
    krr_path: Callable[..., Any], f_syn: Tensor, y_syn: Tensor, f_real: Tensor, *, count: int
) -> Tensor:
    """Predictions [R, B, P]."""
    return krr_path(f_syn, y_syn, ridges(count), ridge_of="mean_diagonal").predict(f_real)


def solve_each(f_syn: Tensor, y_syn: Tensor, f_real: Tensor, *, count: int) -> Tensor:
    """The same, by the formula for each ridge."""
    solve = partial(krr_predict, ridge_of="mean_diagonal", backend="reference")
    return torch.stack([solve(f_syn, y_syn, f_real, ridge=ridge) for ridge in ridges(count)])


class Path(Comparison):
    """`krr_path`: thirty ridges of one problem."""

    against = "the formula for each ridge, by LU"
    params = (
        (Shape(1000, 100, 2048, 1024, 30), Shape(100, 64, 2048, 256, 30)),
        ("torch", "torch-cuda"),
        PLAIN,
    )
    at_least = 2

    def case(self, shape: Shape, how: Setting) -> Case:
        from krrst_fast import krr_path

        f_syn, f_real = features(shape.m, shape.b, columns=shape.d)
        y_syn = torch.randn(shape.m, shape.p, generator=generator(0, "targets"))
        tensors: Sequence[Tensor] = (f_syn, y_syn, f_real)
        m, b, d, p, r = shape.m, shape.b, shape.d, shape.p, shape.r
        # About 9 M^3 for the eigendecomposition; then, a ridge, K_rs alpha is all that is left.
        once = flops.gram(m, d) + 9 * m**3 + flops.product(b, d, m) + flops.product(m, m, p)
        return compared(
            how,
            tensors,
            ours=partial(path, krr_path, count=r),
            plain=partial(solve_each, count=r),
            flops=once + r * flops.product(b, m, p) + flops.product(b, m, m),
        )
