"""The compiled operators that the closed forms are made of, each against what it stands for."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import flops
from bench.common import features
from bench.suite import Case, Comparison, Setting
from krrst_fast import reference
from krrst_fast.seeding import generator

HERE = ("cpp", "torch-cuda")
"""On a GPU the operators are the reference, until somebody writes them: the ratio is 1."""


class Thin(NamedTuple):
    """[I, K] times [K, J], the left one transposed (F^T x) or not (F x)."""

    i: int
    k: int
    j: int
    transposed: bool


class Batch(NamedTuple):
    """N products of [I, K] and [K, J]."""

    n: int
    i: int
    k: int
    j: int


class System(NamedTuple):
    """N systems of M equations, P right-hand sides each."""

    n: int
    m: int
    p: int


def first(function: Callable[..., Any], *tensors: Tensor) -> tuple[Tensor]:
    """The result, or the first of them: the other is a pivot, which cannot be a little wrong."""
    result = function(*tensors)
    return (result if isinstance(result, Tensor) else result[0],)


def operator_case(name: str, tensors: Sequence[Tensor], count: float) -> Case:
    """An operator of the library against the function of its name in the reference."""
    operator, plain = getattr(torch.ops.krrst_fast, name), getattr(reference, name)
    return Case(
        ours=partial(first, operator, *tensors),
        reference=partial(first, plain, *tensors),
        exact=lambda: first(plain, *(x.double() for x in tensors)),
        flops=count,
    )


class ThinMatmul(Comparison):
    """A product with few columns."""

    against = "torch.matmul"
    params = (
        (
            Thin(1000, 8192, 10, False),
            Thin(8192, 1000, 10, True),
            Thin(8192, 1000, 100, True),
            Thin(1024, 8192, 2, False),
        ),
        HERE,
        ("float32", "float64"),
    )

    def case(self, shape: Thin, how: Setting) -> Case:
        rows, columns = (shape.k, shape.i) if shape.transposed else (shape.i, shape.k)
        (f,) = features(rows, columns=columns)
        b = torch.randn(shape.k, shape.j, generator=generator(0, "columns"))
        f, b = how.place([f, b])
        a = f.mT if shape.transposed else f
        return operator_case("thin_matmul", [a, b], flops.product(*shape[:3]))


class BatchedMatmul(Comparison):
    """Thousands of small products."""

    against = "torch.matmul"
    params = (
        (Batch(4096, 25, 640, 5), Batch(4096, 75, 640, 5), Batch(4096, 640, 25, 5)),
        HERE,
        ("float32", "float64"),
    )

    def case(self, shape: Batch, how: Setting) -> Case:
        draw = generator(0, "batch")
        a = torch.randn(shape.n, shape.i, shape.k, generator=draw)
        b = torch.randn(shape.n, shape.k, shape.j, generator=draw)
        return operator_case(
            "batched_matmul", how.place([a, b]), shape.n * flops.product(*shape[1:])
        )


def systems(shape: System) -> tuple[Tensor, Tensor, Tensor]:
    """Grams [N, M, M], ridges [N] and right-hand sides [N, M, P]."""
    draw = generator(0, "systems")
    f = torch.randn(shape.n, shape.m, 2 * shape.m, generator=draw)
    y = torch.randn(shape.n, shape.m, shape.p, generator=draw)
    return f @ f.mT, torch.full((shape.n,), 0.1), y


SYSTEMS = (System(4096, 25, 5), System(4096, 5, 5), System(256, 100, 10))


class BatchedCholesky(Comparison):
    """Thousands of small factors, in float64 inside."""

    against = "torch.linalg.cholesky_ex in float64"
    params = (SYSTEMS, HERE, ("float32",))

    def case(self, shape: System, how: Setting) -> Case:
        k, ridge, _ = systems(shape)
        count = shape.n * shape.m**3 / 3
        return operator_case("batched_cholesky", how.place([k, ridge]), count)


class BatchedCholeskySolve(Comparison):
    """Thousands of small solves with such factors."""

    against = "torch.cholesky_solve in float64"
    params = (SYSTEMS, HERE, ("float32",))

    def case(self, shape: System, how: Setting) -> Case:
        k, ridge, y = systems(shape)
        k, ridge, y = how.place([k, ridge, y])
        factor, _ = reference.batched_cholesky(k, ridge)
        count = shape.n * 2 * shape.m**2 * shape.p
        return operator_case("batched_cholesky_solve", [y, factor], count)
