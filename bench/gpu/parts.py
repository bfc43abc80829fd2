"""Each part of a closed form by everybody who has it: the rows that `krrst_fast/measured.json` has.

The sizes are those that the shapes of `krr.py` come to, and some smaller. Every call finds a cold
L2 cache. Errors are against float64, on the features as rounded for "fast".
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.common import LATENT, relative_error
from bench.gpu.measure import Rows, Run, Unit
from bench.gpu.table import FLOOR, FLOORS
from krrst_fast import plain, reference
from krrst_fast.backends import choose
from krrst_fast.factor import FLOAT64_UP_TO, SOLVERS, Solver
from krrst_fast.library import factored_solve, ridge_factor

Size = tuple[int, ...]
_TWO = ("torch", "triton")
IMPLEMENTATIONS = {
    **{name: _TWO for name in ("gram", "matmul", "matmul_t", "mse", "closing", "views")},
    **{
        name: ("torch", "torch inverse", "cuda", "cuda inverse") for name in ("solve", "solve_many")
    },
}
Call = Callable[[], Sequence[Tensor]]
RIDGE = 1e-6
PADDING, MEAN, STD = 4, (0.507, 0.487, 0.441), (0.267, 0.256, 0.276)
STORE = 4096
"""Images that views are drawn from."""


class Work(NamedTuple):
    """One part at one size: the call of each implementation, and the same in float64."""

    calls: dict[str, Call]
    refused: dict[str, str]
    exact: Call


class Part(NamedTuple):
    """A part: how its inputs are made, and its sizes by precision."""

    make: Callable[[Size, str, str], Work]
    sizes: dict[str, tuple[Size, ...]]


def units(toy: bool) -> Iterator[Unit]:
    """A unit a part."""
    for part, (make, sizes) in (TOY if toy else FULL).items():
        yield Unit(part, partial(rows, part, sizes, make))


def rows(
    part: str, sizes: dict[str, tuple[Size, ...]], make: Callable[..., Work], run: Run
) -> Rows:
    """A row a precision, size and implementation: "gram fast 1000x8192: triton"."""
    for precision, size in ((x, size) for x in sizes for size in sizes[x]):
        cached = Cached(partial(make, size, precision, run.device))
        about = {"part": part, "precision": precision, "size": list(size)}

        def label(size: Size, name: str, precision: str = precision) -> str:
            return f"{part} {precision} {'x'.join(map(str, size))}: {name}"

        for name in IMPLEMENTATIONS[part]:
            others = label(size, "torch"), label(sizes[precision][0], name)
            yield label(size, name), partial(measured, run, cached, name, about, *others)


class Cached:
    """The work at one size, and its exact result, made when the first row asks."""

    def __init__(self, make: Callable[[], Work]) -> None:
        self.make = make

    @functools.cached_property
    def work(self) -> Work:
        return self.make()

    @functools.cached_property
    def exact(self) -> list[Tensor]:
        return [x.double() for x in self.work.exact()]


def measured(
    run: Run, cached: Cached, name: str, about: dict[str, Any], of_torch: str, of_first: str
) -> dict[str, Any]:
    """Time and error of one implementation: of its graph, or of calls where it cannot be captured.

    In a graph small parts cost what the device takes for them, not what Python takes.

    Args:
        run, cached, name, about: what is measured.
        of_torch: the row of torch at this size, whose error is the measure of the others.
        of_first: the row of the first size: what could not be captured there is not tried again.
    """
    if (why := cached.work.refused.get(name)) is not None:
        return {**about, "refused": why}
    call = cached.work.calls[name]
    try:
        row = {**about, "error": relative_error(call(), cached.exact)}
    except torch.OutOfMemoryError:
        return {**about, "refused": "out of memory"}
    usual = (run.row(of_torch) or {}).get("error", row["error"])
    allowed = 2 * usual + FLOORS.get(about["precision"], FLOOR)
    if row["error"] > allowed:
        row["wrong"] = [f"error {row['error']:.1e} > {allowed:.1e}"]
    row |= run.clock.alone(call, seconds=0.05)
    if "no_graph" in (run.row(of_first) or {}):
        return {**row, "no_graph": run.row(of_first)["no_graph"]}
    graph = run.clock.graph(call, seconds=0.1)
    if "ms" in graph:
        return {**row, **graph, "eager_ms": row["ms"]}
    return {**row, "no_graph": graph.get("failed") or graph["refused"]}


def features(n: int, d: int, precision: str, device: str, *, by_columns: bool = False) -> Tensor:
    """Activations of a random ReLU layer [N, D]; for "fast" in float16."""
    latent = torch.randn(n, LATENT, device=device)
    f = (latent @ (torch.randn(LATENT, d, device=device) / LATENT**0.5)).relu_()
    f = f.half() if precision == "fast" else f
    return f.mT.contiguous().mT if by_columns else f


def _backends(x: Tensor, calls: dict[str, Call]) -> tuple[dict[str, Call], dict[str, str]]:
    """Those that do not refuse tensors like x; and why the others do."""
    refused = {}
    for name in calls:
        try:
            choose(name.partition(" ")[0], x, "bench")
        except ValueError as error:
            refused[name] = str(error)
    return {name: call for name, call in calls.items() if name not in refused}, refused


def _of(x: Tensor, op: str, torchs: Callable[..., Any], *rest: Any) -> Work:
    """An operation that the Triton backend has, and torch."""

    def listed(call: Callable[..., Any], *arguments: Any) -> Sequence[Tensor]:
        result = call(*arguments)
        return result if isinstance(result, tuple) else (result,)

    def wide(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) else value

    def triton() -> Sequence[Tensor]:
        return listed(getattr(choose("triton", x, "bench"), op), x, *rest)

    calls, refused = _backends(x, {"torch": partial(listed, torchs, x, *rest), "triton": triton})
    return Work(calls, refused, lambda: listed(torchs, x.double(), *map(wide, rest)))


def gram(size: Size, precision: str, device: str) -> Work:
    """Of N rows of D numbers; where N < D are too many for a dual system, of columns."""
    n, d = size
    return _of(features(n, d, precision, device, by_columns=n > 5000), "gram", plain.gram, 1.0, 1.0)


def matmul(size: Size, precision: str, device: str, *, by_columns: bool = False) -> Work:
    """Features [N, K], by rows or by columns, times [K, P]."""
    n, k, p = size
    a = features(n, k, precision, device, by_columns=by_columns)
    return _of(a, "matmul", plain.matmul, torch.randn(k, p, device=device))


def mse(size: Size, precision: str, device: str) -> Work:
    """Residual and mean square of a prediction from D features, or (fewer) from a K_rs."""
    b, d, p = size
    f = features(b, d, precision, device, by_columns=precision == "float32" and d <= b)
    w, y, offset = (torch.randn(*shape, device=device) for shape in ((d, p), (b, p), (p,)))
    return _of(f, "mse", partial(plain.mse, plain.matmul), w, y, 1.0, offset)


def closing(size: Size, precision: str, device: str) -> Work:
    """The gradient [M, D] from two pairs of [M, P] and [D, P]."""
    m, d, p = size
    alpha, v, beta, w = (torch.randn(n, p, device=device) for n in (m, d, m, d))
    return _of(alpha, "closing", partial(plain.closing, plain.matmul), v, beta, w, 1.0)


def solve(size: Size, precision: str, device: str) -> Work:
    """A Cholesky factor of an M x M system, or of N of them, and two solves with P columns each."""
    *many, m, p = size
    f = features(math.prod(many) * m, max(2 * m, 2048), "float32", device).view(*many, m, -1)
    wide = precision == "float64" and m > FLOAT64_UP_TO
    k = f @ f.mT + 1.0
    k = k.double() if wide else k
    y, z = (torch.randn(*size, device=device, dtype=k.dtype) for _ in range(2))
    lam = RIDGE * k.diagonal(dim1=-2, dim2=-1).sum(-1)

    def both(solver: Solver) -> Sequence[Tensor]:
        found = ridge_factor(k, lam, 0, False, solver)
        return [factored_solve(x, found.factor, found.inverse, solver.own) for x in (y, z)]

    def exact() -> Sequence[Tensor]:
        system = k.double() + lam.double()[..., None, None] * torch.eye(m, device=device)
        return torch.linalg.solve(system, torch.cat((y, z), -1).double()).split(p, -1)

    # The CUDA backend asks for float32 features; in float64 its solver alone is of use.
    x = torch.empty(0, device=device)
    calls, refused = _backends(x, {name: partial(both, one) for name, one in SOLVERS.items()})
    return Work(calls, refused, exact)


def views(size: Size, precision: str, device: str) -> Work:
    """Crops, flips and normalisation of B images of so many pixels."""
    b, pixels = size
    side = round(pixels**0.5)
    draw = (
        torch.randint(256, (STORE, 3, side, side), dtype=torch.uint8, device=device),
        torch.randint(STORE, (b,), device=device),
        torch.randint(2 * PADDING + 1, (b, 2), device=device),
        torch.randint(2, (b,), device=device).bool(),
    )
    plainly = partial(reference.views, *draw, PADDING, MEAN, STD)

    def triton() -> Sequence[Tensor]:
        return (import_module("krrst_fast.kernels.views").views(*draw, PADDING, MEAN, STD),)

    calls: dict[str, Call] = {"torch": lambda: (plainly(),), "triton": triton}
    found, refused = _backends(torch.empty(0, device=device), calls)
    return Work(found, refused, lambda: (plainly(),))


def _both(*sizes: Size) -> dict[str, tuple[Size, ...]]:
    return {"float32": sizes, "fast": sizes}


_MATMUL = _both(
    (1000, 8192, 10),
    (1000, 8192, 100),
    (1000, 8192, 1024),
    (2000, 8192, 512),
    (5000, 8192, 100),
    (10000, 8192, 512),
    (100, 2048, 64),
)
# What stands between the solutions in form "k".
_MATMUL["float32"] += ((1000, 1024, 512), (1000, 512, 1000), (1000, 1024, 8192))
_MSE = _both((1024, 8192, 512), (1024, 8192, 100), (1024, 8192, 10), (256, 2048, 64))
_MSE["float32"] += ((1024, 1000, 512),)

FULL = {
    "solve": Part(
        solve,
        {
            "float32": (
                *((1000, 512), (1000, 100), (1000, 10), (2000, 512), (5000, 100), (8193, 512)),
            ),
            "float64": (
                *((100, 64), (256, 512), (500, 10), (500, 512), (1000, 512), (1000, 10)),
                *((2000, 512),),
            ),
        },
    ),
    "gram": Part(
        gram,
        _both(
            *((1000, 8192), (2000, 8192), (5000, 8192), (8192, 10000)),
            *((100, 2048), (256, 2048), (500, 8192)),
        ),
    ),
    "matmul": Part(matmul, _MATMUL),
    "matmul_t": Part(
        partial(matmul, by_columns=True),
        _both(
            (8192, 1000, 10),
            (8192, 1000, 100),
            (8192, 1000, 512),
            (8192, 1024, 1000),
            (8192, 2000, 512),
            (8192, 5000, 100),
            (8192, 10000, 512),
            (2048, 100, 64),
        ),
    ),
    "mse": Part(mse, _MSE),
    "closing": Part(
        closing,
        {
            "float32": (
                *((1000, 8192, 512), (1000, 8192, 100), (1000, 8192, 10), (2000, 8192, 512)),
                *((5000, 8192, 100), (10000, 8192, 512), (100, 2048, 64)),
            )
        },
    ),
    "solve_many": Part(solve, {"float64": ((4096, 25, 5), (256, 25, 5), (64, 100, 64))}),
    "views": Part(views, {"float32": ((1024, 1024), (1024, 4096), (256, 1024))}),
}
TOY = {
    "gram": Part(gram, _both((10, 40))),
    "matmul": Part(matmul, _both((10, 40, 4))),
    "matmul_t": Part(partial(matmul, by_columns=True), _both((40, 10, 4))),
    "mse": Part(mse, _both((12, 40, 4))),
    "closing": Part(closing, {"float32": ((10, 40, 4),)}),
    "solve": Part(solve, {"float32": ((600, 4),), "float64": ((20, 4),)}),
    "solve_many": Part(solve, {"float64": ((3, 20, 4),)}),
    "views": Part(views, {"float32": ((4, 64),)}),
}
