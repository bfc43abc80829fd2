"""From what a caller has to what the closed forms take: one dtype, at most one batch dimension.

Everything here is plain, differentiable PyTorch, so that gradients find their way back.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from krrst_fast.ops import checks
from krrst_fast.ops.options import Options
from krrst_fast.reference import round_features


class Problem(NamedTuple):
    """One kernel ridge regression, or N of them along a first dimension.

    Attributes:
        f_syn, y_syn, f_real, y_real: [N?, M, D], [N?, M, P], [N?, B, D], [N?, B, P] in the
            precision of the computation; rows of unequal weight are multiplied by its root.
        ridge, ridge_of, bias, scale: of the kernel on these.
        root: square roots of the row weights [N?, M, 1], if there are weights.
        batch: the leading dimensions that the caller sees.
        dtype: what the caller gets.
    """

    f_syn: Tensor
    y_syn: Tensor
    f_real: Tensor | None
    y_real: Tensor | None
    ridge: float | Tensor
    ridge_of: str
    bias: float
    scale: float
    root: Tensor | None
    batch: tuple[int, ...]
    dtype: torch.dtype

    def restore(self, x: Tensor) -> Tensor:
        """A result [N?, ...] as the caller sees it."""
        return cast(unfold(x, self.batch), self.dtype)


def unfold(x: Tensor, batch: tuple[int, ...]) -> Tensor:
    """[N, ...] with the leading dimensions that were one."""
    return x.unflatten(0, batch) if len(batch) > 1 else x


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in another precision; a call that has nothing to do still costs a microsecond."""
    return x if x.dtype == dtype else x.to(dtype)


def fold(x: Tensor, batch: tuple[int, ...], core: int) -> Tensor:
    """x [..., core dimensions] as [N?, core dimensions] for the leading dimensions `batch`."""
    if not batch:
        return x
    x = x.expand(*batch, *x.shape[x.ndim - core :])
    return x.flatten(0, len(batch) - 1) if len(batch) > 1 else x


def result_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    is_double = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if is_double else torch.float32


def working_dtype(dtype: torch.dtype, options: Options) -> torch.dtype:
    """The precision of the computation."""
    if options.precision is None:
        return dtype
    return torch.float64 if options.precision == "float64" else torch.float32


def prepare(
    op: str,
    options: Options,
    f_syn: Tensor,
    y_syn: Tensor,
    *real: Tensor,
) -> Problem:
    """Check tensors against each other and the options, and bring them into their final form.

    A fit has nothing in `real`, a prediction F_r, a loss F_r and Y_r. For precision="fast" the
    features are still to be rounded.
    """
    out_syn, out_real, weights = options.out_syn, options.out_real, options.weights
    checks.matrices(
        op,
        **{"f_syn": f_syn, "y_syn": y_syn, **dict(zip(("f_real", "y_real"), real))},
        **{"out_syn": out_syn, "out_real": out_real},
    )
    f_real, y_real = (*real, None, None)[:2]
    _check_sizes(op, f_syn, y_syn, f_real, y_real)
    if weights is not None:
        check_weights(op, weights, f_syn)
    batch = _batch(op, options, f_syn, y_syn, f_real, y_real)
    dtype = result_dtype(f_syn, y_syn, f_real, y_real)
    working = working_dtype(dtype, options)
    if out_syn is not None and out_real is not None and f_real is not None:
        check_outputs(op, y_syn, out_syn, f_real, out_real)
        # What two numbers in half precision leave may have more digits.
        y_syn = cast(y_syn, working) - cast(out_syn, working)
        y_real = y_real if y_real is None else cast(y_real, working) - cast(out_real, working)

    def ready(x: Tensor) -> Tensor:
        return fold(cast(x, working), batch, 2)

    problem = Problem(
        f_syn=ready(f_syn),
        y_syn=ready(y_syn),
        f_real=None if f_real is None else ready(f_real),
        y_real=None if y_real is None else ready(y_real),
        ridge=ready_ridge(options.ridge, batch, working, f_syn),
        ridge_of=options.ridge_of,
        bias=float(options.bias),
        scale=float(options.scale),
        root=None,
        batch=batch,
        dtype=dtype,
    )
    if weights is not None:
        problem = _weighted(problem, fold(weights.to(working), batch, 1), options.detach_ridge)
    if options.precision == "fast" and options.raises:
        # One that is not finite would spread: the features share a power of two.
        for name, x in (("f_syn", problem.f_syn), ("f_real", problem.f_real)):
            if x is not None:
                checks.finite(op, x, **{name: x})
    return problem


def rounded(problem: Problem) -> Problem:
    """With features of 11 bits: precision="fast", where nobody takes them in float16."""
    f_syn, f_real = round_features(problem.f_syn, problem.f_real)
    return problem._replace(f_syn=f_syn, f_real=f_real)


def ready_ridge(
    ridge: float | Tensor, batch: tuple[int, ...], dtype: torch.dtype, like: Tensor
) -> float | Tensor:
    """A ridge tensor [N?] on the device and in the precision of the computation; a number stays."""
    if not isinstance(ridge, Tensor):
        return float(ridge)
    if ridge.device.type == "meta" != like.device.type:
        raise ValueError(f"ridge must have values, and is on {ridge.device}, not {like.device}")
    return fold(ridge.to(device=like.device, dtype=dtype), batch, 0)


def _check_sizes(
    op: str, f_syn: Tensor, y_syn: Tensor, f_real: Tensor | None, y_real: Tensor | None
) -> None:
    checks.same_size(op, "f_syn", f_syn, "y_syn", y_syn, -2)
    if f_real is not None:
        checks.same_size(op, "f_syn", f_syn, "f_real", f_real, -1)
        if y_real is not None:
            checks.same_size(op, "f_real", f_real, "y_real", y_real, -2)
            checks.same_size(op, "y_syn", y_syn, "y_real", y_real, -1)


def _batch(
    op: str,
    options: Options,
    f_syn: Tensor,
    y_syn: Tensor,
    f_real: Tensor | None,
    y_real: Tensor | None,
) -> tuple[int, ...]:
    ridge = options.ridge if isinstance(options.ridge, Tensor) else None
    plain = ridge is None is options.weights and options.out_syn is None
    if plain and all(x is None or x.ndim == 2 for x in (f_syn, y_syn, f_real, y_real)):
        return ()
    return checks.batch_of(
        op,
        f_syn=(f_syn, 2),
        y_syn=(y_syn, 2),
        f_real=(f_real, 2),
        y_real=(y_real, 2),
        out_syn=(options.out_syn, 2),
        out_real=(options.out_real, 2),
        weights=(options.weights, 1),
        ridge=(ridge, 0),
    )


def check_outputs(op: str, y_syn: Tensor, out_syn: Tensor, rows: Tensor, out_real: Tensor) -> None:
    """The outputs of a network have the shapes of what they are subtracted from and added to."""
    for name, x, like in (("out_syn", out_syn, y_syn), ("out_real", out_real, rows)):
        n = like.shape[-2]
        if tuple(x.shape[-2:]) != (n, y_syn.shape[-1]):
            raise ValueError(
                f"{op}: {name} must be [..., {n}, {y_syn.shape[-1]}], got shape {tuple(x.shape)}"
            )
        checks.finite(op, x, **{name: x})


def check_weights(op: str, weights: Tensor, rows: Tensor) -> None:
    """One weight a row, none negative."""
    if weights.ndim < 1 or weights.shape[-1] != rows.shape[-2]:
        raise ValueError(
            f"{op}: weights must be [..., {rows.shape[-2]}], got shape {tuple(weights.shape)}"
        )
    if weights.device != rows.device:
        raise ValueError(
            f"{op}: weights must be on the device of f_syn, got {weights.device} and {rows.device}"
        )
    if not checks.readable(weights) or not weights.numel():
        return
    checks.finite(op, weights, weights=weights)
    least = weights.detach().min().item()
    if least < 0 or weights.requires_grad and least == 0:
        what = "positive where they ask for a gradient" if weights.requires_grad else "zero or more"
        raise ValueError(f"{op}: weights must be {what}, got {least:.3g}")
    if least == 0 and not weights.detach().amax(-1).all():
        raise ValueError(f"{op}: weights must not all be zero")


def _weighted(problem: Problem, weights: Tensor, detach_ridge: bool) -> Problem:
    """A row of weight w, and its constant feature, times sqrt(w): as if it were there w times."""
    root = weights.sqrt()[..., None]  # [N?, M, 1]
    f_syn, f_real = root * problem.f_syn, problem.f_real
    if problem.bias:
        constant = (problem.bias / problem.scale) ** 0.5
        f_syn = torch.cat((f_syn, constant * root), -1)
        if f_real is not None:
            column = f_real.new_full((*f_real.shape[:-1], 1), constant)
            f_real = torch.cat((f_real, column), -1)
    ridge, ridge_of = problem.ridge, problem.ridge_of
    if ridge_of == "mean_diagonal":
        total = weights.sum(-1)
        ridge, ridge_of = ridge / (total.detach() if detach_ridge else total), "trace"
    return problem._replace(
        f_syn=f_syn,
        y_syn=root * problem.y_syn,
        f_real=f_real,
        ridge=ridge,
        ridge_of=ridge_of,
        bias=0.0,
        root=root,
    )
