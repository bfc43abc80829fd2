"""Every way to factor and solve, with the numbers of a solve in float64.

On the CPU "own" is the operator's fallback: what is tested is which way a call goes, and that the
ladder of ridges, the flags and the gradients are those of every other way.
"""

import functools
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from krrst_fast import (
    NonFiniteError,
    NotPositiveDefiniteError,
    Solver,
    backends,
    krr_mse,
)
from krrst_fast.cholesky import (
    CPP,
    CUDA_METHODS,
    FLOAT64_UP_TO,
    LAPACK,
    Method,
    factored_solve,
    ridge_factor,
)
from krrst_fast.ops import closed_forms
from tests.helpers import (
    NAMES,
    Calls,
    assert_equal,
    features,
    loss_and_gradients,
    more_than_twice,
    problem,
)

LARGE = FLOAT64_UP_TO + 8


SOLVES = (
    *("krrst_fast::batched_cholesky_solve", "aten::cholesky_solve"),
    "aten::linalg_solve_triangular",
)
METHODS = {**CUDA_METHODS, "cpp": CPP, "lapack": LAPACK}


@pytest.fixture(params=sorted(METHODS))
def method(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Method:
    """Every backend solves this way, step by step."""
    chosen = METHODS[request.param]
    monkeypatch.setattr(backends.cpp, "_in_steps", True)
    for backend in backends.AUTO:
        monkeypatch.setattr(backend, "cholesky_method", lambda k, columns: chosen)
    return chosen


@pytest.mark.parametrize("form", ["k", "w", "primal"])
@pytest.mark.parametrize("m,d", [(31, 17), (LARGE, 40), (40, LARGE)])
def test_loss_and_gradients(method: Method, m: int, d: int, form: str) -> None:
    tensors = problem(m, d, 20, 3)
    loss = partial(
        krr_mse, bias=1.0, ridge=1e-3, ridge_of="mean_diagonal", solver=Solver(form=form)
    )
    exact = loss_and_gradients(lambda *t: loss(*t, solver=Solver(backend="reference")), tensors)
    got = loss_and_gradients(loss, tensors)
    for name, a, b in zip(("loss", *NAMES), got, exact):
        assert_equal(a, b, 1e-9, name)


@functools.cache
def solved(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A gram of condition 1e6 in float32, targets, and the exact solution with a ridge of 1e-3."""
    generator = torch.Generator().manual_seed(seed)
    f = features(LARGE, LARGE + 70, 1e6, generator)
    k, y = (f @ f.mT).float(), torch.randn(LARGE, 16, generator=generator)
    return k, y, torch.linalg.solve(k.double() + 1e-3 * torch.eye(LARGE), y.double())


def test_an_inverse_is_as_exact_as_substitution(method: Method) -> None:
    errors, plain = [], []
    for seed in range(5):
        k, y, exact = solved(seed)
        found = ridge_factor(k, torch.tensor(1e-3), 0, True, method)
        assert (found.inverse is not None) == method.inverse
        got = factored_solve(y, found.factor, found.inverse, method)
        errors.append((got - exact).norm() / exact.norm())
        factor = torch.linalg.cholesky((k.double() + 1e-3 * torch.eye(LARGE)).float())
        plain.append((torch.cholesky_solve(y, factor) - exact).norm() / exact.norm())
    found = more_than_twice(torch.stack(errors)[:, None], torch.stack(plain)[:, None], 2.0**-24)
    assert not found, found


@pytest.mark.parametrize("m", [5, LARGE])
def test_our_cholesky_is_called_where_the_method_says_so(
    method: Method, m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved = []

    def solve(*arguments: Any) -> Tensor:
        solved.append(arguments[-1])
        return factored_solve(*arguments)

    monkeypatch.setattr(closed_forms, "factored_solve", solve)
    leaves = [x.float().requires_grad_() for x in problem(m, 7, 3, 2)]
    with Calls() as calls:
        krr_mse(*leaves, solver=Solver(form="k"), ridge=0.1).backward()
    assert solved == [method, method]
    own = method.owns(m)
    assert calls.names.count("krrst_fast::cholesky") == (own and m == LARGE)
    assert calls.names.count("krrst_fast::batched_cholesky") == (own and m != LARGE)
    # For alpha and its adjoint. With an inverse they are products; ours gives it for large Grams.
    expected = dict.fromkeys(SOLVES, 0)
    if method.inverse:
        expected["aten::linalg_solve_triangular"] = int(not (own and m == LARGE))
    elif own and m != LARGE:
        expected["krrst_fast::batched_cholesky_solve"] = 2
    elif method.substitution:
        expected["aten::linalg_solve_triangular"] = 4
    else:
        expected["aten::cholesky_solve"] = 2
    assert {name: calls.names.count(name) for name in SOLVES} == expected


@pytest.mark.parametrize("m", [5, LARGE])
@pytest.mark.parametrize("raises", [True, False])
def test_the_ladder(method: Method, m: int, raises: bool) -> None:
    k = torch.full((m, m), 2.0)  # rank one: a tiny ridge leaves pivots of rounding
    k.diagonal().sub_(1e-3)
    found = ridge_factor(k, torch.tensor(1e-4), 3, raises, method)
    assert found.retries == 2 and found.pivot == 0 and found.ridge.item() == pytest.approx(1e-2)
    y = torch.randn(m, 8, generator=torch.Generator().manual_seed(0))
    x = factored_solve(y, found.factor, found.inverse, method)
    exact = torch.linalg.solve(k.double() + 1e-2 * torch.eye(m), y.double())
    assert (x - exact).norm() <= 1e-2 * exact.norm()


@pytest.mark.parametrize("m", [5, LARGE])
def test_what_has_no_factor(method: Method, m: int) -> None:
    bad, lam = -torch.eye(m), torch.tensor(1e-3)
    with pytest.raises(NotPositiveDefiniteError, match="non-positive pivot at row 0"):
        ridge_factor(bad, lam, 1, True, method)
    with pytest.raises(NonFiniteError):
        ridge_factor(torch.full((m, m), math.nan), lam, 1, True, method)
    for k in (bad, torch.full((m, m), math.nan)):
        found = ridge_factor(k, lam, 1, False, method)
        assert found.pivot > 0 and found.retries == 1 and found.factor.isnan().all()
        x = factored_solve(torch.ones(m, 2), found.factor, found.inverse, method)
        assert x.isnan().all()


def test_many_problems_and_the_one_that_fails(method: Method) -> None:
    good = torch.eye(6).expand(3, 6, 6).clone()
    good[1].fill_(2.0).diagonal().sub_(1e-3)
    for raises in (True, False):
        found = ridge_factor(good, torch.full((3,), 1e-4), 3, raises, method)
        assert found.retries.tolist() == [0, 2, 0] and found.pivot.tolist() == [0, 0, 0]
        y = torch.randn(3, 6, 2, generator=torch.Generator().manual_seed(0))
        x = factored_solve(y, found.factor, found.inverse, method)
        system = good.double() + found.ridge.double()[:, None, None] * torch.eye(6)
        assert_equal(system @ x.double(), y.double(), 1e-2)


def test_the_whole_call_under_a_flag(method: Method) -> None:
    f_syn, y_syn, f_real, y_real = (x.float() for x in problem(40, 30, 10, 2))
    leaves: list[Tensor] = [f_syn.requires_grad_(), y_syn.requires_grad_()]
    loss, info = krr_mse(
        *leaves, f_real, y_real, ridge=1e-3, solver=Solver(check="flag"), return_info=True
    )
    assert not info.failed and loss.isfinite()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, leaves))
    nothing = torch.zeros_like(f_syn)  # of trace 0, and so of ridge 0
    loss, info = krr_mse(
        nothing, y_syn, f_real, y_real, solver=Solver(check="flag"), return_info=True
    )
    assert info.failed and loss.isnan()
