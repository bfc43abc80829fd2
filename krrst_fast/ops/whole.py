"""A small problem, or a batch of them, by one compiled operator for each pass.

A call of an operator costs as much as the arithmetic of some thousand numbers: step by step, as in
`closed_forms`, small problems would take three times as long.
"""

from typing import Any

import torch
from torch import Tensor

from krrst_fast.backends import Backend, cpp
from krrst_fast.cholesky import MAX_RETRIES, log_raised
from krrst_fast.ops.closed_forms import Solve
from krrst_fast.ops.problem import Problem, in_trace
from krrst_fast.ops.solver import Solver

# What `reference.krr_forward` reports.
_RAISED = 4


def takes(backend: Backend, problem: Problem, form: str, grad: Tensor | None = None) -> bool:
    """Return whether the operators compute this problem, and the gradient from `grad`."""
    if backend is not cpp:
        return False
    f_syn, y_syn, f_real = problem.f_syn, problem.y_syn, problem.f_real
    assert f_real is not None
    problems = f_syn.shape[0] if f_syn.ndim == 3 else 1
    sizes = *f_syn.shape[-2:], f_real.shape[-2], y_syn.shape[-1]
    if in_trace(f_syn) or not cpp.suits_whole(form, problems, *sizes):
        return False
    return grad is None or not torch._C._functorch.is_legacy_batchedtensor(grad)


def forward(
    solver: Solver, problem: Problem, form: str
) -> tuple[Tensor, Tensor | None, Solve] | None:
    """Return the result, the error to Y_r and what is left; None where a failure is to raise."""
    f_syn, y_syn, f_real, y_real, ridge, ridge_of, _, scale, bias = problem
    raises, retries = solver.check == "raise", solver.max_retries
    if retries is None:
        retries = MAX_RETRIES if raises else 0
    is_tensor = isinstance(ridge, Tensor)
    loss, readout, factor, lam, count, pivot, base, coefficients, product, met = _FORWARD(
        *(f_syn, y_syn, f_real, y_real, ridge if is_tensor else None, 0.0 if is_tensor else ridge),
        *(ridge_of, retries, scale, bias, form),
    )
    if raises and (found := met.item()):
        if found != _RAISED:
            return None
        log_raised(lam, count)
    kept = None if form == "primal" else product
    solve = Solve(factor, lam, count, pivot, None, base, coefficients, kept)
    return (readout, None, solve) if y_real is None else (loss, readout, solve)


def backward(
    problem: Problem,
    form: str,
    needs_input: tuple[bool, ...],
    error: Tensor | None,
    solve: Solve,
    grad: Tensor,
) -> tuple[Tensor | None, ...]:
    """Return the gradients to F_s, Y_s, F_r, Y_r and the ridge, None where one is not needed."""
    f_syn, y_syn, f_real, _, ridge, ridge_of, detach_ridge, scale, bias = problem
    is_tensor = isinstance(ridge, Tensor)
    product = grad.new_empty(0) if solve.product is None else solve.product
    wanted = [i for i in range(5) if needs_input[i]]
    bits = 0
    for i in wanted:
        bits |= 1 << i
    made = _BACKWARD(
        *(grad, f_syn, y_syn, f_real, error, solve.factor, solve.retries, solve.base),
        *(solve.coefficients, product, ridge if is_tensor else None, 0.0 if is_tensor else ridge),
        *(ridge_of, detach_ridge, scale, bias, form, bits),
    )
    grads: list[Tensor | None] = [None] * 5
    for i, x in zip(wanted, made):
        grads[i] = x
    return tuple(grads)


_FORWARD: Any = torch.ops.krrst_fast.krr_forward.default
_BACKWARD: Any = torch.ops.krrst_fast.krr_backward.default
