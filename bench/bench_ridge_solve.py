"""The ridged solve and the prediction from a given gram, with their gradients."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor

from bench import flops
from bench.common import features, targets
from bench.suite import PLAIN, Case, Comparison, Setting, compared
from krrst_fast import krr_predict_from_gram, reference, ridge_solve

DEVICES = ("torch", "torch-cuda")
"""The only implementation, whatever backend is chosen."""


class Shape(NamedTuple):
    """M rows of the gram, P right-hand sides, D features behind the gram."""

    m: int
    p: int
    d: int = 8192


class GramShape(NamedTuple):
    """M rows of the gram, B rows to predict, P targets, D features behind the grams."""

    m: int
    b: int
    p: int
    d: int = 2048


def symmetric(case: Case) -> Case:
    """Return the case with the symmetric part of the gradient to its first tensor, a gram.

    LU does not use that the gram is symmetric, so the gradient of the reference is not.
    """

    def wrapped(call: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        value, d_k, *others = call()
        return value, d_k.add(d_k.mT).div_(2), *others

    calls = (partial(wrapped, call) for call in (case.ours, case.reference, case.exact))
    return Case(*calls, case.flops)


class RidgeSolve(Comparison):
    """Cholesky against LU."""

    against = "LU and autograd"
    params = (
        (Shape(1000, 512), Shape(1000, 10), Shape(2000, 512), Shape(256, 512), Shape(30, 64)),
        DEVICES,
        (*PLAIN, "float32, float64 inside"),
    )

    def case(self, shape: Shape, how: Setting) -> Case:
        (f,) = features(shape.m, columns=shape.d)
        tensors = [(f @ f.mT + 1).requires_grad_(), targets(shape.m, shape.p).requires_grad_()]
        ridge = {"ridge": 1e-6, "ridge_of": "trace"}
        case = compared(
            how.place(*tensors),
            ours=partial(ridge_solve, **ridge, **how.keywords),
            plain=partial(reference.ridge_solve, **ridge),
            flops=flops.solve(shape.m, shape.p) + 4 * shape.m**2 * shape.p,
        )
        return symmetric(case)


class FromGram(Comparison):
    """`krr_predict_from_gram`, with the gradients to both grams and the targets."""

    against = "LU and autograd"
    params = (
        (GramShape(1000, 1024, 512), GramShape(1000, 1024, 10), GramShape(100, 256, 10)),
        DEVICES,
        (*PLAIN, "float32, float64 inside"),
    )

    def case(self, shape: GramShape, how: Setting) -> Case:
        m, b, p, d = shape
        f_syn, f_real = features(m, b, columns=d)
        k_syn = f_syn @ f_syn.mT
        k_syn = (k_syn + k_syn.mT) / 2  # BLAS gives the two halves in different orders
        ridge = {"ridge": 1e-3, "ridge_of": "mean_diagonal", "detach_ridge": False}

        def plain(k_syn: Tensor, k_real_syn: Tensor, y_syn: Tensor) -> Tensor:
            return k_real_syn @ reference.ridge_solve(k_syn, y_syn, **ridge)

        tensors = [x.requires_grad_() for x in (k_syn, f_real @ f_syn.mT, targets(m, p))]
        case = compared(
            how.place(*tensors),
            ours=partial(krr_predict_from_gram, **ridge, **how.keywords),
            plain=plain,
            # Two solves with one factor, P, and the three gradients.
            flops=flops.solve(m, p) + 4 * m * m * p + flops.product(b, m, p) * 3,
        )
        return symmetric(case)
