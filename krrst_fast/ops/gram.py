"""The gram of a set of features with itself."""

from typing import Any

from torch import Tensor

from krrst_fast import library, reference
from krrst_fast.backends import BackendName, choose
from krrst_fast.exact import exact_arithmetic
from krrst_fast.ops import checks
from krrst_fast.ops.once import Batched, Tensors, gradients
from krrst_fast.ops.options import Options, Precision
from krrst_fast.ops.prepare import fold, result_dtype, unfold, working_dtype


def gram(
    x: Tensor,
    *,
    scale: float = 1.0,
    bias: float = 0.0,
    precision: Precision | None = None,
    backend: BackendName = "auto",
) -> Tensor:
    """K = scale X X^T + bias, differentiable once.

    The C++ kernel, taken from 48 rows on, computes one triangle and is exactly symmetric.

    Args:
        x: features [..., N, D], float32, float64, or half precision (computed in float32), any
            strides (`gram(x.mT)` is the feature gram).
        scale: multiplies every inner product.
        bias: added to every entry.
        precision: None | "float64" | "float32" | "fast", as in `krrst_fast.krr_mse`.
        backend: see `krrst_fast.ops.options.FitOptions`.

    Returns:
        K [..., N, N].

    Raises:
        ValueError, TypeError: `x` or a setting does not fit.
        NonFiniteError: x, on the CPU, holds NaN or infinity.
    """
    op = "gram"
    checks.matrices(op, x=x)
    checks.scale(op, "scale", scale)
    checks.bias(op, "bias", bias)
    checks.one_of(op, "precision", precision, (None, "float64", "float32", "fast"))
    batch, dtype = tuple(x.shape[:-2]), result_dtype(x)
    x = fold(x.to(working_dtype(dtype, Options(precision=precision))), batch, 2)
    if precision == "fast":
        x, _ = reference.round_features(x, None)
    if backend == "reference":
        with exact_arithmetic(x):
            k = reference.gram(x, scale, bias)
        checks.finite(op, k, x=x)
    else:
        k = _Gram.apply(x, float(scale), float(bias), choose(backend, x, op).name)
    return unfold(k, batch).to(dtype)


class _Gram(Batched):
    @staticmethod
    def forward(x: Tensor, scale: float, bias: float, backend: str) -> Tensor:
        with exact_arithmetic(x):
            k = choose(backend, x, "gram").gram(x, scale, bias)
        checks.finite("gram", k, x=x)
        return k

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.scale = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensors:
        return (*gradients(_backward, "gram", (ctx.scale,), *ctx.saved_tensors, grad), *[None] * 3)


def _backward(static: tuple[float], x: Tensor, grad: Tensor) -> Tensors:
    with exact_arithmetic(x):
        return (static[0] * library.matmul(grad + grad.mT, x),)
