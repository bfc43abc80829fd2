"""Kernel ridge regression on features, fused with its gradient: `krr_mse` and `krr_predict`."""

from dataclasses import dataclass
from typing import Any, Literal, TypedDict, overload

import torch
from torch import Tensor
from typing_extensions import Unpack  # torch brings it

from krrst_fast import reference
from krrst_fast.backends import BackendName, choose
from krrst_fast.errors import NonFiniteError
from krrst_fast.library import RIDGE_FACTOR
from krrst_fast.ops import checks
from krrst_fast.ops.forms import BACKWARD, SOLVE, Inputs, Kernel, Needs, Solve
from krrst_fast.ops.once import once_differentiable
from krrst_fast.planner import Form, cheapest

RidgeOf = Literal["trace", "mean_diagonal", "absolute"]


@dataclass(frozen=True)
class SolveInfo:
    """How a call was computed.

    Attributes:
        form: the closed form, "k" | "w" | "primal".
        backend: who computed.
        ridge: the number that was added to the diagonal [].
        retries: how many times the ridge was raised by 10 because there was no factor [].
        factor: lower Cholesky factor of the ridged system, M x M or in primal form D (+ 1) square.
    """

    form: str
    backend: str
    ridge: Tensor
    retries: Tensor
    factor: Tensor

    @property
    def condition(self) -> Tensor:
        """Estimate from below of the 2-norm condition number of the system that was solved [].

        Six steps of power iteration on the system and on its inverse: the work of a dozen
        triangular solves with one right-hand side, done when asked for.
        """
        n = len(self.factor)
        high = self.factor.new_ones((n, 1))
        low = torch.linspace(1, 2, n).to(self.factor)[:, None]
        low[1::2] *= -1
        largest = smallest = high.new_ones(())
        for _ in range(6 if n else 0):
            high, low = high / high.norm(), low / low.norm()
            high = self.factor @ (self.factor.mT @ high)
            low = torch.cholesky_solve(low, self.factor)
            largest, smallest = high.norm(), 1 / low.norm()
        return largest / smallest


class Settings(TypedDict, total=False):
    """The keywords of `krr_mse` that decide what is computed."""

    ridge: float | Tensor
    ridge_of: RidgeOf
    detach_ridge: bool
    bias: float
    scale: float
    form: Literal["auto"] | Form
    backend: BackendName
    max_retries: int


@overload
def krr_mse(
    f_syn: Tensor,
    y_syn: Tensor,
    f_real: Tensor,
    y_real: Tensor,
    *,
    return_info: Literal[False] = ...,
    **settings: Unpack[Settings],
) -> Tensor: ...


@overload
def krr_mse(
    f_syn: Tensor,
    y_syn: Tensor,
    f_real: Tensor,
    y_real: Tensor,
    *,
    return_info: Literal[True],
    **settings: Unpack[Settings],
) -> tuple[Tensor, SolveInfo]: ...


def krr_mse(
    f_syn: Tensor,
    y_syn: Tensor,
    f_real: Tensor,
    y_real: Tensor,
    *,
    ridge: float | Tensor = 1e-6,
    ridge_of: RidgeOf = "trace",
    detach_ridge: bool = True,
    bias: float = 0.0,
    scale: float = 1.0,
    form: Literal["auto"] | Form = "auto",
    backend: BackendName = "auto",
    max_retries: int = 3,
    return_info: bool = False,
) -> Tensor | tuple[Tensor, SolveInfo]:
    """Mean squared error of kernel ridge regression from (F_s, Y_s), tested on (F_r, Y_r).

    Equivalent to `mean((K_rs (K_ss + lam I)^-1 Y_s - Y_r)^2)` with `K_ss = scale F_s F_s^T + bias`
    and `K_rs = scale F_r F_s^T + bias`, differentiable once in every tensor argument. With `bias=1`
    it is the outer loss of KRR-ST (arXiv 2310.06511, equation 4).

    Args:
        f_syn: features [M, D], float32 or float64.
        y_syn: targets [M, P].
        f_real: features [B, D], B > 0.
        y_real: targets [B, P], P > 0.
        ridge: positive; a scalar tensor may be learnt.
        ridge_of: lam is `ridge` times "trace" of K_ss, its "mean_diagonal", or 1 ("absolute").
        detach_ridge: take the trace as a constant (KRR-ST) or differentiate through it (FRePo).
        bias: added to every kernel value: a constant feature sqrt(bias), never materialised.
        scale: multiplies every inner product.
        form: the closed form; "auto" asks `krrst_fast.plan`.
        backend: "auto", "cpp", "torch", or "reference" (the formula above, by LU and autograd).
        max_retries: how often a failed factorisation is tried again with ten times the ridge.
        return_info: also return a `SolveInfo`.

    Returns:
        The loss [], or (loss, info).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or settings that do not fit.
        NonFiniteError: an input on the CPU holds NaN or infinity.
        NotPositiveDefiniteError: no factor even with the largest ridge.
    """
    op = "krr_mse"
    checks.matrices(op, f_syn=f_syn, y_syn=y_syn, f_real=f_real, y_real=y_real)
    checks.same_size(op, "f_real", f_real, "y_real", y_real, 0)
    checks.same_size(op, "y_syn", y_syn, "y_real", y_real, 1)
    if y_real.numel() == 0:
        raise ValueError(f"{op}: the mean is over y_real, got shape {tuple(y_real.shape)}")
    loss, info = _call(
        op,
        (f_syn, y_syn, f_real, y_real),
        (ridge, ridge_of, detach_ridge, bias, scale, form, backend, max_retries),
        return_info,
    )
    checks.finite(op, loss, f_syn=f_syn, y_syn=y_syn, f_real=f_real, y_real=y_real)
    return (loss, info) if info is not None else loss


def krr_predict(
    f_syn: Tensor,
    y_syn: Tensor,
    f_real: Tensor,
    *,
    ridge: float | Tensor = 1e-6,
    ridge_of: RidgeOf = "trace",
    detach_ridge: bool = True,
    bias: float = 0.0,
    scale: float = 1.0,
    form: Literal["auto"] | Form = "auto",
    backend: BackendName = "auto",
    max_retries: int = 3,
) -> Tensor:
    """Predictions [B, P] of kernel ridge regression, differentiable once: put any loss on top.

    Equivalent to `K_rs (K_ss + lam I)^-1 Y_s`; arguments and errors as in `krr_mse`.
    """
    op = "krr_predict"
    checks.matrices(op, f_syn=f_syn, y_syn=y_syn, f_real=f_real)
    prediction, _ = _call(
        op,
        (f_syn, y_syn, f_real, None),
        (ridge, ridge_of, detach_ridge, bias, scale, form, backend, max_retries),
        False,
    )
    checks.finite(op, prediction, f_syn=f_syn, y_syn=y_syn, f_real=f_real)
    return prediction


def _call(
    op: str,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None],
    settings: tuple[float | Tensor, str, bool, float, float, str, str, int],
    return_info: bool,
) -> tuple[Tensor, SolveInfo | None]:
    """Check what the two public functions share, choose form and backend, compute."""
    f_syn, y_syn, f_real, y_real = tensors
    ridge, ridge_of, detach_ridge, bias, scale, form, backend, max_retries = settings
    checks.same_size(op, "f_syn", f_syn, "y_syn", y_syn, 0)
    checks.same_size(op, "f_syn", f_syn, "f_real", f_real, 1)
    checks.kernel(op, scale, bias)
    checks.ridge(op, ridge, ridge_of)
    checks.form(op, form)
    checks.retries(op, max_retries)
    if backend == "reference":
        if return_info:
            raise ValueError(f"{op}: backend 'reference' has no info to return")
        with checks.no_autocast(f_syn):
            return _reference(tensors, ridge, ridge_of, detach_ridge, bias, scale), None
    chosen = choose(backend, f_syn, op)
    if form == "auto" or 0 in f_syn.shape:
        form = cheapest(len(f_syn), len(f_real), f_syn.shape[1], y_syn.shape[1])
    if isinstance(ridge, Tensor):
        ridge = ridge.to(f_syn)
    kernel = (ridge, ridge_of, detach_ridge, float(bias), float(scale))
    try:
        value, lam, retries, factor = _Krr.apply(*tensors, *kernel, form, chosen.name, max_retries)
    except NonFiniteError:
        # Of the gram: say which features it came from.
        checks.blame(op, f_syn=f_syn, **({"ridge": ridge} if isinstance(ridge, Tensor) else {}))
    info = SolveInfo(form, chosen.name, lam, retries, factor) if return_info else None
    return value, info


def _reference(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor | None],
    ridge: float | Tensor,
    ridge_of: str,
    detach_ridge: bool,
    bias: float,
    scale: float,
) -> Tensor:
    f_syn, y_syn, f_real, y_real = tensors
    kernel: dict[str, Any] = {
        "ridge": ridge,
        "ridge_of": ridge_of,
        "detach_ridge": detach_ridge,
        "bias": bias,
        "scale": scale,
    }
    if y_real is None:
        return reference.krr_predict(f_syn, y_syn, f_real, **kernel)
    return reference.krr_mse(f_syn, y_syn, f_real, y_real, **kernel)


class _Krr(torch.autograd.Function):
    """Prediction, or with y_real the MSE, and the analytic gradient of the chosen closed form."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        f_syn: Tensor,
        y_syn: Tensor,
        f_real: Tensor,
        y_real: Tensor | None,
        ridge: float | Tensor,
        ridge_of: str,
        detach_ridge: bool,
        bias: float,
        scale: float,
        form: str,
        backend: str,
        max_retries: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        kernel = Kernel(scale, bias, ridge, ridge_of, max_retries)
        with checks.no_autocast(f_syn):
            inputs = Inputs(f_syn, y_syn, f_real)
            value, solve = SOLVE[form](choose(backend, f_syn, "krr"), kernel, inputs)
            error = None
            if y_real is not None:
                error = value.sub_(y_real)
                value = error.square().mean()
        learnt = ridge if isinstance(ridge, Tensor) else None
        ctx.save_for_backward(f_syn, y_syn, f_real, y_real, learnt, error, *solve)
        ctx.settings = (scale, bias, ridge, ridge_of, detach_ridge, form, backend)
        if learnt is not None:
            ctx.settings = (scale, bias, None, ridge_of, detach_ridge, form, backend)
        ctx.set_materialize_grads(False)  # no zeros the size of the factor on the way back
        ctx.mark_non_differentiable(solve.lam, solve.retries, solve.factor)
        return value, solve.lam, solve.retries, solve.factor

    @staticmethod
    @once_differentiable("krr_mse, krr_predict")
    def backward(ctx, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        if grad is None:
            return (None,) * 12
        f_syn, y_syn, f_real, _, learnt, error, *saved = ctx.saved_tensors
        scale, bias, ridge, ridge_of, detach_ridge, form, backend = ctx.settings
        ridge = ridge if learnt is None else learnt
        kernel, solve = Kernel(scale, bias, ridge, ridge_of, 0), Solve(*saved)
        needs_f_syn, needs_y_syn, needs_f_real, needs_y_real, needs_ridge, *_ = ctx.needs_input_grad
        through_trace = needs_f_syn and not detach_ridge and ridge_of != "absolute"
        needs = Needs(needs_f_syn, needs_y_syn, needs_f_real, needs_ridge or through_trace)
        r = grad if error is None else error * (grad * (2.0 / error.numel()))  # [B, P]
        with checks.no_autocast(f_syn):
            inputs = Inputs(f_syn, y_syn, f_real)
            grads = BACKWARD[form](choose(backend, f_syn, "krr"), kernel, solve, inputs, r, needs)
        d_ridge = None
        if grads.lam is not None:
            raised = grads.lam * RIDGE_FACTOR**solve.retries
            if needs_ridge:
                d_ridge = raised * solve.base
            if through_trace:
                # lam = ridge * base, and d trace(K_ss) / dF_s = 2 scale F_s
                slope = raised * ridge * kernel.base(torch.ones_like(raised), len(f_syn))
                assert grads.f_syn is not None
                grads.f_syn.addcmul_(f_syn, slope, value=2.0 * scale)
        d_y_real = -r if needs_y_real else None
        d_y_syn = grads.y_syn if needs_y_syn else None
        return (grads.f_syn, d_y_syn, grads.f_real, d_y_real, d_ridge, *[None] * 7)
