"""Choice of the fastest measured implementation for each step of a closed form on CUDA.

`tuned.json` is written by `bench/gpu.sh`. It is a table by architecture ("sm_90"), whose rows have
a part, a precision, a size, and the milliseconds of each implementation. Where a size lies further
than a factor of two from every row, nothing was measured, and torch computes.

| part | size | implementations |
|---|---|---|
| gram | N, D | torch, triton |
| matmul, matmul_t | a [N, K], stored by rows or by columns, times [K, P]: N, K, P | torch, triton |
| mse | B, D, P | torch, triton |
| closing | M, D, P | torch, triton |
| solve | M, P: a factor and two solves | torch, torch inverse, cuda, cuda inverse |
| solve_many | N, M, P: the same of N problems | the same |
| views | B, pixels of an image | torch, triton |
| rbf_values, polynomial_values, arccos_values | rows I of all problems, J | torch, triton |
| rbf_slopes, polynomial_slopes, arccos_slopes | rows I of all problems, J | torch, triton |
"""

import functools
import json
import math
from collections.abc import Mapping
from importlib import resources
from typing import Any, NamedTuple

import torch
from torch import Tensor

from krrst_fast import operators
from krrst_fast.backends import torch as torch_backend
from krrst_fast.backends import triton
from krrst_fast.backends.triton import as_operands
from krrst_fast.cholesky import CUDA_METHODS, FLOAT64_UP_TO, Method

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

NAME = "tuned"
FILE = "tuned.json"

# How far a size may be from what was measured, in powers of two.
_REACH = 1.0
# Prefer torch unless another implementation is 3 % faster.
_MARGIN = 0.97


class Choice(NamedTuple):
    """The implementation that computes a part, and the reason."""

    name: str
    why: str


@functools.cache
def tables() -> Mapping[str, Any]:
    """Return the measurements by architecture."""
    text = resources.files("krrst_fast.backends").joinpath(FILE).read_text(encoding="utf-8")
    return json.loads(text)


@functools.lru_cache(maxsize=4096)
def nearest(arch: str, part: str, precision: str, size: tuple[int, ...]) -> Choice:
    """Return the implementation that was fastest at the measured size nearest to this one."""
    table = tables().get(arch)
    if table is None:
        return Choice("torch", f"nothing was measured on {arch}")
    rows = [x for x in table["rows"] if (x["part"], x["precision"]) == (part, precision)]
    near = min(rows, key=lambda row: distance(row["size"], size), default=None)
    if near is None or distance(near["size"], size) > _REACH:
        return Choice("torch", f"nothing was measured near this size on {arch}")
    ms = near["ms"]
    name = min(ms, key=lambda key: ms[key] * (1.0 if key == "torch" else 1 / _MARGIN))
    times = ", ".join(f"{key} {ms[key]:.3g}" for key in sorted(ms, key=ms.__getitem__))
    return Choice(name, f"ms at {near['size']} on {table['gpu']}, {table['date']}: {times}")


def distance(measured: list[int], size: tuple[int, ...]) -> float:
    """Return the largest ratio of two sizes, as a power of two."""
    pairs = zip(measured, size, strict=True)
    return max(abs(math.log2(max(a, 1) / max(b, 1))) for a, b in pairs)


def refuses(x: Tensor) -> str | None:
    """Return why no measured choice exists for a tensor like x, or None."""
    if (reason := triton.refuses_device(x)) is not None:
        return reason
    if (arch := architecture(x)) not in tables():
        return f"nothing was measured on {arch}"
    return None


def architecture(x: Tensor) -> str:
    """Return the name under which the GPU of x has its measurements, as "sm_90"."""
    if x.device.type != "cuda":
        return x.device.type
    major, minor = triton.capability(x.device.index)
    return f"sm_{major}{minor}"


def choice(part: str, x: Tensor, *size: int) -> Choice:
    """Return the implementation of a part of this size, whose largest matrix is x."""
    precision = "fast" if x.dtype == torch.float16 else str(x.dtype).removeprefix("torch.")
    return nearest(architecture(x), part, precision, size)


def _by_triton(part: str, x: Tensor, *size: int) -> bool:
    return x.ndim == 2 and choice(part, x, *size).name == "triton"


def gram(x: Tensor, scale: float | Tensor, bias: float) -> Tensor:
    """Compute `reference.gram`."""
    backend = triton if _by_triton("gram", x, *x.shape) else torch_backend
    return backend.gram(x, scale, bias)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Compute a @ b."""
    if a.ndim == 2 and b.dtype == torch.float16 and a.dtype != torch.float16:
        return matmul(b.mT, a.mT).mT
    part = "matmul" if a.stride(-1) == 1 else "matmul_t"
    backend = triton if _by_triton(part, a, *a.shape, b.shape[-1]) else torch_backend
    return backend.matmul(a, b)


def predicted_residual_mse(
    f_real: Tensor, w: Tensor, y_real: Tensor, scale: float | Tensor, offset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute `reference.predicted_residual_mse`."""
    if _by_triton("mse", f_real, *f_real.shape, w.shape[-1]):
        return triton.predicted_residual_mse(f_real, w, y_real, scale, offset)
    return torch_backend.predicted_residual_mse(f_real, w, y_real, scale, offset, matmul)


def closing_matmul(
    alpha: Tensor, v: Tensor, beta: Tensor, w: Tensor, scale: float | Tensor
) -> Tensor:
    """Compute `reference.closing_matmul`."""
    by_triton = _by_triton("closing", alpha, alpha.shape[0], *v.shape)
    backend = triton if by_triton else torch_backend
    return backend.closing_matmul(alpha, v, beta, w, scale)


def kernel_values(products: Tensor, *rest: Any) -> Tensor:
    """Compute `reference.kernels.kernel_values`."""
    return _functions("values", products, rest[6]).kernel_values(products, *rest)


def kernel_slopes(products: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """Compute `reference.kernels.kernel_slopes`."""
    return _functions("slopes", products, rest[7]).kernel_slopes(products, *rest)


def _functions(what: str, products: Tensor, kernel: str) -> Any:
    size = math.prod(products.shape[:-1]), products.shape[-1]
    name = choice(f"{kernel}_{what}", products, *size).name
    return triton if name == "triton" else torch_backend


def cholesky_method(k: Tensor, columns: int) -> Method:
    """Return the method for a Gram k [N?, M, M] and so many right-hand sides."""
    return CUDA_METHODS[cholesky_choice(k, *k.shape[:-1], columns).name]


def cholesky_choice(k: Tensor, *size: int) -> Choice:
    """Return the fastest method on the GPU of k, in k's precision.

    size: M and P, or N, M and P of a batch.
    """
    dtype = torch.float64 if size[-2] <= FLOAT64_UP_TO else k.dtype
    part = "solve" if len(size) == 2 else "solve_many"
    chosen = nearest(architecture(k), part, str(dtype).removeprefix("torch."), size)
    if chosen.name.startswith("cuda") and not operators.HAS_CUDA_EXTENSION:
        reason = f"{chosen.why}; but the CUDA extension is {operators.CUDA_EXTENSION}"
        return Choice("torch", reason)
    return chosen


def views(*arguments: Any) -> Tensor:
    """Compute `reference.views` by our kernel where it was measured to be faster."""
    images, index = arguments[:2]
    if not torch.compiler.is_compiling() and refuses(images) is None:
        size = (len(index), math.prod(images.shape[-2:]))
        if nearest(architecture(images), "views", "float32", size).name == "triton":
            return triton.kernel("views")(*arguments)
    return torch.ops.krrst_fast.views(*arguments)
