"""KernelRidgeCV and the choice of ridges, against scikit-learn and against fits of their own."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from krrst_fast import KernelRidge, KernelRidgeCV, krr_fit, krr_path
from tests.helpers import assert_equal, problem

linear_model = pytest.importorskip("sklearn.linear_model")

RIDGES = [1e-2, 1.0, 100.0]


def noisy(m: int, d: int, p: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """X and y; each target has noise of its own size, and so a best ridge of its own."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(m, d))
    y = x @ draw.normal(size=(d, p)) + 3
    return x, y + np.geomspace(1e-3, 100, p) * draw.normal(size=(m, p))


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("m,d", [(40, 15), (15, 40)])
@pytest.mark.parametrize("per_target", [False, True])
def test_against_ridge_cv(per_target: bool, m: int, d: int, intercept: bool) -> None:
    x, y = noisy(m, d, 6)
    theirs = linear_model.RidgeCV(
        RIDGES, fit_intercept=intercept, alpha_per_target=per_target, store_cv_results=True
    ).fit(x, y)
    ours = KernelRidgeCV(RIDGES, per_target=per_target, intercept=intercept).fit(x, y)
    np.testing.assert_array_equal(ours.ridge_, theirs.alpha_)
    if per_target:
        assert len(set(ours.ridge_.tolist())) > 1
    errors = theirs.cv_results_.mean(0).T  # [R, P]
    np.testing.assert_allclose(ours.loo_mse_, errors if per_target else errors.mean(1), rtol=1e-9)
    np.testing.assert_allclose(ours.predict(x), theirs.predict(x), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(ours.intercept_, theirs.intercept_, atol=1e-9)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("options", [{}, {"bias": 0.5}, {"intercept": True}], ids=str)
@pytest.mark.parametrize("sizes", [(13, 7, 5, 3), (7, 13, 5, 3), (1, 1, 1, 1)], ids=str)
def test_the_fit_of_each_target(sizes: tuple, options: dict[str, Any], weighted: bool) -> None:
    """As a fit of its own with the ridge that was chosen; a row of weight 0 changes nothing."""
    f, y, q, _ = problem(*sizes)
    y = y * torch.tensor([1.0, 5.0, 0.1][: sizes[3]])
    weights = torch.arange(1, sizes[0] + 1).double() % 3 if weighted else None
    kernel = {**options, "scale": 2.0, "weights": weights, "ridge_of": "mean_diagonal"}
    if sizes[0] == 1 and "intercept" in options:
        kernel["ridge_of"] = "absolute"  # one row less its mean is 0
    path = krr_path(f, y, RIDGES, **kernel)
    for per_target in (False, True):
        fit = path.fit_best(per_target=per_target)
        ridges = path.best_per_target if per_target else path.best.expand(sizes[3])
        assert torch.equal(fit.ridge, ridges)
        for p, ridge in enumerate(ridges.tolist()):
            alone = krr_fit(f, y[:, p : p + 1], ridge=ridge, **kernel)
            assert_equal(fit.predict(q)[:, p : p + 1], alone.predict(q), 1e-9)
            assert_equal(fit.weights[:, p : p + 1], alone.weights, 1e-9)
            assert_equal(fit.alpha[:, p : p + 1], alone.alpha, 1e-8)
            assert_equal(fit.intercept[p : p + 1], alone.intercept, 1e-9)
            assert_equal(fit.lam[p], alone.info.ridge, 1e-12)


def test_scores_are_those_of_the_residuals() -> None:
    each = [problem(9, 12, 4, 2, seed=seed) for seed in range(6)]
    f, y = (torch.stack(x).reshape(2, 3, *x[0].shape) for x in list(zip(*each))[:2])
    weights = torch.rand(9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for given in (None, weights):
        path = krr_path(f, y, RIDGES, weights=given)
        share = (
            torch.full((9,), 1 / 9, dtype=torch.float64) if given is None else given / given.sum()
        )
        exact = (path.loo_residuals.square() * share[:, None]).sum(-2)
        assert path.loo_mse_per_target.shape == (3, 2, 3, 2)
        assert_equal(path.loo_mse_per_target, exact, 1e-11)
        assert path.best_per_target.shape == (2, 3, 2)
        fit = path.fit_best(per_target=True)
        assert fit.predict(f).shape == (2, 3, 9, 2) and fit.weights.shape == (2, 3, 12, 2)


def test_what_was_given_may_change_later() -> None:
    for dtype in (torch.float32, torch.float64):
        f, y, q, _ = (x.to(dtype) for x in problem(9, 12, 4, 2))
        weights = torch.tensor([1.0, 0.0] + [1.0] * 7, dtype=dtype)
        for given in (None, weights):
            expected = krr_path(f, y, RIDGES, weights=given)
            kept = [expected.loo_residuals, expected.loo_mse, expected.fit_best().predict(q)]
            mine, targets = f.clone(), y.clone()
            path = krr_path(mine, targets, RIDGES, weights=given)
            mine.zero_(), targets.zero_()
            got = [path.loo_residuals, path.loo_mse, path.fit_best().predict(q)]
            assert all(map(torch.equal, got, kept))


@pytest.mark.parametrize("m,d", [(40, 15), (15, 40)])
def test_blocks_of_targets(m: int, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = map(torch.from_numpy, noisy(m, d, 7))
    whole = krr_path(x, y, RIDGES)
    monkeypatch.setattr("krrst_fast.ops.spectrum._BLOCK", 2 * m)
    parts = krr_path(x, y, RIDGES)
    assert_equal(parts.loo_mse_per_target, whole.loo_mse_per_target, 1e-12)
    assert_equal(parts.loo_residuals, whole.loo_residuals, 1e-12)


def test_float32_scores() -> None:
    """Over draws, within some roundings of float64, and the same choice."""
    for seed in range(5):
        x, y = noisy(30, 60, 8, seed)
        exact = KernelRidgeCV(RIDGES, per_target=True).fit(x, y)
        got = KernelRidgeCV(RIDGES, per_target=True).fit(x.astype("f4"), y.astype("f4"))
        assert got.loo_mse_.dtype == got.predict(x).dtype == np.float32
        np.testing.assert_allclose(got.loo_mse_, exact.loo_mse_, rtol=2e-4)
        np.testing.assert_allclose(got.predict(x), exact.predict(x), rtol=1e-2, atol=1e-2)


def test_tensors_weights_and_gradients() -> None:
    x, y = map(torch.from_numpy, noisy(12, 20, 3))
    weights = torch.arange(12).double() % 3
    model = KernelRidgeCV(RIDGES, bias=1.0).fit(x, y, weights)
    copies = torch.arange(12).repeat_interleave(weights.long())
    again = KernelRidgeCV([float(model.ridge_)], bias=1.0).fit(x[copies], y[copies])
    assert isinstance(model.coef_, Tensor)
    assert_equal(model.predict(x), again.predict(x), 1e-9)
    query = x.clone().requires_grad_()
    model.predict(query).sum().backward()
    assert query.grad is not None
    assert_equal(query.grad, model.coef_.sum(0).expand(12, 20), 1e-9)
    one = KernelRidgeCV(RIDGES, per_target=True).fit(x, y[:, 0])
    assert one.ridge_.shape == () and one.coef_.shape == (20,) and one.predict(x).shape == (12,)
    assert one.score(x, y[:, 0]) == KernelRidge(float(one.ridge_)).fit(x, y[:, 0]).score(x, y[:, 0])


def test_refusals() -> None:
    x, y = noisy(5, 3, 2)
    with pytest.raises(TypeError, match=r"KernelRidgeCV.fit: per_target must be True or False"):
        KernelRidgeCV(per_target=1).fit(x, y)
    with pytest.raises(ValueError, match="ridges must be positive"):
        KernelRidgeCV([0.0]).fit(x, y)
    with pytest.raises(AttributeError, match="there is no fit yet"):
        _ = KernelRidgeCV().coef_
    fit = krr_path(torch.eye(3), torch.eye(3), RIDGES).fit_best()
    with pytest.raises(ValueError, match=r"PathFit.predict: f must be \[..., B, 3\]"):
        fit.predict(torch.ones(2, 4))
