"""KernelRidge: scikit-learn's own checks, its numbers, and tensors beside arrays."""

import inspect
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn import kernel_ridge
from sklearn.base import clone
from sklearn.metrics import r2_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from krrst_fast import KernelRidge, KernelRidgeCV, Solver, krr_predict
from tests.helpers import assert_equal, problem


def arrays(m: int, d: int, b: int, p: int) -> list[np.ndarray]:
    """F_s, Y_s, F_r, Y_r; for p = 0 the targets are vectors."""
    f_syn, y_syn, f_real, y_real = (x.numpy() for x in problem(m, d, b, max(p, 1)))
    return [f_syn, y_syn if p else y_syn[:, 0], f_real, y_real if p else y_real[:, 0]]


def assert_close(got: Any, exact: Any, tolerance: float, what: str = "") -> None:
    pair = (x if isinstance(x, torch.Tensor) else torch.tensor(np.asarray(x)) for x in (got, exact))
    assert_equal(*pair, tolerance, what)


WHOLE = "a weighted row is left out with its whole weight, a repeated one alone"
OF_KERNELS = [KernelRidge(kernel=kernel) for kernel in ("polynomial", "rbf", "cosine", "arccos")]
EXPECTED = {"check_sample_weight_equivalence_on_dense_data": WHOLE}


@parametrize_with_checks(
    [KernelRidge(), KernelRidgeCV(), KernelRidgeCV(per_target=True), *OF_KERNELS],
    expected_failed_checks=lambda x: EXPECTED if isinstance(x, KernelRidgeCV) else {},
)
def test_scikit_learns_checks(estimator: Any, check: Callable[[Any], None]) -> None:
    check(estimator)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(13, 7, 5, 3), (7, 13, 5, 1), (40, 3, 9, 0), (3, 40, 9, 0)])
def test_fits_what_scikit_learn_fits(shape: tuple[int, int, int, int], weighted: bool) -> None:
    f_syn, y_syn, f_real, y_real = arrays(*shape)
    weights = np.linspace(0, 3, len(f_syn)) if weighted else None
    theirs = kernel_ridge.KernelRidge(kernel="linear", alpha=0.3).fit(f_syn, y_syn, weights)
    ours = KernelRidge(0.3).fit(f_syn, y_syn, weights)
    assert_close(ours.predict(f_real), theirs.predict(f_real), 1e-9)
    assert_close(ours.dual_coef_, theirs.dual_coef_, 1e-9)
    assert_close(ours.coef_, (f_syn.T @ theirs.dual_coef_).T, 1e-9)
    assert ours.score(f_real, y_real) == pytest.approx(theirs.score(f_real, y_real), abs=1e-9)
    assert np.shape(ours.intercept_) == y_syn.shape[1:]
    assert np.all(ours.intercept_ == 0)


@pytest.mark.parametrize("ridge_of", ["absolute", "trace", "mean_diagonal"])
def test_a_whole_weight_is_that_many_rows(ridge_of: str) -> None:
    f_syn, y_syn, f_real, _ = arrays(9, 5, 4, 2)
    counts = np.array([0, 1, 2, 3, 1, 0, 1, 1, 4])
    repeated = f_syn.repeat(counts, axis=0), y_syn.repeat(counts, axis=0)
    model = KernelRidge(0.1, ridge_of=ridge_of, bias=0.5)
    by_rows = clone(model).fit(*repeated)
    by_weights = model.fit(f_syn, y_syn, sample_weight=counts)
    if ridge_of != "mean_diagonal":  # a mean over fewer rows
        assert_close(by_weights.predict(f_real), by_rows.predict(f_real), 1e-9)
    assert np.all(by_weights.dual_coef_[counts == 0] == 0)
    assert_close(by_weights.intercept_, 0.5 * by_weights.dual_coef_.sum(0), 1e-12)
    assert_close(by_weights.coef_, by_weights.dual_coef_.T @ f_syn, 1e-9)


def test_one_number_weighs_every_row() -> None:
    f_syn, y_syn, f_real, _ = arrays(9, 5, 4, 2)
    weighted = KernelRidge(0.6).fit(f_syn, y_syn, sample_weight=3.0)
    assert_close(weighted.predict(f_real), KernelRidge(0.2).fit(f_syn, y_syn).predict(f_real), 1e-9)


@pytest.mark.parametrize("weights", [None, [0.5, 0, 2, 1, 1, 3]])
def test_score_is_that_of_scikit_learn(weights: list[float] | None) -> None:
    f_syn, y_syn, f_real, y_real = arrays(9, 5, 6, 4)
    model = KernelRidge(0.1).fit(f_syn, y_syn)
    prediction = model.predict(f_real)
    y_real[:, 1] = 2.0  # does not vary, and is missed
    y_real[:, 2] = prediction[:, 2]
    exact = r2_score(y_real, prediction, sample_weight=weights)
    assert model.score(f_real, y_real, weights) == pytest.approx(exact, abs=1e-12)
    tensors = torch.from_numpy(f_real), torch.from_numpy(y_real)
    assert model.score(*tensors, weights) == pytest.approx(exact, abs=1e-12)
    vector = KernelRidge(0.1).fit(f_syn, y_syn[:, 0])
    exact = r2_score(y_real[:, 0], vector.predict(f_real))
    assert vector.score(f_real, y_real[:, :1]) == pytest.approx(exact, abs=1e-12)
    with pytest.warns(UserWarning, match=r"KernelRidge.score: R\^2 is not defined for fewer than"):
        assert np.isnan(model.score(f_real[:1], y_real[:1]))


def test_score_of_constant_targets() -> None:
    f_syn, f_real = np.eye(3), np.zeros((2, 3))
    model = KernelRidge().fit(f_syn, np.ones((3, 2)))  # predicts 0 at 0
    assert model.score(f_real, np.zeros((2, 2))) == 1.0
    assert model.score(f_real, np.ones((2, 2))) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_in_tensors_out(dtype: torch.dtype) -> None:
    f_syn, y_syn, f_real, y_real = (x.to(dtype) for x in problem(12, 20, 5, 3))
    weights = torch.linspace(0.5, 2, 12)
    settings = {"ridge": 0.02, "ridge_of": "trace", "bias": 0.5, "scale": 2.0}
    model = KernelRidge(**settings).fit(f_syn.requires_grad_(), y_syn, sample_weight=weights)
    exact = KernelRidge(**settings).fit(*(x.detach().double() for x in (f_syn, y_syn)), weights)
    prediction = model.predict(f_real)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-12
    for got, want in (
        (prediction, exact.predict(f_real.double())),
        (model.coef_, exact.coef_),
        (model.intercept_, exact.intercept_),
        (model.dual_coef_, exact.dual_coef_),
    ):
        assert got.dtype == dtype
        assert not got.requires_grad
        assert_equal(got.double(), want, tolerance)
    score = model.score(f_real, y_real)
    assert score == pytest.approx(model.score(f_real.numpy(), y_real.numpy()), abs=1e-6)
    assert model.predict(f_real.numpy()).dtype == f_real.numpy().dtype


@pytest.mark.parametrize("precision", ["float64", "float32", "fast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision_is_that_of_the_computation(dtype: torch.dtype, precision: str) -> None:
    f_syn, y_syn, f_real, _ = problem(12, 20, 5, 3)
    exact = KernelRidge(0.1).fit(f_syn, y_syn).predict(f_real)
    model = KernelRidge(0.1, solver=Solver(precision=precision)).fit(
        f_syn.to(dtype), y_syn.to(dtype)
    )
    prediction = model.predict(f_real.to(dtype))
    assert prediction.dtype == model.coef_.dtype == dtype
    assert_equal(prediction.double(), exact, {"fast": 1e-2, "float32": 1e-4}.get(precision, 1e-6))
    array = f_real.to(dtype).numpy()
    assert np.array_equal(model.predict(array), prediction.numpy())


def test_a_tensor_fit_is_krr_predict() -> None:
    f_syn, y_syn, f_real, _ = problem(9, 5, 4, 1)
    exact = krr_predict(f_syn, y_syn, f_real, ridge=0.3, ridge_of="absolute", bias=1.0)
    model = KernelRidge(0.3, bias=1.0).fit(f_syn, y_syn[:, 0])
    assert_equal(model.predict(f_real), exact[:, 0], 1e-10)
    assert torch.autograd.gradcheck(model.predict, f_real.requires_grad_())
    # Arrays at a fit to tensors, and tensors at a fit to arrays.
    assert_close(model.predict(f_real.detach().numpy()), exact[:, 0], 1e-10)
    model.fit(f_syn.numpy(), y_syn.numpy()[:, 0])
    assert torch.autograd.gradcheck(model.predict, f_real)


def test_dtypes_of_arrays() -> None:
    f_syn, y_syn, f_real, _ = (np.round(4 * x) for x in arrays(9, 5, 4, 2))
    exact = KernelRidge().fit(f_syn, y_syn).predict(f_real)
    single = KernelRidge().fit(f_syn.astype(np.float32), y_syn)
    assert single.predict(f_real.astype(np.float32)).dtype == np.float32
    assert single.coef_.dtype == single.dual_coef_.dtype == np.float32
    assert_close(single.predict(f_real).astype(float), exact, 1e-5)
    whole = KernelRidge().fit(f_syn.astype(int), y_syn.astype(int)).predict(f_real.astype(np.int8))
    assert np.array_equal(whole, exact)
    lists = KernelRidge().fit(f_syn.tolist(), y_syn.tolist()).predict(f_real.tolist())
    assert np.array_equal(lists, exact)


def test_arrays_that_torch_cannot_share() -> None:
    f_syn, y_syn, f_real, _ = arrays(9, 5, 4, 2)
    exact = KernelRidge().fit(f_syn[::-1].copy(), y_syn).predict(f_real)
    frozen = f_syn[::-1]
    frozen.setflags(write=False)
    model = KernelRidge().fit(frozen, y_syn.astype(">f8"))
    assert_close(model.predict(np.asfortranarray(f_real)), exact, 1e-12)


def test_searches_pipelines_and_copies() -> None:
    f_syn, y_syn, f_real, _ = arrays(30, 5, 4, 2)
    grid = {"kernelridge__ridge": [1e-3, 1e-1, 10.0]}
    ours = GridSearchCV(make_pipeline(StandardScaler(), KernelRidge()), grid).fit(f_syn, y_syn)
    grid = {"kernelridge__alpha": [1e-3, 1e-1, 10.0]}
    linear = kernel_ridge.KernelRidge(kernel="linear")
    theirs = GridSearchCV(make_pipeline(StandardScaler(), linear), grid).fit(f_syn, y_syn)
    for key in ("mean_test_score", "rank_test_score"):
        assert_close(ours.cv_results_[key], theirs.cv_results_[key], 1e-9)
    model = ours.best_estimator_[-1]
    copy = pickle.loads(pickle.dumps(model))
    assert np.array_equal(copy.predict(f_real), model.predict(f_real))
    again = clone(model)
    assert again.get_params() == model.get_params()
    assert not hasattr(again, "fit_")
    assert repr(KernelRidge(bias=2.0, ridge=0.5)) == "KernelRidge(bias=2.0, ridge=0.5)"
    parameters = {"ridge": 3.0, "solver": Solver(precision="float64", form="primal")}
    assert {**again.get_params(), **parameters} == again.set_params(**parameters).get_params()
    assert again.fit(f_syn, y_syn).fit_.info.form == "primal"
    numbers = KernelRidge(np.int64(3), bias=np.float32(1.0))
    exact = KernelRidge(3, bias=1.0).fit(f_syn, y_syn)
    assert np.array_equal(numbers.fit(f_syn, y_syn).coef_, exact.coef_)


BAD_FITS: list[tuple[str, tuple[Any, ...], type[Exception], str]] = [
    ("vector X", (torch.ones(3), torch.ones(3)), ValueError, r"fit: X must be a matrix, got .*3,"),
    ("batch", (torch.ones(2, 3, 4), torch.ones(2, 3)), ValueError, r"fit: X must be a matrix"),
    ("3-D y", (torch.ones(3, 4), torch.ones(3, 1, 1)), ValueError, r"fit: y must be \[M\] or \[M,"),
    ("rows", (torch.ones(3, 4), torch.ones(2)), ValueError, "fit: X and y .* same number of rows"),
    ("no rows", (torch.ones(0, 4), torch.ones(0)), ValueError, "fit: X and y .* one or more"),
    ("dtypes", (torch.ones(3, 4), torch.ones(3).double()), TypeError, "fit: .*X.*y.*float64"),
    ("integers", (torch.ones(3, 4).int(), torch.ones(3)), TypeError, "fit: X must be .*int32"),
    ("array y", (torch.ones(3, 4), np.ones(3)), TypeError, "fit: y must be a tensor, got ndarray"),
    ("tensor y", (np.ones((3, 4)), torch.ones(3)), TypeError, "fit: X and y must both be"),
    ("device", (torch.ones(3, 4), torch.ones(3, device="meta")), ValueError, "fit: .*one device"),
    ("NaN", (torch.full((3, 4), torch.nan), torch.ones(3)), ValueError, "fit: X holds NaN"),
    ("inf y", (torch.ones(3, 4), torch.full((3,), torch.inf)), ValueError, "fit: y holds NaN or"),
    ("sparse", (torch.eye(3).to_sparse(), torch.ones(3)), ValueError, "fit: X must be a dense"),
    ("text", (np.array([["a"]]), np.ones(1)), ValueError, "could not convert string"),
    ("weights", (np.eye(3), np.ones(3), [1, 2]), ValueError, r"fit: sample_weight must be .*\[3\]"),
    ("negative", (np.eye(3), np.ones(3), [1, 2, -1]), ValueError, "fit: no sample_weight may be"),
    ("NaN weight", (np.eye(3), np.ones(3), np.nan), ValueError, "fit: sample_weight holds NaN"),
]


@pytest.mark.parametrize("arguments, error, match", [x[1:] for x in BAD_FITS], ids=lambda x: "")
def test_bad_fits_are_named(arguments: tuple[Any, ...], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match) as raised:
        KernelRidge().fit(*arguments)
    assert type(raised.value) is not AssertionError


def test_bad_predictions_and_parameters_are_named() -> None:
    f, y = torch.eye(3), torch.ones(3)
    with pytest.raises(AttributeError, match="KernelRidge.predict: there is no fit yet"):
        KernelRidge().predict(f)
    model = KernelRidge().fit(f, y)
    with pytest.raises(
        ValueError, match=r"KernelRidge.predict: X must be \[B, 3\], got .*\(2, 4\)"
    ):
        model.predict(torch.ones(2, 4))
    with pytest.raises(ValueError, match="X has 4 features, but KernelRidge is expecting 3"):
        model.predict(np.ones((2, 4)))
    with pytest.raises(TypeError, match="float64"):
        model.predict(f.double())
    with pytest.raises(TypeError, match="KernelRidge.predict: X must be .* on cpu .* on meta"):
        model.predict(f.to("meta"))
    with pytest.raises(ValueError, match="KernelRidge.predict: X holds NaN or infinity"):
        model.predict(f * torch.nan)
    assert model.predict(scipy.sparse.eye_array(3)).shape == (3,)
    with pytest.raises(
        ValueError, match=r"KernelRidge.score: y must be of shape \(3,\), got \(2,\)"
    ):
        model.score(np.eye(3), np.ones(2))
    with pytest.raises(ValueError, match="KernelRidge.score: y must be numbers: could not convert"):
        model.score(np.eye(3), ["a", "b", "c"])
    for bad in (f * torch.nan, np.eye(3) * np.nan):
        with pytest.raises(ValueError, match="KernelRidge.score: y holds NaN or infinity"):
            model.score(f if isinstance(bad, torch.Tensor) else np.eye(3), bad[0])
    with pytest.raises(ValueError, match="KernelRidge.fit: ridge must be positive"):
        KernelRidge(-1.0).fit(f, y)
    with pytest.raises(ValueError, match="Invalid parameter 'alpha'"):
        KernelRidge().set_params(alpha=1.0)


WITHOUT = """
import sys, json
sys.modules["sklearn"] = None  # an import of it fails
import numpy as np, torch
from krrst_fast import KernelRidge

class Frame:
    def __init__(self, x, columns):
        self.x, self.columns = x, columns
    def __array__(self, dtype=None, copy=None):
        return np.array(self.x, dtype)

def error(call):
    try:
        call()
    except Exception as e:
        return [[c.__name__ for c in type(e).__mro__], str(e)]

given = json.load(sys.stdin)
f, y, w, x = (np.array(given[k]) for k in "fywx")
model = KernelRidge(0.1, ridge_of="trace", bias=0.5)
out = {"params": model.get_params(), "repr": repr(model)}
out["unfitted"] = error(lambda: model.predict(x))
out["fitted"] = model.fit(f, y, sample_weight=w) is model
out["predict"], out["score"] = model.predict(x).tolist(), model.score(f, y, w)
out["tensor"] = model.predict(torch.from_numpy(x)).tolist()
out["n_features_in_"], out["vector"] = model.n_features_in_, model.fit(f, y[:, 0]).coef_.tolist()
out["set"] = repr(model.set_params(bias=0.0, ridge=2.0))
out["float32"] = str(model.fit(f.astype("f4"), y).predict(x.astype("f4")).dtype)
out["whole"] = str(model.fit(np.eye(3, dtype=int), [1, 2, 3]).predict(np.eye(3)).dtype)
named = KernelRidge().fit(Frame(f[:, :2], ["a", "b"]), y)
out["names"] = named.feature_names_in_.tolist()
out["renamed"] = error(lambda: named.predict(Frame(x[:, :2], ["b", "a"])))
out["anonymous"] = named.predict(x[:, :2]).shape
out["forgotten"] = hasattr(named.fit(f, y), "feature_names_in_")
nan = np.full((3, 3), np.nan)
out["errors"] = {
    "set": error(lambda: model.set_params(alpha=1.0)),
    "nan": error(lambda: model.fit(nan, np.ones(3))),
    "text": error(lambda: model.fit([["a"]], [1.0])),
    "complex": error(lambda: model.fit(np.eye(3) * 1j, np.ones(3))),
    "vector": error(lambda: model.fit(np.ones(3), np.ones(3))),
    "rows": error(lambda: model.fit(np.eye(3), np.ones(2))),
    "none": error(lambda: model.fit(np.eye(3), None)),
    "columns": error(lambda: model.fit(np.eye(3), np.ones(3)).predict(np.eye(4))),
}
assert "sklearn" not in [name for name, module in sys.modules.items() if module]
print(json.dumps(out))
"""


def test_without_scikit_learn() -> None:
    f, y, x, _ = arrays(9, 5, 4, 2)
    w = np.linspace(0, 2, 9)
    given = json.dumps({"f": f.tolist(), "y": y.tolist(), "w": w.tolist(), "x": x.tolist()})
    command = [sys.executable, "-c", WITHOUT]
    ran = subprocess.run(command, input=given, capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stderr
    out = json.loads(ran.stdout)
    model = KernelRidge(0.1, ridge_of="trace", bias=0.5)
    assert out["params"] == model.get_params()
    assert list(out["params"]) == list(model.get_params())
    assert out["repr"] == re.sub(r"\s+", " ", repr(model))
    assert {"ValueError", "AttributeError", "NotFittedError"} <= set(out["unfitted"][0])
    assert out["fitted"] is True
    model.fit(f, y, w)
    for got, exact in (
        (out["predict"], model.predict(x)),
        (out["tensor"], model.predict(x)),
        (out["score"], model.score(f, y, w)),
        (out["vector"], model.fit(f, y[:, 0]).coef_),
    ):
        assert_close(np.array(got), exact, 1e-12)
    assert out["n_features_in_"] == 5
    assert out["set"] == re.sub(r"\s+", " ", repr(model.set_params(bias=0.0, ridge=2.0)))
    assert (out["float32"], out["whole"]) == ("float32", "float64")
    assert (out["names"], out["anonymous"], out["forgotten"]) == (["a", "b"], [4, 2], False)
    assert "names and the order of the fit" in out["renamed"][1]
    for what, match in {
        "set": r"Invalid parameter 'alpha' for estimator KernelRidge\(.*Valid parameters are: \[",
        "nan": "KernelRidge: X holds NaN or infinity",
        "text": "KernelRidge: X must be numbers: could not convert string to float",
        "complex": "KernelRidge: X must be real, got complex128",
        "vector": r"KernelRidge: X must be a matrix .*, got \(3,\)",
        "rows": r"KernelRidge: y must be \[3\] or \[3, P\], got \(2,\)",
        "none": "KernelRidge: y must be an array, got None",
        "columns": "X has 4 features, but KernelRidge is expecting 3 features as input",
    }.items():
        mro, message = out["errors"][what]
        assert "ValueError" in mro
        assert re.search(match, message), f"{what}: {message}"


def test_the_name_of_scikit_learn_is_answered() -> None:
    with pytest.raises(TypeError, match="KernelRidge: the alpha of scikit-learn is called ridge"):
        KernelRidge(alpha=1.0)  # type: ignore[call-arg]
    assert "ridge" in str(inspect.signature(KernelRidge))


@pytest.mark.parametrize("kind", [np.array, list, lambda x: torch.tensor(x).double()])
def test_a_ridge_for_each_target(kind: Callable[[list[float]], Any]) -> None:
    draw = np.random.default_rng(0)
    x, y, q = draw.normal(size=(9, 4)), draw.normal(size=(9, 3)), draw.normal(size=(5, 4))
    ridges, weights = [0.125, 10.0, 0.125], draw.uniform(0.5, 2, size=9)
    ours = KernelRidge(kind(ridges)).fit(x, y, weights)
    theirs = kernel_ridge.KernelRidge(alpha=np.array(ridges)).fit(x, y, weights)
    np.testing.assert_allclose(ours.predict(q), theirs.predict(q), rtol=1e-9)
    np.testing.assert_allclose(ours.dual_coef_, theirs.dual_coef_, rtol=1e-9)
    assert ours.coef_.shape == (3, 4) and ours.intercept_.shape == (3,)
    assert ours.fit_.ridge.tolist() == ridges
    one = KernelRidge(kind([0.125])).fit(x, y[:, 0]).predict(q)
    np.testing.assert_allclose(one, KernelRidge(0.125).fit(x, y[:, 0]).predict(q), rtol=1e-12)


def test_a_tensor_ridge_for_each_target_predicts_a_matrix() -> None:
    x, y, q = torch.eye(3), torch.ones(3, 2), torch.ones(3, 3, requires_grad=True)
    fitted = KernelRidge(torch.tensor([0.1, 10.0])).fit(x, y)
    prediction = fitted.predict(q)
    assert_equal(prediction.detach(), (3 / torch.tensor([1.1, 11.0])).expand(3, 2), 1e-6)
    prediction.sum().backward()
    assert q.grad is not None and q.grad.shape == (3, 3)


def test_ridges_of_another_number_of_targets() -> None:
    with pytest.raises(ValueError, match=r"one for each of the 2 targets, got shape \(3,\)"):
        KernelRidge(np.ones(3)).fit(np.eye(3), np.ones((3, 2)))
    with pytest.raises(ValueError, match="KernelRidge.fit: ridge must be positive"):
        KernelRidge(np.array([1.0, -1.0])).fit(np.eye(3), np.ones((3, 2)))
