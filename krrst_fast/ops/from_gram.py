"""Kernel ridge regression where the caller has the Gram: an NTK, a graph kernel, any other."""

from typing import Literal, overload

from torch import Tensor
from typing_extensions import Unpack

from krrst_fast.ops import checks
from krrst_fast.ops.info import SolveInfo
from krrst_fast.ops.options import GramOptions, read, takes
from krrst_fast.ops.prepare import (
    check_outputs,
    check_weights,
    fold,
    ready_ridge,
    result_dtype,
    unfold,
    working_dtype,
)
from krrst_fast.ops.product import product
from krrst_fast.ops.ridge_solve import check_gram, solve_gram


@overload
def krr_predict_from_gram(
    k_syn: Tensor,
    k_real_syn: Tensor,
    y_syn: Tensor,
    *,
    return_info: Literal[False] = ...,
    **options: Unpack[GramOptions],
) -> Tensor: ...


@overload
def krr_predict_from_gram(
    k_syn: Tensor,
    k_real_syn: Tensor,
    y_syn: Tensor,
    *,
    return_info: Literal[True],
    **options: Unpack[GramOptions],
) -> tuple[Tensor, SolveInfo]: ...


@takes(GramOptions)
def krr_predict_from_gram(
    k_syn: Tensor,
    k_real_syn: Tensor,
    y_syn: Tensor,
    *,
    return_info: bool = False,
    **options: Unpack[GramOptions],
) -> Tensor | tuple[Tensor, SolveInfo]:
    """Predictions [..., B, P] of kernel ridge regression from grams, differentiable once.

    Equivalent to `K_rs (K_ss + lam I)^-1 Y_s`, or with `out_syn` and `out_real` to
    `out_real + K_rs (K_ss + lam I)^-1 (Y_s - out_syn)`.

    Args:
        k_syn: K_ss, symmetric positive semi-definite [..., M, M]; symmetry is taken, not checked,
            and its gradient is symmetric.
        k_real_syn: K_rs [..., B, M].
        y_syn: targets [..., M, P].
        return_info: also return a `SolveInfo`.
        **options: see `krrst_fast.ops.options.GramOptions`; errors as in `krrst_fast.krr_mse`.
    """
    op = "krr_predict_from_gram"
    chosen = read(op, options, GramOptions)
    checks.yes_or_no(op, "return_info", return_info)
    out_syn, out_real, weights = chosen.out_syn, chosen.out_real, chosen.weights
    checks.matrices(
        op, k_syn=k_syn, k_real_syn=k_real_syn, y_syn=y_syn, out_syn=out_syn, out_real=out_real
    )
    check_gram(op, "k_syn", k_syn, chosen)
    checks.same_size(op, "k_syn", k_syn, "k_real_syn", k_real_syn, -1)
    checks.same_size(op, "k_syn", k_syn, "y_syn", y_syn, -2)
    batch = checks.batch_of(
        op,
        k_syn=(k_syn, 2),
        k_real_syn=(k_real_syn, 2),
        y_syn=(y_syn, 2),
        out_syn=(out_syn, 2),
        out_real=(out_real, 2),
        weights=(weights, 1),
        ridge=(chosen.ridge if isinstance(chosen.ridge, Tensor) else None, 0),
    )
    if out_syn is not None and out_real is not None:
        check_outputs(op, y_syn, out_syn, k_real_syn, out_real)
    dtype = result_dtype(k_syn, k_real_syn, y_syn)
    working = working_dtype(dtype, chosen)
    chosen = chosen._replace(ridge=ready_ridge(chosen.ridge, batch, working, k_syn))
    k_ss, k_rs, y = (fold(x.to(working), batch, 2) for x in (k_syn, k_real_syn, y_syn))
    if out_syn is not None:
        y = y - fold(out_syn.to(working), batch, 2)
    if weights is not None:
        check_weights(op, weights, k_syn)
        row = fold(weights.to(working), batch, 1)
        root = row.sqrt()[..., None]  # [N?, M, 1]
        k_ss, k_rs, y = root * k_ss * root.mT, k_rs * root.mT, root * y
        if chosen.ridge_of == "mean_diagonal":
            total = row.detach().sum(-1) if chosen.detach_ridge else row.sum(-1)
            chosen = chosen._replace(ridge=chosen.ridge / total, ridge_of="trace")
    alpha, factor, lam, retries, pivot = solve_gram(op, k_ss, y, chosen, ("k_syn", "y_syn"))
    prediction = product(k_rs, alpha)
    if chosen.raises:
        checks.finite(op, prediction, k_real_syn=k_rs, alpha=alpha)
    prediction = unfold(prediction, batch)
    if out_real is not None:
        prediction = prediction + out_real
    prediction = prediction.to(dtype)
    if not return_info:
        return prediction
    lam, retries, pivot, factor = (unfold(x, batch) for x in (lam, retries, pivot, factor))
    return prediction, SolveInfo("gram", "torch", lam, retries, pivot, factor)
