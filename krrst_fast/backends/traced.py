"""The CPU backend inside a graph of torch.compile.

Every product is an operator of its own, which switches torch's less precise products off when the
graph runs. Strides, by which `cpp` chooses among its operators, are not known while tracing.
"""

import torch
from torch import Tensor

from krrst_fast.backends.cpp import cholesky_method, refuses
from krrst_fast.backends.torch import (
    as_operands,
    closing_matmul,
    kernel_slopes,
    kernel_values,
    matmul,
    predicted_residual_mse,
)

__all__ = [
    "NAME",
    "as_operands",
    "cholesky_method",
    "closing_matmul",
    "gram",
    "kernel_slopes",
    "kernel_values",
    "matmul",
    "predicted_residual_mse",
    "refuses",
]

NAME = "cpp"


def gram(x: Tensor, scale: float | Tensor, bias: float | Tensor) -> Tensor:
    """Compute `reference.gram`; the operator takes no numbers that are tensors."""
    if isinstance(scale, Tensor) or isinstance(bias, Tensor):
        return scale * torch.ops.krrst_fast.gram(x, 1.0, 0.0) + bias
    return torch.ops.krrst_fast.gram(x, scale, bias)
