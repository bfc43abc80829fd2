"""Kernel ridge regression on a GPU, by every backend that computes there."""

import functools
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from krrst_fast import (
    NotPositiveDefiniteError,
    Solver,
    backends,
    krr_fit,
    krr_mse,
    krr_predict,
    operators,
    reference,
    ridge_solve,
)
from krrst_fast.cholesky import FLOAT64_UP_TO
from tests.helpers import NAMES, assert_equal, problem
from tests.on_device import captured, no_waits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
]

DEVICE = "cuda"
# M, D, B, P: ones, primes, M > D, D > M, both sides of the float64 factor, and a large one.
SHAPES = [
    (1, 1, 1, 1),
    (7, 13, 11, 3),
    (97, 61, 40, 7),
    (65, 129, 33, 130),
    (FLOAT64_UP_TO, 700, 64, 10),
    (FLOAT64_UP_TO + 8, 700, 64, 10),
    (1000, 2048, 256, 64),
]
OPTIONS: dict[str, Any] = {"bias": 1.0, "ridge": 1e-4, "ridge_of": "mean_diagonal"}


@pytest.fixture(params=["torch", "triton", "auto"])
def backend(request: pytest.FixtureRequest) -> str:
    try:
        backends.choose(request.param, torch.empty(1, 1, device=DEVICE), "test")
    except ValueError as error:
        pytest.skip(str(error))
    return request.param


@functools.cache
def _placed(shape: tuple[int, ...], seed: int) -> list[Tensor]:
    return [x.float() for x in problem(*shape, seed=seed, condition=1e4, device=DEVICE)]


def placed(shape: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """F_s, Y_s, F_r, Y_r in float32 on the device; features whose gram has condition 1e4."""
    return [x.clone() for x in _placed(shape, seed)]


def results(loss: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in tensors]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def errors(got: list[Tensor], exact: list[Tensor]) -> Tensor:
    """Relative errors, on the CPU."""
    return torch.stack([(a.double() - b).norm() / b.norm() for a, b in zip(got, exact)]).cpu()


@functools.cache
def judged(shape: tuple[int, ...], seed: int, fast: bool) -> tuple[list[Tensor], Tensor]:
    """The formula's loss and gradients in float64, and the errors that it has in float32."""
    seen = placed(shape, seed)
    if fast:
        seen[0], seen[2] = reference.round_features(seen[0], seen[2])
    formula = partial(krr_mse, **OPTIONS, solver=Solver(backend="reference"))
    exact = results(formula, [x.double() for x in seen])
    return exact, errors(results(formula, seen), exact)


def middle(draws: list[Tensor]) -> list[float]:
    """Of each column its middle number. (A median with indices raises on a GPU.)"""
    return torch.stack(draws).sort(0).values[len(draws) // 2].tolist()


@pytest.mark.parametrize("precision", [None, "fast"])
@pytest.mark.parametrize("form", ["k", "w", "primal"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(
    shape: tuple[int, ...], form: str, precision: str | None, backend: str
) -> None:
    if form == "primal" and shape[0] <= shape[1]:
        pytest.skip("the primal form is for more rows than features")
    mine, plain = [], []
    # One draw is luck: the middle of three is compared, with twice that of the formula.
    for seed in range(3):
        exact, usual = judged(shape, seed, precision == "fast")
        ours = partial(
            krr_mse, **OPTIONS, solver=Solver(form=form, backend=backend, precision=precision)
        )
        mine.append(errors(results(ours, placed(shape, seed)), exact))
        plain.append(usual)
    for name, a, b in zip(("loss", *NAMES), middle(mine), middle(plain)):
        # Of one number, the loss, even the middle is luck.
        allowed = 4 * b + 1e-5 if name == "loss" else 2 * b + 1e-6
        if name == "loss" and precision == "fast":
            # Tensor cores truncate: every entry of K is too small by some 1e-8 of itself, and the
            # condition number of 1e4 multiplies that.
            allowed += 2e-4
        assert a <= allowed, f"{name}: error {a:.2e} > allowed {allowed:.2e}"


def test_float64() -> None:
    tensors = problem(97, 61, 40, 7, condition=1e4, device=DEVICE)
    exact = results(partial(krr_mse, **OPTIONS, solver=Solver(backend="reference")), tensors)
    for form in ("k", "w", "primal"):
        got = results(partial(krr_mse, **OPTIONS, solver=Solver(form=form)), tensors)
        for name, a, b in zip(("loss", *NAMES), got, exact):
            assert_equal(a, b, 1e-9, name)


def test_a_batch_and_a_learnt_ridge(backend: str) -> None:
    many = [torch.stack(x) for x in zip(*(placed((25, 64, 15, 5), seed) for seed in range(6)))]
    ridge = torch.linspace(0.01, 0.1, 6, device=DEVICE)

    def loss(*tensors: Tensor, backend: str) -> Tensor:
        options = {**OPTIONS, "ridge": tensors[-1], "solver": Solver(backend=backend)}
        return krr_mse(*tensors[:-1], **options).sum()

    exact = results(partial(loss, backend="reference"), [x.double() for x in (*many, ridge)])
    got = results(partial(loss, backend=backend), [*many, ridge])
    assert errors(got, exact).max() < 1e-4


@pytest.mark.parametrize("precision", [None, "fast"])
@pytest.mark.parametrize("shape", [(97, 61, 40, 7), (1000, 2048, 256, 64)], ids=str)
def test_nothing_waits_and_a_graph_replays(
    shape: tuple[int, ...], precision: str, backend: str
) -> None:
    leaves = [x.requires_grad_() for x in placed(shape)]
    solver = Solver(backend=backend, precision=precision, check="flag")
    call = partial(krr_mse, *leaves, **OPTIONS, solver=solver)

    def work() -> list[Tensor]:
        loss = call()
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    graph, results_of_graph = captured(work)
    with no_waits():
        work()
    with torch.no_grad():
        for leaf, other in zip(leaves, placed(shape, seed=1)):
            leaf.copy_(other)
    graph.replay()
    for name, a, b in zip(("loss", *NAMES), results_of_graph, work()):
        assert torch.equal(a, b), f"{name}: not the bits of a call"


def test_the_same_bits_every_time(backend: str) -> None:
    tensors = placed((777, 1500, 300, 33))
    for precision in (None, "fast"):
        loss = partial(krr_mse, **OPTIONS, solver=Solver(backend=backend, precision=precision))
        first = results(loss, tensors)
        for _ in range(5):
            for a, b in zip(results(loss, tensors), first):
                assert torch.equal(a, b)


def test_no_switch_rounds(backend: str) -> None:
    tensors = placed((600, 1024, 256, 64))
    loss = partial(krr_mse, **OPTIONS, solver=Solver(backend=backend))
    before = results(loss, tensors)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            after = results(loss, tensors)
    finally:
        torch.set_float32_matmul_precision("highest")
    for a, b in zip(after, before):
        assert torch.equal(a, b)


def test_a_failure_is_flagged_or_raised(backend: str) -> None:
    f_syn, y_syn, f_real, y_real = placed((600, 64, 40, 3))
    nothing = torch.zeros_like(f_syn)
    loss, info = krr_mse(
        nothing,
        y_syn,
        f_real,
        y_real,
        solver=Solver(check="flag", backend=backend, form="k"),
        return_info=True,
    )
    assert bool(info.failed) and loss.isnan()
    with pytest.raises(NotPositiveDefiniteError, match="the ridge is 0 because"):
        krr_mse(nothing, y_syn, f_real, y_real, solver=Solver(backend=backend, form="k"))


def test_half_precision_and_strides(backend: str) -> None:
    tensors = placed((97, 61, 40, 7))
    exact = krr_predict(*(x.bfloat16().double() for x in tensors[:3]), **OPTIONS)
    got = krr_predict(
        *(x.bfloat16() for x in tensors[:3]), **OPTIONS, solver=Solver(backend=backend)
    )
    assert got.dtype == torch.float32 and (got - exact).norm() <= 1e-4 * exact.norm()
    odd = [torch.cat((x, x), 1)[:, : x.shape[1]].mT.contiguous().mT for x in tensors]
    loss = partial(krr_mse, **OPTIONS, solver=Solver(backend=backend))
    exact, _ = judged((97, 61, 40, 7), 0, False)
    assert errors(results(loss, odd), exact).max() < 1e-3


def test_fit_and_solve(backend: str) -> None:
    f_syn, y_syn, f_real, _ = placed((600, 700, 40, 3))
    fit = krr_fit(f_syn, y_syn, **OPTIONS, solver=Solver(backend=backend))
    exact = krr_predict(*(x.double() for x in (f_syn, y_syn, f_real)), **OPTIONS)
    assert (fit.predict(f_real) - exact).norm() <= 5e-3 * exact.norm()
    k = f_syn @ f_syn.mT
    x = ridge_solve(k, y_syn, ridge=1e-3, ridge_of="mean_diagonal")
    lam = 1e-3 * k.double().diagonal().mean()
    left = k.double() @ x.double() + lam * x.double() - y_syn.double()
    assert left.norm() <= 1e-2 * y_syn.norm()


def test_the_graph_of_the_page_runs() -> None:
    """In a process of its own: it captures a graph as torch does, and a failure would stay."""
    page = (Path(__file__).parent.parent / "docs" / "gpu.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_what_is_loaded_is_what_was_built() -> None:
    """A build that was asked for and does not load must not pass as tests that were skipped."""
    if operators.HAS_CUDA_EXTENSION:
        assert operators.CUDA_EXTENSION.endswith(".so")
    elif "No module named" not in operators.CUDA_EXTENSION:
        pytest.fail(operators.CUDA_EXTENSION)
