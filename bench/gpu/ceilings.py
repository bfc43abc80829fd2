"""What this device can do at most: a copy, products in two precisions, factors by cuSOLVER."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from bench.gpu.measure import Rows, Run, Unit

COPY = {False: 2 << 30, True: 1 << 20}
PRODUCT = {False: 8192, True: 32}
SYSTEMS = {False: (1000, 2000, 8192), True: (10, 20)}


def units(toy: bool) -> Iterator[Unit]:
    """One unit."""
    yield Unit("ceilings", rows)


def rows(run: Run) -> Rows:
    """A row a ceiling."""
    yield "copy", partial(copy, run, COPY[run.toy])
    for dtype in (torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        yield f"product of {name}", partial(product, run, PRODUCT[run.toy], dtype)
    for n in SYSTEMS[run.toy]:
        yield f"Cholesky factor of {n}", partial(factor, run, n)


def copy(run: Run, size: int) -> dict[str, Any]:
    """From one part of the device's memory to another: each byte is read once, and written once."""
    source = torch.randint(256, (size // 2,), dtype=torch.uint8, device=run.device)
    goal = torch.empty_like(source)
    taken = run.clock.alone(lambda: goal.copy_(source))
    return taken | {"gb_per_s": size / taken["ms"] / 1e6}


def product(run: Run, n: int, dtype: torch.dtype) -> dict[str, Any]:
    """A square product, and how many operations that is a second."""
    a, b = (torch.randn(n, n, device=run.device).to(dtype) for _ in range(2))
    taken = run.clock.alone(lambda: a @ b)
    return taken | {"tflops": 2 * n**3 / taken["ms"] / 1e9}


def factor(run: Run, n: int) -> dict[str, Any]:
    """A Cholesky factor in float32."""
    x = torch.randn(n, n, device=run.device)
    k = x @ x.mT + n * torch.eye(n, device=run.device)
    taken = run.clock.alone(lambda: torch.linalg.cholesky_ex(k))
    return taken | {"tflops": n**3 / 3 / taken["ms"] / 1e9}
