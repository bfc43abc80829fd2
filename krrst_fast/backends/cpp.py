"""The C++ operators of the extension, on the CPU, and torch where its BLAS is faster."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from krrst_fast import operators
from krrst_fast.backends import torch as torch_backend
from krrst_fast.backends.torch import as_operands
from krrst_fast.cholesky import CPP, Method
from krrst_fast.planner import sizes

__all__ = [
    "NAME",
    "as_operands",
    "by_steps",
    "cholesky_method",
    "closing_matmul",
    "gram",
    "kernel_slopes",
    "kernel_values",
    "matmul",
    "predicted_residual_mse",
    "refuses",
    "suits_whole",
]

NAME = "cpp"

# A smaller Gram does not fill the kernel's panels of 48 rows, and MKL is up to twice as fast.
_GRAM_ROWS = 48
# Few batched products of small depth by a transposed matrix are faster in MKL.
_DEEP = 64
_LARGE_BATCH = 128


def refuses(x: Tensor) -> str | None:
    """Return why the extension cannot compute on a tensor like x, or None."""
    if not operators.HAS_EXTENSION:
        return f"the extension is {operators.EXTENSION}"
    if not x.is_cpu:
        return f"the tensors are on {x.device}, and it computes on the CPU"
    return None


def gram(x: Tensor, scale: float | Tensor, bias: float) -> Tensor:
    """Compute `reference.gram`, from 48 rows on as one triangle that is mirrored."""
    if x.ndim == 3 or x.shape[0] >= _GRAM_ROWS:
        return torch.ops.krrst_fast.gram(x, scale, bias)
    k = x @ x.mT
    if scale != 1.0:
        k.mul_(scale)
    return k.add_(bias) if bias else k


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Compute a @ b, by the operators for thin and for batched products where they are faster."""
    if a.ndim == 3:
        return torch.ops.krrst_fast.batched_matmul(a, b) if _suits_batched(a, b) else a @ b
    return torch.ops.krrst_fast.thin_matmul(a, b) if _is_thin(a, b) else a @ b


def predicted_residual_mse(
    f_real: Tensor, w: Tensor, y_real: Tensor, scale: float | Tensor, offset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute `reference.predicted_residual_mse` of one problem, or of each of N."""
    residual = matmul(f_real, w)
    if scale != 1.0:
        residual.mul_(scale)
    if offset is not None:
        residual.add_(offset)
    squares = residual.sub_(y_real).square()
    return residual, squares.mean() if squares.ndim == 2 else squares.mean((-2, -1))


def closing_matmul(
    alpha: Tensor, v: Tensor, beta: Tensor, w: Tensor, scale: float | Tensor
) -> Tensor:
    """Compute `reference.closing_matmul` as one product."""
    return torch_backend.closing_matmul(alpha, v, beta, w, scale, matmul)


def cholesky_method(k: Tensor, columns: int) -> Method:
    """Return our Cholesky for small Grams and LAPACK for large ones."""
    return CPP


kernel_values = torch.ops.krrst_fast.kernel_values
kernel_slopes = torch.ops.krrst_fast.kernel_slopes


def suits_whole(form: str, problems: int, m: int, d: int, b: int, p: int) -> bool:
    """Return whether one operator for each pass is faster than one for each step."""
    return not _in_steps and sizes.suits_whole(form, problems, m, d, b, p)


@contextmanager
def by_steps() -> Iterator[None]:
    """Compute small problems step by step too, in all threads: for checks of the steps."""
    global _in_steps
    before, _in_steps = _in_steps, True
    try:
        yield
    finally:
        _in_steps = before


_in_steps = False


def _suits_batched(a: Tensor, b: Tensor) -> bool:
    """Return False for few products of small depth by a transposed matrix, where MKL is faster."""
    shallow = a.shape[2] < _DEEP <= b.shape[2] and b.stride(-2) == 1
    return len(a) >= _LARGE_BATCH or not shallow


def _is_thin(a: Tensor, b: Tensor) -> bool:
    rows, depth = a.shape
    return sizes.suits_thin(rows, depth, b.shape[1], a.stride(0) == 1)
