"""Problems with a stated condition number, the formula the fast code must equal, and rounding.

The error of one draw is luck, and another processor draws again: its sums have another order. So
no test compares the error of one draw with the error of another. A sum is held to what roundings
add up to (`rounding_of_sums`), and what is solved to quantiles over draws (`more_than_twice`).
"""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from krrst_fast import Solver
from krrst_fast.backends import BACKENDS

BACKEND_NAMES = [name for name, x in BACKENDS.items() if x.refuses(torch.empty(1, 1)) is None]
"""The backends that compute on the CPU here."""
NAMES = ("f_syn", "y_syn", "f_real", "y_real")
SHAPES = [  # M, D, B, P: ones, primes, M > D, D > M, more targets than images
    (1, 1, 1, 1),
    (2, 3, 5, 1),
    (7, 13, 11, 3),
    (31, 17, 29, 5),
    (17, 31, 13, 47),
    (64, 128, 33, 10),
    (97, 61, 40, 7),
    (300, 331, 20, 2),
    (520, 531, 20, 2),
]


def keywords(**options: Any) -> dict[str, Any]:
    """Keywords of an operator, those of a Solver put into one."""
    names = ("precision", "form", "backend", "max_retries", "check")
    how = {name: options.pop(name) for name in names if name in options}
    return {"solver": Solver(**how), **options} if how else options


def features(n: int, d: int, condition: float, generator: torch.Generator) -> Tensor:
    """Float64 [n, d] whose gram of rows (or of columns, if fewer) has this condition number."""
    rank, on = min(n, d), {"dtype": torch.float64, "device": generator.device}
    left = torch.linalg.qr(torch.randn(n, rank, generator=generator, **on))[0]
    right = torch.linalg.qr(torch.randn(d, rank, generator=generator, **on))[0]
    singular = torch.logspace(0, -math.log10(condition) / 2, rank, **on)
    return 3 * (left * singular) @ right.mT


def problem(
    m: int,
    d: int,
    b: int,
    p: int,
    *,
    condition: float | str = 1e2,
    seed: int = 0,
    device: str = "cpu",
) -> list[Tensor]:
    """F_s, Y_s, F_r, Y_r in float64, exact in float32; "duplicates" repeats half of F_s.

    They are drawn where they are to be: a second of a CPU for what takes a GPU some milliseconds.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    f_syn = features(m, d, 1e2 if condition == "duplicates" else float(condition), generator)
    if condition == "duplicates":
        f_syn[(m + 1) // 2 :] = f_syn[: m // 2].clone()
    on = {"dtype": torch.float64, "device": generator.device}
    y_syn, y_real = (torch.randn(n, p, generator=generator, **on) for n in (m, b))
    return [x.float().double() for x in (f_syn, y_syn, features(b, d, 1e2, generator), y_real)]


def formula(f_syn: Tensor, y_syn: Tensor, f_real: Tensor, y_real: Tensor) -> Tensor:
    """The outer loss of KRR-ST as its authors write it: ones column, full gram, LU, autograd."""

    def with_one(f: Tensor) -> Tensor:
        return torch.cat((f, torch.ones(len(f), 1, dtype=f.dtype)), dim=1)

    syn, real = with_one(f_syn), with_one(f_real)
    k_ss = syn @ syn.mT
    ridge = 1e-6 * k_ss.trace().detach()
    alpha = torch.linalg.solve(k_ss + ridge * torch.eye(len(k_ss), dtype=k_ss.dtype), y_syn)
    return ((real @ syn.mT @ alpha - y_real) ** 2).mean()


def loss_and_gradients(
    loss: Callable[..., Tensor], tensors: list[Tensor], dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """The loss and its gradient to each tensor, computed in `dtype`."""
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in tensors]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def assert_equal(got: Tensor, exact: Tensor, tolerance: float, what: str = "") -> None:
    """|got - exact| <= tolerance * max(1, |exact|_max), and nothing is NaN."""
    assert got.shape == exact.shape, f"{what}: {tuple(got.shape)} is not {tuple(exact.shape)}"
    if exact.numel():
        error = (got - exact).abs().max().item()
        allowed = tolerance * max(1.0, exact.abs().max().item())
        assert error <= allowed, f"{what}: error {error:.3e} > allowed {allowed:.3e}"


def rounding_of_sums(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """What the entries of a @ b may lose when K products are added in `dtype`, in any order.

    A partial sum is as large as the whole one, or as a random walk of the products, and is rounded
    by half an `eps` at most. Such errors are a random walk too: twice sqrt(K) of them are five
    standard deviations where products are added one by one, and more in any other order. Four more
    are for what is done with the sum.
    """
    a, b = a.double(), b.double()
    size = (a @ b).abs() + (a.square() @ b.square()).sqrt()
    return torch.finfo(dtype).eps * (2 + a.shape[-1] ** 0.5) * size


def assert_within(got: Tensor, exact: Tensor, allowed: Tensor | float, what: str = "") -> None:
    """|got - exact| <= allowed in every entry, and what is not finite is so in both."""
    assert got.shape == exact.shape, f"{what}: {tuple(got.shape)} is not {tuple(exact.shape)}"
    assert got.isfinite().all() or not exact.isfinite().all(), f"{what}: not finite"
    over = (got.double() - exact).abs() - allowed
    worst = over.argmax() if over.numel() else None
    if worst is not None and not (over <= 0).all():
        error = (got.double() - exact).abs().flatten()[worst]
        raise AssertionError(f"{what}: entry {worst}: error {error:.3e}, {over.max():.1e} too much")


def more_than_twice(mine: Tensor, plain: Tensor, floor: float) -> list[str]:
    """Where a quantile of errors [draws, results] is above twice that of `plain`, and `floor`."""
    found = []
    for quantile in (0.5, 0.9):
        ours, theirs = mine.quantile(quantile, dim=0), plain.quantile(quantile, dim=0)
        for number, (a, b) in enumerate(zip(ours.tolist(), theirs.tolist())):
            if not a <= 2 * (b + floor):
                found.append(f"result {number}, quantile {quantile}: {a:.2e} > 2 * {b:.2e}")
    return found


def neighbour(tensors: list[Tensor], seed: int) -> list[Tensor]:
    """The same problem with its numbers moved by one in a thousand: as hard, and rounded anew."""
    generator = torch.Generator().manual_seed(seed)

    def moved(x: Tensor) -> Tensor:
        steps = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        return (x * (1 + 1e-3 * steps)).float().to(x.dtype)

    return [moved(x) for x in tensors]


def run_with(isa: str, module: str, function: str) -> None:
    """Call a function of a test module with an instruction set, which is chosen once a process."""
    code = f"from tests.{module} import {function}; {function}()"
    env = {**os.environ, "KRRST_FAST_ISA": isa, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).resolve().parent.parent
    run = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=root, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


class Calls(TorchDispatchMode):
    """A record of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.name().partition(".")[0])
        return func(*args, **(kwargs or {}))
