"""A constant that the ridge does not penalise: scikit-learn's Ridge, and fits without each row."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge, RidgeCV
from torch import Tensor

from krrst_fast import KernelRidge, RidgeHead, Solver, krr_fit, krr_path, krr_predict
from krrst_fast.planner import FORMS
from tests.helpers import assert_equal

DRAW = np.random.default_rng(0)
KERNEL: dict[str, Any] = {"ridge_of": "absolute", "intercept": True}


def _drawn(m: int, d: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows far from the origin, targets, queries and weights."""
    x, y = DRAW.normal(size=(m, d)) + 30, DRAW.normal(size=(m, 2)) - 7
    q, w = DRAW.normal(size=(5, d)) + 30, DRAW.uniform(0.5, 3, size=m)
    return tuple(map(torch.from_numpy, (x, y, q, w)))  # type: ignore[return-value]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("sizes", [(12, 4), (6, 9)])
@pytest.mark.parametrize("form", FORMS)
def test_as_scikit_learn_fits(form: str, sizes: tuple[int, int], weighted: bool) -> None:
    x, y, q, w = _drawn(*sizes)
    weights = w if weighted else None
    exact = Ridge(alpha=0.7).fit(x.numpy(), y.numpy(), w.numpy() if weighted else None)
    fit = krr_fit(x, y, ridge=0.7, weights=weights, solver=Solver(form=form), **KERNEL)
    assert_equal(fit.predict(q), torch.from_numpy(exact.predict(q.numpy())), 1e-9)
    assert_equal(fit.intercept, torch.from_numpy(exact.intercept_), 1e-8)
    path = krr_path(x, y, [0.1, 0.7], weights=weights, **KERNEL)
    assert_equal(path.predict(q)[1], fit.predict(q), 1e-9)
    estimator = KernelRidge(0.7, intercept=True).fit(x.numpy(), y.numpy(), w.numpy())
    weighted_too = Ridge(alpha=0.7).fit(x.numpy(), y.numpy(), w.numpy())
    np.testing.assert_allclose(estimator.predict(q), weighted_too.predict(q), rtol=1e-9)
    np.testing.assert_allclose(estimator.intercept_, weighted_too.intercept_, rtol=1e-8)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("sizes", [(12, 4), (6, 9)])
@pytest.mark.parametrize("form", FORMS)
def test_leave_one_out_is_a_fit_without_the_row(
    form: str, sizes: tuple[int, int], weighted: bool
) -> None:
    x, y, _, w = _drawn(*sizes)
    weights = w if weighted else torch.ones_like(w)
    rows = []
    for i in range(len(x)):
        others = torch.arange(len(x)) != i
        fit = krr_fit(x[others], y[others], ridge=0.7, weights=weights[others], **KERNEL)
        rows.append(y[i] - fit.predict(x[i : i + 1])[0])
    given = weights if weighted else None
    fit = krr_fit(x, y, ridge=0.7, weights=given, solver=Solver(form=form), **KERNEL)
    assert_equal(fit.loo_residuals, torch.stack(rows), 1e-8)
    path = krr_path(x, y, [0.1, 0.7], weights=given, **KERNEL)
    assert_equal(path.loo_residuals[1], torch.stack(rows), 1e-8)


def test_of_a_batch_and_for_each_target() -> None:
    x, y, q, w = _drawn(12, 4)
    many = krr_fit(torch.stack((x, 2 * x)), y, ridge=0.7, weights=w, **KERNEL)
    assert_equal(many.predict(q)[0], krr_fit(x, y, ridge=0.7, weights=w, **KERNEL).predict(q), 1e-9)
    ours = KernelRidge([0.1, 3.0], intercept=True).fit(x, y).predict(q)
    exact = Ridge(alpha=[0.1, 3.0]).fit(x.numpy(), y.numpy()).predict(q.numpy())
    assert_equal(ours, torch.from_numpy(exact), 1e-9)


def test_of_a_head() -> None:
    x, y, q, _ = _drawn(12, 4)
    head = RidgeHead(ridge=0.7, intercept=True)
    exact = krr_fit(x, y, ridge=0.7, **KERNEL)
    assert_equal(head(x, y, q), exact.predict(q), 1e-9)
    assert_equal(head.fit(x, y)(q), exact.predict(q), 1e-9)
    x.requires_grad_()
    (got,) = torch.autograd.grad(head(x, y, q).square().sum(), x)
    plain = krr_predict(x - x.mean(0), y - y.mean(0), q - x.mean(0), ridge=0.7, ridge_of="absolute")
    (expected,) = torch.autograd.grad((plain + y.mean(0)).square().sum(), x)
    assert_equal(got, expected, 1e-9)


def test_a_constant_is_asked_for_once() -> None:
    x, y, _, _ = _drawn(12, 4)
    for call in (
        lambda: krr_fit(x, y, bias=1.0, intercept=True),
        lambda: krr_path(x, y, [1.0], bias=1.0, intercept=True),
        lambda: KernelRidge(bias=1.0, intercept=True).fit(x, y),
        lambda: RidgeHead(bias=1.0, intercept=True),
    ):
        with pytest.raises(ValueError, match="bias must be 0 with intercept=True"):
            call()
    with pytest.raises(TypeError, match="krr_fit: intercept must be True or False"):
        krr_fit(x, y, intercept=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("sizes", [(30, 4), (12, 20)])
def test_the_best_ridge_is_that_of_scikit_learn(sizes: tuple[int, int]) -> None:
    alphas = np.logspace(-3, 3, 13)
    for _ in range(5):
        x, _, _, _ = _drawn(*sizes)
        y = x[:, :1] + torch.from_numpy(DRAW.normal(size=(len(x), 1)))
        exact = RidgeCV(alphas).fit(x.numpy(), y.numpy()[:, 0]).alpha_
        assert krr_path(x, y, alphas, **KERNEL).best.item() == pytest.approx(exact)


def test_no_switch_rounds_the_constant() -> None:
    x, y, _, w = (z.float() for z in _drawn(12, 4))
    exact = krr_fit(x, y, ridge=0.7, weights=w, **KERNEL)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            fit = krr_fit(x, y, ridge=0.7, weights=w, **KERNEL)
            assert_equal(fit.intercept, exact.intercept, 1e-6)
            path = krr_path(x, y, [0.7], weights=w, **KERNEL)
            assert_equal(path.intercept[0], exact.intercept, 1e-4)
    finally:
        torch.set_float32_matmul_precision(before)


def test_half_precision_keeps_the_means() -> None:
    x, y, q, _ = (z.half() for z in _drawn(12, 4))
    head = RidgeHead(ridge=0.7, intercept=True)
    assert_equal(head(x, y, q), head(x.float(), y.float(), q.float()), 1e-6)
    assert "intercept=True" in repr(head)
