"""A ridge of 0: least squares of minimum norm."""

from typing import Any

import numpy as np
import pytest
import torch

from krrst_fast import KernelRidge
from tests.helpers import assert_equal, problem

scipy_sparse = pytest.importorskip("scipy.sparse")

SHAPES = [(12, 30, None), (30, 12, None), (30, 12, 5), (12, 30, 5)]


def drawn(m: int, d: int, rank: int | None) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(m)
    x = draw.normal(size=(m, d))
    if rank is not None:
        x = draw.normal(size=(m, rank)) @ draw.normal(size=(rank, d))
    return x, draw.normal(size=(m, 2)) + 3


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("options", [{}, {"bias": 0.7}, {"intercept": True}], ids=str)
@pytest.mark.parametrize("m,d,rank", SHAPES)
def test_minimum_norm(
    m: int, d: int, rank: int | None, options: dict[str, Any], weighted: bool, sparse: bool
) -> None:
    """Against the pseudo-inverse of the weighted rows, with the kernel's constant as a column."""
    x, y = drawn(m, d, rank)
    weights = 1 + np.arange(m) % 3.0 if weighted else None
    given = scipy_sparse.csr_array(x) if sparse else x
    model = KernelRidge(0, scale=2.0, **options).fit(given, y, weights)
    root = np.sqrt(np.ones(m) if weights is None else weights)[:, None]
    centre_x = centre_y = 0.0
    phi = x
    if "intercept" in options:
        centre_x, centre_y = (np.average(z, axis=0, weights=root[:, 0] ** 2) for z in (x, y))
    if "bias" in options:
        phi = np.concatenate((x, np.full((m, 1), (0.7 / 2.0) ** 0.5)), 1)
    exact = np.linalg.pinv(root * (phi - centre_x), rcond=1e-10) @ (root * (y - centre_y))
    np.testing.assert_allclose(model.coef_.T, exact[:d], atol=1e-9)
    np.testing.assert_allclose(model.predict(x), (phi - centre_x) @ exact + centre_y, atol=1e-9)
    np.testing.assert_allclose(2.0 * x.T @ model.dual_coef_, model.coef_.T, atol=1e-8)


def test_small_ridges_tend_to_it() -> None:
    f, y, q, _ = problem(9, 20, 5, 2)
    zero = KernelRidge(0.0).fit(f, y)
    assert_equal(zero.predict(f), y, 1e-9)
    assert_equal(KernelRidge(1e-10).fit(f, y).predict(q), zero.predict(q), 1e-6)
    query = q.clone().requires_grad_()
    zero.predict(query).sum().backward()
    assert query.grad is not None
    assert_equal(query.grad, zero.coef_.sum(0).expand_as(q), 1e-9)


def test_against_scikit_learn_on_repeated_rows() -> None:
    """Where a Cholesky factor does not exist."""
    kernel_ridge = pytest.importorskip("sklearn.kernel_ridge")
    x, y = drawn(6, 10, None)
    x, y = np.concatenate((x, x)), np.concatenate((y, y + 1))
    with pytest.warns(UserWarning, match="Singular"):
        theirs = kernel_ridge.KernelRidge(alpha=0).fit(x, y)
    np.testing.assert_allclose(KernelRidge(0).fit(x, y).predict(x), theirs.predict(x), atol=1e-8)


def test_float32_and_what_is_no_zero() -> None:
    f, y, _, _ = (z.float() for z in problem(9, 20, 5, 2))
    assert KernelRidge(0).fit(f, y).predict(f).dtype == torch.float32
    assert_equal(KernelRidge(0).fit(f, y).predict(f), y, 1e-3)
    for ridge in (-1.0, float("nan"), False):
        with pytest.raises((ValueError, TypeError), match="ridge must be"):
            KernelRidge(ridge).fit(f, y)
    assert not KernelRidge(0).fit(torch.zeros(3, 2), torch.ones(3)).coef_.any()
