"""Corners that a review found: each was once a wrong number in silence, or an error of torch's."""

import copy
import gc
import os
import pickle
import weakref

import numpy as np
import pytest
import torch

import krrst_fast.precision
from krrst_fast import (
    NonFiniteError,
    NotPositiveDefiniteError,
    Solver,
    gram,
    krr_fit,
    krr_mse,
    krr_path,
    krr_predict,
    krr_predict_from_gram,
    ridge_solve,
)
from krrst_fast.precision import full_precision
from tests.helpers import assert_equal, problem


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_path_predicts_batches_that_only_the_queries_have(count: int) -> None:
    f, y, _, _ = problem(8, 5, 1, 2)
    path = krr_path(f, y, [1e-3, 1e-1, 1.0])
    queries = torch.randn(count, 4, 5, dtype=torch.float64)
    got = path.predict(queries)
    assert got.shape == (3, count, 4, 2)
    for i in range(count):
        assert_equal(got[:, i], path.predict(queries[i]), 1e-13)


def test_a_path_refuses_what_it_cannot_decompose() -> None:
    f, y, _, _ = problem(8, 5, 1, 2)
    with pytest.raises(NotPositiveDefiniteError, match="krr_path: a ridge of 0 is below the round"):
        krr_path(torch.zeros_like(f), y, [1.0])
    twice = torch.cat((f, f))
    with pytest.raises(NotPositiveDefiniteError, match="is below the rounding of the gram"):
        krr_path(twice, torch.cat((y, -y)), [1e-2, 1e-19])
    for ridges in ("ab", None, [10**400], torch.ones(2).to_sparse()):
        with pytest.raises((TypeError, ValueError), match="krr_path: ridges must be"):
            krr_path(f, y, ridges)


def test_a_row_that_alone_says_something_is_never_the_best_left_out() -> None:
    f = 1e3 * torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    y = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
    path = krr_path(f, y, [1e-9, 1e2], ridge_of="absolute")
    assert not path.loo_mse.isnan().any() and path.best == 1e2
    fit = krr_fit(f, y, solver=Solver(form="primal"), ridge=1e-11, ridge_of="absolute")
    assert fit.loo_residuals[0].isinf().all() and fit.loo_residuals[1:].isfinite().all()
    dual = krr_fit(f, y, solver=Solver(form="w"), ridge=1e2, ridge_of="absolute")
    assert_equal(path.loo_residuals[1], dual.loo_residuals, 1e-6)


@pytest.mark.parametrize("n", [3, 10, 30])
def test_condition_of_centred_features(n: int) -> None:
    f = problem(n, 40, 1, 1)[0]
    f = f - f.mean(0)
    fit = krr_fit(f, torch.ones(n, 1).double(), ridge=1e-3)
    k = f @ f.T
    values = torch.linalg.eigvalsh(k + fit.info.ridge * torch.eye(n).double())
    assert 0.5 * values[-1] / values[0] < fit.condition <= 1.001 * values[-1] / values[0]


@pytest.mark.parametrize("batched", [False, True])
def test_features_whose_squares_underflow(batched: bool) -> None:
    tensors = [x.float() for x in problem(6, 8, 5, 2)]
    tensors[0] = tensors[0] * 1e-25
    if batched:
        tensors = [torch.stack((x, x)) for x in tensors]
    with pytest.raises(NotPositiveDefiniteError, match="squares underflow"):
        krr_mse(*tensors)
    _, info = krr_mse(*tensors, solver=Solver(check="flag"), return_info=True)
    assert info.failed.all()


def test_no_rows_are_no_failure() -> None:
    f_syn, y_syn, f_real, _ = problem(4, 3, 5, 2)
    flagged = Solver(check="flag")
    prediction, info = krr_predict(f_syn[:0], y_syn[:0], f_real, solver=flagged, return_info=True)
    assert not info.failed and torch.equal(prediction, torch.zeros(5, 2).double())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_where_nothing_asks_for_a_gradient() -> None:
    f_syn, y_syn, f_real, _ = problem(6, 9, 5, 2)
    k, k_rs = f_syn @ f_syn.T, f_real @ f_syn.T
    for function, arguments in (
        (lambda *t: ridge_solve(*t, ridge=0.1), (k, y_syn)),
        (lambda *t: krr_predict_from_gram(*t, ridge=0.1), (k, k_rs, y_syn)),
        (lambda *t: krr_predict(*t, ridge=0.1), (f_syn, y_syn, f_real)),
        (lambda *t: gram(*t), (f_syn,)),
    ):
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        assert_equal(compiled(*arguments), function(*arguments), 1e-12)


def test_a_fit_keeps_no_graph_and_is_a_value() -> None:
    layer = torch.nn.Linear(5, 5, dtype=torch.float64)
    f, y, q, _ = problem(8, 5, 4, 2)
    features = layer(f)
    alive = weakref.ref(features)
    fit = krr_fit(features, y, solver=Solver(backend="torch"))
    del features
    gc.collect()
    assert alive() is None
    for copied in (copy.deepcopy(fit), pickle.loads(pickle.dumps(fit))):
        assert torch.equal(copied.predict(q), fit.predict(q))
        assert torch.equal(copied.loo_residuals, fit.loo_residuals)


def test_features_that_are_changed_after_the_fit() -> None:
    f, y, q, _ = problem(8, 5, 4, 2)
    weights = torch.arange(8).double()
    fits = [krr_fit(f, y, solver=Solver(form=form)) for form in ("w", "primal")]
    fits.append(krr_fit(f, y, weights=weights))
    before = [(fit.predict(q), fit.loo_residuals) for fit in fits]
    f.mul_(2)
    y.add_(1)
    for fit, (prediction, left_out) in zip(fits, before):
        assert torch.equal(fit.predict(q), prediction)
        assert torch.equal(fit.loo_residuals, left_out)


def test_left_out_residuals_have_the_precision_of_the_data() -> None:
    f, y, _, _ = (x.float() for x in problem(8, 5, 1, 2))
    for precision in (None, "float64", "fast"):
        assert (
            krr_fit(f, y, solver=Solver(precision=precision)).loo_residuals.dtype == torch.float32
        )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="asks for fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_process_is_not_inside() -> None:
    get = torch._C._get_fp32_precision_getter
    before = get("mkldnn", "matmul")
    with full_precision():
        child = os.fork()
        if child == 0:  # no assert here: pytest must not run on in the child
            restored = get("mkldnn", "matmul") == before
            os._exit(0 if restored and krrst_fast.precision._inside == 0 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_small_things() -> None:
    tensors = problem(6, 4, 5, 2)
    with pytest.raises(NonFiniteError, match="gram: x holds NaN"):
        gram(torch.full((2, 2), float("nan")), solver=Solver(backend="reference"))
    with pytest.raises(ValueError, match="max_retries must be from 0 to 700, got 1000000000"):
        krr_mse(*tensors, solver=Solver(max_retries=10**9))
    with pytest.raises(TypeError, match="return_info must be True or False"):
        krr_mse(*tensors, return_info=torch.ones(2))
    assert krr_mse(*tensors, ridge=np.float32(0.5)) == krr_mse(*tensors, ridge=0.5)
