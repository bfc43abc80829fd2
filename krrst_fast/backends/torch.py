"""Plain PyTorch: the backend for every device and dtype.

Features may be float16 (see `reference.half_features`); products with them are float32.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from krrst_fast import reference
from krrst_fast.cholesky import CUDA_METHODS, LAPACK, Method
from krrst_fast.reference.kernels import kernel_slopes, kernel_values

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
    "scale_",
    "widened",
]

NAME = "torch"

Matmul = Callable[[Tensor, Tensor], Tensor]


def refuses(x: Tensor) -> str | None:
    """Return why tensors like x are not computed with: those on MPS, which has no float64."""
    return "MPS has no float64; move the tensors to the CPU" if x.is_mps else None


def gram(x: Tensor, scale: float | Tensor, bias: float | Tensor) -> Tensor:
    """Compute `reference.gram`."""
    k = scale_(matmul(x, x.mT), scale)
    return k.add_(bias) if isinstance(bias, Tensor) or bias else k


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Compute a @ b; in a graph of torch.compile in full precision when the graph runs."""
    a, b = widened(a), widened(b)
    return torch.ops.krrst_fast.matmul(a, b) if torch.compiler.is_compiling() else a @ b


def predicted_residual_mse(
    f_real: Tensor,
    w: Tensor,
    y_real: Tensor,
    scale: float | Tensor,
    offset: Tensor | None,
    times: Matmul = matmul,
) -> tuple[Tensor, Tensor]:
    """Compute `reference.predicted_residual_mse` of one problem, or of each of N.

    times: The product f_real w.
    """
    prediction = scale_(times(f_real, w), scale)
    if offset is not None:
        prediction.add_(offset)
    residual = prediction.sub_(y_real)
    squares = residual.square()
    return residual, squares.mean() if squares.ndim == 2 else squares.mean((-2, -1))


def closing_matmul(
    alpha: Tensor,
    v: Tensor,
    beta: Tensor,
    w: Tensor,
    scale: float | Tensor,
    times: Matmul = matmul,
) -> Tensor:
    """Compute `reference.closing_matmul` as one product: [alpha, -beta] [v, w]^T [N?, M, D]."""
    left = torch.cat((alpha, -beta), -1)
    if alpha.ndim == 2:
        return scale_(times(left, torch.cat((v, w), -1).mT), scale)
    return scale_(times(left, torch.cat((v.mT, w.mT), -2)), scale)


def cholesky_method(k: Tensor, columns: int) -> Method:
    """Return how a Gram k [N?, M, M] is factored and solved with so many right-hand sides."""
    return CUDA_METHODS["torch"] if k.is_cuda else LAPACK


def as_operands(f_syn: Tensor, f_real: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round features [N?, M, D], [N?, B, D] for precision="fast".

    Returns the operands of the products, and the power of two by which they are larger than the
    features, or None for 1.
    """
    with torch.no_grad():
        x_syn, x_real = reference.round_features(f_syn, f_real)
    assert x_real is not None
    return x_syn, x_real, None


def widened(x: Tensor) -> Tensor:
    """Return float16 as float32, and every other dtype as it is."""
    return x.float() if x.dtype == torch.float16 else x


def scale_(x: Tensor, scale: float | Tensor) -> Tensor:
    """Multiply x by scale, in place; the value of a tensor is not read."""
    return x if isinstance(scale, float) and scale == 1.0 else x.mul_(scale)
