"""The KRR loss of KRR-ST with its gradients to the synthetic features and targets."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bench.common import Case, Comparison, features
from krrst_fast.backends import BackendName
from krrst_fast.ops.krr import krr_mse
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


def inputs(shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """f_syn [M, D] and y_syn [M, P], which ask for gradients, f_real [B, D] and y_real [B, P]."""
    f_syn, f_real = features(shape.m, shape.b, columns=shape.d)
    draw = generator(0, "targets")
    y_syn = torch.randn(shape.m, shape.p, generator=draw)
    y_real = torch.randn(shape.b, shape.p, generator=draw)
    return f_syn.requires_grad_(), y_syn.requires_grad_(), f_real, y_real


def loss_and_gradients(
    backend: BackendName, f_syn: Tensor, y_syn: Tensor, f_real: Tensor, y_real: Tensor
) -> Sequence[Tensor]:
    """The loss [], its gradients [M, D] and [M, P]."""
    loss = krr_mse(f_syn, y_syn, f_real, y_real, bias=1.0, backend=backend)
    return (loss.detach(), *torch.autograd.grad(loss, (f_syn, y_syn)))


def krr_case(shape: Shape, backend: BackendName) -> Case:
    """Forward and backward pass; "auto" leaves the choice of the backend to the library."""
    tensors = inputs(shape)
    double = [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]
    return Case(
        ours=partial(loss_and_gradients, backend, *tensors),
        reference=partial(loss_and_gradients, "reference", *tensors),
        exact=partial(loss_and_gradients, "reference", *double),
    )


class KRR(Comparison):
    """`krr_mse` against LU and autograd."""

    params = (tuple(FLOORS), ("cpp", "torch"))

    def case(self, shape: Shape, backend: BackendName) -> Case:
        return krr_case(shape, backend)
