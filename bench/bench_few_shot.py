"""Ridge heads of few-shot learning: thousands of small problems, and a ridge that is learnt."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bench import flops
from bench.common import LATENT
from bench.suite import EVERYWHERE, Case, Comparison, Setting, compared, forward_and_backward
from krrst_fast import krr_mse
from krrst_fast.seeding import generator


class Shape(NamedTuple):
    """Episodes of M support and B query images, P classes, D features."""

    episodes: int
    m: int
    p: int
    d: int
    b: int


FIVE_SHOT = Shape(4096, 25, 5, 640, 75)
SHAPES = (FIVE_SHOT, Shape(256, 25, 5, 640, 75), Shape(4096, 5, 5, 640, 75))
BATCHED, LOOP = "the formula in batched PyTorch", "a Python loop over the episodes"
FLOORS = {BATCHED: 1.2, LOOP: 8.0}
"""How many times as fast `FIVE_SHOT` has to be as each of these."""


def episodes(shape: Shape) -> list[Tensor]:
    """f_syn [N, M, D], y_syn [N, M, P], f_real [N, B, D], y_real [N, B, P] and the ridge [].

    Features are what a backbone is trained through, and the ridge is learnt: these three ask for
    gradients. Labels are one-hot.
    """
    draw = generator(0, "episodes")
    layer = torch.randn(LATENT, shape.d, generator=draw) / LATENT**0.5

    def images(count: int) -> tuple[Tensor, Tensor]:
        size = (shape.episodes, count)
        seen = torch.randn(*size, LATENT, generator=draw) @ layer
        label = torch.arange(count).remainder(shape.p).expand(size)
        return seen.relu_(), torch.nn.functional.one_hot(label, shape.p).float()

    (f_syn, y_syn), (f_real, y_real) = images(shape.m), images(shape.b)
    ridge = torch.tensor(10.0)
    return [f_syn.requires_grad_(), y_syn, f_real.requires_grad_(), y_real, ridge.requires_grad_()]


def batched_formula(
    f_syn: Tensor, y_syn: Tensor, f_real: Tensor, y_real: Tensor, ridge: Tensor
) -> Tensor:
    """The mean loss of all episodes, as plain PyTorch computes it in one go."""
    k_ss = f_syn @ f_syn.mT
    k_rs = f_real @ f_syn.mT
    eye = torch.eye(k_ss.shape[-1], dtype=k_ss.dtype, device=k_ss.device)
    alpha = torch.linalg.solve(k_ss + ridge * eye, y_syn)
    return (k_rs @ alpha - y_real).square().mean()


def looped_formula(
    f_syn: Tensor, y_syn: Tensor, f_real: Tensor, y_real: Tensor, ridge: Tensor
) -> Tensor:
    """The same, an episode at a time."""
    each = zip(f_syn, y_syn, f_real, y_real)
    return torch.stack([batched_formula(*episode, ridge) for episode in each]).mean()


def batched_mse(
    f_syn: Tensor, y_syn: Tensor, f_real: Tensor, y_real: Tensor, ridge: Tensor, *, how: Setting
) -> Tensor:
    """The same by the library: one call, one loss an episode, and their mean."""
    losses = krr_mse(
        f_syn,
        y_syn,
        f_real,
        y_real,
        ridge=ridge,
        ridge_of="absolute",
        backend=how.backend,
        **how.options,
    )
    return losses.mean()


def few_shot_case(shape: Shape, how: Setting, *, reference: str) -> Case:
    """The mean loss [] and its gradients to both sets of features and to the ridge."""
    tensors = how.place(episodes(shape))
    m, b, d, p = shape.m, shape.b, shape.d, shape.p
    case = compared(
        how,
        tensors,
        ours=partial(batched_mse, how=how),
        plain=batched_formula,
        # The gradient to the query features, which `krr` does not count, is R W^T.
        flops=shape.episodes * (flops.krr(m, b, d, p) + flops.product(b, p, d)),
    )
    if reference == LOOP:
        case = case._replace(reference=partial(forward_and_backward, looped_formula, tensors))
    return case


class FewShot(Comparison):
    """Few-shot episodes at once, forward and backward."""

    against = BATCHED
    params = (SHAPES, EVERYWHERE, ("float32",))

    def case(self, shape: Shape, how: Setting) -> Case:
        return few_shot_case(shape, how, reference=BATCHED)


class FewShotLoop(Comparison):
    """Few-shot episodes at once, forward and backward."""

    against = LOOP
    params = (SHAPES, EVERYWHERE, ("float32",))
    at_least = 2

    def case(self, shape: Shape, how: Setting) -> Case:
        return few_shot_case(shape, how, reference=LOOP)
