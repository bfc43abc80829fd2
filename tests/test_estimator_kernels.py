"""KernelRidge with every kernel, against scikit-learn where it has the kernel."""

import pickle
from typing import Any

import numpy as np
import pytest
import torch

sklearn = pytest.importorskip("sklearn")
sparse = pytest.importorskip("scipy.sparse")
from sklearn.base import clone  # noqa: E402
from sklearn.metrics.pairwise import pairwise_kernels  # noqa: E402
from sklearn.model_selection import GridSearchCV  # noqa: E402

from krrst_fast import Kernel, KernelRidge, krr_predict  # noqa: E402

THEIRS = ("linear", "poly", "polynomial", "rbf", "cosine")


def data(rows: int = 20, columns: int = 6, targets: int = 3) -> tuple[np.ndarray, ...]:
    draw = np.random.default_rng(0)
    sizes = (rows, columns), (rows, targets), (9, columns)
    return tuple(draw.standard_normal(size) for size in sizes)


@pytest.mark.parametrize("kernel", THEIRS)
@pytest.mark.parametrize("gamma", [None, 0.7])
@pytest.mark.parametrize("weighted", [False, True])
def test_fits_what_scikit_learn_fits(kernel: str, gamma: float | None, weighted: bool) -> None:
    x, y, new = data()
    weight = np.linspace(0, 2, len(x)) if weighted else None
    numbers: dict[str, Any] = {"kernel": kernel, "gamma": gamma, "degree": 2, "coef0": 0.5}
    theirs = sklearn.kernel_ridge.KernelRidge(alpha=0.3, **numbers).fit(x, y, weight)
    ours = KernelRidge(0.3, **numbers).fit(x, y, weight)
    np.testing.assert_allclose(ours.predict(new), theirs.predict(new), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(ours.dual_coef_, theirs.dual_coef_, rtol=1e-8, atol=1e-9)
    one = KernelRidge(0.3, **numbers).fit(x, y[:, 0], weight)
    np.testing.assert_allclose(one.predict(new), ours.predict(new)[:, 0], rtol=1e-9)
    assert hasattr(ours, "coef_") == (kernel in ("linear", "cosine"))
    ridges = KernelRidge([0.3, 1.0, 5.0], **numbers).fit(x, y, weight)
    for i, ridge in enumerate((0.3, 1.0, 5.0)):
        alone = KernelRidge(ridge, **numbers).fit(x, y[:, i], weight).predict(new)
        np.testing.assert_allclose(ridges.predict(new)[:, i], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kernel", ["linear", "polynomial", "rbf", "cosine", "arccos"])
def test_sparse_rows_are_as_dense_ones(kernel: str) -> None:
    x, y, new = data()
    x[np.abs(x) < 0.7] = 0
    new[np.abs(new) < 0.7] = 0
    x[3] = new[2] = 0
    for ridge in (0.3, 0.0, [0.3, 0.0, 1.0]):
        dense = KernelRidge(ridge, kernel=kernel, bias=0.2).fit(x, y)
        rows = KernelRidge(ridge, kernel=kernel, bias=0.2).fit(sparse.csc_array(x), y)
        found = rows.predict(sparse.csr_matrix(new))
        np.testing.assert_allclose(found, dense.predict(new), rtol=1e-8, atol=1e-8)
    one = KernelRidge(0.3, kernel=kernel).fit(sparse.csr_array(x), y[:, 0])
    assert one.predict(sparse.csr_array(new)).shape == (9,)


def test_a_given_gram() -> None:
    x, y, new = data()
    k, k_new = pairwise_kernels(x, metric="rbf"), pairwise_kernels(new, x, metric="rbf")
    exact = KernelRidge(0.3, kernel="rbf", bias=0.2).fit(x, y).predict(new)
    given = KernelRidge(0.3, kernel="precomputed", bias=0.2)
    np.testing.assert_allclose(given.fit(k, y).predict(k_new), exact, rtol=1e-9)
    tensors = given.fit(torch.from_numpy(k), torch.from_numpy(y))
    np.testing.assert_allclose(tensors.predict(torch.from_numpy(k_new)), exact, rtol=1e-9)
    with pytest.raises(ValueError, match=r"KernelRidge.fit: X must be \[M, M\] .*precomputed"):
        given.fit(k[:, :5], y)
    with pytest.raises(TypeError, match="a precomputed kernel must be dense"):
        given.fit(sparse.csr_array(k), y)
    # A search splits both axes of a Gram.
    grid = {"ridge": [0.1, 1.0]}
    of_gram = GridSearchCV(KernelRidge(kernel="precomputed"), grid, cv=4).fit(k, y)
    of_rows = GridSearchCV(KernelRidge(kernel="rbf"), grid, cv=4).fit(x, y)
    scores = of_gram.cv_results_, of_rows.cv_results_
    np.testing.assert_allclose(*(s["mean_test_score"] for s in scores), rtol=1e-9)


@pytest.mark.parametrize("kernel", ["polynomial", "rbf", "cosine", "arccos"])
def test_tensors_and_copies(kernel: str) -> None:
    f, y, new = (torch.from_numpy(x) for x in data())
    leaf = new.clone().requires_grad_()
    for ridge in (0.3, [0.3, 0.3, 0.3]):
        model = KernelRidge(ridge, kernel=kernel, gamma=0.4).fit(f, y)
        of = Kernel(kernel, 0.4 if kernel in ("polynomial", "rbf") else None)  # type: ignore[arg-type]
        exact = krr_predict(f, y, leaf, ridge=0.3, ridge_of="absolute", kernel=of)
        found = model.predict(leaf)
        assert torch.allclose(found, exact, rtol=1e-10)
        (slope,), (right,) = (torch.autograd.grad(x.sum(), leaf) for x in (found, exact))
        assert torch.allclose(slope, right, rtol=1e-9)
        again = pickle.loads(pickle.dumps(model))
        assert torch.equal(again.predict(new), model.predict(new))
    assert clone(model).get_params()["kernel"] == kernel


@pytest.mark.parametrize(
    "settings, error, match",
    [
        ({"kernel": "cubic"}, ValueError, "kernel must be one of .*'precomputed'.*got 'cubic'"),
        ({"kernel": len}, ValueError, "kernel must be one of"),
        ({"kernel": "rbf", "gamma": -1}, ValueError, "gamma must be positive"),
        ({"kernel": "poly", "degree": 1.5}, TypeError, "degree must be a whole number, got 1.5"),
        ({"kernel": "rbf", "intercept": True}, ValueError, "intercept must be False with kernel"),
        ({"kernel": "precomputed", "intercept": True}, ValueError, "intercept must be False"),
    ],
)
def test_bad_settings_are_named(settings: Any, error: type[Exception], match: str) -> None:
    x, y, _ = data()
    with pytest.raises(error, match=match):
        KernelRidge(**settings).fit(x, y)


def test_rows_in_any_number() -> None:
    """A prediction makes no Gram of all rows."""
    x, y, _ = data()
    new = np.random.default_rng(1).standard_normal((50_000, 6))
    for ridge in (0.3, [0.3, 0.3, 0.3]):
        model = KernelRidge(ridge, kernel="rbf").fit(x, y)
        found = model.predict(new)
        np.testing.assert_allclose(found[-5:], model.predict(new[-5:]), rtol=1e-12)
