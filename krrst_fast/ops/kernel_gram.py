"""Gram matrices of non-linear kernels, and products with them.

A matrix K_rs of two sets of rows is not kept: its product with the dual coefficients is computed
block by block, forward and backward. Inner products that are no more numbers than the rows are kept
for the backward pass. Letters: I rows x, J rows y, P columns.
"""

from typing import Any

import torch
from torch import Tensor

from krrst_fast.backends import Backend, for_backward
from krrst_fast.backends.torch import matmul
from krrst_fast.ops.autograd import Batched, Tensors, gradients, mark_constant, needs_composite
from krrst_fast.ops.kernel import Kernel, Rows
from krrst_fast.ops.kernel_blocks import (
    Function,
    Pair,
    add,
    blocks,
    groups_of,
    is_batched,
    joined,
    keeps,
    mean_row,
    put,
    rows_in,
    slopes_of,
    squares,
)
from krrst_fast.ops.problem import cast, keepable
from krrst_fast.precision import exact_arithmetic
from krrst_fast.reference.kernels import of_products

# A Gram of so few rows is smaller than what its factorisation needs: it is computed in one block.
_AT_ONCE = 2048


def kernel_gram(rows: Rows, gamma: Tensor, kernel: Kernel, backend: Backend) -> Tensor:
    """Compute k(x_i, x_j) [N?, I, I] for x [N?, I, D] and gamma [N?], differentiably."""
    function = Function(kernel.name, kernel.degree, float(kernel.coef0))
    if needs_composite() or torch.compiler.is_compiling():
        return _composite_gram(*rows, gamma, function)
    return _KernelGram.apply(*rows, gamma, function, backend)[0]


def kernel_product(
    x: Rows, y: Rows, v: Tensor, gamma: Tensor, kernel: Kernel, backend: Backend
) -> Tensor:
    """Compute sum_j k(x_i, y_j) v_j [N?, I, P] for v [N?, J, P] and gamma [N?], differentiably."""
    function = Function(kernel.name, kernel.degree, float(kernel.coef0))
    if needs_composite() or torch.compiler.is_compiling():
        return _composite_product(function, *x, *y, v, gamma)
    return _KernelProduct.apply(*x, *y, v, gamma, function, backend)[0]


def _wide(x: Tensor, given: Tensor, mean: Tensor) -> Tensor:
    """Return the rows x in float64 with the digits of those that were given, and the graph of x."""
    if x.dtype == torch.float64:
        return x
    return given.double() - mean + (x - x.detach()).double()


def _composite_gram(x: Tensor, given: Tensor, gamma: Tensor, function: Function) -> Tensor:
    wide = _wide(x, given, mean_row(given, function))
    norms = squares(wide)
    return cast(of_products(wide @ wide.mT, norms, norms, gamma, *function), x.dtype)


def _composite_product(
    function: Function,
    x: Tensor,
    given_x: Tensor,
    y: Tensor,
    given_y: Tensor,
    v: Tensor,
    gamma: Tensor,
) -> Tensor:
    mean = mean_row(given_y, function)
    x, y = _wide(x, given_x, mean), _wide(y, given_y, mean)
    k = of_products(x @ y.mT, squares(x), squares(y), gamma, *function)
    return cast(k @ v.double(), v.dtype)


class _KernelGram(Batched):
    @staticmethod
    def forward(
        x: Tensor, given: Tensor, gamma: Tensor, function: Function, backend: Backend
    ) -> tuple[Tensor | None, ...]:
        groups = groups_of(x, x.shape[-2])
        if groups is None:
            return _gram(x, given, gamma, function, backend)
        return joined([_gram(x[i], given[i], gamma[i], function, backend) for i in groups])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        *rows, function, backend = inputs
        ctx.save_for_backward(*keepable(*rows), output[1])
        ctx.settings = function, backend
        ctx.set_materialize_grads(False)
        mark_constant(ctx, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> Tensors:
        if grad is None:
            return (None,) * 5
        found = gradients(_gram_backward, _gram_again, ctx, ctx.settings, grad)
        return (*found[:3], None, None)


def _gram(
    x: Tensor, given: Tensor, gamma: Tensor, function: Function, backend: Backend
) -> tuple[Tensor, Tensor | None]:
    """Return the Gram [N?, I, I], and products that are kept."""
    rows, count = Rows(x, given), x.shape[-2]
    pair = Pair.made(rows, rows, function, backend)
    with exact_arithmetic(x):
        if keeps(x, count) or count <= _AT_ONCE:
            mine = backend.refuses(pair.x) is None
            products = backend.gram(pair.x, 1.0, 0.0) if mine else pair.x @ pair.x.mT
            values = backend.kernel_values(*pair.operands(products, gamma, 0), *function)
            return values.to(x.dtype), products if keeps(x, count) else None
        k = x.new_empty((*x.shape[:-1], count))
        for block in blocks(x, count):
            first, end, _ = block.indices(count)
            part = pair.of(block, slice(0, end))
            values = backend.kernel_values(*part.operands(None, gamma, first), *function)
            k[..., first:end, :end] = values
            k[..., :end, first:end] = values.mT
    return k, None


def _gram_backward(
    settings: tuple[Any, ...],
    x: Tensor,
    given: Tensor,
    gamma: Tensor,
    products: Tensor | None,
    grad: Tensor,
) -> Tensors:
    function, backend = settings
    groups = None if is_batched(grad) else groups_of(x, x.shape[-2])
    if groups is not None:
        some = [None if products is None else products[i] for i in groups]
        of = [(x[i], given[i], gamma[i], k, grad[i]) for i, k in zip(groups, some)]
        return joined([_gram_backward(settings, *tensors) for tensors in of])
    rows, backend = Rows(x, given), for_backward(backend, grad)
    pair = Pair.made(rows, rows, function, backend)
    d_x = d_gamma = None
    with exact_arithmetic(x):
        for block in blocks(x, x.shape[-2], grad):
            weight = rows_in(grad, block) + rows_in(grad.mT, block)
            kept = None if products is None else rows_in(products, block)
            how = gamma, block.start or 0, weight, function, backend, False
            part, (_, slope, own, _, change) = slopes_of(pair.of(block), kept, *how)
            gradient = (slope @ part.y + own[..., None] * part.x).to(x.dtype)
            d_x = put(d_x, x.shape, block, gradient)
            d_gamma = add(d_gamma, change / 2)  # each pair was weighted twice
    return d_x, None, d_gamma


def _gram_again(
    settings: tuple[Any, ...], x: Tensor, given: Tensor, gamma: Tensor, *_: Tensor | None
) -> Tensor:
    return _composite_gram(x, given, gamma, settings[0])


class _KernelProduct(Batched):
    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor | None, ...]:
        function, backend = inputs[6:]
        tensors = inputs[:6]
        groups = groups_of(tensors[0], tensors[2].shape[-2])
        if groups is None:
            return _product(function, backend, *tensors)
        return joined([_product(function, backend, *(x[i] for x in tensors)) for i in groups])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        *tensors, function, backend = inputs
        ctx.save_for_backward(*keepable(*tensors), output[1])
        ctx.settings = function, backend, tuple(ctx.needs_input_grad[:6])
        ctx.set_materialize_grads(False)
        mark_constant(ctx, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> Tensors:
        if grad is None:
            return (None,) * 8
        found = gradients(_product_backward, _product_again, ctx, ctx.settings, grad)
        return (*found[:6], None, None)


def _product(
    function: Function,
    backend: Backend,
    x: Tensor,
    given_x: Tensor,
    y: Tensor,
    given_y: Tensor,
    v: Tensor,
    gamma: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Return the product [N?, I, P], and inner products that are kept."""
    pair = Pair.made(Rows(x, given_x), Rows(y, given_y), function, backend)
    shape, out, products = (*x.shape[:-1], v.shape[-1]), None, None
    with exact_arithmetic(v):
        if keeps(x, y.shape[-2]):
            products = pair.x @ pair.y.mT
        for block in blocks(x, y.shape[-2]):
            kept = None if products is None else rows_in(products, block)
            values = backend.kernel_values(*pair.of(block).operands(kept, gamma, -1), *function)
            out = put(out, shape, block, matmul(values.to(v.dtype), v))
    assert out is not None
    return out, products


def _product_backward(
    settings: tuple[Any, ...],
    x: Tensor,
    given_x: Tensor,
    y: Tensor,
    given_y: Tensor,
    v: Tensor,
    gamma: Tensor,
    products: Tensor | None,
    grad: Tensor,
) -> Tensors:
    function, backend, needs = settings
    groups = None if is_batched(grad) else groups_of(x, y.shape[-2])
    if groups is not None:
        tensors = x, given_x, y, given_y, v, gamma, products, grad
        of = [[None if t is None else t[i] for t in tensors] for i in groups]
        return joined([_product_backward(settings, *some) for some in of])  # type: ignore[arg-type]
    backend = for_backward(backend, grad)
    pair = Pair.made(Rows(x, given_x), Rows(y, given_y), function, backend)
    d_x = d_y = d_v = d_gamma = None
    with exact_arithmetic(grad):
        for block in blocks(x, y.shape[-2], grad):
            change = rows_in(grad, block)
            kept = None if products is None else rows_in(products, block)
            if not (needs[0] or needs[2] or needs[5]):
                values = backend.kernel_values(*pair.of(block).operands(kept, gamma, -1), *function)
                d_v = add(d_v, matmul(values.mT.to(v.dtype), change))
                continue
            how = gamma, -1, matmul(change, v.mT), function, backend, needs[4]
            part, (values, slope, own, column, numbers) = slopes_of(pair.of(block), kept, *how)
            if needs[0]:
                gradient = (slope @ part.y + own[..., None] * part.x).to(x.dtype)
                d_x = put(d_x, x.shape, block, gradient)
            if needs[2]:
                gradient = slope.mT @ part.x + column[..., None] * part.y
                d_y = add(d_y, gradient.to(y.dtype))
            if needs[4]:
                d_v = add(d_v, matmul(values.mT.to(v.dtype), change))
            d_gamma = add(d_gamma, numbers)
    return d_x, None, d_y, None, d_v, d_gamma


def _product_again(settings: tuple[Any, ...], *saved: Any) -> Tensor:
    return _composite_product(settings[0], *saved[:6])
