"""KernelRidge.partial_fit is fit of all rows so far; a memory-mapped X is fitted in blocks."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.base import clone
from sklearn.linear_model import Ridge
from torch import Tensor

from krrst_fast import KernelRidge, KernelRidgeCV, NonFiniteError, NotPositiveDefiniteError, Solver
from krrst_fast.estimator import base
from tests.helpers import assert_equal
from tests.test_stream import drawn, mapped

MODELS: list[dict[str, Any]] = [
    {"bias": 0.5, "scale": 2.0},
    {"ridge": 0.3, "intercept": True},
    {"ridge": 1e-3, "ridge_of": "trace"},
    {"ridge": np.array([0.1, 2.0, 0.1]), "intercept": True},
    {"ridge": [0.1, 2.0, 0.1], "ridge_of": "mean_diagonal", "bias": 1.0},
    {"ridge": 0, "intercept": True},
    {"ridge": 0.0, "bias": 0.5},
]


def assert_same(got: KernelRidge, exact: KernelRidge, q: Any, tolerance: float = 1e-8) -> None:
    """Both predict the same, and have the same coefficients."""
    for a, b in (
        (got.predict(q), exact.predict(q)),
        (got.coef_, exact.coef_),
        (got.intercept_, exact.intercept_),
    ):
        assert type(a) is type(b) and a.dtype == b.dtype
        assert_equal(torch.as_tensor(a), torch.as_tensor(b), tolerance)


@pytest.mark.parametrize("kind", ["array", "tensor", "vector"])
@pytest.mark.parametrize("settings", MODELS)
def test_each_call_adds_rows(settings: dict[str, Any], kind: str) -> None:
    f, y, w, q = drawn(30, 8)
    w[0], w[2] = 1, 0
    if kind == "vector":
        if not isinstance(settings.get("ridge", 1.0), float | int):
            settings = {**settings, "ridge": [0.1]}
        y = y[:, 0]
    rows = (f, y, w) if kind == "tensor" else tuple(x.numpy() for x in (f, y, w))
    queries = q if kind == "tensor" else q.numpy()
    model = KernelRidge(**settings)
    model.fit(rows[0][:20], rows[1][:20])  # is forgotten
    before = 0
    for last in (1, 5, 8, 9, 30):
        x, targets, weights = (part[before:last] for part in rows)
        assert model.partial_fit(x, targets, weights) is model
        before = last
        exact = KernelRidge(**settings).fit(*(part[:last] for part in rows))
        assert_same(model, exact, queries)
        assert model.n_features_in_ == 8
        assert hasattr(model, "dual_coef_") == (last <= 8)
        if last <= 8:
            assert_equal(*map(torch.as_tensor, (model.dual_coef_, exact.dual_coef_)), 1e-8)
        model = pickle.loads(pickle.dumps(model))
    assert not hasattr(clone(model), "fit_")
    model.fit(rows[0][:9], rows[1][:9]).partial_fit(rows[0][:3], rows[1][:3])
    assert_same(model, KernelRidge(**settings).fit(rows[0][:3], rows[1][:3]), queries)


def test_it_is_scikit_learns_ridge_of_all_rows() -> None:
    f, y, w, q = (x.numpy() for x in drawn(300, 8))
    model = KernelRidge(0.7, intercept=True)
    for first in range(0, 300, 50):
        part = slice(first, first + 50)
        model.partial_fit(f[part], y[part], w[part] + 0.1)
    exact = Ridge(alpha=0.7).fit(f, y, w + 0.1)
    np.testing.assert_allclose(model.predict(q), exact.predict(q), rtol=1e-9)
    model.set_params(ridge=7.0).partial_fit(f[:1], y[:1])
    weights = np.append(w + 0.1, 1)
    exact = Ridge(alpha=7.0).fit(np.append(f, f[:1], 0), np.append(y, y[:1], 0), weights)
    np.testing.assert_allclose(model.predict(q), exact.predict(q), rtol=1e-9)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("settings", MODELS)
@pytest.mark.parametrize("shape", [(30, 8), (9, 12)])
@pytest.mark.parametrize("alone", [False, True])
def test_a_file_is_fitted_in_blocks(
    shape: tuple[int, int],
    settings: dict[str, Any],
    dtype: type,
    alone: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if alone:
        monkeypatch.setattr(base, "HAS_SKLEARN", False)
    f, y, w, q = (x.numpy() for x in drawn(*shape))
    f = f.astype(dtype)
    file = mapped(tmp_path, "f", f)
    got = KernelRidge(**settings).fit(file, y, w)
    computed = np.float64 if dtype == np.float64 else np.float32
    exact = KernelRidge(**settings).fit(f.astype(computed), y, w)
    assert_same(got, exact, q.astype(computed), 1e-8 if dtype == np.float64 else 2e-4)
    primal = shape[0] > shape[1]
    assert hasattr(got, "dual_coef_") != primal
    part = mapped(tmp_path, "q", q.astype(dtype))
    tolerance = 1e-9 if dtype == np.float64 else 1e-3
    assert_equal(*map(torch.as_tensor, (got.predict(part), got.predict(q.astype(computed)))),
                 tolerance)  # fmt: skip
    again = KernelRidge(**settings).partial_fit(file[:4], y[:4]).partial_fit(file[4:], y[4:])
    whole = KernelRidge(**settings).fit(f.astype(computed), y)
    assert_same(again, whole, q.astype(computed), 1e-8 if dtype == np.float64 else 2e-4)


def test_nan_in_a_file(tmp_path: Path) -> None:
    f, y, _, _ = (x.numpy() for x in drawn(30, 8))
    model = KernelRidge().fit(f, y)
    f[17, 3] = np.nan
    file = mapped(tmp_path, "f", f)
    with pytest.raises(NonFiniteError, match="KernelRidge.fit: X holds NaN or infinity, .* row 17"):
        KernelRidge().fit(file, y)
    with pytest.raises(NonFiniteError, match="KernelRidge.predict: X holds NaN .* row 17"):
        model.predict(file)
    model.partial_fit(f[:4], y[:4])
    with pytest.raises(NonFiniteError, match="KernelRidge.partial_fit: X holds NaN .* row 13"):
        model.partial_fit(file[4:], y[4:])
    f[17, 3] = 0
    assert_same(model.partial_fit(f[4:], y[4:]), KernelRidge().fit(f, y), f)


def test_what_the_first_call_fixes() -> None:
    f, y, _, q = drawn(20, 8)
    x, targets = f.numpy(), y.numpy()
    model = KernelRidge().partial_fit(x, targets)
    for error, match, call in (
        (ValueError, "X has 7 features, but KernelRidge is expecting 8", (x[:, :7], targets)),
        (ValueError, r"y must be \[m, 3\] like .* got shape \(20, 2\)", (x, targets[:, :2])),
        (ValueError, r"y must be \[m, 3\] like .* got shape \(20,\)", (x, targets[:, 0])),
        (ValueError, "y must be an array, got None", (x, None)),
        (TypeError, "X must be an array of torch.float64 .*, got a tensor of torch.fl", (f, y)),
        (TypeError, "float64 .*, got an array of torch.float32", (x.astype("f"), targets)),
        (TypeError, "X is sparse", (scipy.sparse.csr_array(x), targets)),
        (ValueError, "no sample_weight may be negative", (x, targets, -np.ones(20))),
        (ValueError, "y.* NaN", (x, targets * np.nan)),
    ):
        with pytest.raises(error, match=match):
            model.partial_fit(*call)
    with pytest.raises(ValueError, match="partial_fit: intercept must stay False between calls"):
        model.set_params(intercept=True).partial_fit(x, targets)
    model.set_params(intercept=False)
    tensors = KernelRidge().partial_fit(f, y)
    with pytest.raises(ValueError, match=r"partial_fit: X must be \[m, 8\], got shape \(20, 7\)"):
        tensors.partial_fit(f[:, :7], y)
    with pytest.raises(TypeError, match="float64 on cpu like in the first call, got a tensor"):
        tensors.partial_fit(f.float(), y.float())
    for solver, match in (
        (Solver(form="w"), "form must be 'auto' or 'primal', got 'w'"),
        (Solver(precision="fast"), "precision 'fast' scales"),
        (Solver(backend="reference"), "backend 'reference' keeps no fit"),
    ):
        with pytest.raises(ValueError, match="KernelRidge.partial_fit: " + match):
            KernelRidge(solver=solver).partial_fit(x, targets)
    # None of these added rows.
    twice = np.append(x, x, 0), np.append(targets, targets, 0)
    assert_same(model.partial_fit(x, targets), KernelRidge().fit(*twice), q.numpy())
    assert not hasattr(KernelRidgeCV(), "partial_fit")


def test_a_ridge_that_is_too_small_can_be_raised() -> None:
    f, y, _, q = drawn(600, 530)
    f[:, 1:] = f[:, :1]
    rows: tuple[Tensor, Tensor] = f, y
    model = KernelRidge(1e-25, solver=Solver(max_retries=0))
    with pytest.raises(NotPositiveDefiniteError, match="pass a larger ridge"):
        model.partial_fit(*rows)
    model.set_params(ridge=1.0, solver=None).partial_fit(f[:1], y[:1])
    exact = KernelRidge(1.0).fit(torch.cat((f, f[:1])), torch.cat((y, y[:1])))
    assert_same(model, exact, q)
