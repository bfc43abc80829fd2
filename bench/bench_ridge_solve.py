"""The ridged solve with its gradients to the gram and the right-hand sides."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bench import flops
from bench.common import features
from bench.suite import PLAIN, Case, Comparison, Setting, leaf
from krrst_fast import reference, ridge_solve
from krrst_fast.seeding import generator

RIDGE = 1e-6


class Shape(NamedTuple):
    """M rows of the gram, P right-hand sides, D features behind the gram."""

    m: int
    p: int
    d: int = 8192


SHAPES = (Shape(1000, 512), Shape(1000, 10), Shape(2000, 512), Shape(256, 512), Shape(30, 64))


def gradients(
    solve: Callable[[Tensor, Tensor], Tensor], tensors: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """alpha [M, P], and the gradients [M, M] and [M, P] of <alpha, y>."""
    k, y = tensors
    alpha = solve(k, y)
    d_k, d_y = torch.autograd.grad(alpha, (k, y), grad_outputs=y.detach())
    # The reference's LU knows nothing of symmetry: only the symmetric part is the gram's gradient.
    return alpha.detach(), d_k.add(d_k.mT).div_(2), d_y


class RidgeSolve(Comparison):
    """Cholesky against LU. There is one implementation, whatever backend is chosen."""

    against = "LU and autograd"
    params = (
        SHAPES,
        ("torch", "torch-cuda"),
        (*PLAIN, "float32, float64 inside", "float32, refined"),
    )

    def case(self, shape: Shape, how: Setting) -> Case:
        (f,) = features(shape.m, columns=shape.d)
        k = (f @ f.mT + 1).requires_grad_()
        y = torch.randn(shape.m, shape.p, generator=generator(0, "targets")).requires_grad_()
        tensors = how.place([k, y])
        ours = partial(ridge_solve, ridge=RIDGE, ridge_of="trace", **how.options)
        plain = partial(reference.ridge_solve, ridge=RIDGE, ridge_of="trace")
        return Case(
            ours=partial(gradients, ours, tensors),
            reference=partial(gradients, plain, tensors),
            exact=lambda: gradients(plain, [leaf(x, x.double()) for x in tensors]),
            flops=flops.solve(shape.m, shape.p) + 4 * shape.m**2 * shape.p,
        )
