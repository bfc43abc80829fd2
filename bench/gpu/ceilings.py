"""What this device can do: copies, products, factors and triangular solves by the libraries."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.gpu.clock import Sample
from bench.gpu.stage import Run

RIGHT_HAND_SIDES = 512


class Sizes(NamedTuple):
    """What is measured: bytes of a copy, products (rows, depth, columns), systems."""

    copy: int
    products: tuple[tuple[int, int, int], ...]
    systems: tuple[int, ...]
    columns: int = RIGHT_HAND_SIDES


FULL = Sizes(
    2 << 30,
    (
        (1000, 8192, 1000),
        (2000, 8192, 2000),
        (1000, 8192, 1024),
        (1000, 8192, 512),
        (1024, 8192, 512),
        (1000, 8192, 10),
        (8192, 1000, 512),
        (10000, 8192, 512),
        (8192, 10000, 8192),
    ),
    (1000, 2000, 4096, 8192),
)
TOY = Sizes(1 << 20, ((10, 16, 10), (10, 16, 4)), (10, 20), 4)


def measure(run: Run) -> None:
    """A row a copy, a product in a precision, and a system in a precision."""
    sizes = TOY if run.toy else FULL
    run.row("copy", partial(copy, run, sizes.copy))
    for size in sizes.products:
        for name in PRODUCTS:
            run.row(f"product {'x'.join(map(str, size))} {name}", partial(product, run, size, name))
    for dtype in (torch.float32, torch.float64):
        for n in sizes.systems:
            name = f"system {n} {str(dtype).removeprefix('torch.')}"
            run.row(name, partial(system, run, n, sizes.columns, dtype))


def copy(run: Run, size: int) -> dict[str, Any]:
    """From one part of the device's memory to another: each byte is read once, and written once."""
    source = torch.randint(256, (size // 2,), dtype=torch.uint8, device=run.device)
    goal = torch.empty_like(source)
    taken = _one(run, lambda: goal.copy_(source))
    return taken | {"gb_per_s": size / taken["ms"] / 1e6}


@contextmanager
def tensor_float32() -> Iterator[None]:
    """Products of float32 with operands rounded to TF32."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


PRODUCTS: dict[str, tuple[torch.dtype, Callable[[], Any]]] = {
    "float32": (torch.float32, nullcontext),
    "tf32": (torch.float32, tensor_float32),
    "float16": (torch.float16, nullcontext),
}


def product(run: Run, size: tuple[int, int, int], name: str) -> dict[str, Any]:
    """A product, and how many operations that is a second."""
    dtype, context = PRODUCTS[name]
    rows, depth, columns = size
    a = torch.randn(rows, depth, device=run.device).to(dtype)
    b = torch.randn(depth, columns, device=run.device).to(dtype)
    with context():
        taken = _one(run, lambda: a @ b)
    return taken | {"tflops": 2 * rows * depth * columns / taken["ms"] / 1e9}


def system(run: Run, n: int, columns: int, dtype: torch.dtype) -> dict[str, Any]:
    """A Cholesky factor; with it a triangular solve, and both at once by `cholesky_solve`."""
    x = torch.randn(n, n, dtype=dtype, device=run.device)
    k = x @ x.mT + n * torch.eye(n, dtype=dtype, device=run.device)
    y = torch.randn(n, columns, dtype=dtype, device=run.device)
    factor = torch.linalg.cholesky(k)
    calls: dict[str, Callable[[], Tensor]] = {
        "potrf": lambda: torch.linalg.cholesky_ex(k)[0],
        "trsm": lambda: torch.linalg.solve_triangular(factor, y, upper=False),
        "potrs": lambda: torch.cholesky_solve(y, factor),
    }
    taken = run.clock.in_turn(calls, seconds=0.5)
    counted = {"potrf": n**3 / 3, "trsm": n * n * columns, "potrs": 2 * n * n * columns}
    row: dict[str, Any] = {"columns": columns}
    for name, one in taken.items():
        if isinstance(one, Sample):
            row[name] = one._asdict() | {"tflops": counted[name] / one.ms / 1e9}
        else:
            row[name] = {"failed": one}
    row["wrong"] = [f"{name}: {one}" for name, one in taken.items() if not isinstance(one, Sample)]
    return row


def _one(run: Run, call: Callable[[], Any]) -> dict[str, Any]:
    taken = run.clock.in_turn({"call": call}, seconds=0.3)["call"]
    if not isinstance(taken, Sample):
        raise RuntimeError(taken)
    return taken._asdict()
