"""Functions with a gradient written by hand: batched under vmap, differentiable once.

A gradient written by hand has none of its own. torch's `once_differentiable` raises only where the
incoming gradient requires grad; elsewhere it leaves the second derivative out of the sum in
silence. Here a gradient that somebody could differentiate hangs on everything it was computed from,
so that no path of a second derivative can miss the error.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Tensors = tuple[Tensor | None, ...]

# Before, a trace with sizes that change counts its outputs in two ways, and fails over the marks.
_MARKS_IN_A_TRACE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


class Batched(torch.autograd.Function):
    """A function of one problem, or of N of them along a first dimension: `vmap` is just that.

    The first tensor argument is a matrix in one problem, and has three dimensions in N of them.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        # As torch does, without the 30 us in which it looks for defaults that no forward here has.
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        moved = [_to_front(x, dim, size) for x, dim in zip(args, in_dims)]
        many = next(x for x in moved if isinstance(x, Tensor)).ndim == 4
        if many:
            moved = [x.flatten(0, 1) if isinstance(x, Tensor) else x for x in moved]
        outputs = cls.apply(*moved)
        single = isinstance(outputs, Tensor)
        values = (outputs,) if single else outputs
        if many:
            values = tuple(x if x is None else x.unflatten(0, (size, -1)) for x in values)
        dims = tuple(None if x is None else 0 for x in values)
        return (values[0], dims[0]) if single else (values, dims)


def mark_constant(ctx: Any, *outputs: Tensor | None) -> None:
    """Outputs that are there to be looked at; nothing flows back from them."""
    if _MARKS_IN_A_TRACE or not torch.compiler.is_compiling():
        ctx.mark_non_differentiable(*(x for x in outputs if x is not None))


def _to_front(x: Any, dim: int | None, size: int) -> Any:
    if not isinstance(x, Tensor):
        return x
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def gradients(
    compute: Callable[..., Tensors], op: str, static: tuple[Any, ...], *tensors: Tensor | None
) -> Tensors:
    """compute(static, *tensors), of which a derivative raises and names `op`."""
    if torch.compiler.is_compiling():
        return compute(static, *tensors)
    if not torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
        return compute(static, *tensors)
    return _Gradients.apply(compute, op, static, *tensors)


class _Gradients(Batched):
    @staticmethod
    def forward(
        compute: Callable[..., Tensors], op: str, static: tuple[Any, ...], *tensors: Tensor | None
    ) -> Tensors:
        return compute(static, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.op = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Tensors:
        raise RuntimeError(
            f"{ctx.op}: is differentiable once, and a second derivative was asked for"
        )
