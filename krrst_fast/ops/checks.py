"""What the public functions ask of their inputs, once, before anything is computed."""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import NoReturn

import torch
from torch import Tensor

from krrst_fast.errors import NonFiniteError
from krrst_fast.planner import FORMS
from krrst_fast.reference import RIDGE_OF

DTYPES = (torch.float32, torch.float64)


def matrices(op: str, **tensors: Tensor) -> None:
    """Every tensor is a float32 or float64 matrix, and all share one dtype and one device."""
    first_name, first = next(iter(tensors.items()))
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
        if x.dtype not in DTYPES:
            raise TypeError(f"{op}: {name} must be float32 or float64, got {x.dtype}")
        if x.ndim != 2:
            raise ValueError(f"{op}: {name} must be a matrix, got shape {tuple(x.shape)}")
        if x.dtype != first.dtype:
            raise TypeError(
                f"{op}: {first_name} and {name} must have one dtype, "
                f"got {first.dtype} and {x.dtype}"
            )
        if x.device != first.device:
            raise ValueError(
                f"{op}: {first_name} and {name} must be on one device, "
                f"got {first.device} and {x.device}"
            )


def same_size(op: str, first: str, x: Tensor, second: str, y: Tensor, dim: int) -> None:
    """x and y agree in dimension `dim` (0: rows, 1: columns)."""
    if x.shape[dim] != y.shape[dim]:
        raise ValueError(
            f"{op}: {first} and {second} must have the same number of {('rows', 'columns')[dim]}, "
            f"got shapes {tuple(x.shape)} and {tuple(y.shape)}"
        )


def kernel(op: str, scale: float, bias: float) -> None:
    """scale * <x, y> + bias is a kernel."""
    for name, value in (("scale", scale), ("bias", bias)):
        if isinstance(value, bool | Tensor) or not isinstance(value, int | float):
            raise TypeError(f"{op}: {name} must be a number, got {value!r}")
    if not 0 < scale < math.inf:
        raise ValueError(f"{op}: scale must be positive and finite, got {scale}")
    if not 0 <= bias < math.inf:
        raise ValueError(f"{op}: bias must be zero or more and finite, got {bias}")


def ridge(op: str, value: float | Tensor, ridge_of: str) -> None:
    """The ridge is a scalar; as a number it is positive (a tensor's value is not looked at)."""
    if ridge_of not in RIDGE_OF:
        raise ValueError(f"{op}: ridge_of must be one of {list(RIDGE_OF)}, got {ridge_of!r}")
    if isinstance(value, Tensor):
        if value.ndim != 0 or not value.is_floating_point():
            raise ValueError(
                f"{op}: a ridge tensor must be a floating scalar, "
                f"got {value.dtype} of shape {tuple(value.shape)}"
            )
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{op}: ridge must be a number or a scalar tensor, got {value!r}")
    elif not 0 < value < math.inf:
        raise ValueError(f"{op}: ridge must be positive and finite, got {value}")


def retries(op: str, value: int) -> None:
    """The number of retries is a count."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{op}: max_retries must be a whole number, zero or more, got {value!r}")


def form(op: str, name: str) -> None:
    """The closed form is one of ours, or "auto"."""
    if name not in ("auto", *FORMS):
        raise ValueError(f"{op}: form must be one of {['auto', *FORMS]}, got {name!r}")


def finite(op: str, result: Tensor, **inputs: Tensor) -> None:
    """A non-finite result on the CPU is traced to the input it came from.

    On a GPU the question would stall the stream, and under torch.compile break the graph: there the
    NaN stays in the result.
    """
    if not _readable(result):
        return
    # A sum is finite only if its terms are; where the sum alone overflows, a second look finds it.
    if not math.isfinite(result.sum().item()) and not result.isfinite().all():
        blame(op, **inputs)


def _readable(x: Tensor) -> bool:
    """Whether values can be looked at without a stall: not on a GPU, in a trace, or of a fake."""
    return x.device.type == "cpu" and type(x) is Tensor and not torch.compiler.is_compiling()


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Autocast would round the products of a solve to 8 bits: off for as long as it lasts."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def blame(op: str, **inputs: Tensor) -> NoReturn:
    """Raise NonFiniteError for the first input that is not finite, or for an overflow."""
    for name, x in inputs.items():
        if not x.isfinite().all():
            row = f", first in row {int((~x.isfinite()).nonzero()[0][0])}" if x.ndim else ""
            raise NonFiniteError(f"{op}: {name} holds NaN or infinity{row}")
    raise NonFiniteError(f"{op}: finite inputs overflowed; scale the features down or use float64")
