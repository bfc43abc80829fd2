"""Our Triton kernels, and our CUDA Cholesky where its extension is built.

Triton is imported when the first kernel is launched. With TRITON_INTERPRET=1 its interpreter runs
the kernels on CPU tensors, slowly.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from krrst_fast import operators, reference
from krrst_fast.backends import torch as torch_backend
from krrst_fast.cholesky import CUDA_METHODS, FLOAT64_UP_TO, Method

NAME = "triton"

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_OLDEST = (8, 0)


def refuses(x: Tensor) -> str | None:
    """Return why the Triton kernels cannot compute on a tensor like x, or None."""
    if x.dtype not in (torch.float32, torch.float16):
        return f"it has no kernels for {str(x.dtype).removeprefix('torch.')}"
    return refuses_device(x)


def refuses_device(x: Tensor) -> str | None:
    """Return why no Triton kernel runs on the device of x, or None."""
    if not _has_triton():
        return "triton is not installed"
    if isinstance(x, FakeTensor):
        return "the tensors have no values"
    if x.device.type == "cpu" and _INTERPRETED:
        return None
    if x.device.type != "cuda":
        return f"the tensors are on {x.device}, and it computes on CUDA devices"
    if torch.version.hip is not None:
        return "it was not made for ROCm"
    if (found := capability(x.device.index)) < _OLDEST:
        return f"the GPU has compute capability {found}, and it needs {_OLDEST}"
    return None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def capability(index: int) -> tuple[int, int]:
    """Return the compute capability of a GPU."""
    return torch.cuda.get_device_capability(index)


def kernel(name: str, function: str = "") -> Callable[..., Any]:
    """Return the function that launches a kernel of `krrst_fast.kernels`."""
    return getattr(importlib.import_module(f"krrst_fast.kernels.{name}"), function or name)


def gram(x: Tensor, scale: float | Tensor, bias: float) -> Tensor:
    """Compute `reference.gram` of x [N?, M, D]: the lower triangle, then its mirror image."""
    return kernel("gram")(x, scale, bias)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Compute a @ b; of a batch by torch."""
    if a.ndim == 3:
        return torch_backend.matmul(a, b)
    if b.dtype == torch.float16 and a.dtype != torch.float16:
        return matmul(b.mT, a.mT).mT
    return kernel("thin_matmul")(a, b)


def predicted_residual_mse(
    f_real: Tensor, w: Tensor, y_real: Tensor, scale: float | Tensor, offset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute `reference.predicted_residual_mse`; of a batch by torch."""
    if f_real.ndim == 3:
        return torch_backend.predicted_residual_mse(f_real, w, y_real, scale, offset)
    fused = kernel("residual_mse", "predicted_residual_mse")
    return fused(f_real, w, y_real, scale, offset)


def closing_matmul(
    alpha: Tensor, v: Tensor, beta: Tensor, w: Tensor, scale: float | Tensor
) -> Tensor:
    """Compute `reference.closing_matmul`; of a batch by torch."""
    if alpha.ndim == 3:
        return torch_backend.closing_matmul(alpha, v, beta, w, scale)
    return kernel("closing_matmul")(alpha, v, beta, w, scale)


def kernel_values(products: Tensor, *rest: Any) -> Tensor:
    """Compute `reference.kernels.kernel_values` of float64 operands."""
    return kernel("kernel_functions", "kernel_values")(products, *rest)


def kernel_slopes(products: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Compute `reference.kernels.kernel_slopes` of float64 operands."""
    return kernel("kernel_functions", "kernel_slopes")(products, *rest)


def cholesky_method(k: Tensor, columns: int) -> Method:
    """Return our Cholesky, or torch's where ours is not built.

    A large Gram is inverted in the same steps; a batch has no such kernel.
    """
    if not (k.is_cuda and operators.HAS_CUDA_EXTENSION):
        return CUDA_METHODS["torch"]
    inverse = k.ndim == 2 and k.shape[-1] > FLOAT64_UP_TO
    return CUDA_METHODS["cuda inverse" if inverse else "cuda"]


def as_operands(f_syn: Tensor, f_real: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round features [N?, M, D], [N?, B, D] for precision="fast", to float16 if it is one problem.

    Each problem of a batch needs a power of two of its own, and the kernels take one: a batch is
    rounded in float32.
    """
    if f_syn.ndim == 3:
        return torch_backend.as_operands(f_syn, f_real)
    return reference.half_features(f_syn, f_real)
