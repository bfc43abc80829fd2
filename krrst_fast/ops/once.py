"""Backward passes that are written by hand have no backward pass of their own."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def once_differentiable(op: str) -> Callable[[Callable], Callable]:
    """Decorate `Function.backward` of `op`: a second derivative through it raises.

    torch's own decorator does that only where the incoming gradient requires grad; elsewhere it
    leaves the second derivative out of the sum in silence. Here every gradient hangs on all saved
    tensors, so that no path of a second derivative can miss the error.
    """

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def first_order(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            with torch.no_grad():
                outputs = backward(ctx, *grads)
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return outputs
            roots = [x for x in (*ctx.saved_tensors, *grads) if x is not None and x.requires_grad]
            return tuple(x if x is None else _End.apply(op, x, *roots) for x in outputs)

        return first_order

    return decorate


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: str, x: Tensor, *roots: Tensor) -> Tensor:
        ctx.op = op
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise RuntimeError(
            f"{ctx.op}: is differentiable once, and a second derivative was asked for"
        )
