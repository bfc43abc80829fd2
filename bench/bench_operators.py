"""The operators that the closed forms are made of, the gram and views, each with its reference."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import flops
from bench.common import features, targets
from bench.suite import EVERYWHERE, PLAIN, Case, Comparison, Setting, compared
from krrst_fast import gram, reference, views
from krrst_fast.runs.seeding import generator

COMPILED = ("cpp", "torch-cuda")
"""On a GPU the compiled operators fall back to the reference: the ratio is 1."""
MEAN, STD = (0.507, 0.487, 0.441), (0.267, 0.256, 0.276)
PADDING = 4


class GramShape(NamedTuple):
    """Rows and columns of the features, transposed (the D x D gram of the primal form) or not."""

    n: int
    d: int
    transposed: bool = False


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


class Images(NamedTuple):
    """B images, of `size` by `size` pixels."""

    b: int
    size: int


class Gram(Comparison):
    """K = X X^T + 1."""

    against = "the full product"
    params = (
        (
            GramShape(1000, 8192),
            GramShape(2000, 8192),
            GramShape(5000, 512, transposed=True),
            GramShape(256, 2049),
            GramShape(10, 25088),
        ),
        EVERYWHERE,
        (*PLAIN, "fast"),
    )
    gradient = False

    def case(self, shape: GramShape, how: Setting) -> Case:
        (x,) = features(shape.n, columns=shape.d)
        x = (x.mT if shape.transposed else x).requires_grad_(self.gradient)
        rows, columns = x.shape
        return compared(
            how.place(x),
            ours=partial(gram, scale=1.0, bias=1.0, **how.keywords),
            plain=partial(reference.gram, scale=1.0, bias=1.0),
            flops=flops.gram(rows, columns) + self.gradient * flops.product(rows, rows, columns),
        )


class GramGradient(Gram):
    """Forward and backward pass of |K|^2 / 2."""

    against = "the full product and autograd"
    gradient = True


def operator_case(name: str, tensors: list[Tensor], count: float) -> Case:
    """Compare an operator with the function of its name in `reference`."""

    def first(function: Callable[..., Any], *tensors: Tensor) -> Tensor:
        # A second result is a pivot, which has no relative error.
        result = function(*tensors)
        return result if isinstance(result, Tensor) else result[0]

    return compared(
        tensors,
        ours=partial(first, getattr(torch.ops.krrst_fast, name)),
        plain=partial(first, getattr(reference, name)),
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
        COMPILED,
        PLAIN,
    )

    def case(self, shape: Thin, how: Setting) -> Case:
        rows, columns = (shape.k, shape.i) if shape.transposed else (shape.i, shape.k)
        f, b = how.place(*features(rows, columns=columns), targets(shape.k, shape.j))
        a = f.mT if shape.transposed else f
        return operator_case("thin_matmul", [a, b], flops.product(*shape[:3]))


class BatchedMatmul(Comparison):
    """Thousands of small products."""

    against = "torch.matmul"
    params = (
        (Batch(4096, 25, 640, 5), Batch(4096, 75, 640, 5), Batch(4096, 640, 25, 5)),
        COMPILED,
        PLAIN,
    )

    def case(self, shape: Batch, how: Setting) -> Case:
        n, i, k, j = shape
        tensors = how.place(targets(n, i, k), targets(n, k, j, seed=1))
        return operator_case("batched_matmul", tensors, n * flops.product(i, k, j))


class BatchedCholesky(Comparison):
    """Thousands of small factors, in float64 inside."""

    against = "torch.linalg.cholesky_ex in float64"
    params = ((System(4096, 25, 5), System(4096, 5, 5), System(256, 100, 10)), COMPILED, PLAIN[:1])

    def systems(self, shape: System, how: Setting) -> list[Tensor]:
        """Draw grams [N, M, M], ridges [N] and right-hand sides [N, M, P]."""
        n, m, p = shape
        f = targets(n, m, 2 * m)
        return how.place(f @ f.mT, torch.full((n,), 0.1), targets(n, m, p, seed=1))

    def case(self, shape: System, how: Setting) -> Case:
        k, ridge, _ = self.systems(shape, how)
        return operator_case("batched_cholesky", [k, ridge], shape.n * shape.m**3 / 3)


class BatchedCholeskySolve(BatchedCholesky):
    """Thousands of small solves with such factors."""

    against = "torch.cholesky_solve in float64"

    def case(self, shape: System, how: Setting) -> Case:
        k, ridge, y = self.systems(shape, how)
        factor, _ = reference.batched_cholesky(k, ridge)
        count = shape.n * 2 * shape.m**2 * shape.p
        return operator_case("batched_cholesky_solve", [y, factor], count)


class Views(Comparison):
    """Crop, flip and normalise packed uint8 images in one pass."""

    against = "padding, indexing and arithmetic"
    params = ((Images(1024, 32), Images(1024, 64), Images(256, 8)), ("cpp",), PLAIN[:1])

    def case(self, shape: Images, how: Setting) -> Case:
        draw = partial(torch.randint, generator=generator(0, "views"))
        count = max(2048, shape.b)
        tensors = [
            draw(256, (count, 3, shape.size, shape.size), dtype=torch.uint8),
            draw(count, (shape.b,)),
            draw(2 * PADDING + 1, (shape.b, 2)),
            draw(2, (shape.b,)).bool(),
        ]
        options = {"padding": PADDING, "mean": MEAN, "std": STD}

        def exact() -> list[Tensor]:
            # The bytes as the reference crops them, normalised in float64.
            pixels = reference.views(*tensors, PADDING, (0.0,) * 3, (1.0,) * 3)
            pixels = (pixels.double() * 255).round() / 255
            mean, std = (pixels.new_tensor(v).view(3, 1, 1) for v in (MEAN, STD))
            return [(pixels - mean) / std]

        case = compared(
            tensors,
            ours=partial(views, **options),
            plain=partial(reference.views, **options),
            # A subtraction and a multiplication for each value; memory is the limit.
            flops=2 * shape.b * 3 * shape.size**2,
        )
        return case._replace(exact=exact)
