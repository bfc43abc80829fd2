"""The gradients of kernel ridge regression, from what its forward pass saved."""

from typing import Any

import torch
from torch import Tensor

from krrst_fast.backends import for_backward
from krrst_fast.cholesky import RIDGE_FACTOR
from krrst_fast.ops import whole
from krrst_fast.ops.autograd import Tensors
from krrst_fast.ops.closed_forms import BACKWARD, Needs, Solve, assembled, ridge_base
from krrst_fast.ops.problem import Problem
from krrst_fast.precision import exact_arithmetic


def with_operands(problem: Problem, x_syn: Tensor, x_real: Tensor, unit: Tensor | None) -> Problem:
    """Return the problem with rounded features, which are `unit` times as large."""
    scale = problem.scale if unit is None else problem.scale / (unit * unit)
    return problem._replace(f_syn=x_syn, f_real=x_real, scale=scale)


def krr_gradients(settings: tuple[Any, ...], *saved: Tensor | None) -> Tensors:
    """Return the gradients to F_s, Y_s, F_r, Y_r and the ridge; the last of `saved` is incoming."""
    needs_input, *kernel, form, backend, _, _ = settings
    error, x_syn, x_real, unit = saved[7:11]
    solved: list[Any] = list(saved[11:-1])
    grad = saved[-1]
    assert grad is not None
    problem, solve = assembled(kernel, *saved[:7]), Solve(*solved)
    f_syn = problem.f_syn
    if unit is not None and unit.ndim:  # a vmap over the gradient of one problem
        unit = unit[..., None, None]
    if x_syn is not None and x_real is not None:
        problem = with_operands(problem, x_syn, x_real, unit)
    if whole.takes(backend, problem, form, grad):
        return whole.backward(problem, form, needs_input, error, solve, grad)
    needs_f_syn, needs_y_syn, needs_f_real, needs_y_real, needs_ridge, *_ = needs_input
    through_trace = needs_f_syn and not problem.detach_ridge and problem.ridge_of != "absolute"
    needs = Needs(needs_f_syn, needs_y_syn, needs_f_real, needs_ridge or through_trace)
    r = grad  # [N?, B, P]
    if error is not None:
        r = error * (grad * (2.0 / (error.shape[-2] * error.shape[-1])))[..., None, None]
    backend = for_backward(backend, grad)
    factor = 1.0 if unit is None else unit
    with exact_arithmetic(f_syn):
        grads = BACKWARD[form](backend, problem, solve, r, needs, factor)
    d_ridge = None
    if grads.lam is not None:
        raised = grads.lam * RIDGE_FACTOR**solve.retries
        if needs_ridge:
            d_ridge = raised * solve.base
        if through_trace:
            # lam = ridge * base, and d trace(K_ss) / dF_s = 2 scale F_s
            one = torch.ones_like(raised)
            base = ridge_base(problem.ridge_of, one, max(f_syn.shape[-2], 1))
            slope = raised * problem.ridge * base
            slope = slope[..., None, None] * (2.0 * (problem.scale * factor))
            assert grads.f_syn is not None
            grads.f_syn.addcmul_(problem.f_syn.to(grads.f_syn.dtype), slope)
    d_y_real = -r if needs_y_real else None
    d_y_syn = grads.y_syn if needs_y_syn else None
    return grads.f_syn, d_y_syn, grads.f_real, d_y_real, d_ridge
