"""The parts of a closed form on a GPU: by our kernels, or part by part by whoever was fastest.

Triton is imported when the first kernel is launched. With TRITON_INTERPRET=1 its interpreter runs
the kernels on CPU tensors, slowly.
"""

import functools
import importlib
import importlib.util
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from krrst_fast import library, measured, plain
from krrst_fast.factor import FLOAT64_UP_TO, SOLVERS, Solver

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_OLDEST = (8, 0)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def triton_refuses(x: Tensor) -> str | None:
    """Why the Triton kernels cannot compute on tensors like x."""
    if x.dtype not in (torch.float32, torch.float16):
        return f"it has no kernels for {_name(x.dtype)}"
    return _place_refuses(x)


def _place_refuses(x: Tensor) -> str | None:
    """Why there are no Triton kernels where x is."""
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
    if (capability := _capability(x.device.index)) < _OLDEST:
        return f"the GPU has compute capability {capability}, and it needs {_OLDEST}"
    return None


def cuda_refuses(x: Tensor) -> str | None:
    """The same for the Triton kernels together with our Cholesky factor."""
    if not library.has_cuda_extension():
        return f"the CUDA extension is {library.CUDA_EXTENSION}"
    return triton_refuses(x)


def tuned_refuses(x: Tensor) -> str | None:
    """Why there is no choice among measured implementations for tensors like x."""
    if (reason := _place_refuses(x)) is not None:
        return reason
    if (arch := architecture(x)) not in measured.tables():
        return f"nothing was measured on {arch}"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def architecture(x: Tensor) -> str:
    """The name under which the GPU that holds x has its measurements, as "sm_90"."""
    if x.device.type != "cuda":
        return x.device.type
    major, minor = _capability(x.device.index)
    return f"sm_{major}{minor}"


def _kernel(name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"krrst_fast.kernels.{name}"), name)


def gram(x: Tensor, scale: float | Tensor, bias: float) -> Tensor:
    """`reference.gram` of x [N?, M, D], which computes one triangle."""
    return _kernel("gram")(x, scale, bias)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b; of many problems by torch."""
    if a.ndim == 3:
        return plain.matmul(a, b)
    if b.dtype == torch.float16 and a.dtype != torch.float16:
        return matmul(b.mT, a.mT).mT
    return _kernel("thin_matmul")(a, b)


def mse(
    f: Tensor, w: Tensor, y: Tensor, scale: float | Tensor, offset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`reference.predicted_residual_mse`; of many problems by torch."""
    if f.ndim == 3:
        return plain.mse(plain.matmul, f, w, y, scale, offset)
    module = importlib.import_module("krrst_fast.kernels.residual_mse")
    return module.predicted_residual_mse(f, w, y, scale, offset)


def closing(alpha: Tensor, v: Tensor, beta: Tensor, w: Tensor, scale: float | Tensor) -> Tensor:
    """`reference.closing_matmul`; of many problems by torch."""
    if alpha.ndim == 3:
        return plain.closing(plain.matmul, alpha, v, beta, w, scale)
    return _kernel("closing_matmul")(alpha, v, beta, w, scale)


def cuda_solver(k: Tensor, columns: int) -> Solver:
    """Our Cholesky; the inverse of the factor comes with it where there is one problem."""
    return SOLVERS["cuda inverse" if k.ndim == 2 and k.shape[-1] > FLOAT64_UP_TO else "cuda"]


def choice(part: str, x: Tensor, *size: int) -> measured.Choice:
    """Who computes a part of this size, whose largest matrix is x."""
    precision = "fast" if x.dtype == torch.float16 else _name(x.dtype)
    return measured.choice(architecture(x), part, precision, size)


def _wins(part: str, x: Tensor, *size: int) -> bool:
    return x.ndim == 2 and choice(part, x, *size).name == "triton"


def tuned_gram(x: Tensor, scale: float | Tensor, bias: float) -> Tensor:
    """`gram` where it was measured to win."""
    return (gram if _wins("gram", x, *x.shape) else plain.gram)(x, scale, bias)


def tuned_matmul(a: Tensor, b: Tensor) -> Tensor:
    """`matmul` where it was measured to win."""
    if a.ndim == 2 and b.dtype == torch.float16 and a.dtype != torch.float16:
        return tuned_matmul(b.mT, a.mT).mT
    part = "matmul" if a.stride(-1) == 1 else "matmul_t"
    return (matmul if _wins(part, a, *a.shape, b.shape[-1]) else plain.matmul)(a, b)


def tuned_mse(
    f: Tensor, w: Tensor, y: Tensor, scale: float | Tensor, offset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`mse` where it was measured to win."""
    if _wins("mse", f, *f.shape, w.shape[-1]):
        return mse(f, w, y, scale, offset)
    return plain.mse(tuned_matmul, f, w, y, scale, offset)


def tuned_closing(
    alpha: Tensor, v: Tensor, beta: Tensor, w: Tensor, scale: float | Tensor
) -> Tensor:
    """`closing` where it was measured to win."""
    if _wins("closing", alpha, alpha.shape[0], *v.shape):
        return closing(alpha, v, beta, w, scale)
    return plain.closing(plain.matmul, alpha, v, beta, w, scale)


def solver_choice(k: Tensor, *size: int) -> measured.Choice:
    """Who factors a gram on the GPU of k, in k's precision, and solves with it.

    size: its rows and the right-hand sides, or those of each of N problems: N first.
    """
    precision = _name(torch.float64 if size[-2] <= FLOAT64_UP_TO else k.dtype)
    part = "solve" if len(size) == 2 else "solve_many"
    chosen = measured.choice(architecture(k), part, precision, size)
    if chosen.name.startswith("cuda") and not library.has_cuda_extension():
        why = f"{chosen.why}; but the CUDA extension is {library.CUDA_EXTENSION}"
        return measured.Choice("torch", why)
    return chosen


def tuned_solver(k: Tensor, columns: int) -> Solver:
    """The factor and the way to solve with it that was measured to win."""
    return SOLVERS[solver_choice(k, *k.shape[:-1], columns).name]


def views(*arguments: Any) -> Tensor:
    """`reference.views` by our kernel where it was measured to win, else by the operator."""
    images, index = arguments[:2]
    if not torch.compiler.is_compiling() and tuned_refuses(images) is None:
        size = (len(index), math.prod(images.shape[-2:]))
        if measured.choice(architecture(images), "views", "float32", size).name == "triton":
            return _kernel("views")(*arguments)
    return torch.ops.krrst_fast.views(*arguments)
