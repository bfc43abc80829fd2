"""The checks of `krrst_fast.selftest`: every public operator, forward and backward.

A check compares the relative error (Frobenius norm) of each output and each gradient with
`krrst_fast.reference` in float64 and autograd. Allowed is eight times the largest error that the
reference has in the operator's own precision, on this problem and two neighbours of it, plus a few
roundings. An error of 1e-3 is a hundred times that.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from krrst_fast import reference
from krrst_fast.backends import choose, cpp
from krrst_fast.ops.fit import krr_fit
from krrst_fast.ops.from_gram import krr_predict_from_gram
from krrst_fast.ops.gram import gram
from krrst_fast.ops.krr import krr_mse, krr_predict
from krrst_fast.ops.path import krr_path
from krrst_fast.ops.ridge_solve import ridge_solve
from krrst_fast.ops.solver import Solver
from krrst_fast.ops.views import views
from krrst_fast.planner import FORMS
from krrst_fast.reference.kernels import OF_PRODUCTS, kernel_matrix, of_products

Values = Tensor | Sequence[Tensor]
Problem = dict[str, Tensor]
Function = Callable[..., Values]
Shapes = Sequence[tuple[int, ...]]
Compared = tuple[str, Function, Function, str, Shapes]
"""Name of a check, the operator, the reference, names of their tensors, shapes of the problems."""

# M, D, B, P and the batch: ones, primes, more rows than features, and just above the smallest sizes
# for which the compiled operators are taken: 48 rows of a gram, 4096 numbers and few columns of a
# product.
SHAPES: Shapes = (
    *((1, 1, 1, 1), (7, 13, 5, 3), (49, 33, 17, 2), (65, 129, 70, 17), (49, 129, 70, 3)),
    (7, 13, 5, 3, 2, 3),
)
# The primal form is as exact as the others where M >= D, and chosen only where M > D.
TALL: Shapes = ((1, 1, 1, 1), (49, 33, 17, 2), (129, 65, 70, 17), (49, 33, 17, 2, 2, 3))
FLOOR = 1e-12  # what float64 may lose at condition numbers below 100, as these are
RIDGES = (0.05, 0.5, 5.0)
SCALE, BIAS = 2.0, 0.5
ABSOLUTE: dict[str, Any] = {"scale": SCALE, "bias": BIAS, "ridge_of": "absolute"}
OF_TRACE: dict[str, Any] = {**ABSOLUTE, "ridge_of": "mean_diagonal", "detach_ridge": False}
# The trace, so that condition numbers of these Grams are below 100 too.
OF_KERNEL: dict[str, Any] = {**OF_TRACE, "ridge_of": "trace"}

BACKENDS = ("cpp", "triton", "torch")


class Result(NamedTuple):
    """Outcome of a check.

    Attributes:
        ok: Whether the error is at most `allowed`.
        error: The relative error that is largest in proportion to `allowed`; None if it is not
            finite, which JSON cannot express, or not computed.
        seconds: Duration, the reference included.
        problem: The exception that ended the check, or "".
    """

    check: str
    backend: str
    precision: str
    ok: bool
    error: float | None
    allowed: float | None
    seconds: float
    problem: str = ""

    def line(self) -> str:
        """Return the result as a line of text."""
        error, allowed = (math.nan if x is None else x for x in (self.error, self.allowed))
        return (
            f"{'ok' if self.ok else 'FAILED':6}  {self.check:40} {self.backend:13} "
            f"{self.precision:19} error {error:8.1e}  allowed {allowed:8.1e}  "
            f"{self.seconds:5.2f} s  {self.problem}"
        ).rstrip()


class Precision(NamedTuple):
    """The dtype of the inputs, the precision of the computation, and the reference's dtype."""

    name: str
    dtype: torch.dtype
    computed: Literal["float64", "float32", "fast"] | None = None
    plain: torch.dtype = torch.float32

    def rounded(self, problem: Problem) -> Problem:
        """Round a problem as the operator does: to the dtype, and for "fast" the features."""
        inputs = {name: x.to(self.dtype) for name, x in problem.items()}
        if self.computed == "fast":
            f_syn, f_real = reference.round_features(inputs["f_syn"], inputs["f_real"])
            assert f_real is not None
            inputs |= {"f_syn": f_syn, "f_real": f_real}
        return inputs


FLOAT32 = Precision("float32", torch.float32)
FLOAT64 = Precision("float64", torch.float64, plain=torch.float64)
PRECISIONS = (
    FLOAT32,
    FLOAT64,
    Precision("float32 in float64", torch.float32, "float64", torch.float64),
    Precision("float32, fast", torch.float32, "fast"),
    Precision("bfloat16", torch.bfloat16),
)


def checks(device: str, backends: Sequence[str] = ()) -> Iterator[Result]:
    """Run every check of a device, or only those of `backends`."""
    names = backends or (*BACKENDS, *(() if device == "cpu" else ("auto",)))
    for precision in PRECISIONS:
        run = partial(compared, device, precision)
        x = torch.empty(1, 1, device=device, dtype=precision.plain)
        for name in names:
            if refusal(name, x) is None:
                solver = Solver(backend=name, precision=precision.computed)  # type: ignore[arg-type]
                yield from map(partial(run, name), _of_backend(precision, solver))
                if name == "cpp":
                    with cpp.by_steps():
                        yield from map(partial(run, name), _in_steps(precision, solver))
        if not backends and precision in (FLOAT32, FLOAT64):
            yield from map(partial(run, ""), _of_all_backends())
    if not backends:
        yield from map(partial(compared, device, FLOAT32, ""), _of_views(device))


def refusal(name: str, x: Tensor) -> str | None:
    """Return why the backend refuses tensors like x, or None."""
    try:
        choose(name, x, "selftest")
    except ValueError as error:
        return str(error)
    return None


def compared(device: str, precision: Precision, backend: str, check: Compared) -> Result:
    """Compare an operator with the reference; an exception is a failed check."""
    name, operator, exact, tensors, shapes = check
    start, message = time.perf_counter(), ""
    error = allowed = math.nan
    try:
        problems = [drawn(device, tensors, *shape) for shape in shapes]
        pairs = [x for problem in problems for x in _errors(operator, exact, precision, problem)]
        # NaN is worse than any number.
        error, allowed = max(pairs, key=lambda x: math.inf if math.isnan(x[0]) else x[0] / x[1])
    except Exception as raised:
        message = f"{type(raised).__name__}: {raised}".strip().splitlines()[0]
    numbers = [x if math.isfinite(x) else None for x in (error, allowed)]
    seconds = time.perf_counter() - start
    about = name, backend, precision.name, error <= allowed
    return Result(*about, numbers[0], numbers[1], seconds, message)


def _errors(
    operator: Function, exact: Function, precision: Precision, problem: Problem
) -> Iterator[tuple[float, float]]:
    """Yield error and allowance of each output and gradient."""
    plain, usual = precision.plain, 0.0
    right = evaluate(exact, precision.rounded(problem), torch.float64)
    for seed in range(3 if plain == torch.float32 else 1):
        inputs = precision.rounded(_neighbour(problem, seed) if seed else problem)
        pair = (evaluate(exact, inputs, dtype) for dtype in (plain, torch.float64))
        usual = max(usual, *map(_relative, *pair))
    floor = 16 * torch.finfo(plain).eps + FLOOR
    for a, b in zip(evaluate(operator, problem, precision.dtype), right, strict=True):
        if a.shape != b.shape:
            raise AssertionError(f"shape {tuple(a.shape)}, expected {tuple(b.shape)}")
        yield _relative(a, b), 8 * usual + 4 * torch.finfo(a.dtype).eps + floor


def _neighbour(problem: Problem, seed: int) -> Problem:
    """Change each number by about a thousandth: equally hard, rounded differently."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    return {name: x * (1 + 1e-3 * draw(x.shape).to(x)) for name, x in problem.items()}


def _relative(x: Tensor, exact: Tensor) -> float:
    return (x.double() - exact).norm().item() / (exact.norm().item() or 1.0)


def evaluate(function: Function, problem: Problem, dtype: torch.dtype) -> list[Tensor]:
    """Return the outputs of `function` on leaves of `dtype`, and gradients of a weighted sum."""
    leaves = {name: x.to(dtype).detach().clone().requires_grad_() for name, x in problem.items()}
    value = function(**leaves)
    outputs = [value] if isinstance(value, Tensor) else list(value)
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(1))
    # Drawn in float32, the weights are exact in every dtype of an output.
    total = torch.stack([(out * draw(out.shape).to(out)).sum() for out in outputs]).sum()
    grads = torch.autograd.grad(total, list(leaves.values())) if total.requires_grad else ()
    return [*(out.detach() for out in outputs), *grads]


def drawn(device: str, names: str, m: int, d: int, b: int, p: int, *batch: int) -> Problem:
    """Draw float64 tensors by name, exact in float32.

    Rows of features have about unit length, a ridge is between 0.3 and 0.6, row weights are 1, 2 or
    3, and all else is N(0, 1).
    """
    generator = torch.Generator().manual_seed(m * d + b)

    def draw(*size: int) -> Tensor:
        return torch.randn((*batch, *size), generator=generator, dtype=torch.float64)

    tensors = {
        "f_syn": draw(m, d) / d**0.5,
        "f_real": draw(b, d) / d**0.5,
        "y_syn": draw(m, p),
        "y_real": draw(b, p),
        "ridge": 0.3 + 0.3 * draw().sigmoid(),
        "weights": draw(m).abs().clamp(max=2).floor() + 1,
    }
    return {name: tensors[name].float().double().to(device) for name in names.split()}


def _gram(f_syn: Tensor) -> Tensor:
    return reference.gram(f_syn, SCALE, BIAS)


def _cross(f_syn: Tensor, f_real: Tensor) -> Tensor:
    return SCALE * (f_real @ f_syn.mT) + BIAS


def _predicted(
    f_syn: Tensor, y_syn: Tensor, f_real: Tensor, *, ridge: Any, weights: Tensor | None = None
) -> Tensor:
    """Predict by the reference; the roots of row weights scale rows and columns of the system."""
    root = (f_syn.new_ones(1) if weights is None else weights.sqrt())[..., None]
    alpha = reference.ridge_solve(root * _gram(f_syn) * root.mT, root * y_syn, ridge, "absolute")
    return _cross(f_syn, f_real) @ (root * alpha)


def _mse(*, y_real: Tensor, **others: Any) -> Tensor:
    return (_predicted(**others) - y_real).square().mean((-2, -1))


def _mse_of_kernel(
    f_syn: Tensor, y_syn: Tensor, f_real: Tensor, y_real: Tensor, ridge: Tensor, *, kernel: str
) -> Tensor:
    """Compute the loss with a non-linear kernel, which has derivatives at equal rows too."""
    rows, gamma = torch.cat((f_syn, f_real), -2), 1 / f_syn.shape[-1]
    if kernel == "arccos":
        of = rows.square().sum(-1), f_syn.square().sum(-1), gamma, kernel, 3, 1.0
        k = SCALE * of_products(rows @ f_syn.mT, *of) + BIAS
    else:
        k = SCALE * kernel_matrix(rows, f_syn, kernel, gamma, 3, 1.0) + BIAS
    m = f_syn.shape[-2]
    alpha = reference.ridge_solve(k[..., :m, :], y_syn, ridge, OF_KERNEL["ridge_of"])
    return (k[..., m:, :] @ alpha - y_real).square().mean((-2, -1))


def _of_backend(precision: Precision, solver: Solver) -> Iterator[Compared]:
    """Yield gram, krr_mse and krr_fit in each form, and krr_predict."""
    plain = precision in (FLOAT32, FLOAT64)
    names = "f_syn y_syn f_real"
    # "fast" rounds weighted rows, which the reference does not do.
    learnt = f"{names} ridge" if precision.computed == "fast" else f"{names} ridge weights"
    if plain:
        of_rows = partial(gram, scale=SCALE, bias=BIAS, solver=solver)
        yield "gram", lambda f_syn: of_rows(f_syn), _gram, "f_syn", SHAPES
    for form in FORMS:
        loss = partial(krr_mse, **ABSOLUTE, solver=replace(solver, form=form))
        shapes = TALL if form == "primal" else SHAPES
        yield f"krr_mse, form {form}", loss, _mse, f"{learnt} y_real", shapes
    predict = partial(krr_predict, **ABSOLUTE, solver=solver)
    yield "krr_predict", predict, _predicted, learnt, SHAPES
    for kernel in OF_PRODUCTS if plain else ():
        loss = partial(krr_mse, kernel=kernel, **OF_KERNEL, solver=solver)
        of_kernel = partial(_mse_of_kernel, kernel=kernel)
        shapes = (*SHAPES[1:3], SHAPES[-1])
        yield f"kernel {kernel}", loss, of_kernel, f"{names} y_real ridge", shapes
    if precision is FLOAT64:
        loss, exact = partial(krr_mse, solver=solver, **OF_TRACE), reference.krr_mse
        every = f"{names} y_real ridge"
        yield "krr_mse, ridge of the trace", loss, partial(exact, **OF_TRACE), every, SHAPES
    for form in FORMS if plain else ():
        fit = partial(krr_fit, ridge=RIDGES[1], **ABSOLUTE, solver=replace(solver, form=form))
        shapes = TALL[1:2] if form == "primal" else SHAPES[1:3]
        left_out, got = partial(_left_out, ridge=RIDGES[1]), partial(_of_fit, fit)
        yield f"krr_fit and leave-one-out, form {form}", got, left_out, names, shapes


def _in_steps(precision: Precision, solver: Solver) -> Iterator[Compared]:
    """Yield those again that one compiled operator computes as a whole where they are small."""
    for name, operator, exact, tensors, shapes in _of_backend(precision, solver):
        if name.startswith(("krr_mse", "krr_predict")):
            yield f"{name}, by steps", operator, exact, tensors, shapes


def _of_all_backends() -> Iterator[Compared]:
    """Yield the operators that have no choice of a backend."""

    def solved(solve: Function, f_syn: Tensor, y_syn: Tensor, ridge: Tensor) -> Values:
        return solve(_gram(f_syn), y_syn, ridge=ridge, ridge_of="absolute")

    def from_gram(f_syn: Tensor, y_syn: Tensor, f_real: Tensor, **others: Any) -> Tensor:
        grams = _gram(f_syn), _cross(f_syn, f_real)
        return krr_predict_from_gram(*grams, y_syn, ridge_of="absolute", **others)

    def each(**tensors: Tensor) -> Values:
        by_ridge = [_left_out(**tensors, ridge=ridge) for ridge in RIDGES]
        return [torch.stack(values) for values in zip(*by_ridge)]

    solve, exact = (partial(solved, f) for f in (ridge_solve, reference.ridge_solve))
    yield "ridge_solve", solve, exact, "f_syn y_syn ridge", SHAPES
    names = "f_syn y_syn f_real"
    yield "krr_predict_from_gram", from_gram, _predicted, f"{names} ridge weights", SHAPES
    path = partial(_of_fit, partial(krr_path, ridges=RIDGES, **ABSOLUTE))
    yield "krr_path and leave-one-out", path, each, names, SHAPES[1:3]


@torch.no_grad()
def _of_fit(fit: Callable[..., Any], f_syn: Tensor, y_syn: Tensor, f_real: Tensor) -> Values:
    """Return predictions and leave-one-out residuals."""
    fitted = fit(f_syn.detach(), y_syn.detach())
    return fitted.predict(f_real), fitted.loo_residuals


@torch.no_grad()
def _left_out(f_syn: Tensor, y_syn: Tensor, f_real: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Return the same by the reference, the residuals by M fits."""
    rows = torch.arange(len(f_syn), device=f_syn.device)
    others = rows[:-1] + (rows[:-1] >= rows[:, None])  # [M, M - 1]
    without = _predicted(f_syn[others], y_syn[others], f_syn[:, None], ridge=ridge)
    return _predicted(f_syn, y_syn, f_real, ridge=ridge), y_syn - without.squeeze(-2)


def _of_views(device: str) -> Iterator[Compared]:
    """Yield comparisons of views with the reference on the CPU: no number differs by a bit."""

    def different(count: int, batch: int, *shape: int) -> Tensor:
        draw = partial(torch.randint, generator=torch.Generator().manual_seed(0))
        images, index = draw(256, (count, *shape), dtype=torch.uint8), draw(count, (batch,))
        tensors = images, index, draw(7, (batch, 2)), draw(2, (batch,)).bool()
        mean, std = (0.5, 0.4, 0.3)[: shape[0]], (0.2, 0.3, 0.25)[: shape[0]]
        exact = reference.views(*tensors, 3, mean, std)
        got = views(*(x.to(device) for x in tensors), padding=3, mean=mean, std=std)
        return (got.cpu() != exact).double().sum()

    for count, batch, *shape in ((1, 3, 1, 1, 1), (5, 70, 3, 13, 17)):
        name, got = f"views {'x'.join(map(str, shape))}", partial(different, count, batch, *shape)
        yield name, got, lambda: torch.zeros(()), "", SHAPES[:1]
