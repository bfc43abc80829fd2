"""Solve with a ridged positive semi-definite gram."""

from typing import Any, NamedTuple

from torch import Tensor
from typing_extensions import Unpack

from krrst_fast import library
from krrst_fast.backends import choose
from krrst_fast.exact import exact_arithmetic
from krrst_fast.factor import RIDGE_FACTOR
from krrst_fast.ops import checks
from krrst_fast.ops.forms import Kernel, Solve, factored, refines, solved
from krrst_fast.ops.once import Batched, Tensors, gradients, mark_constant
from krrst_fast.ops.options import Options, SolveOptions, read, takes
from krrst_fast.ops.prepare import fold, ready_ridge, result_dtype, unfold, working_dtype
from krrst_fast.reference import absolute_ridge


@takes(SolveOptions)
def ridge_solve(k: Tensor, y: Tensor, **options: Unpack[SolveOptions]) -> Tensor:
    """alpha = (k + lam I)^-1 y by Cholesky, differentiable once in k, y and ridge.

    Args:
        k: symmetric positive semi-definite [..., M, M]; symmetry is taken, not checked.
        y: right-hand sides [..., M, P].
        **options: see `krrst_fast.ops.options.SolveOptions`; "fast" is no precision of a gram that
            is given. The gradient goes through the trace.

    Returns:
        alpha [..., M, P]. The gradient to k is symmetric.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options that do not fit.
        NonFiniteError: an input on the CPU holds NaN or infinity.
        NotPositiveDefiniteError: no factor even with the largest ridge.
    """
    op = "ridge_solve"
    chosen = read(op, options, SolveOptions)
    checks.matrices(op, k=k, y=y)
    check_gram(op, "k", k, chosen)
    checks.same_size(op, "k", k, "y", y, -2)
    ridge = chosen.ridge if isinstance(chosen.ridge, Tensor) else None
    batch = checks.batch_of(op, k=(k, 2), y=(y, 2), ridge=(ridge, 0))
    dtype = result_dtype(k, y)
    working = working_dtype(dtype, chosen)
    chosen = chosen._replace(ridge=ready_ridge(chosen.ridge, batch, working, k))
    k, y = (fold(x.to(working), batch, 2) for x in (k, y))
    alpha, *_ = solve_gram(op, k, y, chosen._replace(detach_ridge=False), ("k", "y"))
    return unfold(alpha, batch).to(dtype)


def check_gram(op: str, name: str, k: Tensor, options: Options) -> None:
    """k is square, and nothing asks to round the features that it no longer has."""
    if k.shape[-2] != k.shape[-1]:
        raise ValueError(f"{op}: {name} must be square, got shape {tuple(k.shape)}")
    if options.precision == "fast":
        raise ValueError(f"{op}: precision 'fast' rounds features, and a gram has none")


def solve_gram(
    op: str, k: Tensor, y: Tensor, options: Options, names: tuple[str, str]
) -> tuple[Tensor, ...]:
    """alpha [N?, M, P], factor, lam, retries, pivot for k [N?, M, M] and y [N?, M, P]."""
    lam = absolute_ridge(k, options.ridge, options.ridge_of, options.detach_ridge)
    lam = lam.expand(k.shape[:-2])
    static = _Static(op, *names, options.retries, options.raises, options.refine)
    alpha, factor, lam, retries, pivot, _ = _RidgeSolve.apply(k, y, lam, static)
    return alpha, factor, lam, retries, pivot


class _Static(NamedTuple):
    op: str
    k_name: str
    y_name: str
    retries: int
    raises: bool
    refine: int


class _RidgeSolve(Batched):
    @staticmethod
    def forward(k: Tensor, y: Tensor, lam: Tensor, static: _Static) -> tuple[Tensor | None, ...]:
        kernel = Kernel(1.0, 0.0, lam, "absolute", static.retries, static.raises, static.refine)
        with exact_arithmetic(k):
            solve = factored(choose("auto", k, static.op), kernel, k, y, k.shape[-2])
        alpha = solve.coefficients
        if static.raises:
            checks.finite(static.op, alpha, **{static.k_name: k, static.y_name: y})
        return alpha, solve.factor, solve.lam, solve.retries, solve.pivot, solve.inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        alpha, factor, lam, retries, pivot, inverse = output
        static = inputs[3]
        k = inputs[0] if refines(static.refine, alpha, factor) else None
        ctx.save_for_backward(k, alpha, factor, lam, retries, inverse)
        ctx.static = static
        ctx.set_materialize_grads(False)
        mark_constant(ctx, factor, lam, retries, pivot, inverse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Tensors:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        static = (ctx.needs_input_grad[0], ctx.static)
        grads = gradients(_backward, ctx.static.op, static, *ctx.saved_tensors, grad)
        return (*grads, None)


def _backward(
    settings: tuple[bool, _Static],
    k: Tensor | None,
    alpha: Tensor,
    factor: Tensor,
    lam: Tensor,
    retries: Tensor,
    inverse: Tensor | None,
    grad: Tensor,
) -> Tensors:
    needs_k, static = settings
    with exact_arithmetic(grad):
        solve = Solve(factor, lam, retries, retries, inverse, lam, alpha, None, k)
        beta = solved(choose("auto", grad, static.op), solve, grad, static.refine)
        d_k = None
        if needs_k:
            outer = library.matmul(beta, alpha.mT)
            d_k = (outer + outer.mT).mul_(-0.5)
        d_lam = -(alpha * beta).sum((-2, -1)) * RIDGE_FACTOR**retries
    return d_k, beta, d_lam
