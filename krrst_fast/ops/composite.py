"""The operators composed of differentiable operations of PyTorch.

They serve every derivative but the one that is written by hand: forward mode, second and higher
ones, and transforms of torch.func that torch.compile traces.
"""

from typing import Any

import torch
from torch import Tensor

from krrst_fast import reference
from krrst_fast.cholesky import RIDGE_FACTOR, factor_dtype
from krrst_fast.errors import NotPositiveDefiniteError
from krrst_fast.ops.closed_forms import assembled
from krrst_fast.ops.problem import Problem, cast, finite, keepable
from krrst_fast.ops.solver import Solver
from krrst_fast.precision import exact_arithmetic, is_rounded


def product(a: Tensor, b: Tensor) -> Tensor:
    """Compute a @ b [N?, I, J]."""
    wide = _dtype(a)
    return cast(cast(a, wide) @ cast(b, wide), a.dtype)


def gram(x: Tensor, scale: float | Tensor, bias: float | Tensor) -> Tensor:
    """Compute scale X X^T + bias [N?, M, M]."""
    return cast(reference.gram(cast(x, _dtype(x)), scale, bias), x.dtype)


def ridge_solve(
    op: str, k: Tensor, y: Tensor, lam: Tensor, check: str, factor: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return (k + lam I)^-1 y [N?, M, P] and the Cholesky factor; the ridge is not raised.

    k [N?, M, M] has the symmetric gradient of a symmetric matrix. A factor that is given is used.

    Raises:
        NotPositiveDefiniteError: check is "raise", and the factorisation fails.
    """
    tracing = torch.compiler.is_compiling()
    wide = torch.float64 if _dtype(k) == torch.float64 else factor_dtype(k)
    k_wide, y_wide = cast(k, wide), cast(y, wide)
    eye = torch.eye(k.shape[-1], dtype=wide, device=k.device)
    system = (k_wide + k_wide.mT) / 2 + cast(lam, wide)[..., None, None] * eye
    if tracing or _nested_forward():
        factor = _cholesky(op, system, check)
        return cast(torch.cholesky_solve(y_wide, factor), y.dtype), factor
    given = None if factor is None else cast(factor.detach(), wide)
    factor = _cholesky(op, system.detach(), check) if given is None else given
    return cast(_Solve.apply(system, factor, y_wide), y.dtype), factor


def _nested_forward() -> bool:
    """Return whether forward mode is in forward mode.

    While a function's own jvp runs, torch switches forward mode off, and the outer tangent is lost.
    """
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return sum(x.key() == torch._C._functorch.TransformType.Jvp for x in levels) > 1


class _Solve(torch.autograd.Function):
    """A^-1 y with a factor of A that is not differentiated: every derivative is a solve again.

    Not in a trace, where torch.compile differentiates the forward pass, and not for forward mode in
    forward mode.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(system: Tensor, factor: Tensor, y: Tensor) -> Tensor:
        return torch.cholesky_solve(y, factor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*keepable(*inputs[:2]), output)
        ctx.save_for_forward(*inputs[:2], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        system, factor, x = ctx.saved_tensors
        beta = _Solve.apply(system, factor, grad)
        return -(beta @ x.mT) if ctx.needs_input_grad[0] else None, None, beta

    @staticmethod
    def jvp(ctx: Any, system_t: Tensor | None, _: None, y_t: Tensor | None) -> Tensor:
        system, factor, x = ctx.saved_tensors
        change = torch.zeros_like(x) if y_t is None else y_t
        if system_t is not None:
            change = change - system_t @ x
        return _Solve.apply(system, factor, change)


def krr(op: str, problem: Problem, *, solver: Solver, factor: Tensor | None = None) -> Tensor:
    """Compute the prediction [N?, B, P], or with y_real the mean squared error [N?].

    factor: The Cholesky factor of the ridged K_ss, if it is known.
    """
    f_syn, y_syn, f_real, y_real, ridge, ridge_of, detach_ridge, scale, bias = problem
    assert f_real is not None
    dtype, wide = f_syn.dtype, _dtype(f_syn)
    if solver.precision == "fast":
        f_syn, f_real = _rounded(f_syn, f_real)
    f_syn, f_real, y_syn = cast(f_syn, wide), cast(f_real, wide), cast(y_syn, wide)
    k_ss = reference.gram(f_syn, scale, bias)
    if isinstance(ridge, Tensor):
        ridge = cast(ridge, wide)
    lam = reference.absolute_ridge(k_ss, ridge, ridge_of, detach_ridge)
    alpha, _ = ridge_solve(op, k_ss, y_syn, lam.expand(k_ss.shape[:-2]), solver.check, factor)
    prediction = (scale * (f_real @ f_syn.mT) + bias) @ alpha
    value = prediction
    if y_real is not None:
        value = (prediction - cast(y_real, wide)).square().mean((-2, -1))
    if solver.check == "raise":
        finite(op, value, f_syn=f_syn, y_syn=y_syn, f_real=f_real, y_real=y_real)
    return cast(value, dtype)


def krr_of_saved(settings: tuple[Any, ...], *saved: Tensor | None) -> Tensor:
    """Compute what the operator returned, by differentiable operations, with the same ridge."""
    _, *kernel, form, _, solver, op = settings
    problem, error, solve = assembled(kernel, *saved[:7]), saved[7], saved[11:]
    factor, retries = solve[0], solve[2]
    assert retries is not None
    problem = problem._replace(ridge=problem.ridge * RIDGE_FACTOR ** retries.double())
    value = krr(op, problem, solver=solver, factor=None if form == "primal" else factor)
    if error is None or problem.y_real is not None:
        return value
    # Y_r was not saved, since it needs no gradient: the error to it changes as the prediction does.
    return (value - value.detach() + error).square().mean((-2, -1))


def by_reference(op: str, problem: Problem, solver: Solver) -> Tensor:
    """Compute the same as the reference does, with LU."""
    f_syn, y_syn, f_real, y_real, ridge, ridge_of, detach_ridge, scale, bias = problem
    assert f_real is not None
    if solver.precision == "fast":
        f_syn, f_real = _rounded(f_syn, f_real)
    kernel: dict[str, Any] = {
        **{"ridge": ridge, "ridge_of": ridge_of, "detach_ridge": detach_ridge},
        **{"scale": scale, "bias": bias},
    }
    with exact_arithmetic(f_syn):
        if y_real is None:
            value = reference.krr_predict(f_syn, y_syn, f_real, **kernel)
        else:
            value = reference.krr_mse(f_syn, y_syn, f_real, y_real, **kernel)
    finite(op, value, f_syn=f_syn, y_syn=y_syn, f_real=f_real, y_real=y_real)
    return value


def _rounded(f_syn: Tensor, f_real: Tensor) -> tuple[Tensor, Tensor]:
    f_syn, rounded = reference.round_features(f_syn, f_real)
    assert rounded is not None
    return f_syn, rounded


def _dtype(x: Tensor) -> torch.dtype:
    """Return the precision of products: float64 where torch would round float32 operands.

    Derivatives are computed after the operator has returned, when its own switches are off again;
    no switch rounds float64. A graph does not know the switches that it will run with.
    """
    return torch.float64 if torch.compiler.is_compiling() or is_rounded(x) else x.dtype


def _cholesky(op: str, system: Tensor, check: str) -> Tensor:
    """Return the lower factor [N?, M, M]; one that fails raises, or is NaN."""
    if check != "raise":
        factor, pivot = torch.linalg.cholesky_ex(system)
        return torch.where((pivot != 0)[..., None, None], torch.nan, factor)
    if torch.compiler.is_compiling():
        return torch.linalg.cholesky(system)
    try:
        return torch.linalg.cholesky(system)
    except torch.linalg.LinAlgError as error:
        raise NotPositiveDefiniteError(
            f"{op}: for this derivative the ridge is not raised, and the ridged gram is not "
            f"positive definite ({error}); pass a larger ridge or float64"
        ) from None
