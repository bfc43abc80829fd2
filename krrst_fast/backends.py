"""Who computes: the implementations, fastest first, and why each one refuses a call."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from krrst_fast import library

BackendName = Literal["auto", "cpp", "torch", "reference"]


@dataclass(frozen=True)
class Backend:
    """One implementation of the parts a closed form is made of.

    Attributes:
        refuses: why it cannot compute on tensors like this one, or None.
        gram: `reference.gram`.
        matmul: a @ b.

    Both take one problem [., .] or N of them [N, ., .].
    """

    name: str
    refuses: Callable[[Tensor], str | None]
    gram: Callable[[Tensor, float, float], Tensor]
    matmul: Callable[[Tensor, Tensor], Tensor]


def _cpp_refuses(x: Tensor) -> str | None:
    if not library.has_extension():
        return f"the extension is {library.EXTENSION}"
    if x.device.type != "cpu":
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


def _cpp_gram(x: Tensor, scale: float, bias: float) -> Tensor:
    if x.ndim == 2 and x.shape[0] < _GRAM_ROWS:
        return _torch_gram(x, scale, bias)
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


def _torch_gram(x: Tensor, scale: float, bias: float) -> Tensor:
    k = x @ x.mT
    k = k if scale == 1.0 else k.mul_(scale)
    return k.add_(bias) if bias else k


def _never_refuses(x: Tensor) -> str | None:
    return None


BACKENDS = (
    Backend("cpp", _cpp_refuses, _cpp_gram, _cpp_matmul),
    Backend("torch", _never_refuses, _torch_gram, torch.matmul),
)


def _traced_gram(x: Tensor, scale: float, bias: float) -> Tensor:
    k = scale * torch.ops.krrst_fast.matmul(x, x.mT)
    return k + bias if bias else k


# In a graph that torch.compile traces, products are operators of their own: they keep torch's
# switches for less precise products out when the graph runs. Strides are not known there.
_TRACED = {
    "cpp": Backend("cpp", _cpp_refuses, torch.ops.krrst_fast.gram, torch.ops.krrst_fast.matmul),
    "torch": Backend("torch", _never_refuses, _traced_gram, torch.ops.krrst_fast.matmul),
}


def choose(name: str, x: Tensor, op: str) -> Backend:
    """The backend called `name`, or for "auto" the first that does not refuse tensors like `x`.

    Raises:
        ValueError: there is no such backend, or it refuses; the message has its reason.
    """
    for backend in BACKENDS:
        if name in ("auto", backend.name):
            reason = backend.refuses(x)
            if reason is None:
                return _TRACED[backend.name] if torch.compiler.is_compiling() else backend
            if name != "auto":
                raise ValueError(f"{op}: backend {name!r} cannot compute this: {reason}")
    names = ["auto", *(backend.name for backend in BACKENDS)]
    raise ValueError(f"{op}: backend must be one of {names}, got {name!r}")
