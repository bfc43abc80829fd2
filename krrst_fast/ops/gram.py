"""The gram of a set of features with itself."""

import torch
from torch import Tensor

from krrst_fast import reference
from krrst_fast.backends import BackendName, choose
from krrst_fast.ops import checks
from krrst_fast.ops.once import once_differentiable


def gram(
    x: Tensor, *, scale: float = 1.0, bias: float = 0.0, backend: BackendName = "auto"
) -> Tensor:
    """K = scale X X^T + bias, differentiable once.

    The C++ kernel, taken from 48 rows on, computes one triangle and is exactly symmetric.

    Args:
        x: features [N, D], float32 or float64, any strides (`gram(x.mT)` is the feature gram).
        scale: multiplies every inner product.
        bias: added to every entry.
        backend: "auto", "cpp", "torch" or "reference".

    Returns:
        K [N, N].

    Raises:
        ValueError, TypeError: `x` or a setting does not fit.
    """
    checks.matrices("gram", x=x)
    checks.kernel("gram", scale, bias)
    if backend == "reference":
        return reference.gram(x, scale, bias)
    return _Gram.apply(x, float(scale), float(bias), choose(backend, x, "gram").name)


class _Gram(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, scale: float, bias: float, backend: str) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        ctx.scale = scale
        with checks.no_autocast(x):
            return choose(backend, x, "gram").gram(x, scale, bias)

    @staticmethod
    @once_differentiable("gram")
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        with checks.no_autocast(x):
            return ctx.scale * ((grad + grad.mT) @ x), None, None, None
