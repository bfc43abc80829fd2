"""KernelRidge on sparse rows, against itself on the same rows made dense."""

from typing import Any

import numpy as np
import pytest

from krrst_fast import KernelRidge, KernelRidgeCV, NonFiniteError

sparse = pytest.importorskip("scipy.sparse")
kernel_ridge = pytest.importorskip("sklearn.kernel_ridge")


def drawn(m: int, d: int, p: int, seed: int = 0) -> tuple[Any, np.ndarray]:
    draw = np.random.default_rng(seed)
    x = sparse.random_array((m, d), density=0.2, rng=draw, format="csr")
    return x, draw.normal(size=(m, p)) + 2


@pytest.mark.parametrize("ridge_of", ["absolute", "trace", "mean_diagonal"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("options", [{}, {"bias": 0.7}, {"intercept": True}], ids=str)
@pytest.mark.parametrize("m,d", [(12, 30), (30, 12)])
def test_as_dense(m: int, d: int, options: dict, weighted: bool, ridge_of: str) -> None:
    x, y = drawn(m, d, 3)
    weights = np.arange(m) % 3.0 if weighted else None
    for ridge in (0.3, [0.1, 1.0, 0.1]):
        settings = {"ridge": ridge, "scale": 2.0, "ridge_of": ridge_of, **options}
        exact = KernelRidge(**settings).fit(x.toarray(), y, weights)
        got = KernelRidge(**settings).fit(x, y, weights)
        for name in ("dual_coef_", "coef_", "intercept_"):
            np.testing.assert_allclose(
                getattr(got, name), getattr(exact, name), rtol=1e-8, atol=1e-10, err_msg=name
            )
        np.testing.assert_allclose(got.predict(x), exact.predict(x.toarray()), atol=1e-10)
        np.testing.assert_allclose(got.predict(x.toarray()), exact.predict(x), atol=1e-10)
        assert got.score(x, y) == pytest.approx(exact.score(x.toarray(), y))


@pytest.mark.parametrize("kind", ["csr_matrix", "csc_array", "coo_array", "lil_matrix"])
def test_formats_and_types(kind: str) -> None:
    x, y = drawn(9, 14, 2)
    x = getattr(sparse, kind)(x)
    theirs = kernel_ridge.KernelRidge(alpha=0.5).fit(x, y)
    np.testing.assert_allclose(KernelRidge(0.5).fit(x, y).predict(x), theirs.predict(x))
    one = KernelRidge(0.5).fit(x.astype(np.float32), y[:, 0])
    assert one.predict(x).shape == (9,) and one.predict(x).dtype == np.float32
    np.testing.assert_allclose(one.predict(x), theirs.predict(x)[:, 0], rtol=1e-5)
    counts = sparse.csr_array(np.eye(4, dtype=np.int64))
    assert KernelRidge(1.0).fit(counts, np.ones(4)).dual_coef_ == pytest.approx(0.5)


def test_what_is_not_finite_and_what_is_refused() -> None:
    x, y = drawn(5, 8, 1)
    x.data[0] = np.nan
    with pytest.raises((ValueError, NonFiniteError), match="NaN"):
        KernelRidge().fit(x, y)
    with pytest.raises(TypeError, match="KernelRidgeCV.fit: X is sparse .*toarray"):
        KernelRidgeCV().fit(x, y)
    with pytest.raises(ValueError, match="bias must be 0 with intercept=True"):
        KernelRidge(bias=1.0, intercept=True).fit(drawn(5, 8, 1)[0], y)


def test_a_hundred_thousand_columns() -> None:
    """Which would be 400 MB as an array."""
    x, y = sparse.random_array((500, 100_000), density=1e-3, rng=0, format="csr"), np.ones(500)
    assert np.abs(KernelRidge(1e-3).fit(x, y).predict(x) - 1).max() < 1e-2
