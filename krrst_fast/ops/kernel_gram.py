"""Gram matrices of kernels that are no linear ones, and products with them.

Operands are those of `kernel.operands`, in float64. A matrix K_rs of two sets of rows is not made:
its product with the dual coefficients is computed block by block, forward and backward. Letters: I
rows x, J rows y, P columns.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from krrst_fast.backends import Backend, for_backward
from krrst_fast.backends.torch import matmul
from krrst_fast.ops.autograd import Batched, Tensors, gradients, needs_composite
from krrst_fast.ops.kernel import Kernel
from krrst_fast.ops.problem import cast, keepable
from krrst_fast.precision import exact_arithmetic
from krrst_fast.reference.kernels import of_products

# Numbers of a block of products: in the last cache of a CPU, and enough to fill a GPU.
_BLOCK, _BLOCK_OF_GPU = 2**19, 2**25
# A smaller Gram is computed at once, by half of the products.
_AT_ONCE = 2048


class _Function(NamedTuple):
    """A kernel with gamma = 1 as the backends take it."""

    name: str
    degree: int
    coef0: float


def kernel_gram(x: Tensor, kernel: Kernel, dtype: torch.dtype, backend: Backend) -> Tensor:
    """Compute k(x_i, x_j) [N?, I, I] in `dtype` for x [N?, I, D], differentiably."""
    function = _function(kernel)
    if needs_composite() or torch.compiler.is_compiling():
        return cast(_composite_gram(x, function), dtype)
    return _KernelGram.apply(x, function, dtype, backend)


def kernel_product(x: Tensor, y: Tensor, v: Tensor, kernel: Kernel, backend: Backend) -> Tensor:
    """Compute sum_j k(x_i, y_j) v_j [N?, I, P] in the dtype of v [N?, J, P], differentiably.

    Nothing of the size I x J is made, in the backward pass neither.
    """
    function = _function(kernel)
    if needs_composite() or torch.compiler.is_compiling():
        return _composite_product(x, y, v, function)
    return _KernelProduct.apply(x, y, v, function, backend)


def _function(kernel: Kernel) -> _Function:
    return _Function(kernel.name, kernel.degree, float(kernel.coef0))


def _squares(x: Tensor) -> Tensor:
    return x.square().sum(-1)


def _blocks(x: Tensor, columns: int, grad: Tensor | None = None) -> Iterator[slice | None]:
    """Yield the rows of x [N?, I, D] in blocks, for so many columns; None for all of them.

    A gradient of is_grads_batched=True has no slices.
    """
    *many, rows, _ = x.shape
    numbers = _BLOCK if x.device.type == "cpu" else _BLOCK_OF_GPU
    high = max(1, numbers // max(columns * (many[0] if many else 1), 1))
    if high >= rows or (grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad)):
        yield None
        return
    for first in range(0, rows, high):
        yield slice(first, min(first + high, rows))


def _rows(x: Tensor, block: slice | None) -> Tensor:
    """Return rows of a matrix [N?, I, K]."""
    return x if block is None else x[..., block, :]


def _entries(x: Tensor, block: slice | None) -> Tensor:
    """Return entries of a vector [N?, I]."""
    return x if block is None else x[..., block]


def _together(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _add(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def _composite_gram(x: Tensor, function: _Function) -> Tensor:
    squares = _squares(x)
    return of_products(x @ x.mT, squares, squares, *function)


def _composite_product(x: Tensor, y: Tensor, v: Tensor, function: _Function) -> Tensor:
    k = of_products(x @ y.mT, _squares(x), _squares(y), *function)
    return cast(k @ v.double(), v.dtype)


class _KernelGram(Batched):
    @staticmethod
    def forward(x: Tensor, function: _Function, dtype: torch.dtype, backend: Backend) -> Tensor:
        single, squares = dtype == torch.float32, _squares(x)
        *many, rows, _ = x.shape
        if rows <= _AT_ONCE:
            products = backend.gram(x, 1.0, 0.0) if backend.refuses(x) is None else x @ x.mT
            return backend.kernel_values(products, x, x, squares, squares, *function, single)
        k = x.new_empty((*many, rows, rows), dtype=dtype)
        for block in _blocks(x, rows):
            assert block is not None
            below = slice(0, block.stop)
            part = x[..., block, :], x[..., below, :]
            norms = squares[..., block], squares[..., below]
            values = backend.kernel_values(part[0] @ part[1].mT, *part, *norms, *function, single)
            k[..., block, below] = values
            k[..., below, block] = values.mT
        return k

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, function, dtype, backend = inputs
        ctx.save_for_backward(*keepable(x))
        ctx.settings = function, dtype, backend

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensors:
        found = gradients(_gram_backward, _gram_again, ctx, ctx.settings, grad)
        return (*found[:1], None, None, None)


def _gram_backward(settings: tuple[Any, ...], x: Tensor, grad: Tensor) -> Tensors:
    function, _, backend = settings
    backend = for_backward(backend, grad)
    squares, parts = _squares(x), []
    for block in _blocks(x, x.shape[-2], grad):
        rows, norms = _rows(x, block), (_entries(squares, block), squares)
        weight = _rows(grad, block) + _rows(grad.mT, block)
        found = backend.kernel_slopes(rows @ x.mT, rows, x, *norms, weight, *function, False)
        _, slope, own, _ = found
        parts.append(slope @ x + own[..., None] * rows)
    return (_together(parts, -2),)


def _gram_again(settings: tuple[Any, ...], x: Tensor) -> Tensor:
    function, dtype, _ = settings
    return cast(_composite_gram(x, function), dtype)


class _KernelProduct(Batched):
    @staticmethod
    def forward(x: Tensor, y: Tensor, v: Tensor, function: _Function, backend: Backend) -> Tensor:
        squares_x, squares_y, single = _squares(x), _squares(y), v.dtype == torch.float32
        parts = []
        with exact_arithmetic(v):
            for block in _blocks(x, y.shape[-2]):
                rows, norms = _rows(x, block), (_entries(squares_x, block), squares_y)
                values = backend.kernel_values(rows @ y.mT, rows, y, *norms, *function, single)
                parts.append(matmul(values, v))
        return _together(parts, -2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*keepable(*inputs[:3]))
        ctx.settings = *inputs[3:], tuple(ctx.needs_input_grad[:3])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensors:
        found = gradients(_product_backward, _product_again, ctx, ctx.settings, grad)
        return (*found[:3], None, None)


def _product_backward(
    settings: tuple[Any, ...], x: Tensor, y: Tensor, v: Tensor, grad: Tensor
) -> Tensors:
    function, backend, needs = settings
    backend = for_backward(backend, grad)
    squares_x, squares_y, parts = _squares(x), _squares(y), []
    d_y = d_v = None
    with exact_arithmetic(grad):
        for block in _blocks(x, y.shape[-2], grad):
            rows, part = _rows(x, block), _rows(grad, block)
            norms, weight = (_entries(squares_x, block), squares_y), matmul(part, v.mT)
            values, slope, own, column = backend.kernel_slopes(
                rows @ y.mT, rows, y, *norms, weight, *function, needs[2]
            )
            if needs[0]:
                parts.append(slope @ y + own[..., None] * rows)
            if needs[1]:
                d_y = _add(d_y, slope.mT @ rows + column[..., None] * y)
            if needs[2]:
                d_v = _add(d_v, matmul(values.mT, part))
    return _together(parts, -2) if needs[0] else None, d_y, d_v


def _product_again(settings: tuple[Any, ...], x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    return _composite_product(x, y, v, settings[0])
