"""Who computes: the implementations, fastest first, and why each one refuses a call."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from krrst_fast import gpu, library, plain
from krrst_fast.factor import SOLVERS, Solver

BackendName = Literal["auto", "cpp", "tuned", "triton", "cuda", "torch", "reference"]


def _torch_solver(k: Tensor, columns: int) -> Solver:
    return SOLVERS["torch"]


@dataclass(frozen=True)
class Backend:
    """One implementation of the parts a closed form is made of.

    Attributes:
        refuses: why it cannot compute on tensors like this one, or None.
        gram: `reference.gram`.
        matmul: a @ b.
        fused_mse: `reference.predicted_residual_mse` of one problem, if it has that in one piece.
        fused_closing: `reference.closing_matmul` of one problem, likewise.
        solver: who factors a gram like this one and solves with so many right-hand sides, and how.
        halves: precision="fast" gives it the features in float16.
        on_request: never taken by "auto".

    All take one problem [., .] or N of them [N, ., .].
    """

    name: str
    refuses: Callable[[Tensor], str | None]
    gram: Callable[[Tensor, float | Tensor, float], Tensor]
    matmul: Callable[[Tensor, Tensor], Tensor]
    fused_mse: Callable[..., tuple[Tensor, Tensor]] | None = None
    fused_closing: Callable[..., Tensor] | None = None
    solver: Callable[[Tensor, int], Solver] = _torch_solver
    halves: bool = False
    on_request: bool = False

    def mse(
        self, f: Tensor, w: Tensor, y: Tensor, scale: float | Tensor, offset: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """E = scale f w + offset - y and the mean of E^2: `reference.predicted_residual_mse`."""
        if self.fused_mse is not None:
            return self.fused_mse(f, w, y, scale, offset)
        return plain.mse(self.matmul, f, w, y, scale, offset)

    def closing(
        self, alpha: Tensor, v: Tensor, beta: Tensor, w: Tensor, scale: float | Tensor
    ) -> Tensor:
        """scale (alpha v^T - beta w^T) [N?, M, D]: `reference.closing_matmul`."""
        if self.fused_closing is not None:
            return self.fused_closing(alpha, v, beta, w, scale)
        return plain.closing(self.matmul, alpha, v, beta, w, scale)


def _cpp_refuses(x: Tensor) -> str | None:
    if not library.has_extension():
        return f"the extension is {library.EXTENSION}"
    if not x.is_cpu:
        return f"the tensors are on {x.device}, and it computes on the CPU"
    return None


# Measured against MKL on one core, for a [rows, depth] that is read once from memory: by rows the
# thin product pays below 16 columns; by columns, which MKL reads slowly, below 256 if it is deep.
_ROW_MAJOR_COLUMNS = 16
_COLUMN_MAJOR_COLUMNS = 256
_DEEP = 64
_THIN_NUMBERS = 4096
_MANY = 128  # problems


# Below, a gram does not fill the kernel's panels of 48 rows and MKL is up to twice as fast.
_GRAM_ROWS = 48


def _cpp_gram(x: Tensor, scale: float | Tensor, bias: float) -> Tensor:
    if x.ndim == 2 and x.shape[0] < _GRAM_ROWS:
        return plain.gram(x, scale, bias)
    return torch.ops.krrst_fast.gram(x, scale, bias)


def _cpp_matmul(a: Tensor, b: Tensor) -> Tensor:
    if a.ndim == 3:
        return torch.ops.krrst_fast.batched_matmul(a, b) if _suits_many(a, b) else a @ b
    return torch.ops.krrst_fast.thin_matmul(a, b) if _is_thin(a, b) else a @ b


def _suits_many(a: Tensor, b: Tensor) -> bool:
    """Not for a few products of small depth with a transposed matrix: MKL copies that faster."""
    shallow = a.shape[2] < _DEEP <= b.shape[2] and b.stride(-2) == 1
    return len(a) >= _MANY or not shallow


def _is_thin(a: Tensor, b: Tensor) -> bool:
    (rows, depth), columns = a.shape, b.shape[1]
    if not (columns > 1 and 2 * columns < rows and rows * depth >= _THIN_NUMBERS):
        return False
    return columns < (_COLUMN_MAJOR_COLUMNS if _is_deep(a) else _ROW_MAJOR_COLUMNS)


def _is_deep(a: Tensor) -> bool:
    return a.stride(0) == 1 and a.shape[1] >= _DEEP


def _never_refuses(x: Tensor) -> str | None:
    return None


BACKENDS = (
    Backend("cpp", _cpp_refuses, _cpp_gram, _cpp_matmul),
    Backend(
        *("tuned", gpu.tuned_refuses, gpu.tuned_gram, gpu.tuned_matmul),
        *(gpu.tuned_mse, gpu.tuned_closing, gpu.tuned_solver),
        halves=True,
    ),
    Backend(
        *("triton", gpu.triton_refuses, gpu.gram, gpu.matmul, gpu.mse, gpu.closing),
        halves=True,
        on_request=True,
    ),
    Backend(
        *("cuda", gpu.cuda_refuses, gpu.gram, gpu.matmul, gpu.mse, gpu.closing, gpu.cuda_solver),
        halves=True,
        on_request=True,
    ),
    Backend("torch", _never_refuses, plain.gram, torch.matmul),
)


def _traced_gram(x: Tensor, scale: float | Tensor, bias: float) -> Tensor:
    k = scale * torch.ops.krrst_fast.matmul(x, x.mT)
    return k + bias if bias else k


# In a graph that torch.compile traces, products are operators of their own: they keep torch's
# switches for less precise products out when the graph runs. Strides are not known there.
_TRACED = {
    "cpp": Backend("cpp", _cpp_refuses, torch.ops.krrst_fast.gram, torch.ops.krrst_fast.matmul),
    "torch": Backend("torch", _never_refuses, _traced_gram, torch.ops.krrst_fast.matmul),
}


def going_back(name: str, grad: Tensor) -> str:
    """Who computes a gradient from `grad` after a forward pass by `name`.

    torch, where `grad` has no memory that a kernel could read: in `is_grads_batched=True`, and
    where torch.compile traces the way back of a call that it has not traced.
    """
    if name in _TRACED:
        return name
    unread = torch.compiler.is_compiling() or torch._C._functorch.is_legacy_batchedtensor(grad)
    return "torch" if unread else name


def choose(name: str, x: Tensor, op: str) -> Backend:
    """The backend called `name`, or for "auto" the first that does not refuse tensors like `x`.

    Raises:
        ValueError: there is no such backend, or it refuses; the message has its reason.
    """
    tracing = torch.compiler.is_compiling()
    for backend in BACKENDS:
        if name == backend.name or (name == "auto" and not backend.on_request):
            # Before it is asked: how it refuses, by what is installed and measured, has no trace.
            if tracing and backend.name not in _TRACED:
                reason: str | None = "torch.compile cannot trace it"
            else:
                reason = backend.refuses(x)
            if reason is None:
                return _TRACED[backend.name] if tracing else backend
            if name != "auto":
                raise ValueError(f"{op}: backend {name!r} cannot compute this: {reason}")
    names = ["auto", *(backend.name for backend in BACKENDS)]
    raise ValueError(f"{op}: backend must be one of {names}, got {name!r}")
