"""Matrix products that no global switch rounds."""

from typing import Any

from torch import Tensor

from krrst_fast import library
from krrst_fast.exact import exact_arithmetic
from krrst_fast.ops.once import Batched, Tensors, gradients


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for [N?, I, K], [N?, K, J], in the precision of the operands; differentiable once."""
    return _Product.apply(a, b)


class _Product(Batched):
    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        with exact_arithmetic(a):
            return library.matmul(a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensors:
        return gradients(_backward, "product", ctx.needs_input_grad, *ctx.saved_tensors, grad)


def _backward(needs: tuple[bool, ...], a: Tensor, b: Tensor, grad: Tensor) -> Tensors:
    with exact_arithmetic(grad):
        return (
            library.matmul(grad, b.mT) if needs[0] else None,
            library.matmul(a.mT, grad) if needs[1] else None,
        )
