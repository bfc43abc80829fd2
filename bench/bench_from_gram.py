"""Predictions from a gram that the user made, with the gradients to it."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bench import flops
from bench.common import features
from bench.suite import Case, Comparison, Setting, compared
from krrst_fast.seeding import generator

RIDGE = 1e-3


class Shape(NamedTuple):
    """M rows of the gram, B rows to predict, P targets, D features behind the grams."""

    m: int
    b: int
    p: int
    d: int = 2048


def formula(k_syn: Tensor, k_real_syn: Tensor, y_syn: Tensor) -> Tensor:
    """K_rs (K_ss + ridge tr(K_ss) / M I)^-1 Y_s by LU."""
    # The op takes the gram to be symmetric, and gives the symmetric part of its gradient.
    k_syn = (k_syn + k_syn.mT) / 2
    eye = torch.eye(len(k_syn), dtype=k_syn.dtype, device=k_syn.device)
    ridge = RIDGE * k_syn.diagonal().mean()
    return k_real_syn @ torch.linalg.solve(k_syn + ridge * eye, y_syn)


class FromGram(Comparison):
    """`krr_predict_from_gram`, forward and backward to both grams and the targets."""

    against = "LU and autograd"
    params = (
        (Shape(1000, 1024, 512), Shape(1000, 1024, 10), Shape(100, 256, 10)),
        ("torch", "torch-cuda"),
        ("float32", "float64", "float32, float64 inside"),
    )

    def case(self, shape: Shape, how: Setting) -> Case:
        from krrst_fast import krr_predict_from_gram

        f_syn, f_real = features(shape.m, shape.b, columns=shape.d)
        k_syn = f_syn @ f_syn.mT
        k_syn = (k_syn + k_syn.mT) / 2  # BLAS gives the two halves in different orders
        y_syn = torch.randn(shape.m, shape.p, generator=generator(0, "targets"))
        ours = partial(
            krr_predict_from_gram,
            ridge=RIDGE,
            ridge_of="mean_diagonal",
            detach_ridge=False,
            **how.options,
        )
        m, b, p = shape.m, shape.b, shape.p
        return compared(
            how,
            [x.requires_grad_() for x in (k_syn, f_real @ f_syn.mT, y_syn)],
            ours=ours,
            plain=formula,
            # Two solves with one factor, P, and the three gradients.
            flops=flops.solve(m, p) + 2 * m * m * p + flops.product(b, m, p) * 3 + 2 * m * m * p,
        )
