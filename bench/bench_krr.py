"""The KRR loss of KRR-ST with its gradients, and the prediction for other losses."""

from functools import partial
from typing import NamedTuple

from torch import Tensor

from bench import flops
from bench.common import features, solving, targets
from bench.suite import EVERYWHERE, PLAIN, SPECIAL, Case, Comparison, Setting, compared
from krrst_fast import krr_mse, krr_predict


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
    Shape(100, 64, 2048, 256): 1.1,
    Shape(256, 512, 2049, 256): 1.0,
    Shape(30, 64, 512, 256): 1.2,
    Shape(20, 8, 512, 20): 1.4,
    Shape(10, 8, 128, 10): 1.3,
}
"""Required speed of each shape, relative to the reference, on two threads."""

# A shape for each closed form, and a small one.
FEW = (
    Shape(1000, 512, 8192),
    Shape(1000, 10, 8192),
    Shape(5000, 512, 512),
    Shape(100, 64, 2048, 256),
)


def inputs(shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw f_syn [M, D] and y_syn [M, P] with gradients, f_real [B, D] and y_real [B, P]."""
    f_syn, f_real = features(shape.m, shape.b, columns=shape.d)
    y_syn, y_real = targets(shape.m, shape.p), targets(shape.b, shape.p, seed=1)
    return f_syn.requires_grad_(), y_syn.requires_grad_(), f_real, y_real


class KRR(Comparison):
    """The loss of KRR-ST, forward and backward."""

    against = "the formula, by LU and autograd"
    params = (tuple(FLOORS), EVERYWHERE, PLAIN)

    def case(self, shape: Shape, how: Setting) -> Case:
        return compared(
            how.place(*inputs(shape)),
            ours=partial(krr_mse, bias=1.0, **how.keywords),
            plain=partial(krr_mse, bias=1.0, **solving("reference")),
            flops=flops.krr(shape.m, shape.b, shape.d, shape.p),
        )


class KRRPrecision(KRR):
    """The same loss in every other precision, against the formula in float32."""

    params = (FEW, EVERYWHERE, SPECIAL)


class KRRPredict(KRR):
    """Predictions for any loss on top, forward and backward, trace not detached."""

    params = (FEW, EVERYWHERE, PLAIN)

    def case(self, shape: Shape, how: Setting) -> Case:
        predict = partial(krr_predict, ridge_of="mean_diagonal", detach_ridge=False)
        return compared(
            how.place(*inputs(shape)[:3]),
            ours=partial(predict, **how.keywords),
            plain=partial(predict, **solving("reference")),
            flops=flops.krr(shape.m, shape.b, shape.d, shape.p),
        )
