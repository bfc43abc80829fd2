"""Ridge heads of few-shot learning: thousands of small problems and a learnt ridge."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bench import flops
from bench.common import LATENT
from bench.suite import EVERYWHERE, Case, Comparison, Setting, compared
from krrst_fast import krr_mse
from krrst_fast.runs.seeding import generator


class Shape(NamedTuple):
    """Episodes of M support and B query images, P classes, D features."""

    episodes: int
    m: int
    p: int
    d: int
    b: int


FIVE_SHOT = Shape(4096, 25, 5, 640, 75)
SHAPES = (FIVE_SHOT, Shape(256, 25, 5, 640, 75), Shape(4096, 5, 5, 640, 75))


def inputs(shape: Shape) -> list[Tensor]:
    """Draw f_syn [N, M, D], y_syn [N, M, P], f_real [N, B, D], y_real [N, B, P] and a ridge [].

    Labels are one-hot; the features and the ridge require gradients, as in training.
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
    """Compute the mean loss of all episodes in one batch of plain PyTorch."""
    k_ss = f_syn @ f_syn.mT
    k_rs = f_real @ f_syn.mT
    eye = torch.eye(k_ss.shape[-1], dtype=k_ss.dtype, device=k_ss.device)
    alpha = torch.linalg.solve(k_ss + ridge * eye, y_syn)
    return (k_rs @ alpha - y_real).square().mean()


def looped_formula(*tensors: Tensor) -> Tensor:
    """Compute the same, episode by episode."""
    *batches, ridge = tensors
    return torch.stack([batched_formula(*episode, ridge) for episode in zip(*batches)]).mean()


class FewShot(Comparison):
    """The mean loss of a batch of episodes, with its gradients to features and ridge."""

    against = "the formula in batched PyTorch"
    params = (SHAPES, EVERYWHERE, ("float32",))
    plain: Callable[..., Tensor] = staticmethod(batched_formula)

    def case(self, shape: Shape, how: Setting) -> Case:
        loss = partial(krr_mse, ridge_of="absolute", **how.keywords)
        m, b, d, p = shape.m, shape.b, shape.d, shape.p
        return compared(
            how.place(*inputs(shape)),
            ours=lambda *tensors: loss(*tensors[:4], ridge=tensors[4]).mean(),
            plain=self.plain,
            exact=batched_formula,
            # The gradient to the query features, which `krr` does not count, is R W^T.
            flops=shape.episodes * (flops.krr(m, b, d, p) + flops.product(b, p, d)),
        )


class FewShotLoop(FewShot):
    """The same against a loop."""

    against = "a Python loop over the episodes"
    at_least = 2
    plain = staticmethod(looped_formula)
