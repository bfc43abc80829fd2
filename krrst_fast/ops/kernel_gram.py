"""Gram matrices of kernels that are no linear ones, and products with them.

A matrix K_rs of two sets of rows is not kept: its product with the dual coefficients is computed
block by block, forward and backward. Inner products that are no more numbers than the rows are kept
for the backward pass. Letters: I rows x, J rows y, P columns.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from krrst_fast.backends import Backend, for_backward
from krrst_fast.backends.torch import matmul
from krrst_fast.ops.autograd import Batched, Tensors, gradients, mark_constant, needs_composite
from krrst_fast.ops.kernel import Kernel, Rows
from krrst_fast.ops.problem import cast, keepable
from krrst_fast.precision import exact_arithmetic
from krrst_fast.reference.kernels import of_products

# Numbers of a block of products: in the last cache of a CPU, and enough to fill a GPU.
_BLOCK, _BLOCK_OF_GPU = 2**19, 2**25


class _Function(NamedTuple):
    """A kernel as the backends take it."""

    name: str
    degree: int
    coef0: float


def kernel_gram(rows: Rows, gamma: Tensor, kernel: Kernel, backend: Backend) -> Tensor:
    """Compute k(x_i, x_j) [N?, I, I] for x [N?, I, D] and gamma [N?], differentiably."""
    function = _Function(kernel.name, kernel.degree, float(kernel.coef0))
    if needs_composite() or torch.compiler.is_compiling():
        return _composite_gram(rows.x, gamma, function)
    return _KernelGram.apply(*rows, gamma, function, backend)[0]


def kernel_product(
    x: Rows, y: Rows, v: Tensor, gamma: Tensor, kernel: Kernel, backend: Backend
) -> Tensor:
    """Compute sum_j k(x_i, y_j) v_j [N?, I, P] for v [N?, J, P] and gamma [N?], differentiably."""
    function = _Function(kernel.name, kernel.degree, float(kernel.coef0))
    if needs_composite() or torch.compiler.is_compiling():
        return _composite_product(x.x, y.x, v, gamma, function)
    return _KernelProduct.apply(*x, *y, v, gamma, function, backend)[0]


def _squares(x: Tensor) -> Tensor:
    return x.square().sum(-1)


def _composite_gram(x: Tensor, gamma: Tensor, function: _Function) -> Tensor:
    wide = x.double()
    squares = _squares(wide)
    return cast(of_products(wide @ wide.mT, squares, squares, gamma, *function), x.dtype)


def _composite_product(
    x: Tensor, y: Tensor, v: Tensor, gamma: Tensor, function: _Function
) -> Tensor:
    x, y = x.double(), y.double()
    k = of_products(x @ y.mT, _squares(x), _squares(y), gamma, *function)
    return cast(k @ v.double(), v.dtype)


class _Pair(NamedTuple):
    """Two sets of rows as they are multiplied, and as their differences are taken."""

    x: Tensor
    y: Tensor
    given_x: Tensor
    given_y: Tensor

    def of(self, block: slice | None) -> "_Pair":
        """Return the pair for a block of the rows x."""
        x, given = _rows(self.x, block), _rows(self.given_x, block)
        return _Pair(x, self.y, given, self.given_y)

    def in_float64(self, function: _Function) -> "_Pair":
        """Return the pair in float64, from the rows as they were given."""
        x, y = self.given_x.double(), self.given_y.double()
        if function.name == "rbf":
            mean = y.mean(-2, keepdim=True)
            return _Pair(x - mean, y - mean, x, y)
        return _Pair(x, y, x, y)

    def operands(self, products: Tensor | None, gamma: Tensor, same: int) -> tuple[Any, ...]:
        """Return what the functions of a backend take; products [N?, I, J] if they are known."""
        products = self.x @ self.y.mT if products is None else products
        return products, self.given_x, self.given_y, _squares(self.x), _squares(self.y), gamma, same


def _pair(x: Rows, y: Rows, function: _Function, backend: Backend) -> _Pair:
    """Return rows for a backend: only the one of the CPU takes differences of near rows."""
    pair = _Pair(x.x, y.x, x.given, y.given)
    return pair if backend.NAME == "cpp" else pair.in_float64(function)


def _blocks(x: Tensor, columns: int, grad: Tensor | None = None) -> Iterator[slice | None]:
    """Yield the rows of x [N?, I, D] in blocks, for so many columns; None for all of them.

    They are all where products of them are no more numbers than the rows, and are kept. A gradient
    of is_grads_batched=True has no slices.
    """
    *many, rows, _ = x.shape
    numbers = _BLOCK if x.device.type == "cpu" else _BLOCK_OF_GPU
    high = max(1, numbers // max(columns * (many[0] if many else 1), 1))
    if high >= rows or _keeps(x, columns) or (grad is not None and _is_batched(grad)):
        yield None
        return
    for first in range(0, rows, high):
        yield slice(first, min(first + high, rows))


def _keeps(x: Tensor, columns: int) -> bool:
    """Return whether the products of x [N?, I, D] and so many rows are no more numbers than all."""
    rows, depth = x.shape[-2:]
    return rows * columns <= (rows + columns) * depth


def _is_batched(grad: Tensor) -> bool:
    return torch._C._functorch.is_legacy_batchedtensor(grad)


def _rows(x: Tensor, block: slice | None) -> Tensor:
    """Return rows of a matrix [N?, I, K]."""
    return x if block is None else x[..., block, :]


def _together(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _add(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def _slopes(
    pair: _Pair,
    products: Tensor | None,
    gamma: Tensor,
    same: int,
    weight: Tensor,
    function: _Function,
    backend: Backend,
    needs_values: bool,
) -> tuple[_Pair, tuple[Tensor, ...]]:
    """Return what `kernel_slopes` does, in float64 where float32 would lose digits, and the rows.

    Those are the ones that the slopes are to be multiplied with.
    """
    weight = weight.to(pair.x.dtype)
    settings = *function, needs_values
    found = backend.kernel_slopes(*pair.operands(products, gamma, same), weight, *settings)
    single = pair.x.dtype == torch.float32 and pair.x.is_cpu and not _is_batched(weight)
    if single and found[-1].item():
        pair, weight = pair.in_float64(function), weight.double()
        found = backend.kernel_slopes(*pair.operands(None, gamma, same), weight, *settings)
    return pair, found[:-1]


class _KernelGram(Batched):
    @staticmethod
    def forward(
        x: Tensor, given: Tensor, gamma: Tensor, function: _Function, backend: Backend
    ) -> tuple[Tensor, Tensor | None]:
        rows, count = Rows(x, given), x.shape[-2]
        pair = _pair(rows, rows, function, backend)
        with exact_arithmetic(x):
            if _keeps(x, count):
                mine = backend.refuses(pair.x) is None
                products = backend.gram(pair.x, 1.0, 0.0) if mine else pair.x @ pair.x.mT
                values = backend.kernel_values(*pair.operands(products, gamma, 0), *function)
                return values.to(x.dtype), products
            k = x.new_empty((*x.shape[:-1], count))
            for block in _blocks(x, count):
                first, end = (0, count) if block is None else (block.start, block.stop)
                below = slice(0, end)
                part = pair.of(block)._replace(
                    y=pair.y[..., below, :], given_y=pair.given_y[..., below, :]
                )
                values = backend.kernel_values(*part.operands(None, gamma, first), *function)
                k[..., first:end, below] = values
                k[..., below, first:end] = values.mT
        return k, None

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


def _gram_backward(
    settings: tuple[Any, ...],
    x: Tensor,
    given: Tensor,
    gamma: Tensor,
    products: Tensor | None,
    grad: Tensor,
) -> Tensors:
    function, backend = settings
    rows, backend = Rows(x, given), for_backward(backend, grad)
    pair = _pair(rows, rows, function, backend)
    parts, d_gamma = [], None
    with exact_arithmetic(x):
        for block in _blocks(x, x.shape[-2], grad):
            weight = _rows(grad, block) + _rows(grad.mT, block)
            first = 0 if block is None else block.start
            kept = products if block is None else None
            how = gamma, first, weight, function, backend, False
            part, (_, slope, own, _, change) = _slopes(pair.of(block), kept, *how)
            parts.append((slope @ part.y + own[..., None] * part.x).to(x.dtype))
            d_gamma = _add(d_gamma, change / 2)  # each pair was weighted twice
    return _together(parts, -2), None, d_gamma


def _gram_again(
    settings: tuple[Any, ...], x: Tensor, given: Tensor, gamma: Tensor, *_: Tensor | None
) -> Tensor:
    return _composite_gram(x, gamma, settings[0])


class _KernelProduct(Batched):
    @staticmethod
    def forward(
        x: Tensor,
        given_x: Tensor,
        y: Tensor,
        given_y: Tensor,
        v: Tensor,
        gamma: Tensor,
        function: _Function,
        backend: Backend,
    ) -> tuple[Tensor, Tensor | None]:
        pair = _pair(Rows(x, given_x), Rows(y, given_y), function, backend)
        parts, products = [], None
        with exact_arithmetic(v):
            if _keeps(x, y.shape[-2]):
                products = pair.x @ pair.y.mT
            for block in _blocks(x, y.shape[-2]):
                operands = pair.of(block).operands(products, gamma, -1)
                values = backend.kernel_values(*operands, *function)
                parts.append(matmul(values.to(v.dtype), v))
        return _together(parts, -2), products

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
    backend = for_backward(backend, grad)
    pair = _pair(Rows(x, given_x), Rows(y, given_y), function, backend)
    parts: list[Tensor] = []
    d_y = d_v = d_gamma = None
    with exact_arithmetic(grad):
        for block in _blocks(x, y.shape[-2], grad):
            change = _rows(grad, block)
            how = gamma, -1, matmul(change, v.mT), function, backend, needs[4]
            kept = products if block is None else None
            part, (values, slope, own, column, numbers) = _slopes(pair.of(block), kept, *how)
            if needs[0]:
                parts.append((slope @ part.y + own[..., None] * part.x).to(x.dtype))
            if needs[2]:
                d_y = _add(d_y, slope.mT @ part.x + column[..., None] * part.y)
            if needs[4]:
                d_v = _add(d_v, matmul(values.mT.to(v.dtype), change))
            d_gamma = _add(d_gamma, numbers)
    d_x = _together(parts, -2) if needs[0] else None
    return d_x, None, None if d_y is None else d_y.to(y.dtype), None, d_v, d_gamma


def _product_again(
    settings: tuple[Any, ...],
    x: Tensor,
    given_x: Tensor,
    y: Tensor,
    given_y: Tensor,
    v: Tensor,
    gamma: Tensor,
    *_: Tensor | None,
) -> Tensor:
    return _composite_product(x, y, v, gamma, settings[0])
