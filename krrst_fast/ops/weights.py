"""Weights of the rows of F_s: a row of weight w counts like w equal rows.

Rows and targets are multiplied by sqrt(w), the constant feature of the kernel included, which is
materialised for that; what is computed from them is converted back.
"""

import torch
from torch import Tensor

from krrst_fast.ops.problem import Problem, fold


def apply_weights(
    problem: Problem, weights: Tensor, batch: tuple[int, ...]
) -> tuple[Problem, Tensor]:
    """Return the weighted problem, and sqrt(weights) [N?, M, 1], for weights [..., M]."""
    row = fold(weights.to(problem.f_syn.dtype), batch, 1)
    root = row.sqrt()[..., None]
    f_syn, f_real = root * problem.f_syn, problem.f_real
    if problem.has_bias:
        constant = constant_feature(problem.scale, problem.bias)
        f_syn = torch.cat((f_syn, constant * root), -1)
        if f_real is not None:
            column = constant * f_real.new_ones((*f_real.shape[:-1], 1))
            f_real = torch.cat((f_real, column), -1)
    ridge, ridge_of = of_repeated_rows(problem.ridge, problem.ridge_of, row, problem.detach_ridge)
    weighted = problem._replace(
        f_syn=f_syn,
        y_syn=root * problem.y_syn,
        f_real=f_real,
        ridge=ridge,
        ridge_of=ridge_of,
        bias=0.0,
    )
    return weighted, root


def apply_weights_to_grams(
    k_syn: Tensor,
    k_real: Tensor,
    y: Tensor,
    weights: Tensor,
    ridge: float | Tensor,
    ridge_of: str,
    detach_ridge: bool,
) -> tuple[Tensor, Tensor, Tensor, float | Tensor, str]:
    """Return K_ss [N?, M, M], K_rs [N?, B, M], Y_s and the ridge, weighted by weights [N?, M]."""
    root = weights.sqrt()[..., None]
    ridge, ridge_of = of_repeated_rows(ridge, ridge_of, weights, detach_ridge)
    return root * k_syn * root.mT, k_real * root.mT, root * y, ridge, ridge_of


def of_repeated_rows(
    ridge: float | Tensor, ridge_of: str, weights: Tensor, detach_ridge: bool
) -> tuple[float | Tensor, str]:
    """Return the ridge of a mean over as many rows as the weights [N?, M] stand for."""
    if ridge_of != "mean_diagonal":
        return ridge, ridge_of
    total = weights.sum(-1)
    return ridge / (total.detach() if detach_ridge else total), "trace"


def constant_feature(scale: float | Tensor, bias: float | Tensor) -> float | Tensor:
    """Return the constant feature whose square, times the scale, is the bias of the kernel."""
    return (bias / scale) ** 0.5


def undo_weights(root: Tensor, residual: Tensor, unweighted: Tensor) -> Tensor:
    """Return leave-one-out residuals of the rows as given.

    Args:
        root: sqrt(weights) [..., M, 1].
        residual: Leave-one-out residuals of the weighted rows [..., M, P].
        unweighted: Plain residuals [..., M, P], which hold for rows of weight 0: these are left
            out of the fit already.
    """
    return torch.where(root > 0, residual / root, unweighted)
