"""The parts of a closed form in plain PyTorch: what computes where no kernel of ours does.

Features may be float16 (see `reference.half_features`); what is computed from them is float32.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Matmul = Callable[[Tensor, Tensor], Tensor]


def wide(x: Tensor) -> Tensor:
    """x in float32, if it is float16."""
    return x.float() if x.dtype == torch.float16 else x


def scaled(x: Tensor, scale: float | Tensor) -> Tensor:
    """scale x, in place; a tensor is not looked at."""
    return x if isinstance(scale, float) and scale == 1.0 else x.mul_(scale)


def gram(x: Tensor, scale: float | Tensor, bias: float) -> Tensor:
    """`reference.gram`."""
    x = wide(x)
    k = scaled(x @ x.mT, scale)
    return k.add_(bias) if bias else k


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b."""
    return wide(a) @ wide(b)


def predicted(
    times: Matmul, f: Tensor, w: Tensor, scale: float | Tensor, offset: Tensor | None
) -> Tensor:
    """scale f w + offset [N?, B, P] for an offset [N?, 1, P]."""
    prediction = scaled(times(f, w), scale)
    return prediction if offset is None else prediction.add_(offset)


def mse(
    times: Matmul, f: Tensor, w: Tensor, y: Tensor, scale: float | Tensor, offset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`reference.predicted_residual_mse`, of one problem or of each of N."""
    error = predicted(times, f, w, scale, offset).sub_(y)
    squares = error.square()
    return error, squares.mean() if squares.ndim == 2 else squares.mean((-2, -1))


def closing(
    times: Matmul, alpha: Tensor, v: Tensor, beta: Tensor, w: Tensor, scale: float | Tensor
) -> Tensor:
    """`reference.closing_matmul` as one product: [alpha, -beta] [v, w]^T [N?, M, D]."""
    left = torch.cat((alpha, -beta), -1)
    if alpha.ndim == 2:
        return scaled(times(left, torch.cat((v, w), -1).mT), scale)
    return scaled(times(left, torch.cat((v.mT, w.mT), -2)), scale)
