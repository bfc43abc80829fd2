"""Checks of arguments, and the form in which the closed forms take a problem.

That form has one dtype and at most one batch dimension. All conversions are plain, differentiable
PyTorch, so that autograd carries the gradients back to what was given.
"""

import math
import sys
from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple, NoReturn

import torch
from torch import _C, Tensor

from krrst_fast.errors import NonFiniteError
from krrst_fast.ops.solver import Solver
from krrst_fast.reference import RIDGE_OF

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

_PROXY = _C._TorchDispatchModeKey.PROXY  # of make_fx, by which torch.func.linearize traces

# A whole number may be larger, and then does not fit into a float.
_LARGEST = sys.float_info.max

_NAMES = ("f_syn", "y_syn", "f_real", "y_real")


class Problem(NamedTuple):
    """Kernel ridge regression as it is computed, of one problem or of a batch of N.

    Attributes:
        f_syn, y_syn, f_real, y_real: [N?, M, D], [N?, M, P], [N?, B, D], [N?, B, P] in the
            precision of the computation; a fit has no f_real, a prediction no y_real.
        ridge: A number, or a tensor [N?].
        ridge_of: "trace" | "mean_diagonal" | "absolute": what the ridge is relative to.
        detach_ridge: Whether the trace is a constant for the gradient.
        scale, bias: The kernel is scale <x, y> + bias. Tensors [] in a graph of torch.compile; the
            scale also for features that were multiplied by a power of two (see
            `reference.half_features`).
    """

    f_syn: Tensor
    y_syn: Tensor
    f_real: Tensor | None
    y_real: Tensor | None
    ridge: float | Tensor
    ridge_of: str
    detach_ridge: bool
    scale: float | Tensor
    bias: float | Tensor

    @property
    def has_bias(self) -> bool:
        """Whether the kernel has a constant."""
        return isinstance(self.bias, Tensor) or self.bias != 0


def prepare(
    op: str,
    solver: Solver,
    tensors: Sequence[Tensor],
    ridge: float | Tensor,
    ridge_of: str,
    detach_ridge: bool,
    scale: float,
    bias: float,
    weights: Tensor | None,
    gamma: float | Tensor | None = None,
) -> tuple[Problem, tuple[int, ...], torch.dtype]:
    """Check the arguments of `op` and bring them into the form that is computed.

    Weights are checked and broadcast, and still to be applied; for precision="fast" the features
    are still to be rounded.

    Args:
        tensors: F_s and Y_s, then F_r for a prediction, then Y_r for a loss.
        gamma: That of a kernel, which may be a tensor with leading dimensions too.

    Returns:
        The problem, the leading dimensions that the caller sees, and the dtype of the result.
    """
    check_kernel(op, ridge, ridge_of, detach_ridge, scale, bias)
    check_solver(op, solver)
    dtype = check_matrices(op, _NAMES, tensors)
    f_syn, y_syn, *real = tensors
    f_real, y_real = (*real, None, None)[:2]
    if f_syn.shape[-2] != y_syn.shape[-2]:
        check_same_size(op, "f_syn", f_syn, "y_syn", y_syn, -2)
    if f_real is not None and f_syn.shape[-1] != f_real.shape[-1]:
        check_same_size(op, "f_syn", f_syn, "f_real", f_real, -1)
    if f_real is not None and y_real is not None:
        if f_real.shape[-2] != y_real.shape[-2]:
            check_same_size(op, "f_real", f_real, "y_real", y_real, -2)
        if y_syn.shape[-1] != y_real.shape[-1]:
            check_same_size(op, "y_syn", y_syn, "y_real", y_real, -1)
    if weights is not None:
        check_weights(op, weights, f_syn)
    batch: tuple[int, ...] = ()
    working = working_dtype(dtype, solver.precision)
    many = converted = False  # by one loop: two generators would take as long as all checks
    for given in tensors:
        many |= given.ndim > 2
        converted |= given.dtype != working
    number = gamma if isinstance(gamma, Tensor) else None
    if many or isinstance(ridge, Tensor) or weights is not None or number is not None:
        cores: dict[str, tuple[Tensor | None, int]]
        cores = {name: (x, 2) for name, x in zip(_NAMES, tensors)}
        scalar = ridge if isinstance(ridge, Tensor) else None
        batch = batch_of(op, **cores, weights=(weights, 1), ridge=(scalar, 0), gamma=(number, 0))
    if batch or converted:
        f_syn, y_syn, *real = (fold(cast(x, working), batch, 2) for x in tensors)
        f_real, y_real = (*real, None, None)[:2]
    if isinstance(ridge, Tensor):
        ridge = ready_ridge(ridge, batch, working, f_syn)
    numbers: tuple[float | Tensor, float | Tensor]
    if torch.compiler.is_compiling():
        numbers = symbol(scale, f_syn), symbol(bias, f_syn)
    else:
        numbers = float(scale), float(bias)
    problem = Problem(
        *(f_syn, y_syn, f_real, y_real, ridge, ridge_of),
        *(detach_ridge, *numbers),
    )
    if solver.precision == "fast" and solver.check == "raise":
        # NaN or infinity in one entry would spread: all features share a power of two.
        finite(op, f_syn, f_syn=f_syn)
        if f_real is not None:
            finite(op, f_real, f_real=f_real)
    return problem, batch, dtype


def symbol(value: float, like: Tensor) -> float | Tensor:
    """Return a number of the kernel, in a graph of torch.compile, as a tensor [].

    It may be a symbol, whose powers the compiler takes for constants of the graph. 0 and 1, for
    which there is less to compute, stay numbers.
    """
    if value == 0 or value == 1:
        return 0.0 if value == 0 else 1.0
    return value * like.new_ones(())


def keepable(*tensors: Tensor | None) -> list[Tensor | None]:
    """Return tensors that can be saved for a backward pass: those of inference mode cannot."""
    if torch.compiler.is_compiling():
        return list(tensors)
    kept = list(tensors)
    for i, x in enumerate(tensors):
        if x is not None and x.is_inference():
            kept[i] = x.clone()
    return kept


def unfold(x: Tensor, batch: tuple[int, ...]) -> Tensor:
    """Return [N, ...] with the leading dimensions that were folded into N."""
    return x.unflatten(0, batch) if len(batch) > 1 else x


def restore(x: Tensor, batch: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a result [N?, ...] with the caller's leading dimensions and dtype."""
    x = x.unflatten(0, batch) if len(batch) > 1 else x
    return x if x.dtype == dtype else x.to(dtype)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in another precision; `to` costs a microsecond even where it does nothing."""
    return x if x.dtype == dtype else x.to(dtype)


def fold(x: Tensor, batch: tuple[int, ...], core: int) -> Tensor:
    """Return x [..., core dimensions] as [N?, core dimensions] for leading dimensions `batch`."""
    if not batch:
        return x
    x = x.expand(*batch, *x.shape[x.ndim - core :])
    return x.flatten(0, len(batch) - 1) if len(batch) > 1 else x


def result_dtype(*tensors: Tensor) -> torch.dtype:
    """Return float64 if a tensor is float64, else float32."""
    is_double = any(x.dtype == torch.float64 for x in tensors)
    return torch.float64 if is_double else torch.float32


def working_dtype(dtype: torch.dtype, precision: str | None) -> torch.dtype:
    """Return the precision of the computation."""
    if precision is None:
        return dtype
    return torch.float64 if precision == "float64" else torch.float32


def ready_ridge(
    ridge: float | Tensor, batch: tuple[int, ...], dtype: torch.dtype, like: Tensor
) -> float | Tensor:
    """Return a ridge tensor [N?] on the device and in the precision of the computation."""
    if not isinstance(ridge, Tensor):
        return float(ridge)
    if ridge.device.type == "meta" != like.device.type:
        raise ValueError(f"ridge must have values, and is on {ridge.device}, not {like.device}")
    return fold(ridge.to(device=like.device, dtype=dtype), batch, 0)


def check_matrices(op: str, names: Sequence[str], tensors: Sequence[Tensor]) -> torch.dtype:
    """Check that all are dense floating matrices, or batches of them, on one device.

    Half precision mixes with float32; float64 with nothing else.

    Returns:
        The dtype of a result: float64 or float32.
    """
    first = tensors[0]
    for name, x in zip(names, tensors):
        if not isinstance(x, Tensor) or x.layout != torch.strided or x.dtype not in DTYPES:
            check_dense(op, name, x)
        if x.is_nested:
            check_dense(op, name, x)
        if x.ndim < 2:
            raise ValueError(
                f"{op}: {name} must be a matrix or a batch of them, got shape {tuple(x.shape)}"
            )
        if (x.dtype == torch.float64) != (first.dtype == torch.float64):
            raise TypeError(
                f"{op}: {names[0]} and {name} must have one dtype, got {first.dtype} and {x.dtype}"
            )
        if x.device != first.device:
            raise ValueError(
                f"{op}: {names[0]} and {name} must be on one device, "
                f"got {first.device} and {x.device}"
            )
    return torch.float64 if first.dtype == torch.float64 else torch.float32


def check_dense(op: str, name: str, x: object) -> None:
    """Check that x is a strided tensor of floating-point numbers."""
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
    """Return the leading dimensions of tensors, each given with its number of core dimensions."""
    given = {name: (x, core) for name, (x, core) in cores.items() if x is not None}
    leading = {name: tuple(x.shape[: x.ndim - core]) for name, (x, core) in given.items()}
    try:
        return tuple(torch.broadcast_shapes(*leading.values()))
    except RuntimeError:
        raise ValueError(
            f"{op}: the leading dimensions must broadcast, got "
            + ", ".join(f"{name} {shape}" for name, shape in leading.items())
        ) from None


def check_same_size(op: str, first: str, x: Tensor, second: str, y: Tensor, dim: int) -> None:
    """Check that x and y agree in dimension `dim` (-2: rows, -1: columns)."""
    if x.shape[dim] != y.shape[dim]:
        raise ValueError(
            f"{op}: {first} and {second} must have the same number of {('rows', 'columns')[dim]}, "
            f"got shapes {tuple(x.shape)} and {tuple(y.shape)}"
        )


def check_solver(op: str, solver: Solver) -> None:
    """Check the type; the values were checked when the Solver was made."""
    if not isinstance(solver, Solver):
        raise TypeError(f"{op}: solver must be a Solver, got {solver!r}")


def check_kernel(
    op: str,
    ridge: float | Tensor,
    ridge_of: str,
    detach_ridge: bool,
    scale: float,
    bias: float,
) -> None:
    """Check the numbers of the kernel and of its ridge."""
    if not (type(ridge) is float and 0.0 < ridge <= _LARGEST):
        check_ridge(op, ridge)
    if not isinstance(ridge_of, str) or ridge_of not in RIDGE_OF:
        raise ValueError(f"{op}: ridge_of must be one of {list(RIDGE_OF)}, got {ridge_of!r}")
    if not isinstance(detach_ridge, bool):
        raise TypeError(f"{op}: detach_ridge must be True or False, got {detach_ridge!r}")
    if not 0 < (scale if type(scale) is float else number(op, "scale", scale)) <= _LARGEST:
        raise ValueError(f"{op}: scale must be positive and finite, got {scale}")
    if not 0 <= (bias if type(bias) is float else number(op, "bias", bias)) <= _LARGEST:
        raise ValueError(f"{op}: bias must be zero or more and finite, got {bias}")


def number(op: str, name: str, value: object, kind: str = "a number") -> float:
    """Return the value as a Python number: a NumPy float32 would overflow in a comparison."""
    if isinstance(value, bool | Tensor) or not isinstance(value, int | float | Real):
        raise TypeError(f"{op}: {name} must be {kind}, got {value!r}")
    return value if isinstance(value, int) else float(value)


def check_ridge(op: str, value: float | Tensor, name: str = "ridge") -> None:
    """Check that a ridge is positive; a tensor is read only where that is free."""
    if not isinstance(value, Tensor):
        if not 0 < number(op, name, value, "a number or a tensor") <= _LARGEST:
            raise ValueError(f"{op}: {name} must be positive and finite, got {value}")
        return
    if not value.is_floating_point():
        raise TypeError(f"{op}: a {name} tensor must be floating, got {value.dtype}")
    check_dense(op, name, value)
    if readable(value) and value.numel() and not value.detach().min().item() > 0:
        least = value.detach().min().item()
        raise ValueError(f"{op}: {name} must be positive, got {least:.3g}")


def check_weights(op: str, weights: Tensor, rows: Tensor) -> None:
    """Check that each row [..., M, .] has one weight [..., M], and that none is negative."""
    check_dense(op, "weights", weights)
    if weights.ndim < 1 or weights.shape[-1] != rows.shape[-2]:
        raise ValueError(
            f"{op}: weights must be [..., {rows.shape[-2]}], got shape {tuple(weights.shape)}"
        )
    if weights.device != rows.device:
        raise ValueError(
            f"{op}: weights must be on the device of f_syn, got {weights.device} and {rows.device}"
        )
    if not readable(weights) or not weights.numel():
        return
    finite(op, weights, weights=weights)
    least = weights.detach().min().item()
    if least < 0 or weights.requires_grad and least == 0:
        need = "positive where they ask for a gradient" if weights.requires_grad else "zero or more"
        raise ValueError(f"{op}: weights must be {need}, got {least:.3g}")
    if least == 0 and not weights.detach().amax(-1).all():
        raise ValueError(f"{op}: weights must not all be zero")


def check_not_mapped(op: str, *tensors: object) -> None:
    """Raise under torch.func transforms, where a value that is kept would outlive its transform."""
    if torch.compiler.is_compiling():
        return
    if any(_C._functorch.is_functorch_wrapped_tensor(x) for x in tensors if isinstance(x, Tensor)):
        raise RuntimeError(
            f"{op}: keeps what it fits, and torch.func.vmap and grad cannot: give it leading "
            "dimensions, or use krr_predict"
        )


def readable(x: Tensor) -> bool:
    """Return whether values can be read without a stall: not on a GPU, in a trace, or of a fake."""
    return x.is_cpu and not in_trace(x)


def in_trace(x: Tensor) -> bool:
    """Return whether x stands for values that a trace or a transform will have, or is fake."""
    if torch.compiler.is_compiling() or _C._get_dispatch_mode(_PROXY) is not None:
        return True
    # A subclass that dispatches by itself (a fake tensor, a distributed one) may hold no values.
    if type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return True
    return _C._functorch.is_functorch_wrapped_tensor(x)


def finite(op: str, result: Tensor, **inputs: Tensor | None) -> None:
    """Raise NonFiniteError if a result on the CPU is not finite, and name the input that caused it.

    On a GPU reading it would stall the stream, and under torch.compile break the graph: there the
    NaN stays in the result.
    """
    # A sum is finite only if its terms are; where only the sum overflows, `isfinite` decides.
    if readable(result) and not math.isfinite(result.sum().item()) and not result.isfinite().all():
        raise_non_finite(op, **inputs)


def raise_non_finite(op: str, **inputs: Tensor | None) -> NoReturn:
    """Raise NonFiniteError for the first input that is not finite, or for an overflow."""
    for name, x in inputs.items():
        if x is not None and not x.isfinite().all():
            where = (~x.isfinite()).nonzero()[0].tolist()
            row = f", first in row {where[-2]}" if x.ndim > 1 else ""
            row += f" of problem {where[0]}" if x.ndim > 2 else ""
            raise NonFiniteError(f"{op}: {name} holds NaN or infinity{row}")
    sizes = (
        f"{name} up to {x.abs().max().item():.3g}"
        for name, x in inputs.items()
        if x is not None and x.numel()
    )
    raise NonFiniteError(
        f"{op}: finite inputs gave a result that is not ({', '.join(sizes)}); bring the features "
        "nearer to 1, or use float64"
    )
