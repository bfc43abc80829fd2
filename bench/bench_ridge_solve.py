"""The ridged solve with its gradients to the gram and the right-hand sides."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bench.common import Case, Comparison, features
from krrst_fast import reference
from krrst_fast.backends import BackendName
from krrst_fast.ops.ridge_solve import ridge_solve
from krrst_fast.seeding import generator

RIDGE = 1e-6


class Shape(NamedTuple):
    """M rows of the gram, P right-hand sides, D features behind the gram."""

    m: int
    p: int
    d: int = 8192


SHAPES = (Shape(1000, 512), Shape(1000, 10), Shape(2000, 512), Shape(256, 512), Shape(30, 64))


def gradients(
    solve: Callable[[Tensor, Tensor], Tensor], k: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """alpha [M, P], and the gradients [M, M] and [M, P] of <alpha, y>."""
    alpha = solve(k, y)
    d_k, d_y = torch.autograd.grad(alpha, (k, y), grad_outputs=y.detach())
    # The reference's LU knows nothing of symmetry: only the symmetric part is the gram's gradient.
    return alpha.detach(), d_k.add(d_k.mT).div_(2), d_y


class RidgeSolve(Comparison):
    """Cholesky against LU. There is one implementation, whatever backend is chosen."""

    params = (SHAPES, ("torch",))

    def case(self, shape: Shape, backend: BackendName) -> Case:
        (f,) = features(shape.m, columns=shape.d)
        k = (f @ f.mT + 1).requires_grad_()
        y = torch.randn(shape.m, shape.p, generator=generator(0, "targets")).requires_grad_()
        double = [x.detach().double().requires_grad_() for x in (k, y)]
        ours = partial(ridge_solve, ridge=RIDGE, ridge_of="trace")
        plain = partial(reference.ridge_solve, ridge=RIDGE, ridge_of="trace")
        return Case(
            ours=partial(gradients, ours, k, y),
            reference=partial(gradients, plain, k, y),
            exact=partial(gradients, plain, *double),
        )
