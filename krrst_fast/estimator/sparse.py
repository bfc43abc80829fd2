"""Fits of sparse rows: their Gram is dense, they are not."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from krrst_fast.ops.centring import check_intercept
from krrst_fast.ops.per_target import TargetFit, ridges_added, solve_each_target
from krrst_fast.ops.solver import DEFAULT, RidgeOf


def fit_sparse(
    op: str,
    x: Any,
    y: Tensor,
    ridge: float | Tensor,
    *,
    ridge_of: RidgeOf,
    scale: float,
    bias: float,
    intercept: bool,
    weights: Tensor | None,
) -> TargetFit:
    """Fit targets y [M, P] on the rows of x [M, D] in CSR, as `krrst_fast.krr_fit` fits dense ones.

    Solved in float64 by the Gram of the rows [M, M], or where M > D by that of the columns [D, D].

    Args:
        op: The name in errors.
        x, y: Rows and targets.
        ridge: Positive number, or one for each target [P]; 0 is least squares of minimum norm.
        ridge_of, scale, bias, intercept: As for `krrst_fast.krr_fit`.
        weights: Weights of the rows [M].

    Raises:
        ValueError: Bias and intercept are both asked for.
        NotPositiveDefiniteError: The ridge is too small for these rows.
    """
    check_intercept(op, intercept, bias)
    rows, columns = x.shape
    of_rows = np.ones(rows) if weights is None else weights.double().numpy()
    root, total = np.sqrt(of_rows)[:, None], of_rows.sum()
    exact, targets = x.astype(np.float64), y.double().numpy()
    mean_x, mean_y = np.zeros((1, columns)), np.zeros((1, targets.shape[1]))
    if intercept:
        mean_x = np.asarray(of_rows @ exact).reshape(1, -1) / total
        mean_y = of_rows[None] @ targets / total
    phi, solved_for = _scaled(exact, root), root * (targets - mean_y)  # weighted
    centre, primal = phi @ mean_x.T, rows > columns  # [M, 1]
    square = float((mean_x**2).sum())
    if primal:
        gram = _dense(phi.T @ phi) - total * (mean_x.T @ mean_x)
        right = phi.T @ solved_for - mean_x.T @ (root.T @ solved_for)  # [D, P]
    else:
        gram = _dense(phi @ phi.T) - centre @ root.T - root @ centre.T + square * (root @ root.T)
        right = solved_for
    gram *= scale
    trace = gram.trace() + bias * total
    if bias and primal:  # the constant feature, without a scale of its own
        border = (bias * scale) ** 0.5 * np.asarray(phi.T @ root)  # [D, 1]
        gram = np.block([[gram, border], [border.T, np.full((1, 1), bias * total)]])
        right = np.concatenate((right, (bias / scale) ** 0.5 * (root.T @ solved_for)))
    elif bias:
        gram += bias * (root @ root.T)
    system = torch.from_numpy(gram)
    of = torch.tensor(trace, dtype=torch.float64), total, targets.shape[1]
    lam, none = ridges_added(ridge, ridge_of, *of)
    found, lam = solve_each_target(op, system, torch.from_numpy(right), lam, none, DEFAULT)
    solved = found.numpy()
    if primal:
        primal_weights = scale * solved[:columns]
        constant = (bias * scale) ** 0.5 * solved[columns:] if bias else mean_y * 0
    else:
        primal_weights = scale * (phi.T @ solved - mean_x.T @ (root.T @ solved))
        constant = bias * (root.T @ solved)
    constant = constant + mean_y - mean_x @ primal_weights
    alpha, least = root * solved if not primal else None, none.numpy()
    if alpha is None:
        residual = targets - exact @ primal_weights - constant
        alpha = of_rows[:, None] * residual / np.where(least, 1, lam.numpy())
    if primal and least.any():  # K^+ y by the inverse of the smaller Gram, twice
        once = torch.from_numpy(solved[:, least])
        of_none = lam[none], none[none]
        twice = solve_each_target(op, system, once, *of_none, DEFAULT)[0].numpy()
        alpha[:, least] = phi @ twice[:columns] - root @ (mean_x @ twice[:columns])
        if bias:
            alpha[:, least] += (bias / scale) ** 0.5 * root @ twice[columns:]
        alpha[:, least] *= scale * root
    return TargetFit(
        alpha=torch.from_numpy(alpha).to(y.dtype),
        weights=torch.from_numpy(np.asarray(primal_weights)).to(y.dtype),
        intercept=torch.from_numpy(constant[0]).to(y.dtype),
        ridge=lam.to(y.dtype),
        _solver=DEFAULT,
    )


def _scaled(x: Any, root: np.ndarray) -> Any:
    """Return the rows of a CSR matrix times root [M, 1], in CSR."""
    scaled = x.copy()
    scaled.data *= np.repeat(root[:, 0], np.diff(x.indptr))
    return scaled


def _dense(x: Any) -> np.ndarray:
    """Return a sparse product as an array."""
    return np.asarray(x.toarray(), dtype=np.float64)


def unit_sparse_rows(x: Any) -> Any:
    """Return the rows of a CSR matrix divided by their length, in float64; one of zeros stays."""
    x = x.astype(np.float64)
    largest = np.asarray(abs(x).max(axis=1).todense()).ravel()
    scaled = _scaled(x, 1 / np.where(largest > 0, largest, 1)[:, None])
    length = np.sqrt(np.asarray(scaled.multiply(scaled).sum(axis=1)).ravel())
    return _scaled(scaled, 1 / np.where(length > 0, length, 1)[:, None])
