"""Every way to factor and solve, with the numbers of a solve in float64.

On the CPU "own" is the operator's fallback: what is tested is which way a call goes, and that the
ladder of ridges, the flags and the gradients are those of every other way.
"""

import dataclasses
import functools
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from krrst_fast import NonFiniteError, NotPositiveDefiniteError, backends, krr_mse, library
from krrst_fast.factor import FLOAT64_UP_TO, SOLVERS, Solver
from krrst_fast.ops import forms
from krrst_fast.selftest_choices import _Calls as Calls
from tests.helpers import (
    NAMES,
    assert_equal,
    features,
    loss_and_gradients,
    more_than_twice,
    problem,
)

LARGE = FLOAT64_UP_TO + 8


@pytest.fixture(params=sorted(SOLVERS))
def solver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Solver:
    """Every backend solves this way."""
    how = SOLVERS[request.param]
    changed = [dataclasses.replace(one, solver=lambda k, columns: how) for one in backends.BACKENDS]
    monkeypatch.setattr(backends, "BACKENDS", tuple(changed))
    return how


@pytest.mark.parametrize("form", ["k", "w", "primal"])
@pytest.mark.parametrize("m,d", [(31, 17), (LARGE, 40), (40, LARGE)])
def test_loss_and_gradients(solver: Solver, m: int, d: int, form: str) -> None:
    tensors = problem(m, d, 20, 3)
    loss = partial(krr_mse, bias=1.0, ridge=1e-3, ridge_of="mean_diagonal", form=form)
    exact = loss_and_gradients(partial(loss, backend="reference"), tensors)
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


def test_an_inverse_is_as_exact_as_substitution(solver: Solver) -> None:
    errors, plain = [], []
    for seed in range(5):
        k, y, exact = solved(seed)
        found = library.ridge_factor(k, torch.tensor(1e-3), 0, True, solver)
        assert (found.inverse is not None) == solver.inverse
        got = library.factored_solve(y, found.factor, found.inverse, solver.own)
        errors.append((got - exact).norm() / exact.norm())
        factor = torch.linalg.cholesky((k.double() + 1e-3 * torch.eye(LARGE)).float())
        plain.append((torch.cholesky_solve(y, factor) - exact).norm() / exact.norm())
    found = more_than_twice(torch.stack(errors)[:, None], torch.stack(plain)[:, None], 2.0**-24)
    assert not found, found


@pytest.mark.parametrize("m", [5, LARGE])
def test_our_own_is_asked_where_it_is_wanted(
    solver: Solver, m: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    solved = []

    def solve(*arguments: Any) -> Tensor:
        solved.append(arguments[-1])
        return library.factored_solve(*arguments)

    monkeypatch.setattr(forms, "factored_solve", solve)
    leaves = [x.float().requires_grad_() for x in problem(m, 7, 3, 2)]
    with Calls() as calls:
        krr_mse(*leaves, form="k", ridge=0.1).backward()
    assert solved == [solver.own, solver.own]
    # Small factors are our own on the CPU anyway.
    assert calls.names.count("krrst_fast::cholesky") == (solver.own and m == LARGE)


@pytest.mark.parametrize("m", [5, LARGE])
@pytest.mark.parametrize("raises", [True, False])
def test_the_ladder(solver: Solver, m: int, raises: bool) -> None:
    k = torch.full((m, m), 2.0)  # rank one: a tiny ridge leaves pivots of rounding
    k.diagonal().sub_(1e-3)
    found = library.ridge_factor(k, torch.tensor(1e-4), 3, raises, solver)
    assert found.retries == 2 and found.pivot == 0 and found.ridge.item() == pytest.approx(1e-2)
    y = torch.randn(m, 8, generator=torch.Generator().manual_seed(0))
    x = library.factored_solve(y, found.factor, found.inverse, solver.own)
    exact = torch.linalg.solve(k.double() + 1e-2 * torch.eye(m), y.double())
    assert (x - exact).norm() <= 1e-2 * exact.norm()


@pytest.mark.parametrize("m", [5, LARGE])
def test_what_has_no_factor(solver: Solver, m: int) -> None:
    bad, lam = -torch.eye(m), torch.tensor(1e-3)
    with pytest.raises(NotPositiveDefiniteError, match="non-positive pivot at row 0"):
        library.ridge_factor(bad, lam, 1, True, solver)
    with pytest.raises(NonFiniteError):
        library.ridge_factor(torch.full((m, m), math.nan), lam, 1, True, solver)
    for k in (bad, torch.full((m, m), math.nan)):
        found = library.ridge_factor(k, lam, 1, False, solver)
        assert found.pivot > 0 and found.retries == 1 and found.factor.isnan().all()
        x = library.factored_solve(torch.ones(m, 2), found.factor, found.inverse, solver.own)
        assert x.isnan().all()


def test_many_problems_and_the_one_that_fails(solver: Solver) -> None:
    good = torch.eye(6).expand(3, 6, 6).clone()
    good[1].fill_(2.0).diagonal().sub_(1e-3)
    for raises in (True, False):
        found = library.ridge_factor(good, torch.full((3,), 1e-4), 3, raises, solver)
        assert found.retries.tolist() == [0, 2, 0] and found.pivot.tolist() == [0, 0, 0]
        y = torch.randn(3, 6, 2, generator=torch.Generator().manual_seed(0))
        x = library.factored_solve(y, found.factor, found.inverse, solver.own)
        system = good.double() + found.ridge.double()[:, None, None] * torch.eye(6)
        assert_equal(system @ x.double(), y.double(), 1e-2)


def test_the_whole_call_under_a_flag(solver: Solver) -> None:
    f_syn, y_syn, f_real, y_real = (x.float() for x in problem(40, 30, 10, 2))
    leaves: list[Tensor] = [f_syn.requires_grad_(), y_syn.requires_grad_()]
    loss, info = krr_mse(*leaves, f_real, y_real, ridge=1e-3, check="flag", return_info=True)
    assert not info.failed and loss.isfinite()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, leaves))
    nothing = torch.zeros_like(f_syn)  # of trace 0, and so of ridge 0
    loss, info = krr_mse(nothing, y_syn, f_real, y_real, check="flag", return_info=True)
    assert info.failed and loss.isnan()
