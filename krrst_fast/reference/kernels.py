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
    products: Tensor,
    squares_x: Tensor,
    squares_y: Tensor,
    gamma: float | Tensor,
    kernel: str,
    degree: int,
    coef0: float,
) -> Tensor:
    """Compute the kernel [..., I, J] from <x, y> [..., I, J] and squared norms; gamma is [...].

    Differentiable twice, at equal rows too.
    """
    gamma = gamma[..., None, None] if isinstance(gamma, Tensor) else gamma
    if kernel == "polynomial":
        return (gamma * products + coef0) ** degree
    if kernel == "rbf":
        return torch.exp(-gamma * _distances(products, squares_x, squares_y))
    lengths, cosine, sine = _angles(products, squares_x, squares_y)
    # As the arc of a tangent, whose derivative needs no square root.
    angle = torch.atan2(sine, cosine)
    values = lengths * (sine + (math.pi - angle) * cosine) / math.pi
    # Where a norm is 0 a derivative from both sides is that of half the product.
    return torch.where(lengths == 0, products / 2, values)


def _distances(products: Tensor, squares_x: Tensor, squares_y: Tensor) -> Tensor:
    return squares_x[..., :, None] + squares_y[..., None, :] - 2 * products


def _angles(products: Tensor, squares_x: Tensor, squares_y: Tensor) -> tuple[Tensor, ...]:
    """Return |x| |y|, cos t and sin t [..., I, J]; a right angle where a norm is 0."""
    norms = [torch.where(squares == 0, 1, squares).sqrt() for squares in (squares_x, squares_y)]
    none = (squares_x == 0)[..., :, None] | (squares_y == 0)[..., None, :]
    lengths = norms[0][..., :, None] * norms[1][..., None, :]
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
    gamma: Tensor,
    same: int,
    kernel: str,
    degree: int,
    coef0: float,
) -> Tensor:
    """Compute the kernel [N?, I, J] of rows x [N?, I, D] and y [N?, J, D], in their precision.

    Products [N?, I, J] and squared norms [N?, I], [N?, J] may be those of rows less a common row,
    which leaves distances as they are; implementations may compute the distance of near rows from
    x and y. gamma is float64 [N?]. Row i of x is row i + same of y, unless same is negative.
    """
    of = products, squares_x, squares_y, gamma.to(products.dtype)
    values = of_products(*of, kernel, degree, coef0)
    if kernel == "rbf":
        values = values.clamp(max=1)
        if same >= 0:
            rows = torch.arange(products.shape[-2], device=products.device)
            values[..., rows, rows + same] = 0 * values[..., rows, rows + same] + 1
    return values


def kernel_slopes(
    products: Tensor,
    x: Tensor,
    y: Tensor,
    squares_x: Tensor,
    squares_y: Tensor,
    gamma: Tensor,
    same: int,
    weight: Tensor,
    kernel: str,
    degree: int,
    coef0: float,
    needs_values: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the derivative of sum(weight * k) for the kernel k [N?, I, J].

    Args:
        products, x, y, squares_x, squares_y, gamma, same, kernel, degree, coef0: As for
            `kernel_values`.
        weight: Gradient to the kernel [N?, I, J].
        needs_values: Return the kernel too.

    Returns:
        The kernel, or an empty tensor; slope [N?, I, J], own [N?, I] and column [N?, J], with which
        the gradients are slope @ y + own * x and slope^T @ x + column * y for the rows whose
        products these are; the gradient to gamma in float64 [N?]; and, in an implementation that
        counts them, in how many entries rows are so near that these sums lose digits, int64 [].
    """
    of = squares_x, squares_y, gamma.to(products.dtype)
    number = of[-1][..., None, None]
    own, column = torch.zeros_like(squares_x), torch.zeros_like(squares_y)
    if kernel == "polynomial":
        base = number * products + coef0
        below = base ** (degree - 1)
        values, slope = below * base, degree * number * weight * below
        change = degree * weight * below * products
    elif kernel == "rbf":
        values = kernel_values(products, x, y, *of[:2], gamma, same, kernel, degree, coef0)
        change = weight * values
        if same >= 0:
            rows = torch.arange(products.shape[-2], device=products.device)
            change[..., rows, rows + same] = 0
        slope = 2 * number * change
        own, column = -slope.sum(-1), -slope.sum(-2)
        change = -change * _distances(products, squares_x, squares_y)
    else:
        lengths, cosine, sine = _angles(products, squares_x, squares_y)
        angle = torch.atan2(sine, cosine)
        values = lengths * (sine + (math.pi - angle) * cosine) / math.pi
        slope = weight * (math.pi - angle) / math.pi
        turn = weight * lengths * sine / math.pi
        own = torch.where(squares_x > 0, turn.sum(-1) / squares_x, 0)
        column = torch.where(squares_y > 0, turn.sum(-2) / squares_y, 0)
        change = torch.zeros_like(turn)
    d_gamma = change.sum((-2, -1), dtype=torch.float64)
    near = torch.zeros((), dtype=torch.int64, device=products.device)
    values = values if needs_values else products.new_empty(0)
    return values, slope, own, column, d_gamma, near
