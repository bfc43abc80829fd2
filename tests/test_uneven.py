"""Rows, columns and weights of different sizes: float32 against float64 and plain PyTorch."""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from krrst_fast import KernelRidge, KrrstError, Solver, krr_fit, krr_mse, krr_predict, reference
from krrst_fast.ops.problem import Problem
from krrst_fast.ops.uneven import exact_primal
from tests.helpers import assert_equal

KERNEL = {
    **{"ridge": 1.0, "ridge_of": "absolute", "detach_ridge": True},
    **{"scale": 1.0, "bias": 0.0},
}


@pytest.mark.parametrize(
    ("last", "exact"),
    [((3000, 6001), (0.640008, 1.916264)), ((1e5, 200001), (0.638922, 1.916655))],
)
def test_one_large_row(last: tuple[float, float], exact: tuple[float, float]) -> None:
    x = np.array([[1, 0], [0, 1], [1, 1], [2, -1], last], dtype=np.float32)
    y = np.arange(1, 6, dtype=np.float32)
    got = KernelRidge(1.0).fit(x, y).predict(np.array([[1, 1], [1, -1]], dtype=np.float32))
    np.testing.assert_allclose(got, exact, rtol=2e-6)


def _uneven(kind: str, spread: float, seed: int) -> list[Tensor]:
    """M = 40 > D = 8, exact in float32."""
    draw = torch.Generator().manual_seed(seed)
    shapes = ((40, 8), (40, 3), (20, 8), (20, 3))
    f_syn, y_syn, f_real, y_real = (
        torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in shapes
    )
    sizes = torch.logspace(0, np.log10(spread), 40, dtype=torch.float64)
    if kind == "rows":
        f_syn *= sizes[torch.randperm(40, generator=draw), None]
    elif kind == "one row":
        f_syn[0] *= spread
    else:
        columns = torch.logspace(0, np.log10(spread), 8, dtype=torch.float64)
        f_syn, f_real = f_syn * columns, f_real * columns
    return [x.float().double() for x in (f_syn, y_syn, f_real, y_real)]


def _errors(function, exact: list[Tensor], tensors: list[Tensor]) -> list[float]:
    leaves = [x.float().requires_grad_() for x in tensors]
    loss = function(*leaves)
    got = [loss.detach(), *torch.autograd.grad(loss, leaves)]
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, exact)]


@pytest.mark.parametrize("precision", [None, "fast"])
@pytest.mark.parametrize("kind", ["rows", "one row", "columns"])
@pytest.mark.parametrize("spread", [1e0, 1e1, 1e2, 1e3, 1e4, 1e6, 1e8])
def test_no_worse_than_plain_pytorch(kind: str, spread: float, precision: str | None) -> None:
    if kind == "columns" and spread > 1e4:
        pytest.skip("float64 does not resolve the exact result either")
    if precision == "fast" and spread > 1e4:
        pytest.skip("beyond the range of float16; a factorisation that fails raises")
    rows, solver = [], Solver(precision=precision)
    for seed in range(9):
        tensors = _uneven(kind, spread, seed)
        if precision == "fast":  # of the rounded features
            tensors[0], tensors[2] = reference.round_features(tensors[0], tensors[2])
        leaves = [x.clone().requires_grad_() for x in tensors]
        loss = reference.krr_mse(*leaves, **KERNEL)
        exact = [loss.detach(), *torch.autograd.grad(loss, leaves)]
        ours = _errors(lambda *t: krr_mse(*t, **KERNEL, solver=solver), exact, tensors)
        plain = _errors(lambda *t: reference.krr_mse(*t, **KERNEL), exact, tensors)
        rows.append((ours, plain))
    ours, plain = (np.median([row[i] for row in rows], axis=0) for i in range(2))
    assert (ours <= 2 * plain + 1e-6).all(), (ours, plain)


def test_weights_are_uneven_rows_too() -> None:
    f_syn, y_syn, f_real, y_real = _uneven("rows", 1, 0)
    weights = torch.ones(40, dtype=torch.float64)
    weights[0] = 1e10
    exact = krr_mse(f_syn, y_syn, f_real, y_real, weights=weights, **KERNEL)
    single = [x.float() for x in (f_syn, y_syn, f_real, y_real)]
    assert_equal(krr_mse(*single, weights=weights.float(), **KERNEL).double(), exact, 1e-5)
    fit = krr_fit(*single[:2], weights=weights.float(), ridge=1.0, ridge_of="absolute")
    true = krr_fit(f_syn, y_syn, weights=weights, ridge=1.0, ridge_of="absolute")
    assert_equal(fit.weights.double(), true.weights, 1e-5)


def _chosen(f: Tensor, solver: Solver) -> tuple[str, torch.dtype]:
    form, problem = exact_primal(
        Problem(f, f[..., :1], f, None, 1.0, "absolute", True, 1.0, 0.0), solver
    )
    return form, problem.f_syn.dtype


def test_the_choice() -> None:
    even = torch.nn.functional.normalize(_uneven("rows", 1, 0)[0].float())
    one, huge = even.clone(), even.clone()
    one[0] *= 1e3
    huge[0] *= 1e7
    assert _chosen(even, Solver()) == ("primal", torch.float32)
    assert _chosen(one, Solver()) == ("primal", torch.float64)
    assert _chosen(huge, Solver()) == ("w", torch.float64)
    assert _chosen(huge, Solver(form="primal")) == ("primal", torch.float64)
    assert _chosen(one, Solver(precision="fast")) == ("w", torch.float32)
    assert _chosen(even[:0], Solver()) == ("primal", torch.float32)


def test_a_raised_ridge_is_said_without_any_setting() -> None:
    code = """
import torch
from krrst_fast import Solver, krr_fit
f = torch.ones(6, 3)
info = krr_fit(f, f[:, :1], ridge=1e-17, solver=Solver(form="k", max_retries=9)).info
assert info.retries > 0
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "ridge_factor: ridge raised" in done.stderr


def _drawn(draw: torch.Generator) -> tuple[list[Tensor], Tensor | None, float, tuple[int, int]]:
    """A problem exact in float32, row weights, a ridge, and the decades of the two spreads."""

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=draw))

    def spread(count: int, decades: int) -> Tensor:
        powers = torch.rand(count, generator=draw, dtype=torch.float64) * decades
        return 10**powers

    m, d, b, p = number(1, 40), number(1, 40), number(1, 12), number(1, 4)
    rows, columns = (number(0, 8) if number(0, 1) else 0 for _ in range(2))
    tensors = [
        torch.randn(*shape, generator=draw, dtype=torch.float64)
        for shape in ((m, d), (m, p), (b, d), (b, p))
    ]
    scales = spread(d, columns)
    tensors[0] *= spread(m, rows)[:, None] * scales
    tensors[2] *= scales
    weights = spread(m, number(0, 6)).float().double() if number(0, 2) == 0 else None
    ridge = float(10 ** -(torch.rand((), generator=draw, dtype=torch.float64) * 6))
    return [x.float().double() for x in tensors], weights, ridge, (rows, columns)


@pytest.mark.slow
def test_ten_thousand_calls_are_no_worse_than_plain_pytorch() -> None:
    draw, errors = torch.Generator().manual_seed(0), {}
    raised = 0
    for _ in range(10_000):
        tensors, weights, ridge, spreads = _drawn(draw)
        root = 1.0 if weights is None else weights.sqrt()[:, None]

        def plain(
            f: Tensor, y: Tensor, q: Tensor, root: Any = root, ridge: float = ridge
        ) -> Tensor:
            root = root if isinstance(root, float) else root.to(f)
            rows = root * f
            return reference.krr_predict(
                *(rows, root * y, q),
                **{**KERNEL, "ridge": ridge, "ridge_of": "trace"},
            )

        exact = plain(*tensors[:3])
        singular = torch.linalg.svdvals(root * tensors[0]).square()
        if not 1e-16 * singular[0] < 1e-9 * (ridge * singular.sum()):
            continue  # float64 does not resolve it either
        single = [x.float() for x in tensors]
        try:
            got = krr_predict(
                *single[:3], ridge=ridge, weights=None if weights is None else weights.float()
            )
        except KrrstError:
            raised += 1
            continue
        assert got.isfinite().all()
        pair = got.double(), plain(*single[:3]).double()
        found = [((x - exact).norm() / exact.norm().clamp(min=1e-30)).item() for x in pair]
        errors.setdefault(spreads, []).append(found)
    assert raised < 100 and sum(map(len, errors.values())) > 9000
    for spreads, pairs in errors.items():
        if len(pairs) >= 50:
            ours, theirs = np.median(np.array(pairs), axis=0)
            assert ours <= 2 * theirs + 1e-6, (spreads, len(pairs), ours, theirs)
