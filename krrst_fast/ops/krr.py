"""Kernel ridge regression on features, fused with its gradient: `krr_mse` and `krr_predict`."""

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from krrst_fast.backends import Backend, choose
from krrst_fast.errors import NonFiniteError
from krrst_fast.ops import composite, whole
from krrst_fast.ops.autograd import (
    MARKS_IN_A_TRACE,
    Batched,
    Tensors,
    gradients,
    needs_composite,
)
from krrst_fast.ops.closed_forms import SOLVE, separated
from krrst_fast.ops.info import SolveInfo
from krrst_fast.ops.kernel import LINEAR, Kernel, KernelName, as_kernel, of_unit_length
from krrst_fast.ops.krr_gradients import krr_gradients, with_operands
from krrst_fast.ops.krr_of_kernel import krr_of_kernel
from krrst_fast.ops.problem import (
    Problem,
    finite,
    keepable,
    prepare,
    raise_non_finite,
    restore,
    unfold,
)
from krrst_fast.ops.solver import DEFAULT, RidgeOf, Solver
from krrst_fast.ops.uneven import exact_primal
from krrst_fast.ops.weights import apply_weights
from krrst_fast.planner import cached_cheapest, cheapest
from krrst_fast.precision import exact_arithmetic


@overload
def krr_mse(
    f_syn: Tensor,
    y_syn: Tensor,
    f_real: Tensor,
    y_real: Tensor,
    *,
    ridge: float | Tensor = ...,
    ridge_of: RidgeOf = ...,
    detach_ridge: bool = ...,
    scale: float = ...,
    bias: float = ...,
    kernel: KernelName | Kernel = ...,
    weights: Tensor | None = ...,
    solver: Solver = ...,
    return_info: Literal[False] = ...,
) -> Tensor: ...


@overload
def krr_mse(
    f_syn: Tensor,
    y_syn: Tensor,
    f_real: Tensor,
    y_real: Tensor,
    *,
    ridge: float | Tensor = ...,
    ridge_of: RidgeOf = ...,
    detach_ridge: bool = ...,
    scale: float = ...,
    bias: float = ...,
    kernel: KernelName | Kernel = ...,
    weights: Tensor | None = ...,
    solver: Solver = ...,
    return_info: Literal[True],
) -> tuple[Tensor, SolveInfo]: ...


def krr_mse(
    f_syn: Tensor,
    y_syn: Tensor,
    f_real: Tensor,
    y_real: Tensor,
    *,
    ridge: float | Tensor = 1e-6,
    ridge_of: RidgeOf = "trace",
    detach_ridge: bool = True,
    scale: float = 1.0,
    bias: float = 0.0,
    kernel: KernelName | Kernel = "linear",
    weights: Tensor | None = None,
    solver: Solver = DEFAULT,
    return_info: bool = False,
) -> Tensor | tuple[Tensor, SolveInfo]:
    """Compute the mean squared error of kernel ridge regression from (F_s, Y_s) on (F_r, Y_r).

    Equivalent to `mean((K_rs (K_ss + lam I)^-1 Y_s - Y_r)^2)` with `K_ss = scale F_s F_s^T + bias`
    and `K_rs = scale F_r F_s^T + bias`, or with another kernel, differentiable in every tensor
    argument. With `bias=1` it is the outer loss of KRR-ST (arXiv 2310.06511, equation 4).

    Args:
        f_syn: Features [..., M, D], float32, float64, or half precision (computed in float32).
            Leading dimensions are a batch of problems, each with its own loss; they broadcast.
        y_syn: Targets [..., M, P].
        f_real: Features [..., B, D], B > 0.
        y_real: Targets [..., B, P], P > 0.
        ridge: Positive number, or a tensor [...], which may require a gradient.
        ridge_of: What the ridge multiplies to give lam: the "trace" of K_ss, its "mean_diagonal",
            or 1 ("absolute").
        detach_ridge: Treat the trace as a constant in the gradient, as KRR-ST does; False
            differentiates through it, as FRePo does.
        scale: Positive factor of every kernel value.
        bias: Non-negative constant that is added to every kernel value.
        kernel: The name of a kernel, or a `Kernel` with its numbers, which takes the place of the
            inner product.
        weights: Weights of the rows of F_s [..., M], not negative (positive where they require a
            gradient). A whole number is equivalent to as many equal rows, also in the trace.
        solver: How the system is solved: precision, closed form, backend, retries, checks.
        return_info: Return also a `SolveInfo`.

    Returns:
        The losses [...], a scalar tensor for matrices; with `return_info`, (losses, info).

    Raises:
        ValueError: Shapes, devices or values that do not fit.
        TypeError: An argument of another type or dtype.
        NonFiniteError: An input on the CPU holds NaN or infinity.
        NotPositiveDefiniteError: The Cholesky factorisation fails with the largest ridge.
    """
    op = "krr_mse"
    tensors = f_syn, y_syn, f_real, y_real
    kernel = LINEAR if kernel == "linear" else as_kernel(op, kernel)
    problem, batch, dtype = prepare(
        op, solver, tensors, ridge, ridge_of, detach_ridge, scale, bias, weights, kernel.gamma
    )
    if y_real.numel() == 0 or (batch and problem.f_syn.shape[0] == 0):
        raise ValueError(f"{op}: the mean is over y_real, got shape {tuple(y_real.shape)}")
    loss, info = _compute(op, problem, kernel, weights, solver, batch, dtype, return_info)
    return (loss, info) if info is not None else loss


@overload
def krr_predict(
    f_syn: Tensor,
    y_syn: Tensor,
    f_real: Tensor,
    *,
    ridge: float | Tensor = ...,
    ridge_of: RidgeOf = ...,
    detach_ridge: bool = ...,
    scale: float = ...,
    bias: float = ...,
    kernel: KernelName | Kernel = ...,
    weights: Tensor | None = ...,
    solver: Solver = ...,
    return_info: Literal[False] = ...,
) -> Tensor: ...


@overload
def krr_predict(
    f_syn: Tensor,
    y_syn: Tensor,
    f_real: Tensor,
    *,
    ridge: float | Tensor = ...,
    ridge_of: RidgeOf = ...,
    detach_ridge: bool = ...,
    scale: float = ...,
    bias: float = ...,
    kernel: KernelName | Kernel = ...,
    weights: Tensor | None = ...,
    solver: Solver = ...,
    return_info: Literal[True],
) -> tuple[Tensor, SolveInfo]: ...


def krr_predict(
    f_syn: Tensor,
    y_syn: Tensor,
    f_real: Tensor,
    *,
    ridge: float | Tensor = 1e-6,
    ridge_of: RidgeOf = "trace",
    detach_ridge: bool = True,
    scale: float = 1.0,
    bias: float = 0.0,
    kernel: KernelName | Kernel = "linear",
    weights: Tensor | None = None,
    solver: Solver = DEFAULT,
    return_info: bool = False,
) -> Tensor | tuple[Tensor, SolveInfo]:
    """Predict with kernel ridge regression, differentiably, for any loss on top.

    Equivalent to `K_rs (K_ss + lam I)^-1 Y_s` with `K_ss = scale F_s F_s^T + bias` and
    `K_rs = scale F_r F_s^T + bias` (arXiv 2310.06511, equation 4).

    Args:
        f_syn: Features [..., M, D], float32, float64, or half precision (computed in float32).
            Leading dimensions are a batch of problems; they broadcast.
        y_syn: Targets [..., M, P].
        f_real: Features [..., B, D].
        ridge: Positive number, or a tensor [...], which may require a gradient.
        ridge_of: What the ridge multiplies to give lam: the "trace" of K_ss, its "mean_diagonal",
            or 1 ("absolute").
        detach_ridge: Treat the trace as a constant in the gradient.
        scale: Positive factor of every kernel value.
        bias: Non-negative constant that is added to every kernel value.
        kernel: The name of a kernel, or a `Kernel`, as in `krr_mse`.
        weights: Weights of the rows of F_s [..., M], as in `krr_mse`.
        solver: How the system is solved: precision, closed form, backend, retries, checks.
        return_info: Return also a `SolveInfo`.

    Returns:
        The predictions [..., B, P]; with `return_info`, (predictions, info).

    Raises:
        The errors of `krr_mse`.
    """
    op = "krr_predict"
    kernel = LINEAR if kernel == "linear" else as_kernel(op, kernel)
    tensors, of = (f_syn, y_syn, f_real), (scale, bias, weights, kernel.gamma)
    problem, batch, dtype = prepare(op, solver, tensors, ridge, ridge_of, detach_ridge, *of)
    prediction, info = _compute(op, problem, kernel, weights, solver, batch, dtype, return_info)
    return (prediction, info) if info is not None else prediction


def _compute(
    op: str,
    problem: Problem,
    kernel: Kernel,
    weights: Tensor | None,
    solver: Solver,
    batch: tuple[int, ...],
    dtype: torch.dtype,
    return_info: bool,
) -> tuple[Tensor, SolveInfo | None]:
    """Choose form and backend, and compute the loss, or without y_real the prediction."""
    if not isinstance(return_info, bool):
        raise TypeError(f"{op}: return_info must be True or False, got {return_info!r}")
    if kernel is not LINEAR:
        if kernel.of_products:
            settings = weights, solver, batch, dtype, return_info
            return krr_of_kernel(op, problem, kernel, *settings)
        problem = of_unit_length(problem) if kernel.name == "cosine" else problem
    if weights is not None:
        problem, _ = apply_weights(problem, weights, batch)
    tracing = torch.compiler.is_compiling()
    in_transform = torch._C._are_functorch_transforms_active()
    if (in_transform or forward_ad._current_level >= 0) and needs_composite():
        if return_info:
            where = "in forward mode, and in transforms of torch.func that are nested or compiled"
            raise ValueError(f"{op}: return_info must be False {where}")
        return restore(composite.krr(op, problem, solver=solver), batch, dtype), None
    if solver.backend == "reference":
        if return_info or solver.check == "flag":
            missing = "info to return" if return_info else "failure to flag"
            raise ValueError(f"{op}: backend 'reference' has no {missing}")
        return restore(composite.by_reference(op, problem, solver), batch, dtype), None
    f_syn, y_syn, f_real = problem[:3]
    assert f_real is not None
    form, (m, d) = solver.form, f_syn.shape[-2:]
    if form == "auto" or m == 0 or d == 0:
        sizes = m, f_real.shape[-2], d, y_syn.shape[-1]
        form = cheapest(*sizes) if tracing else cached_cheapest(*sizes)
    if form == "primal":
        form, problem = exact_primal(problem, solver)
    backend = choose(solver.backend, problem.f_syn, op)
    computed: list[Any] = []
    inputs: list[Any] = [*problem, form, backend, solver, op]
    if tracing or in_transform:
        value, *computed = _Krr.apply(*inputs)
    elif torch.is_grad_enabled():
        value = _Direct.direct(*inputs, computed)
    else:
        value, *computed = _Krr.forward(*inputs)
    narrowed, value = value.dtype != dtype, restore(value, batch, dtype)
    if narrowed and solver.check == "raise":
        finite(op, value, f_syn=f_syn, y_syn=y_syn, f_real=f_real, y_real=problem.y_real)
    if not return_info:
        return value, None
    factor, lam, retries, pivot = (unfold(x, batch) for x in computed[4:8])
    return value, SolveInfo(form, backend.NAME, lam, retries, pivot, factor)


class _Krr(Batched):
    """The prediction, or with y_real the MSE, and the analytic gradient of a closed form."""

    @staticmethod
    def forward(
        f_syn: Tensor,
        y_syn: Tensor,
        f_real: Tensor,
        y_real: Tensor | None,
        ridge: float | Tensor,
        ridge_of: str,
        detach_ridge: bool,
        scale: float,
        bias: float,
        form: str,
        backend: Backend,
        solver: Solver,
        op: str,
    ) -> tuple[Tensor | None, ...]:
        x_syn = x_real = unit = error = None
        solve: Sequence[Tensor | None]
        problem = Problem(f_syn, y_syn, f_real, y_real, ridge, ridge_of, detach_ridge, scale, bias)
        if solver.precision == "fast":
            with exact_arithmetic(f_syn):
                x_syn, x_real, unit = backend.as_operands(f_syn, f_real)
            problem = with_operands(problem, x_syn, x_real, unit)
        if whole.takes(backend, problem, form):
            found = whole.forward(solver, problem, form)
            if found is not None:
                value, error, solve = found
                return value, error, x_syn, x_real, unit, *solve
        with exact_arithmetic(f_syn):
            try:
                readout, solve = SOLVE[form](backend, solver, problem)
            except NonFiniteError:
                # It is about the Gram: name the features instead.
                raise_non_finite(
                    op, f_syn=f_syn, ridge=ridge if isinstance(ridge, Tensor) else None
                )
            if y_real is None:
                value = readout.prediction(backend)
            else:
                error, value = readout.mse(backend, y_real)
        if solver.check == "raise":
            finite(op, value, f_syn=f_syn, y_syn=y_syn, f_real=f_real, y_real=y_real)
        return value, error, x_syn, x_real, unit, *solve

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        _, *computed = output
        _save(ctx, inputs, computed)
        ctx.set_materialize_grads(False)  # no zeros of the size of the factor
        # Not `mark_constant`: one call and one file less.
        if MARKS_IN_A_TRACE or not torch.compiler.is_compiling():
            ctx.mark_non_differentiable(*[x for x in computed if x is not None])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Tensors:
        if grad is None:
            return (None,) * 13
        settings = (tuple(ctx.needs_input_grad), *ctx.settings)
        grads = gradients(krr_gradients, composite.krr_of_saved, ctx, settings, grad)
        return (*grads[:5], *(None,) * 8)


class _Direct(torch.autograd.Function):
    """`_Krr` outside of transforms and traces, with one output.

    What was computed on the way goes into the list `computed`: each output of a function takes a
    microsecond, and a small problem takes ten.
    """

    direct = Batched.__dict__["direct"]

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *problem_and_how, computed = inputs
        value, *rest = _Krr.forward(*problem_and_how)
        computed += rest
        _save(ctx, problem_and_how, rest)
        assert value is not None
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensors:
        return (*_Krr.backward(ctx, grad), None)


def _save(ctx: Any, inputs: Sequence[Any], computed: Sequence[Tensor | None]) -> None:
    """Save what `krr_gradients` and `composite.krr_of_saved` read."""
    f_syn, y_syn, f_real, y_real, *kernel = inputs[:9]
    # F_s and F_r may be saved in float16 too: these are for a second derivative. Y_r is part of
    # the error, and may change after the call; it is saved only where its own gradient counts,
    # which under torch.func the level that asks for it cannot tell.
    if not (ctx.needs_input_grad[3] or torch._C._are_functorch_transforms_active()):
        y_real = None
    numbers, settings = separated(*kernel)
    ctx.save_for_backward(*keepable(f_syn, y_syn, f_real, y_real), *numbers, *computed)
    ctx.settings = (*settings, *inputs[9:])
