"""What the public functions ask of their inputs, once, before anything is computed."""

import math
import sys
from numbers import Real
from typing import NoReturn

import torch
from torch import Tensor
from torch.nn import Parameter

from krrst_fast.errors import NonFiniteError

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# What a call may leave out.
_OPTIONAL = ("out_syn", "out_real")

# A whole number may be larger, and is then no float.
_LARGEST = sys.float_info.max


def matrices(op: str, **tensors: Tensor | None) -> None:
    """Each tensor is a dense floating matrix, or a batch of them, on one device.

    Half precision mixes with float32; float64 with nothing else.
    """
    first_name, first = next(iter(tensors.items()))
    for name, x in tensors.items():
        if x is None and name in _OPTIONAL:
            continue
        dense(op, name, x)
        assert x is not None and first is not None
        if x.ndim < 2:
            raise ValueError(
                f"{op}: {name} must be a matrix or a batch of them, got shape {tuple(x.shape)}"
            )
        if (x.dtype == torch.float64) != (first.dtype == torch.float64):
            raise TypeError(
                f"{op}: {first_name} and {name} must have one dtype, "
                f"got {first.dtype} and {x.dtype}"
            )
        if x.device != first.device:
            raise ValueError(
                f"{op}: {first_name} and {name} must be on one device, "
                f"got {first.device} and {x.device}"
            )


def dense(op: str, name: str, x: object) -> None:
    """x is a strided tensor of floating numbers."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    if x.layout != torch.strided or x.is_nested:
        kind = "nested" if x.is_nested else str(x.layout)
        raise ValueError(f"{op}: {name} must be a dense (strided) tensor, got a {kind} one")
    if x.dtype not in DTYPES:
        raise TypeError(
            f"{op}: {name} must be float32, float64, float16 or bfloat16, got {x.dtype}"
        )


def batch_of(op: str, **cores: tuple[Tensor | None, int]) -> tuple[int, ...]:
    """The leading dimensions of tensors that each have so many dimensions in one problem."""
    given = {name: (x, core) for name, (x, core) in cores.items() if x is not None}
    if all(x.ndim == core for x, core in given.values()):
        return ()
    leading = {name: tuple(x.shape[: x.ndim - core]) for name, (x, core) in given.items()}
    try:
        return tuple(torch.broadcast_shapes(*leading.values()))
    except RuntimeError:
        raise ValueError(
            f"{op}: the leading dimensions must broadcast, got "
            + ", ".join(f"{name} {shape}" for name, shape in leading.items())
        ) from None


def same_size(op: str, first: str, x: Tensor, second: str, y: Tensor, dim: int) -> None:
    """x and y agree in dimension `dim` (-2: rows, -1: columns)."""
    if x.shape[dim] != y.shape[dim]:
        raise ValueError(
            f"{op}: {first} and {second} must have the same number of {('rows', 'columns')[dim]}, "
            f"got shapes {tuple(x.shape)} and {tuple(y.shape)}"
        )


def scale(op: str, name: str, value: float) -> None:
    """A factor of inner products is positive."""
    if not 0 < _number(op, name, value) <= _LARGEST:
        raise ValueError(f"{op}: {name} must be positive and finite, got {value}")


def bias(op: str, name: str, value: float) -> None:
    """A constant that is added to a kernel is not negative."""
    if not 0 <= _number(op, name, value) <= _LARGEST:
        raise ValueError(f"{op}: {name} must be zero or more and finite, got {value}")


def _number(op: str, name: str, value: float, what: str = "a number") -> float:
    """The value as Python has it: a NumPy float32 would overflow in a comparison."""
    if isinstance(value, bool | Tensor) or not isinstance(value, int | float | Real):
        raise TypeError(f"{op}: {name} must be {what}, got {value!r}")
    return value if isinstance(value, int) else float(value)


def ridge(op: str, name: str, value: float | Tensor) -> None:
    """A ridge is positive: a number, or a floating tensor, whose values are read if they can be."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{op}: a {name} tensor must be floating, got {value.dtype}")
        dense(op, name, value)
        if readable(value) and value.numel() and not value.detach().min().item() > 0:
            least = value.detach().min().item()
            raise ValueError(f"{op}: {name} must be positive, got {least:.3g}")
    elif not 0 < _number(op, name, value, "a number or a tensor") <= _LARGEST:
        raise ValueError(f"{op}: {name} must be positive and finite, got {value}")


def yes_or_no(op: str, name: str, value: bool) -> None:
    """A switch is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True or False, got {value!r}")


def count(op: str, name: str, value: int) -> None:
    """A count is a whole number."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{op}: {name} must be a whole number, zero or more, got {value!r}")


def one_of(op: str, name: str, value: object, names: tuple[object, ...]) -> None:
    """The value is one of those that there are: words, or None."""
    if not isinstance(value, str | None) or value not in names:
        raise ValueError(f"{op}: {name} must be one of {list(names)}, got {value!r}")


def finite(op: str, result: Tensor, **inputs: Tensor | None) -> None:
    """A non-finite result on the CPU is traced to the input it came from.

    On a GPU the question would stall the stream, and under torch.compile break the graph: there the
    NaN stays in the result.
    """
    # A sum is finite only if its terms are; where the sum alone overflows, a second look finds it.
    if readable(result) and not math.isfinite(result.sum().item()) and not result.isfinite().all():
        blame(op, **inputs)


def not_mapped(op: str, *tensors: Tensor) -> None:
    """A value that is kept cannot belong to one slice of a vmap."""
    if torch.compiler.is_compiling():
        return
    if any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors):
        raise RuntimeError(
            f"{op}: keeps what it fits, and torch.func.vmap and grad cannot: give it leading "
            "dimensions, or use krr_predict"
        )


def readable(x: Tensor) -> bool:
    """Whether values can be looked at without a stall: not on a GPU, in a trace, or of a fake."""
    if not x.is_cpu or torch.compiler.is_compiling():
        return False
    return type(x) in (Tensor, Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def blame(op: str, **inputs: Tensor | None) -> NoReturn:
    """Raise NonFiniteError for the first input that is not finite, or for an overflow."""
    for name, x in inputs.items():
        if x is not None and not x.isfinite().all():
            where = (~x.isfinite()).nonzero()[0].tolist()
            row = f", first in row {where[-2]}" if x.ndim > 1 else ""
            row += f" of problem {where[0]}" if x.ndim > 2 else ""
            raise NonFiniteError(f"{op}: {name} holds NaN or infinity{row}")
    raise NonFiniteError(f"{op}: finite inputs overflowed; scale the features down or use float64")
