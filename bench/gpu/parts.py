"""Each part of a closed form by every implementation: the rows of `krrst_fast/backends/tuned.json`.

The sizes are those of the shapes in `krr.py`, and some smaller ones. Every call finds a cold L2
cache. Errors are against float64, with features rounded as for precision "fast".
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.common import LATENT, refusal, relative_error
from bench.gpu.measure import Rows, Run, Unit
from bench.gpu.table import FLOOR, FLOORS
from krrst_fast import operators, reference
from krrst_fast.backends import choose
from krrst_fast.backends import torch as torch_backend
from krrst_fast.cholesky import (
    CUDA_METHODS,
    FLOAT64_UP_TO,
    Method,
    factored_solve,
    ridge_factor,
)
from krrst_fast.reference.kernels import OF_PRODUCTS

Size = tuple[int, ...]
_TWO = ("torch", "triton")
IMPLEMENTATIONS = {
    **{name: _TWO for name in ("gram", "matmul", "matmul_t", "mse", "closing", "views")},
    **{f"{name}_{what}": _TWO for name in OF_PRODUCTS for what in ("values", "slopes")},
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
    """Yield a unit for the ceilings of the libraries, then one for each part."""
    yield Unit("ceilings", ceilings)
    for part, (make, sizes) in (TOY if toy else FULL).items():
        yield Unit(part, partial(rows, part, sizes, make))


def ceilings(run: Run) -> Rows:
    """Yield a copy, products in two precisions, and Cholesky factors by the libraries."""
    draw = partial(torch.randn, device=run.device)
    size, n = (1 << 20, 32) if run.toy else (2 << 30, 8192)

    def copy() -> dict[str, Any]:
        source = torch.randint(256, (size // 2,), dtype=torch.uint8, device=run.device)
        goal = torch.empty_like(source)
        taken = run.clock.alone(lambda: goal.copy_(source))
        return taken | {"gb_per_s": size / taken["ms"] / 1e6}  # each byte is read and written

    def product(dtype: torch.dtype) -> dict[str, Any]:
        a, b = (draw(n, n).to(dtype) for _ in range(2))
        taken = run.clock.alone(lambda: a @ b)
        return taken | {"tflops": 2 * n**3 / taken["ms"] / 1e9}

    def factor(m: int) -> dict[str, Any]:
        x = draw(m, m)
        k = x @ x.mT + m * torch.eye(m, device=run.device)
        taken = run.clock.alone(lambda: torch.linalg.cholesky_ex(k))
        return taken | {"tflops": m**3 / 3 / taken["ms"] / 1e9}

    yield "ceiling: copy", copy
    for dtype in (torch.float16, torch.float32):
        yield f"ceiling: product of {str(dtype).removeprefix('torch.')}", partial(product, dtype)
    for m in (10, 20) if run.toy else (1000, 2000, 8192):
        yield f"ceiling: Cholesky factor of {m}", partial(factor, m)


def rows(
    part: str, sizes: dict[str, tuple[Size, ...]], make: Callable[..., Work], run: Run
) -> Rows:
    """Yield a row for each precision, size and implementation: "gram fast 1000x8192: triton"."""
    for precision, size in ((x, size) for x in sizes for size in sizes[x]):
        cached = Cached(partial(make, size, precision, run.device))
        about = {"part": part, "precision": precision, "size": list(size)}

        def label(size: Size, name: str, precision: str = precision) -> str:
            return f"{part} {precision} {'x'.join(map(str, size))}: {name}"

        for name in IMPLEMENTATIONS[part]:
            others = label(size, "torch"), label(sizes[precision][0], name)
            yield label(size, name), partial(measured, run, cached, name, about, *others)


class Cached:
    """The calls of one part at one size and their exact result, made when first needed."""

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
    """Measure an implementation: its graph, or plain calls where it cannot be captured.

    A graph measures the time of the device without that of Python, which is larger for small sizes.

    Args:
        run: Context of the measurement.
        cached: The calls at this size.
        name: The implementation.
        about: Part, precision and size, for the row.
        of_torch: Name of torch's row at this size; an error may be at most twice as large.
        of_first: Name of this implementation's row at the first size; if no graph could be captured
            there, none is tried again.
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
    """Draw activations of a random ReLU layer [N, D]; in float16 if `precision` is "fast"."""
    latent = torch.randn(n, LATENT, device=device)
    f = (latent @ (torch.randn(LATENT, d, device=device) / LATENT**0.5)).relu_()
    f = f.half() if precision == "fast" else f
    return f.mT.contiguous().mT if by_columns else f


def _backends(x: Tensor, calls: dict[str, Call]) -> tuple[dict[str, Call], dict[str, str]]:
    """Return the calls of backends that take tensors like x, and the reasons of the others."""
    found = {name: refusal(name.partition(" ")[0], x) for name in calls}
    refused = {name: why for name, why in found.items() if why is not None}
    return {name: call for name, call in calls.items() if name not in refused}, refused


def _of(x: Tensor, op: str, torchs: Callable[..., Any], *rest: Any) -> Work:
    """Return an operation by the Triton backend and by torch."""

    def listed(call: Callable[..., Any], *arguments: Any) -> Sequence[Tensor]:
        result = call(*arguments)
        return result if isinstance(result, tuple) else (result,)

    def wide(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) else value

    # The functions of products have kernels for float64, and nothing else that the backend has.
    on = x.new_empty(0, dtype=torch.float32) if x.dtype == torch.float64 else x

    def triton() -> Sequence[Tensor]:
        return listed(getattr(choose("triton", on, "bench"), op), x, *rest)

    calls, refused = _backends(on, {"torch": partial(listed, torchs, x, *rest), "triton": triton})
    return Work(calls, refused, lambda: listed(torchs, x.double(), *map(wide, rest)))


def gram(size: Size, precision: str, device: str) -> Work:
    """Return the Gram of N rows of D numbers; for more than 5000 rows stored by columns."""
    n, d = size
    return _of(
        features(n, d, precision, device, by_columns=n > 5000), "gram", torch_backend.gram, 1.0, 1.0
    )


def matmul(size: Size, precision: str, device: str, *, by_columns: bool = False) -> Work:
    """Return the product of features [N, K], stored by rows or columns, and [K, P]."""
    n, k, p = size
    a = features(n, k, precision, device, by_columns=by_columns)
    return _of(a, "matmul", torch_backend.matmul, torch.randn(k, p, device=device))


def mse(size: Size, precision: str, device: str) -> Work:
    """Return residual and mean square of a prediction from D features, or from a K_rs."""
    b, d, p = size
    f = features(b, d, precision, device, by_columns=precision == "float32" and d <= b)
    w, y, offset = (torch.randn(*shape, device=device) for shape in ((d, p), (b, p), (p,)))
    return _of(f, "predicted_residual_mse", torch_backend.predicted_residual_mse, w, y, 1.0, offset)


def closing(size: Size, precision: str, device: str) -> Work:
    """Return the gradient [M, D] from two pairs of [M, P] and [D, P]."""
    m, d, p = size
    alpha, v, beta, w = (torch.randn(n, p, device=device) for n in (m, d, m, d))
    return _of(alpha, "closing_matmul", torch_backend.closing_matmul, v, beta, w, 1.0)


def solve(size: Size, precision: str, device: str) -> Work:
    """Return a Cholesky factor of [N?, M, M] and two solves with P columns each."""
    *many, m, p = size
    f = features(math.prod(many) * m, max(2 * m, 2048), "float32", device).view(*many, m, -1)
    wide = precision == "float64" and m > FLOAT64_UP_TO
    k = f @ f.mT + 1.0
    k = k.double() if wide else k
    y, z = (torch.randn(*size, device=device, dtype=k.dtype) for _ in range(2))
    lam = RIDGE * k.diagonal(dim1=-2, dim2=-1).sum(-1)

    def both(method: Method) -> Sequence[Tensor]:
        found = ridge_factor(k, lam, 0, False, method)
        return [factored_solve(x, found.factor, found.inverse, method) for x in (y, z)]

    def exact() -> Sequence[Tensor]:
        system = k.double() + lam.double()[..., None, None] * torch.eye(m, device=device)
        return torch.linalg.solve(system, torch.cat((y, z), -1).double()).split(p, -1)

    calls, refused = {}, {}
    for name, method in CUDA_METHODS.items():
        if method.own_up_to and not (k.is_cuda and operators.HAS_CUDA_EXTENSION):
            refused[name] = f"the CUDA extension is {operators.CUDA_EXTENSION}"
        else:
            calls[name] = partial(both, method)
    return Work(calls, refused, exact)


def views(size: Size, precision: str, device: str) -> Work:
    """Return crops, flips and normalisation of B images of so many pixels."""
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


def kernel_function(kernel: str, what: str, size: Size, precision: str, device: str) -> Work:
    """Return a kernel of I and J rows from their inner products, or its derivatives too."""
    rows_x, rows_y = size
    x, y = (features(n, LATENT, "float32", device).double() for n in size)
    squares = x.square().sum(-1), y.square().sum(-1)
    gamma = torch.full((), 0.1 / LATENT, dtype=torch.float64, device=device)
    operands = x @ y.mT, x, y, *squares, gamma, -1
    if what == "values":
        torchs = torch_backend.kernel_values
        return _of(operands[0], f"kernel_{what}", torchs, *operands[1:], kernel, 3, 1.0)
    weight = torch.randn(rows_x, rows_y, dtype=torch.float64, device=device)
    rest = *operands[1:], weight, kernel, 3, 1.0, True
    return _of(operands[0], f"kernel_{what}", torch_backend.kernel_slopes, *rest)


def _sizes(text: str) -> tuple[Size, ...]:
    return tuple(tuple(map(int, size.split("x"))) for size in text.split())


def _both(text: str, float32: str = "") -> dict[str, tuple[Size, ...]]:
    """Return sizes for both precisions, and some for float32 alone."""
    return {"float32": _sizes(f"{text} {float32}"), "fast": _sizes(text)}


by_columns = partial(matmul, by_columns=True)


def _functions(sizes: str) -> dict[str, Part]:
    return {
        f"{kernel}_{what}": Part(partial(kernel_function, kernel, what), {"float64": _sizes(sizes)})
        for kernel in OF_PRODUCTS
        for what in ("values", "slopes")
    }


FULL = {
    "solve": Part(
        solve,
        {
            "float32": _sizes("1000x512 1000x100 1000x10 2000x512 5000x100 8193x512"),
            "float64": _sizes("100x64 256x512 500x10 500x512 1000x512 1000x10 2000x512"),
        },
    ),
    "gram": Part(
        gram,
        _both("1000x8192 2000x8192 5000x8192 8192x10000 100x2048 256x2048 500x8192"),
    ),
    "matmul": Part(
        matmul,
        _both(
            "1000x8192x10 1000x8192x100 1000x8192x1024 2000x8192x512 5000x8192x100 "
            "10000x8192x512 100x2048x64",
            # Products of form "k", which have no features as an operand.
            float32="1000x1024x512 1000x512x1000 1000x1024x8192",
        ),
    ),
    "matmul_t": Part(
        by_columns,
        _both(
            "8192x1000x10 8192x1000x100 8192x1000x512 8192x1024x1000 8192x2000x512 8192x5000x100 "
            "8192x10000x512 2048x100x64"
        ),
    ),
    "mse": Part(
        mse,
        _both("1024x8192x512 1024x8192x100 1024x8192x10 256x2048x64", float32="1024x1000x512"),
    ),
    "closing": Part(
        closing,
        {
            "float32": _sizes(
                "1000x8192x512 1000x8192x100 1000x8192x10 2000x8192x512 5000x8192x100 "
                "10000x8192x512 100x2048x64"
            )
        },
    ),
    "solve_many": Part(solve, {"float64": _sizes("4096x25x5 256x25x5 64x100x64")}),
    "views": Part(views, {"float32": _sizes("1024x1024 1024x4096 256x1024")}),
    **_functions("1000x1000 1024x5000 200x200"),
}
TOY = {
    "gram": Part(gram, _both("10x40")),
    "matmul": Part(matmul, _both("10x40x4")),
    "matmul_t": Part(by_columns, _both("40x10x4")),
    "mse": Part(mse, _both("12x40x4")),
    "closing": Part(closing, {"float32": _sizes("10x40x4")}),
    "solve": Part(solve, {"float32": _sizes("600x4"), "float64": _sizes("20x4")}),
    "solve_many": Part(solve, {"float64": _sizes("3x20x4")}),
    "views": Part(views, {"float32": _sizes("4x64")}),
    **_functions("6x5"),
}
