"""Functions with a gradient written by hand, batched under vmap.

Such a gradient has no derivative of its own. torch's `once_differentiable` raises only where the
incoming gradient requires grad; elsewhere the second derivative silently misses a term. Here a
gradient that could be differentiated further depends, for autograd, on everything that it was
computed from, and its derivative is that of the same operator in plain PyTorch (`composite`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from krrst_fast.backends.torch import matmul
from krrst_fast.ops import composite
from krrst_fast.ops.problem import keepable
from krrst_fast.precision import exact_arithmetic

Tensors = tuple[Tensor | None, ...]

# Before torch 2.13 a trace with dynamic sizes fails at such marks: it counts outputs in two ways.
MARKS_IN_A_TRACE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


class Batched(torch.autograd.Function):
    """A function of one problem or of a batch along a first dimension, which `vmap` makes.

    The first tensor argument is a matrix for one problem, and has three dimensions for a batch.
    """

    # What torch's `apply` calls after 30 us of looking for default arguments, which no forward here
    # has. Not for torch.compile and the transforms of torch.func.
    direct = torch._C._FunctionBase.__dict__["apply"]

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Apply the function, without the detour where it is not needed."""
        if torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling():
            return super().apply(*args)
        return cls.direct(*args)

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


def needs_composite() -> bool:
    """Return whether a derivative is asked for that is not written by hand.

    That is forward mode, a second derivative by torch.func, or any transform of torch.func that
    torch.compile traces: it differentiates the forward pass of an autograd function in place of
    calling its backward pass, and the compiled operators in it have no derivative.
    """
    if forward_ad._current_level >= 0:
        return True
    if not torch._C._are_functorch_transforms_active():
        return False
    if torch.compiler.is_compiling():
        return True
    levels = torch._C._functorch.get_interpreter_stack()
    return sum(x.key() == torch._C._functorch.TransformType.Grad for x in levels) > 1


def mark_constant(ctx: Any, *outputs: Tensor | None) -> None:
    """Mark outputs that have no gradient."""
    if MARKS_IN_A_TRACE or not torch.compiler.is_compiling():
        ctx.mark_non_differentiable(*[x for x in outputs if x is not None])


def _to_front(x: Any, dim: int | None, size: int) -> Any:
    if not isinstance(x, Tensor):
        return x
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def gradients(
    compute: Callable[..., Tensors],
    again: Callable[..., Tensor],
    ctx: Any,
    static: tuple[Any, ...],
    grad: Tensor,
) -> Tensors:
    """Return the gradients to the inputs of a function, perhaps followed by more of None.

    Args:
        compute: Returns the gradients, from static, the saved tensors and grad. The first saved
            tensors are the inputs.
        again: Computes the result of the function from static and the saved tensors, by
            differentiable operations: it is differentiated where a derivative of the gradients is
            asked for.
        ctx: The context of the function.
        static: What is no tensor.
        grad: Gradient to the result.
    """
    tensors = (*ctx.saved_tensors, grad)
    transformed = torch._C._are_functorch_transforms_active()
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() or transformed):
        return compute(static, *tensors)
    *inputs, incoming = _aliases(tensors)
    wanted = [x for x, needed in zip(inputs, ctx.needs_input_grad) if x is not None and needed]
    # create_graph=True: the gradients are to be differentiated, and are computed so at once. Not
    # where autograd does not see what they are gradients to: within torch.func, or after it.
    plain = not (transformed or torch._C._functorch.is_legacy_batchedtensor(grad))
    if not plain or not all(x.requires_grad for x in wanted):
        return _Gradients.apply(compute, again, static, *tensors)
    value = again(static, *inputs)
    first = torch.autograd.grad(value, wanted, incoming, create_graph=True, allow_unused=True)
    found = {id(x): derivative for x, derivative in zip(wanted, first)}
    return tuple(found.get(id(x)) for x in inputs)


def _aliases(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return other tensors of the same values: one that was computed from another leads to that."""
    return [x if x is None else x.view_as(x) for x in tensors]


class _Gradients(Batched):
    @staticmethod
    def forward(
        compute: Callable[..., Tensors],
        again: Callable[..., Tensor],
        static: tuple[Any, ...],
        *tensors: Tensor | None,
    ) -> Tensors:
        return compute(static, *tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, ctx.again, ctx.static, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Tensors:
        if all(grad is None for grad in grads):
            return (None,) * (3 + len(ctx.saved_tensors))
        further = torch.is_grad_enabled()
        with torch.enable_grad():
            tensors = _aliases(ctx.saved_tensors)
            *inputs, incoming = tensors
            asked = [(x, g) for x, g in zip(inputs, grads) if x is not None and g is not None]
            value = ctx.again(ctx.static, *inputs)
            first = torch.autograd.grad(
                value, [x for x, _ in asked], incoming, create_graph=True, materialize_grads=True
            )
            wanted = [x for x in tensors if x is not None and x.requires_grad]
            second = torch.autograd.grad(
                first, wanted, [g for _, g in asked], create_graph=further, allow_unused=True
            )
        found = {id(x): derivative for x, derivative in zip(wanted, second)}
        return (None, None, None, *(found.get(id(x)) for x in tensors))


def product(a: Tensor, b: Tensor) -> Tensor:
    """Compute a @ b [N?, I, J] in full precision."""
    return composite.product(a, b) if needs_composite() else _Product.apply(a, b)


class _Product(Batched):
    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        with exact_arithmetic(a):
            return matmul(a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*keepable(*inputs))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensors:
        needs = ctx.needs_input_grad
        return gradients(_product_backward, _product_again, ctx, needs, grad)[:2]


def _product_backward(needs: tuple[bool, ...], a: Tensor, b: Tensor, grad: Tensor) -> Tensors:
    with exact_arithmetic(grad):
        return (
            matmul(grad, b.mT) if needs[0] else None,
            matmul(a.mT, grad) if needs[1] else None,
        )


def _product_again(needs: tuple[bool, ...], a: Tensor, b: Tensor) -> Tensor:
    return composite.product(a, b)
