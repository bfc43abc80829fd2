"""Kernel ridge regression from given Gram matrices: an NTK, a graph kernel, any other."""

from typing import Literal, overload

from torch import Tensor

from krrst_fast.ops.autograd import product
from krrst_fast.ops.info import SolveInfo
from krrst_fast.ops.problem import (
    batch_of,
    check_kernel,
    check_matrices,
    check_same_size,
    check_solver,
    check_weights,
    finite,
    fold,
    ready_ridge,
    restore,
    unfold,
    working_dtype,
)
from krrst_fast.ops.ridge_solve import check_gram, choose_for_gram, solve_gram
from krrst_fast.ops.solver import DEFAULT, RidgeOf, Solver
from krrst_fast.ops.weights import apply_weights_to_grams
from krrst_fast.reference import absolute_ridge


@overload
def krr_predict_from_gram(
    k_syn: Tensor,
    k_real_syn: Tensor,
    y_syn: Tensor,
    *,
    ridge: float | Tensor = ...,
    ridge_of: RidgeOf = ...,
    detach_ridge: bool = ...,
    weights: Tensor | None = ...,
    solver: Solver = ...,
    return_info: Literal[False] = ...,
) -> Tensor: ...


@overload
def krr_predict_from_gram(
    k_syn: Tensor,
    k_real_syn: Tensor,
    y_syn: Tensor,
    *,
    ridge: float | Tensor = ...,
    ridge_of: RidgeOf = ...,
    detach_ridge: bool = ...,
    weights: Tensor | None = ...,
    solver: Solver = ...,
    return_info: Literal[True],
) -> tuple[Tensor, SolveInfo]: ...


def krr_predict_from_gram(
    k_syn: Tensor,
    k_real_syn: Tensor,
    y_syn: Tensor,
    *,
    ridge: float | Tensor = 1e-6,
    ridge_of: RidgeOf = "trace",
    detach_ridge: bool = True,
    weights: Tensor | None = None,
    solver: Solver = DEFAULT,
    return_info: bool = False,
) -> Tensor | tuple[Tensor, SolveInfo]:
    """Predict with kernel ridge regression from Gram matrices, differentiably.

    Equivalent to `K_rs (K_ss + lam I)^-1 Y_s`.

    Args:
        k_syn: K_ss, symmetric positive semi-definite [..., M, M]; symmetry is assumed, not checked,
            and its gradient is symmetric.
        k_real_syn: K_rs [..., B, M].
        y_syn: Targets [..., M, P].
        ridge: Positive number, or a tensor [...], which may require a gradient.
        ridge_of: What the ridge multiplies to give lam: the "trace" of K_ss, its "mean_diagonal",
            or 1 ("absolute").
        detach_ridge: Treat the trace as a constant in the gradient.
        weights: Weights of the rows [..., M], as in `krrst_fast.krr_mse`.
        solver: How the system is solved; see `krrst_fast.ridge_solve`.
        return_info: Return also a `SolveInfo`.

    Returns:
        The predictions [..., B, P]; with `return_info`, (predictions, info).

    Raises:
        The errors of `krrst_fast.krr_mse`.
    """
    op = "krr_predict_from_gram"
    if not isinstance(return_info, bool):
        raise TypeError(f"{op}: return_info must be True or False, got {return_info!r}")
    check_kernel(op, ridge, ridge_of, detach_ridge, 1.0, 0.0)
    check_solver(op, solver)
    names, tensors = ("k_syn", "k_real_syn", "y_syn"), (k_syn, k_real_syn, y_syn)
    dtype = check_matrices(op, names, tensors)
    check_gram(op, "k_syn", k_syn, solver)
    check_same_size(op, "k_syn", k_syn, "k_real_syn", k_real_syn, -1)
    check_same_size(op, "k_syn", k_syn, "y_syn", y_syn, -2)
    if weights is not None:
        check_weights(op, weights, k_syn)
    scalar = ridge if isinstance(ridge, Tensor) else None
    cores: dict[str, tuple[Tensor | None, int]] = {name: (x, 2) for name, x in zip(names, tensors)}
    batch = batch_of(op, **cores, weights=(weights, 1), ridge=(scalar, 0))
    working = working_dtype(dtype, solver.precision)
    ridge = ready_ridge(ridge, batch, working, k_syn)
    k_ss, k_rs, y = (fold(x.to(working), batch, 2) for x in tensors)
    of: str = ridge_of
    if weights is not None:
        row = fold(weights.to(working), batch, 1)
        k_ss, k_rs, y, ridge, of = apply_weights_to_grams(
            k_ss, k_rs, y, row, ridge, of, detach_ridge
        )
    lam = absolute_ridge(k_ss, ridge, of, detach_ridge)
    backend = choose_for_gram(op, solver, k_ss)
    alpha, *found = solve_gram(op, k_ss, y, lam, backend, solver, ("k_syn", "y_syn"))
    prediction = restore(product(k_rs, alpha), batch, dtype)
    if solver.check == "raise":
        finite(op, prediction, k_real_syn=k_rs, alpha=alpha)
    if not return_info:
        return prediction
    factor, lam, retries, pivot = (unfold(x, batch) for x in found)
    return prediction, SolveInfo("gram", backend.NAME, lam, retries, pivot, factor)
