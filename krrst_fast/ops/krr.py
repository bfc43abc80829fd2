"""Kernel ridge regression on features, fused with its gradient: `krr_mse` and `krr_predict`."""

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from typing_extensions import Unpack  # torch brings it

from krrst_fast import reference
from krrst_fast.backends import choose, going_back
from krrst_fast.errors import NonFiniteError
from krrst_fast.exact import exact_arithmetic
from krrst_fast.factor import RIDGE_FACTOR
from krrst_fast.ops import checks
from krrst_fast.ops.forms import BACKWARD, SOLVE, Inputs, Kernel, Needs, Solve
from krrst_fast.ops.info import SolveInfo
from krrst_fast.ops.once import Batched, Tensors, gradients, mark_constant
from krrst_fast.ops.options import Options, PredictOptions, read, takes
from krrst_fast.ops.prepare import Problem, cast, prepare, rounded, unfold
from krrst_fast.plain import wide
from krrst_fast.planner import cheapest
from krrst_fast.reference import half_features


@overload
def krr_mse(
    f_syn: Tensor,
    y_syn: Tensor,
    f_real: Tensor,
    y_real: Tensor,
    *,
    return_info: Literal[False] = ...,
    **options: Unpack[PredictOptions],
) -> Tensor: ...


@overload
def krr_mse(
    f_syn: Tensor,
    y_syn: Tensor,
    f_real: Tensor,
    y_real: Tensor,
    *,
    return_info: Literal[True],
    **options: Unpack[PredictOptions],
) -> tuple[Tensor, SolveInfo]: ...


@takes(PredictOptions)
def krr_mse(
    f_syn: Tensor,
    y_syn: Tensor,
    f_real: Tensor,
    y_real: Tensor,
    *,
    return_info: bool = False,
    **options: Unpack[PredictOptions],
) -> Tensor | tuple[Tensor, SolveInfo]:
    """Mean squared error of kernel ridge regression from (F_s, Y_s), tested on (F_r, Y_r).

    Equivalent to `mean((K_rs (K_ss + lam I)^-1 Y_s - Y_r)^2)` with `K_ss = scale F_s F_s^T + bias`
    and `K_rs = scale F_r F_s^T + bias`, differentiable once in every tensor argument. With `bias=1`
    it is the outer loss of KRR-ST (arXiv 2310.06511, equation 4). Leading dimensions are problems
    side by side, each with a loss of its own; they broadcast.

    Args:
        f_syn: features [..., M, D], float32, float64, or half precision (computed in float32).
        y_syn: targets [..., M, P].
        f_real: features [..., B, D], B > 0.
        y_real: targets [..., B, P], P > 0.
        return_info: also return a `SolveInfo`.
        **options: see `krrst_fast.ops.options.PredictOptions`; by default a ridge of 1e-6 of the
            trace, which is taken as a constant.

    Returns:
        The losses [...], one number for matrices; or (losses, info).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options that do not fit.
        NonFiniteError: an input on the CPU holds NaN or infinity.
        NotPositiveDefiniteError: no factor even with the largest ridge.
    """
    op = "krr_mse"
    chosen = read(op, options, PredictOptions)
    checks.yes_or_no(op, "return_info", return_info)
    problem = prepare(op, chosen, f_syn, y_syn, f_real, y_real)
    if y_real.numel() == 0 or problem.f_syn.shape[0] == 0 < len(problem.batch):
        raise ValueError(f"{op}: the mean is over y_real, got shape {tuple(y_real.shape)}")
    loss, info = _compute(op, problem, chosen, return_info)
    loss = problem.restore(loss)
    return (loss, info) if info is not None else loss


@overload
def krr_predict(
    f_syn: Tensor,
    y_syn: Tensor,
    f_real: Tensor,
    *,
    return_info: Literal[False] = ...,
    **options: Unpack[PredictOptions],
) -> Tensor: ...


@overload
def krr_predict(
    f_syn: Tensor,
    y_syn: Tensor,
    f_real: Tensor,
    *,
    return_info: Literal[True],
    **options: Unpack[PredictOptions],
) -> tuple[Tensor, SolveInfo]: ...


@takes(PredictOptions)
def krr_predict(
    f_syn: Tensor,
    y_syn: Tensor,
    f_real: Tensor,
    *,
    return_info: bool = False,
    **options: Unpack[PredictOptions],
) -> Tensor | tuple[Tensor, SolveInfo]:
    """Predictions [..., B, P] of kernel ridge regression, differentiable once: any loss on top.

    Equivalent to `K_rs (K_ss + lam I)^-1 Y_s`, or with `out_syn` and `out_real` to
    `out_real + K_rs (K_ss + lam I)^-1 (Y_s - out_syn)`; arguments and errors as in `krr_mse`.
    """
    op = "krr_predict"
    chosen = read(op, options, PredictOptions)
    checks.yes_or_no(op, "return_info", return_info)
    problem = prepare(op, chosen, f_syn, y_syn, f_real)
    prediction, info = _compute(op, problem, chosen, return_info)
    prediction = unfold(prediction, problem.batch)
    if chosen.out_real is not None:
        prediction = prediction + chosen.out_real
    prediction = cast(prediction, problem.dtype)
    return (prediction, info) if info is not None else prediction


class _Static(NamedTuple):
    """What is not a tensor in a call; `ridge` is None where it is a tensor."""

    op: str
    scale: float
    bias: float
    ridge: float | None
    ridge_of: str
    detach_ridge: bool
    form: str
    backend: str
    retries: int
    raises: bool
    refine: int
    halves: bool

    def kernel(self, ridge: Tensor | None, unit: Tensor | None) -> Kernel:
        value = ridge if self.ridge is None else self.ridge
        assert value is not None
        if unit is not None and unit.ndim:  # a vmap over the gradient of one problem
            unit = unit[..., None, None]
        scale = self.scale if unit is None else self.scale / unit.square()
        how = self.retries, self.raises, self.refine
        return Kernel(scale, self.bias, value, self.ridge_of, *how, 1.0 if unit is None else unit)


def _compute(
    op: str, problem: Problem, options: Options, return_info: bool
) -> tuple[Tensor, SolveInfo | None]:
    """Choose form and backend, and compute."""
    fast = options.precision == "fast"
    if options.backend == "reference":
        return _reference(op, rounded(problem) if fast else problem, options, return_info), None
    backend = choose(options.backend, problem.f_syn, op)
    # Problems side by side have a power of two each; under vmap they look like one.
    halves = fast and backend.halves and problem.f_syn.ndim == 2
    halves = halves and not torch._C._are_functorch_transforms_active()
    if fast and not halves:
        problem = rounded(problem)
    f_syn, y_syn, f_real, y_real, ridge, ridge_of, bias, scale, *_ = problem
    assert f_real is not None
    form, (m, d) = options.form, f_syn.shape[-2:]
    if form == "auto" or m == 0 or d == 0:
        form = cheapest(m, f_real.shape[-2], d, y_syn.shape[-1])
    learnt = ridge if isinstance(ridge, Tensor) else None
    number = None if isinstance(ridge, Tensor) else ridge
    static = _Static(
        *(op, scale, bias, number, ridge_of, options.detach_ridge),
        *(form, backend.name, options.retries, options.raises, options.refine, halves),
    )
    value, _, _, _, _, *solve = _Krr.apply(f_syn, y_syn, f_real, y_real, learnt, static)
    if not return_info:
        return value, None
    info = (unfold(x, problem.batch) for x in Solve(*solve)[:4])
    factor, lam, retries, pivot = info
    return value, SolveInfo(form, backend.name, lam, retries, pivot, factor)


def _reference(op: str, problem: Problem, options: Options, return_info: bool) -> Tensor:
    for name, unwanted in (
        ("info to return", return_info),
        ("solve to refine", options.refine > 0),
        ("failure to flag", not options.raises),
    ):
        if unwanted:
            raise ValueError(f"{op}: backend 'reference' has no {name}")
    f_syn, y_syn, f_real, y_real, ridge, ridge_of, bias, scale, *_ = problem
    assert f_real is not None
    kernel: dict[str, Any] = {
        **{"ridge": ridge, "ridge_of": ridge_of, "detach_ridge": options.detach_ridge},
        **{"bias": bias, "scale": scale},
    }
    with exact_arithmetic(f_syn):
        if y_real is None:
            value = reference.krr_predict(f_syn, y_syn, f_real, **kernel)
        else:
            value = reference.krr_mse(f_syn, y_syn, f_real, y_real, **kernel)
    checks.finite(op, value, f_syn=f_syn, y_syn=y_syn, f_real=f_real, y_real=y_real)
    return value


class _Krr(Batched):
    """Prediction, or with y_real the MSE, and the analytic gradient of the chosen closed form."""

    @staticmethod
    def forward(
        f_syn: Tensor,
        y_syn: Tensor,
        f_real: Tensor,
        y_real: Tensor | None,
        ridge: Tensor | None,
        static: _Static,
    ) -> tuple[Tensor | None, ...]:
        ops = choose(static.backend, f_syn, static.op)
        named = {"f_syn": f_syn, "y_syn": y_syn, "f_real": f_real, "y_real": y_real}
        x_syn = x_real = unit = error = None
        with exact_arithmetic(f_syn):
            inputs = Inputs(f_syn, y_syn, f_real)
            if static.halves:
                x_syn, x_real, unit = half_features(f_syn, f_real)
                inputs = Inputs(x_syn, y_syn, x_real)
            try:
                readout, solve = SOLVE[static.form](ops, static.kernel(ridge, unit), inputs)
            except NonFiniteError:
                # Of the gram: say which features it came from.
                checks.blame(static.op, f_syn=f_syn, ridge=ridge)
            if y_real is None:
                value = readout.prediction(ops)
            else:
                error, value = readout.mse(ops, y_real)
        if static.raises:
            checks.finite(static.op, value, **named)
        return value, error, x_syn, x_real, unit, *solve

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        _, *computed = output
        # Y_r is in the error, F_s and F_r may be there in float16: the inputs are here so that a
        # second derivative finds its way to the refusal.
        ctx.save_for_backward(*inputs[:5], *computed)
        ctx.static = inputs[5]
        ctx.set_materialize_grads(False)  # no zeros the size of the factor on the way back
        mark_constant(ctx, *computed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Tensors:
        if grad is None:
            return (None,) * 6
        static = (ctx.static, tuple(ctx.needs_input_grad))
        return (*gradients(_backward, ctx.static.op, static, *ctx.saved_tensors, grad), None)


def _backward(
    settings: tuple[_Static, tuple[bool, ...]],
    f_syn: Tensor,
    y_syn: Tensor,
    f_real: Tensor,
    y_real: Tensor | None,
    ridge: Tensor | None,
    error: Tensor | None,
    x_syn: Tensor | None,
    x_real: Tensor | None,
    unit: Tensor | None,
    *saved: Tensor,
) -> Tensors:
    """Gradients to F_s, Y_s, F_r, Y_r and the ridge; the last of `saved` is the incoming one."""
    static, needs_all, grad = *settings, saved[-1]
    kernel, solve = static.kernel(ridge, unit), Solve(*saved[:-1])
    ops = choose(going_back(static.backend, grad), f_syn, static.op)
    if x_syn is not None and x_real is not None:
        f_syn, f_real = (x_syn, x_real) if ops.halves else (wide(x_syn), wide(x_real))
    needs_f_syn, needs_y_syn, needs_f_real, needs_y_real, needs_ridge, _ = needs_all
    through_trace = needs_f_syn and not static.detach_ridge and static.ridge_of != "absolute"
    needs = Needs(needs_f_syn, needs_y_syn, needs_f_real, needs_ridge or through_trace)
    r = grad  # [N?, B, P]
    if error is not None:
        r = error * (grad * (2.0 / (error.shape[-2] * error.shape[-1])))[..., None, None]
    with exact_arithmetic(f_syn):
        grads = BACKWARD[static.form](ops, kernel, solve, Inputs(f_syn, y_syn, f_real), r, needs)
    d_ridge = None
    if grads.lam is not None:
        raised = grads.lam * RIDGE_FACTOR**solve.retries
        if needs_ridge:
            d_ridge = raised * solve.base
        if through_trace:
            # lam = ridge * base, and d trace(K_ss) / dF_s = 2 scale F_s
            slope = raised * kernel.ridge * kernel.base(torch.ones_like(raised), f_syn.shape[-2])
            slope = slope[..., None, None] * (2.0 * kernel.slope)
            assert grads.f_syn is not None
            grads.f_syn.addcmul_(f_syn.to(grads.f_syn.dtype), slope)
    d_y_real = -r if needs_y_real else None
    d_y_syn = grads.y_syn if needs_y_syn else None
    return grads.f_syn, d_y_syn, grads.f_real, d_y_real, d_ridge
