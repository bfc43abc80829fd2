"""Kernels of pairs of rows in plain PyTorch.

`kernel_values` and `kernel_slopes` take kernels as functions of inner products and squared norms;
`kernel_matrix` is the definition. Letters: I rows x, J rows y, D features.
"""

import math

import torch
from torch import Tensor

OF_PRODUCTS = ("polynomial", "rbf", "arccos")
"""The kernels that are functions of inner products and norms; the others are linear ones."""


def kernel_matrix(
    x: Tensor, y: Tensor, kernel: str, gamma: float | Tensor, degree: int, coef0: float
) -> Tensor:
    """Compute k(x[i], y[j]) [..., I, J] for x [..., I, D] and y [..., J, D], pair by pair.

    linear: <x, y>; polynomial: (gamma <x, y> + coef0)^degree; rbf: exp(-gamma |x - y|^2);
    cosine: the cosine of the angle t, 0 where a row is zero; arccos: |x| |y| (sin t + (pi - t)
    cos t) / pi (Cho and Saul 2009, of degree 1: an infinitely wide layer of ReLUs).
    """
    products = x @ y.mT
    if kernel == "linear":
        return products
    if kernel == "polynomial":
        return (gamma * products + coef0) ** degree
    if kernel == "rbf":
        distance = (x[..., :, None, :] - y[..., None, :, :]).square().sum(-1)
        return torch.exp(-gamma * distance)
    lengths = torch.linalg.vector_norm(x, dim=-1)[..., :, None]
    lengths = lengths * torch.linalg.vector_norm(y, dim=-1)[..., None, :]
    cosine = torch.where(lengths > 0, products / lengths, 0).clamp(-1, 1)
    if kernel == "cosine":
        return cosine
    angle = torch.arccos(cosine)
    return lengths * (torch.sin(angle) + (math.pi - angle) * cosine) / math.pi


def of_products(
    products: Tensor, squares_x: Tensor, squares_y: Tensor, kernel: str, degree: int, coef0: float
) -> Tensor:
    """Compute the kernel [..., I, J] from <x, y> [..., I, J] and squared norms, with gamma = 1.

    Differentiable twice, at equal rows too.
    """
    if kernel == "polynomial":
        return (products + coef0) ** degree
    if kernel == "rbf":
        return torch.exp(2 * products - squares_x[..., :, None] - squares_y[..., None, :])
    lengths, cosine, sine = _angles(products, squares_x, squares_y)
    # As pi / 2 less the arc of a tangent, whose derivative needs no square root.
    angle = torch.atan2(sine, cosine)
    values = lengths * (sine + (math.pi - angle) * cosine) / math.pi
    # Where a norm is 0 a derivative from both sides is that of half the product.
    return torch.where(lengths == 0, products / 2, values)


def _angles(products: Tensor, squares_x: Tensor, squares_y: Tensor) -> tuple[Tensor, ...]:
    """Return |x| |y|, cos t and sin t [..., I, J]; a right angle where a norm is 0."""
    area = squares_x[..., :, None] * squares_y[..., None, :]
    none = area == 0
    lengths = torch.where(none, 1, area).sqrt()
    cosine = torch.where(none, 0, products / lengths)
    # Where the rows are parallel to rounding, the sine is 0 and has no derivative.
    rest = (1 - cosine) * (1 + cosine)
    parallel = rest < 4 * torch.finfo(products.dtype).eps
    sine = torch.where(parallel, 0, torch.where(parallel, 1, rest).sqrt())
    return torch.where(none, 0, lengths), cosine, sine


def kernel_values(
    products: Tensor,
    x: Tensor,
    y: Tensor,
    squares_x: Tensor,
    squares_y: Tensor,
    kernel: str,
    degree: int,
    coef0: float,
    single: bool,
) -> Tensor:
    """Compute the kernel [N?, I, J] with gamma = 1, in float32 if `single`, else in float64.

    products [N?, I, J], x [N?, I, D], y [N?, J, D] and the squared norms [N?, I], [N?, J] are
    float64. Implementations may compute the distance of near rows from x and y.
    """
    values = of_products(products, squares_x, squares_y, kernel, degree, coef0)
    if kernel == "rbf":
        values = values.clamp(max=1)
    return values.float() if single else values


def kernel_slopes(
    products: Tensor,
    x: Tensor,
    y: Tensor,
    squares_x: Tensor,
    squares_y: Tensor,
    weight: Tensor,
    kernel: str,
    degree: int,
    coef0: float,
    needs_values: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the derivative of sum(weight * k) for the kernel k [N?, I, J] with gamma = 1.

    Args:
        products, x, y, squares_x, squares_y, kernel, degree, coef0: As for `kernel_values`.
        weight: Gradient to the kernel [N?, I, J], float32 or float64.
        needs_values: Return the kernel too.

    Returns:
        The kernel in the precision of weight, or an empty tensor; then in float64 slope [N?, I, J],
        own [N?, I] and column [N?, J], with which the gradients are slope @ y + own * x and
        slope^T @ x + column * y.
    """
    wide, none = weight.to(products.dtype), products.new_empty(0, dtype=weight.dtype)
    if kernel == "polynomial":
        below = (products + coef0) ** (degree - 1)
        values, slope = below * (products + coef0), degree * wide * below
        own, column = torch.zeros_like(squares_x), torch.zeros_like(squares_y)
    elif kernel == "rbf":
        values = of_products(products, squares_x, squares_y, kernel, degree, coef0).clamp(max=1)
        slope = 2 * wide * values
        own, column = -slope.sum(-1), -slope.sum(-2)
    else:
        lengths, cosine, sine = _angles(products, squares_x, squares_y)
        angle = torch.atan2(sine, cosine)
        values = lengths * (sine + (math.pi - angle) * cosine) / math.pi
        slope = wide * (math.pi - angle) / math.pi
        turn = wide * lengths * sine / math.pi
        own = torch.where(squares_x > 0, turn.sum(-1) / squares_x, 0)
        column = torch.where(squares_y > 0, turn.sum(-2) / squares_y, 0)
    return values.to(weight.dtype) if needs_values else none, slope, own, column
