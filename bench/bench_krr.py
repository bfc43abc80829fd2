"""The KRR loss of KRR-ST with its gradients, and the prediction that other losses stand on."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bench import flops
from bench.common import features
from bench.suite import EVERYWHERE, PLAIN, SPECIAL, Case, Comparison, Setting, compared
from krrst_fast import krr_mse, krr_predict
from krrst_fast.seeding import generator


class Shape(NamedTuple):
    """M synthetic images, P target features, D features, B real images."""

    m: int
    p: int
    d: int
    b: int = 1024


FLOORS = {
    Shape(1000, 512, 8192): 1.3,
    Shape(1000, 100, 8192): 2.3,
    Shape(1000, 10, 8192): 4.0,
    Shape(2000, 512, 8192): 1.7,
    Shape(5000, 512, 512): 8.0,
    Shape(10, 2048, 25088, 256): 1.0,
    Shape(100, 64, 2048, 256): 1.0,
    Shape(256, 512, 2049, 256): 1.0,
    Shape(30, 64, 512, 256): 1.0,
}
"""How many times as fast as the reference a shape has to be, on two threads."""

# One for each closed form, and one that the calls and not the work take most of.
FEW = (
    Shape(1000, 512, 8192),
    Shape(1000, 10, 8192),
    Shape(5000, 512, 512),
    Shape(100, 64, 2048, 256),
)
FORMULA = "the formula, by LU and autograd"


def inputs(shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """f_syn [M, D] and y_syn [M, P], which ask for gradients, f_real [B, D] and y_real [B, P]."""
    f_syn, f_real = features(shape.m, shape.b, columns=shape.d)
    draw = generator(0, "targets")
    y_syn = torch.randn(shape.m, shape.p, generator=draw)
    y_real = torch.randn(shape.b, shape.p, generator=draw)
    return f_syn.requires_grad_(), y_syn.requires_grad_(), f_real, y_real


def krr_case(shape: Shape, how: Setting) -> Case:
    """The loss [], its gradients [M, D] and [M, P]."""
    return compared(
        how,
        inputs(shape),
        ours=partial(krr_mse, bias=1.0, backend=how.backend, **how.options),
        plain=partial(krr_mse, bias=1.0, backend="reference"),
        flops=flops.krr(shape.m, shape.b, shape.d, shape.p),
    )


class KRR(Comparison):
    """The loss of KRR-ST, forward and backward."""

    against = FORMULA
    params = (tuple(FLOORS), EVERYWHERE, PLAIN)

    def case(self, shape: Shape, how: Setting) -> Case:
        return krr_case(shape, how)


class KRRPrecision(Comparison):
    """The same loss in every other precision, against the formula in float32."""

    against = FORMULA
    params = (FEW, EVERYWHERE, SPECIAL)

    def case(self, shape: Shape, how: Setting) -> Case:
        return krr_case(shape, how)


class KRRPredict(Comparison):
    """Predictions for any loss on top, forward and backward, trace not detached."""

    against = FORMULA
    params = (FEW, EVERYWHERE, PLAIN)

    def case(self, shape: Shape, how: Setting) -> Case:
        predict = partial(krr_predict, ridge_of="mean_diagonal", detach_ridge=False)
        return compared(
            how,
            inputs(shape)[:3],
            ours=partial(predict, backend=how.backend, **how.options),
            plain=partial(predict, backend="reference"),
            flops=flops.krr(shape.m, shape.b, shape.d, shape.p),
        )
