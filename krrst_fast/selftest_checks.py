"""The checks of `krrst_fast.selftest`: every public operator, forward and backward.

What is compared is the relative error (Frobenius norms) of each output and each gradient against
the formula in float64. Allowed is eight times the largest error that the formula has in the
operator's own precision, on this problem and some beside it, plus a few roundings. (A draw is luck:
the tests compare quantiles of many, and allow twice.) An error of 1e-3 is a hundred times that.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from krrst_fast import backends, reference
from krrst_fast.krr import krr_fit
from krrst_fast.ops.from_gram import krr_predict_from_gram
from krrst_fast.ops.gram import gram
from krrst_fast.ops.krr import krr_mse, krr_predict
from krrst_fast.ops.ridge_solve import ridge_solve
from krrst_fast.ops.views import views
from krrst_fast.path import krr_path
from krrst_fast.planner import FORMS

Values = Tensor | Sequence[Tensor]
Problem = dict[str, Tensor]
Function = Callable[..., Values]

# M, D, B, P: ones, primes, more rows than features, one more than a vector register holds.
SHAPES = ((1, 1, 1, 1), (7, 13, 5, 3), (49, 33, 17, 2), (65, 129, 40, 17))
# The primal form is as exact as the others where M >= D, and chosen only there.
TALL = ((1, 1, 1, 1), (49, 33, 17, 2), (129, 65, 40, 17))
BATCH = (2, 3)
FLOOR = 1e-12  # what float64 may lose at condition numbers below 100, as these are
RIDGES = (0.05, 0.5, 5.0)
SCALE, BIAS = 2.0, 0.5


@dataclass(frozen=True)
class Result:
    """One line: what was checked, by whom it was computed, and how wrong it was.

    Attributes:
        error: the relative error that is largest beside what is allowed.
        allowed: the largest error for which this is right.
        seconds: what the check took, references included.
        problem: the exception that ended the check, or "".
    """

    check: str
    backend: str
    precision: str
    error: float
    allowed: float
    seconds: float
    problem: str = ""

    @property
    def ok(self) -> bool:
        """Whether it is right; an error of NaN is not."""
        return not self.problem and self.error <= self.allowed


@dataclass(frozen=True)
class Precision:
    """How inputs come and how they are computed.

    Attributes:
        dtype: of the inputs.
        plain: the precision of the formula beside which an error is judged.
        settings: the keywords of the operator.
    """

    name: str
    dtype: torch.dtype
    plain: torch.dtype
    settings: dict[str, Any] = field(default_factory=dict)

    def seen(self, problem: Problem) -> Problem:
        """A problem as the operator sees it: rounded to its dtype, and features once more."""
        inputs = {name: x.to(self.dtype) for name, x in problem.items()}
        if self.settings.get("precision") == "fast":
            f_syn, f_real = reference.round_features(inputs["f_syn"], inputs["f_real"])
            assert f_real is not None
            inputs |= {"f_syn": f_syn, "f_real": f_real}
        return inputs


FLOAT32 = Precision("float32", torch.float32, torch.float32)
FLOAT64 = Precision("float64", torch.float64, torch.float64)
IN_FLOAT64 = {"precision": "float64"}
FAST = {"precision": "fast"}
PRECISIONS = (
    FLOAT32,
    FLOAT64,
    Precision("float32 in float64", torch.float32, torch.float64, IN_FLOAT64),
    Precision("float32, fast", torch.float32, torch.float32, FAST),
    Precision("bfloat16", torch.bfloat16, torch.float32),
)


def timed(
    check: str, backend: str, precision: str, work: Callable[[], tuple[float, float]]
) -> Result:
    """The line of one check, which returns its error and what is allowed, or raises."""
    start = time.perf_counter()
    error = allowed = math.nan
    problem = ""
    try:
        error, allowed = work()
    except Exception as raised:
        problem = f"{type(raised).__name__}: {raised}".strip().splitlines()[0]
    seconds = time.perf_counter() - start
    return Result(check, backend, precision, error, allowed, seconds, problem)


def run(
    check: str,
    backend: str,
    got: Function,
    formula: Function,
    problems: Sequence[Problem],
    precision: Precision,
) -> Result:
    """The line of one comparison."""
    work = partial(compare, got, formula, problems, precision)
    return timed(check, backend, precision.name, work)


def compare(
    got: Function, formula: Function, problems: Sequence[Problem], precision: Precision
) -> tuple[float, float]:
    """Error and what is allowed, for the output or gradient where their ratio is largest.

    `got` and `formula` take the tensors of a problem by name. Gradients are those of the sum of all
    outputs, each entry with a weight drawn at random.
    """
    pairs, floor = [], 16 * torch.finfo(precision.plain).eps + FLOOR
    for problem in problems:
        seen = precision.seen(problem)
        exact = _evaluate(formula, seen, torch.float64)
        plain = _evaluate(formula, seen, precision.plain)
        values = _evaluate(got, problem, precision.dtype)
        if len(values) != len(exact):
            raise AssertionError(f"{len(values)} outputs and gradients, expected {len(exact)}")
        usual = max(map(_relative, plain, exact))
        for seed in range(2 if precision.plain == torch.float32 else 0):
            beside = precision.seen(_neighbour(problem, seed))
            pair = (_evaluate(formula, beside, to) for to in (torch.float32, torch.float64))
            usual = max(usual, *map(_relative, *pair))
        for a, b in zip(values, exact):
            if a.shape != b.shape:
                raise AssertionError(f"shape {tuple(a.shape)}, expected {tuple(b.shape)}")
            allowed = 8 * usual + 4 * torch.finfo(a.dtype).eps + floor
            pairs.append((_relative(a, b), allowed))
    # NaN is worse than any number.
    return max(pairs, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0] / pair[1])


def _neighbour(problem: Problem, seed: int) -> Problem:
    """The same with its numbers moved by one in a thousand: as hard, and rounded anew."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    return {name: x * (1 + 1e-3 * draw(x.shape).to(x)) for name, x in problem.items()}


def _relative(x: Tensor, exact: Tensor) -> float:
    return (x.double() - exact).norm().item() / (exact.norm().item() or 1.0)


def _evaluate(function: Function, problem: Problem, dtype: torch.dtype) -> list[Tensor]:
    """Outputs and gradients of `function`, computed on leaves of `dtype`."""
    leaves = {name: x.to(dtype).detach().clone().requires_grad_() for name, x in problem.items()}
    value = function(**leaves)
    outputs = [value] if isinstance(value, Tensor) else list(value)
    total = outputs[0].new_zeros(())
    generator = torch.Generator().manual_seed(1)
    for out in outputs:
        weight = torch.randn(out.shape, generator=generator)  # exact in every dtype of an output
        total = total + (out * weight.to(out)).sum()
    grads: tuple[Tensor, ...] = ()
    if total.requires_grad:
        grads = torch.autograd.grad(total, list(leaves.values()))
    return [*(out.detach() for out in outputs), *grads]


def problem(
    shape: tuple[int, ...], device: str, names: str, batch: tuple[int, ...] = ()
) -> Problem:
    """Float64 tensors by name, exact in float32.

    Rows of features are of about unit length, a ridge is between 0.3 and 0.6, row weights are 1, 2
    or 3, and all else is N(0, 1).
    """
    m, d, b, p = shape
    generator = torch.Generator().manual_seed(m * d + b)
    sizes = {
        **{"f_syn": (m, d), "f_real": (b, d), "y_syn": (m, p), "y_real": (b, p)},
        **{"out_syn": (m, p), "out_real": (b, p), "weights": (m,), "ridge": ()},
    }
    tensors = {}
    for name in names.split():
        x = torch.randn((*batch, *sizes[name]), generator=generator, dtype=torch.float64)
        if name.startswith("f_"):
            x = x / d**0.5
        elif name == "ridge":
            x = 0.3 + 0.3 * x.sigmoid()
        elif name == "weights":
            x = x.abs().clamp(max=2).floor() + 1
        tensors[name] = x.float().double().to(device)
    return tensors


def backends_of(device: str, dtype: torch.dtype = torch.float32) -> list[str]:
    """The backends that compute on this device in this precision, fastest first."""
    x = torch.empty(1, 1, device=device, dtype=dtype)
    return [backend.name for backend in backends.BACKENDS if backend.refuses(x) is None]


def checks(device: str) -> Iterator[Result]:
    """Every check of a device, as it is made."""
    yield from _gram(device)
    yield from _krr(device)
    yield from _solves(device)
    yield from _fits(device)
    yield from _views(device)


def _gram(device: str) -> Iterator[Result]:
    problems = [problem(shape, device, "f_syn") for shape in SHAPES]
    problems.append(problem(SHAPES[2], device, "f_syn", BATCH))

    def formula(f_syn: Tensor) -> Tensor:
        return SCALE * (f_syn @ f_syn.mT) + BIAS

    for precision in (FLOAT32, FLOAT64):
        for name in backends_of(device, precision.plain):
            got = partial(_gram_of, name)
            yield run("gram", name, got, formula, problems, precision)


def _gram_of(backend: Any, f_syn: Tensor) -> Tensor:
    return gram(f_syn, scale=SCALE, bias=BIAS, backend=backend)


def predicted(
    f_syn: Tensor,
    y_syn: Tensor,
    f_real: Tensor,
    *,
    ridge: float | Tensor,
    weights: Tensor | None = None,
    out_syn: Tensor | None = None,
    out_real: Tensor | None = None,
) -> Tensor:
    """out_real + K_rs (K_ss + ridge diag(1 / weights))^-1 (Y_s - out_syn), written down again."""
    one = f_syn.new_ones(f_syn.shape[:-1])
    ridges = one * (ridge[..., None] if isinstance(ridge, Tensor) else ridge)
    if weights is not None:
        ridges = ridges / weights
    k_ss = SCALE * (f_syn @ f_syn.mT) + BIAS + ridges.diag_embed()
    k_rs = SCALE * (f_real @ f_syn.mT) + BIAS
    left = y_syn if out_syn is None else y_syn - out_syn
    prediction = k_rs @ torch.linalg.solve(k_ss, left)
    return prediction if out_real is None else out_real + prediction


def _krr(device: str) -> Iterator[Result]:
    """krr_mse and krr_predict: each closed form, each precision, and batches of problems."""
    for precision in PRECISIONS:
        for name in backends_of(device, precision.plain):
            how: dict[str, Any] = {"backend": name, **precision.settings}
            extra = "ridge out_syn out_real"
            if how.get("precision") != "fast":  # which rounds weighted rows, and not these
                extra += " weights"
            alone = [problem(s, device, f"f_syn y_syn f_real {extra}") for s in SHAPES]
            many = [problem(SHAPES[1], device, f"f_syn y_syn f_real y_real {extra}", BATCH)]
            for form in FORMS:
                got = partial(_mse, form=form, **how)
                shapes = TALL if form == "primal" else SHAPES
                both = [problem(s, device, f"f_syn y_syn f_real y_real {extra}") for s in shapes]
                check = f"krr_mse, form {form}"
                yield run(check, name, got, _mse_formula, both, precision)
            got = partial(_predict, **how)
            yield run("krr_predict", name, got, predicted, alone, precision)
            got = partial(_mse, **how)
            check = f"krr_mse, {BATCH[0]} x {BATCH[1]} problems"
            yield run(check, name, got, _mse_formula, many, precision)
            if precision is FLOAT64:
                got = partial(_mse, backend=name, **OF_TRACE)
                exact = partial(reference.krr_mse, **OF_TRACE)
                two = [problem(s, device, "f_syn y_syn f_real y_real ridge") for s in SHAPES]
                check = "krr_mse, ridge of the trace"
                yield run(check, name, got, exact, two, precision)


KERNEL: dict[str, Any] = {"scale": SCALE, "bias": BIAS, "ridge_of": "absolute"}
OF_TRACE: dict[str, Any] = {**KERNEL, "ridge_of": "mean_diagonal", "detach_ridge": False}


def _predict(f_syn: Tensor, y_syn: Tensor, f_real: Tensor, **settings: Any) -> Tensor:
    return krr_predict(f_syn, y_syn, f_real, **{**KERNEL, **settings})


def _mse(f_syn: Tensor, y_syn: Tensor, f_real: Tensor, y_real: Tensor, **settings: Any) -> Tensor:
    return krr_mse(f_syn, y_syn, f_real, y_real, **{**KERNEL, **settings})


def _mse_formula(
    f_syn: Tensor, y_syn: Tensor, f_real: Tensor, y_real: Tensor, **others: Any
) -> Tensor:
    return (predicted(f_syn, y_syn, f_real, **others) - y_real).square().mean((-2, -1))


def _solves(device: str) -> Iterator[Result]:
    """Operators on a given gram, in which a backend has no say."""

    def grams(f_syn: Tensor, f_real: Tensor) -> tuple[Tensor, Tensor]:
        return SCALE * (f_syn @ f_syn.mT) + BIAS, SCALE * (f_real @ f_syn.mT) + BIAS

    def solved(f_syn: Tensor, y_syn: Tensor, f_real: Tensor, ridge: Tensor) -> Tensor:
        k_ss, k_rs = grams(f_syn, f_real)
        return k_rs @ ridge_solve(k_ss, y_syn, ridge=ridge, ridge_of="absolute")

    def from_gram(f_syn: Tensor, y_syn: Tensor, f_real: Tensor, **others: Any) -> Tensor:
        return krr_predict_from_gram(*grams(f_syn, f_real), y_syn, ridge_of="absolute", **others)

    names = "f_syn y_syn f_real ridge"
    solves = [problem(shape, device, names) for shape in SHAPES]
    solves.append(problem(SHAPES[1], device, names, BATCH))
    names += " out_syn out_real weights"
    given = [problem(shape, device, names) for shape in SHAPES]
    given.append(problem(SHAPES[1], device, names, BATCH))
    for precision in (FLOAT32, FLOAT64):
        yield run("ridge_solve", "", solved, predicted, solves, precision)
        check = "krr_predict_from_gram"
        yield run(check, "", from_gram, predicted, given, precision)


@torch.no_grad()
def left_out(f_syn: Tensor, y_syn: Tensor, ridge: float) -> Tensor:
    """What the fit without row i leaves of y_i, by M fits side by side."""
    rows = torch.arange(len(f_syn), device=f_syn.device)
    others = rows[:-1] + (rows[:-1] >= rows[:, None])  # [M, M - 1]
    prediction = predicted(f_syn[others], y_syn[others], f_syn[:, None], ridge=ridge)
    return y_syn - prediction.squeeze(-2)


@torch.no_grad()
def _path_formula(f_syn: Tensor, y_syn: Tensor, f_real: Tensor, ridges: Any = RIDGES) -> Values:
    predictions = [predicted(f_syn, y_syn, f_real, ridge=ridge) for ridge in ridges]
    return torch.stack(predictions), torch.stack([left_out(f_syn, y_syn, r) for r in ridges])


def _fits(device: str) -> Iterator[Result]:
    """krr_fit, its leave-one-out residuals, and krr_path; nothing of them has a gradient."""

    def fit(f_syn: Tensor, y_syn: Tensor, f_real: Tensor, **how: Any) -> Values:
        fitted = krr_fit(f_syn, y_syn, ridge=RIDGES[1], **KERNEL, **how)
        return fitted.predict(f_real.detach())[None], fitted.loo_residuals[None]

    def path(f_syn: Tensor, y_syn: Tensor, f_real: Tensor) -> Values:
        found = krr_path(f_syn.detach(), y_syn.detach(), RIDGES, **KERNEL)
        return found.predict(f_real.detach()), found.loo_residuals

    names = "f_syn y_syn f_real"
    problems = [problem(shape, device, names) for shape in SHAPES[1:3]]
    tall = [problem(TALL[1], device, names)]
    one = partial(_path_formula, ridges=RIDGES[1:2])
    for precision in (FLOAT32, FLOAT64):
        for name in backends_of(device, precision.plain):
            for form in FORMS:
                got = partial(fit, backend=name, form=form)
                check = f"krr_fit and leave-one-out, form {form}"
                mine = tall if form == "primal" else problems
                yield run(check, name, got, one, mine, precision)
        check = "krr_path and leave-one-out"
        yield run(check, "", path, _path_formula, problems, precision)


def _views(device: str) -> Iterator[Result]:
    """Bit for bit what the reference computes on the CPU."""

    def difference(count: int, batch: int, shape: tuple[int, ...]) -> tuple[float, float]:
        draw = partial(torch.randint, generator=torch.Generator().manual_seed(0))
        images, index = draw(256, (count, *shape), dtype=torch.uint8), draw(count, (batch,))
        offset, flip = draw(7, (batch, 2)), draw(2, (batch,)).bool()
        mean, std = (0.5, 0.4, 0.3)[: shape[0]], (0.2, 0.3, 0.25)[: shape[0]]
        exact = reference.views(images, index, offset, flip, 3, mean, std)
        images, index, offset, flip = (x.to(device) for x in (images, index, offset, flip))
        got = views(images, index, offset, flip, padding=3, mean=mean, std=std)
        return (got.cpu() - exact).abs().max().item(), 0.0

    for count, batch, shape in ((1, 3, (1, 1, 1)), (5, 70, (3, 13, 17))):
        work = partial(difference, count, batch, shape)
        yield timed(f"views {'x'.join(map(str, shape))}", "", "float32", work)
