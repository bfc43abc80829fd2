"""The Gram matrix of a set of features."""

from typing import Any

import torch
from torch import Tensor

from krrst_fast import reference
from krrst_fast.backends import Backend, choose
from krrst_fast.backends.torch import matmul
from krrst_fast.ops import composite
from krrst_fast.ops.autograd import Batched, Tensors, gradients, needs_composite
from krrst_fast.ops.problem import (
    check_kernel,
    check_matrices,
    check_solver,
    finite,
    fold,
    keepable,
    symbol,
    unfold,
    working_dtype,
)
from krrst_fast.ops.solver import DEFAULT, Solver
from krrst_fast.precision import exact_arithmetic


def gram(x: Tensor, *, scale: float = 1.0, bias: float = 0.0, solver: Solver = DEFAULT) -> Tensor:
    """Compute the Gram matrix K = scale X X^T + bias, differentiably.

    The C++ kernel, used from 48 rows on, computes one triangle and is exactly symmetric.

    Args:
        x: Features [..., N, D], float32, float64, or half precision (computed in float32), with
            any strides (`gram(x.mT)` is the Gram of the columns).
        scale: Positive factor of every inner product.
        bias: Non-negative constant that is added to every entry.
        solver: Its `precision` and `backend`; nothing is solved.

    Returns:
        K [..., N, N].

    Raises:
        ValueError: The shape or a value does not fit.
        TypeError: An argument has another type or dtype.
        NonFiniteError: x, on the CPU, holds NaN or infinity.
    """
    op = "gram"
    check_kernel(op, 1.0, "trace", True, scale, bias)
    check_solver(op, solver)
    dtype = check_matrices(op, ("x",), (x,))
    batch = tuple(x.shape[:-2])
    x = fold(x.to(working_dtype(dtype, solver.precision)), batch, 2)
    if solver.precision == "fast":
        x, _ = reference.round_features(x, None)
    if solver.backend == "reference":
        with exact_arithmetic(x):
            k = reference.gram(x, scale, bias)
        finite(op, k, x=x)
    elif needs_composite():
        k = composite.gram(x, scale, bias)
    elif torch.compiler.is_compiling():
        plain = _Gram.apply(x, 1.0, 0.0, choose(solver.backend, x, op))
        k = symbol(scale, x) * plain + symbol(bias, x)
    else:
        k = _Gram.apply(x, float(scale), float(bias), choose(solver.backend, x, op))
    narrowed, k = k.dtype != dtype, unfold(k, batch).to(dtype)
    if narrowed:
        finite(op, k, x=x)
    return k


class _Gram(Batched):
    @staticmethod
    def forward(x: Tensor, scale: float, bias: float, backend: Backend) -> Tensor:
        with exact_arithmetic(x):
            k = backend.gram(x, scale, bias)
        finite("gram", k, x=x)
        return k

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*keepable(inputs[0]))
        ctx.settings = inputs[1:3]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensors:
        found = gradients(_backward, _again, ctx, ctx.settings, grad)
        return (*found[:1], None, None, None)


def _backward(settings: tuple[float, float], x: Tensor, grad: Tensor) -> Tensors:
    with exact_arithmetic(x):
        return (settings[0] * matmul(grad + grad.mT, x),)


def _again(settings: tuple[float, float], x: Tensor) -> Tensor:
    return composite.gram(x, *settings)
