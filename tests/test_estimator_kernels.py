"""KernelRidge with every kernel, against scikit-learn where it has the kernel."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sklearn = pytest.importorskip("sklearn")
sparse = pytest.importorskip("scipy.sparse")
from sklearn.base import clone  # noqa: E402
from sklearn.metrics.pairwise import pairwise_kernels  # noqa: E402
from sklearn.model_selection import GridSearchCV  # noqa: E402

from krrst_fast import (  # noqa: E402
    Kernel,
    KernelRidge,
    NonFiniteError,
    NotPositiveDefiniteError,
    Solver,
    krr_predict,
)

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


@pytest.mark.parametrize("kernel", ["linear", "polynomial", "rbf", "cosine", "arccos"])
@pytest.mark.parametrize("ridge", [0.3, [0.3, 0.3, 0.3]])
def test_dense_and_sparse_rows_mix(kernel: str, ridge: Any) -> None:
    x, y, new = data()
    exact = KernelRidge(ridge, kernel=kernel).fit(x, y).predict(new)
    for fitted, asked in ((x, sparse.csr_array(new)), (sparse.csr_array(x), new)):
        model = KernelRidge(ridge, kernel=kernel).fit(fitted, y)
        np.testing.assert_allclose(model.predict(asked), exact, rtol=1e-8, atol=1e-8)
    tensors = KernelRidge(ridge, kernel=kernel).fit(sparse.csr_array(x), y)
    found = tensors.predict(torch.from_numpy(new))
    np.testing.assert_allclose(found.numpy(), exact, rtol=1e-8, atol=1e-8)


def test_float32_keeps_large_coefficients() -> None:
    """Least squares with a narrow spectrum: coefficients of a million that cancel."""
    x = np.random.default_rng(0).standard_normal((60, 2)).astype(np.float32)
    y = np.sin(x @ np.eye(2) + x.sum(1, keepdims=True))
    for kernel in ("rbf", "arccos"):
        for ridge in (0.0, [1e-9, 1e-9]):
            model = KernelRidge(ridge, kernel=kernel, gamma=0.1).fit(x, y)
            exact = KernelRidge(ridge, kernel=kernel, gamma=0.1).fit(x.astype(float), y).predict(x)
            assert model.predict(x).dtype == np.float32
            np.testing.assert_allclose(model.predict(x), exact, atol=2e-3)


@pytest.mark.parametrize("kernel", ["linear", "rbf", "cosine", "precomputed"])
@pytest.mark.parametrize("ridge", [0.3, 0.0, [0.3, 0.0, 1.0]])
def test_half_precision_and_autocast(kernel: str, ridge: Any) -> None:
    f, y, new = (torch.from_numpy(x).half() for x in data())
    if kernel == "precomputed":
        f, new = f @ f.mT, new @ f.mT
        f = (f + f.mT) / 2
    exact = KernelRidge(ridge, kernel=kernel).fit(f.double(), y.double()).predict(new.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = KernelRidge(ridge, kernel=kernel).fit(f, y).predict(new)
    assert found.dtype == torch.float32
    scale = exact.abs().max()
    assert (found - exact).abs().max() < 2e-2 * scale if kernel == "precomputed" else 1e-4 * scale


def test_a_zero_trace_is_no_least_squares() -> None:
    y = np.ones((4, 3))
    for x, kernel in ((np.zeros((4, 3)), "arccos"), (np.zeros((4, 4)), "precomputed")):
        for ridge in (0.1, [0.1, 0.1, 0.1]):
            with pytest.raises(NotPositiveDefiniteError, match="because trace.K. is 0"):
                KernelRidge(ridge, kernel=kernel, ridge_of="trace").fit(x, y)
    with pytest.raises(NotPositiveDefiniteError, match="because trace.K. is 0"):
        KernelRidge(0.1, ridge_of="trace").fit(sparse.csr_array((4, 3)), y)


def test_the_solver_of_a_gram() -> None:
    x, y, _ = data()
    for ridge in (0.1, [0.1, 0.2, 0.3]):
        for solver, match in (
            (Solver(form="w"), "form must be 'auto' or 'k'"),
            ("cholesky", "solver must be a Solver"),
        ):
            with pytest.raises((ValueError, TypeError), match=match):
                KernelRidge(ridge, kernel="rbf", solver=solver).fit(x, y)  # type: ignore[arg-type]
    raised = KernelRidge([1e-16] * 3, kernel="rbf", gamma=1e-9).fit(x, y)
    assert (raised.fit_.ridge > 1e-16).all()
    with pytest.raises(NotPositiveDefiniteError):
        solver = Solver(max_retries=0)
        KernelRidge([1e-16] * 3, kernel="rbf", gamma=1e-9, solver=solver).fit(x, y)


def test_one_gamma() -> None:
    x, y, new = data()
    exact = KernelRidge(kernel="rbf", gamma=0.2).fit(x, y).predict(new)
    for gamma in (np.float32(0.2), np.array(0.2), np.array([0.2]), torch.tensor([0.2]).double()):
        found = KernelRidge(kernel="rbf", gamma=gamma).fit(x, y).predict(new)
        np.testing.assert_allclose(found, exact, rtol=1e-6)
    with pytest.raises(ValueError, match="KernelRidge.fit: gamma must be one number"):
        KernelRidge(kernel="rbf", gamma=torch.tensor([0.1, 0.2])).fit(x, y)


def test_a_sparse_gram_and_nan_are_refused() -> None:
    x, y, _ = data()
    model = KernelRidge(kernel="precomputed").fit(torch.from_numpy(x @ x.T), torch.from_numpy(y))
    bad = torch.full((2, 20), float("nan"), dtype=torch.float64)
    with pytest.raises(NonFiniteError, match="X holds NaN"):
        model.predict(bad)
    arrays = KernelRidge(kernel="precomputed").fit(x @ x.T, y)
    with pytest.raises(TypeError, match="precomputed kernel must be dense"):
        arrays.predict(sparse.csr_array((2, 20)))


def test_sparse_cosine_of_single_precision() -> None:
    x, y, new = (a.astype(np.float32) for a in data())
    x[3] = 0
    for size in (1.0, 1e-30):
        dense = KernelRidge(kernel="cosine").fit(x * np.float32(size), y).predict(new)
        rows = KernelRidge(kernel="cosine").fit(sparse.csr_array(x * np.float32(size)), y)
        np.testing.assert_allclose(rows.predict(sparse.csr_array(new)), dense, atol=1e-4)


@pytest.mark.parametrize("kernel", ["linear", "polynomial", "rbf", "cosine", "arccos"])
@pytest.mark.parametrize("ridge", [0.3, 0.0, [0.3, 0.3, 0.3]])
def test_rows_of_files(kernel: str, ridge: Any, tmp_path: Path) -> None:
    x, y, new = data()
    files = []
    for name, rows in (("x", x), ("new", new)):
        np.save(tmp_path / f"{name}.npy", rows)
        files.append(np.load(tmp_path / f"{name}.npy", mmap_mode="r"))
    exact = KernelRidge(ridge, kernel=kernel).fit(x, y).predict(new)
    model = KernelRidge(ridge, kernel=kernel).fit(files[0], y)
    np.testing.assert_allclose(model.predict(files[1]), exact, rtol=1e-8, atol=1e-8)
    assert hasattr(model, "partial_fit") == (kernel == "linear")
