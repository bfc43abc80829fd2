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


# Measured against MKL on one core: reading `a` by rows pays below 16 columns, by columns below 256.
_ROW_MAJOR_COLUMNS = 16
_COLUMN_MAJOR_COLUMNS = 256


# Below, a gram does not fill the kernel's panels of 48 rows and MKL is up to twice as fast.
_GRAM_ROWS = 48


def _cpp_gram(x: Tensor, scale: float, bias: float) -> Tensor:
    if x.ndim == 3 or x.shape[0] < _GRAM_ROWS:
        return _torch_gram(x, scale, bias)
    return torch.ops.krrst_fast.gram(x, scale, bias)


def _cpp_matmul(a: Tensor, b: Tensor) -> Tensor:
    if a.ndim == 2:
        # In a traced backward pass strides are not known yet.
        by_columns = not torch.compiler.is_compiling() and a.stride(0) == 1
        limit = _COLUMN_MAJOR_COLUMNS if by_columns else _ROW_MAJOR_COLUMNS
        if 1 < b.shape[1] < limit and a.shape[0] > 2 * b.shape[1]:
            return torch.ops.krrst_fast.thin_matmul(a, b)
    return library.matmul(a, b)


def _torch_gram(x: Tensor, scale: float, bias: float) -> Tensor:
    k = library.matmul(x, x.mT)
    k = k if scale == 1.0 else k.mul_(scale)
    return k.add_(bias) if bias else k


BACKENDS = (
    Backend("cpp", _cpp_refuses, _cpp_gram, _cpp_matmul),
    Backend("torch", lambda x: None, _torch_gram, library.matmul),
)


def choose(name: str, x: Tensor, op: str) -> Backend:
    """The backend called `name`, or for "auto" the first that does not refuse tensors like `x`.

    Raises:
        ValueError: there is no such backend, or it refuses; the message has its reason.
    """
    for backend in BACKENDS:
        if name in ("auto", backend.name):
            reason = backend.refuses(x)
            if reason is None:
                return backend
            if name != "auto":
                raise ValueError(f"{op}: backend {name!r} cannot compute this: {reason}")
    names = ["auto", *(backend.name for backend in BACKENDS)]
    raise ValueError(f"{op}: backend must be one of {names}, got {name!r}")
