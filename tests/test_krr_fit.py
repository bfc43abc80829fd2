"""krr_fit: the same predictions as krr_predict, from a factor that is kept."""

import pytest
import torch

from krrst_fast import Solver, krr_fit, krr_predict
from krrst_fast.planner import FORMS
from tests.helpers import assert_equal, problem


@pytest.mark.parametrize("form", ["auto", *FORMS])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (13, 7, 5, 3), (7, 13, 5, 30)])
def test_predicts_like_the_reference(shape: tuple[int, int, int, int], form: str) -> None:
    f_syn, y_syn, f_real, _ = problem(*shape)
    kernel = {"ridge": 1e-3, "bias": 0.5, "scale": 2.0}
    fit = krr_fit(f_syn, y_syn, solver=Solver(form=form), **kernel)
    exact = krr_predict(
        f_syn, y_syn, f_real, solver=Solver(backend="reference"), detach_ridge=True, **kernel
    )
    assert_equal(fit.predict(f_real), exact, 1e-10)
    k = 2.0 * f_syn @ f_syn.mT + 0.5
    alpha = torch.linalg.solve(k + 1e-3 * k.trace() * torch.eye(len(k), dtype=k.dtype), y_syn)
    assert_equal(fit.alpha, alpha, 1e-9)
    assert_equal(fit.info.ridge, 1e-3 * k.trace(), 1e-12)


def test_the_factor_is_of_the_ridged_gram() -> None:
    f_syn, y_syn, _, _ = problem(9, 20, 1, 2)
    fit = krr_fit(f_syn, y_syn, ridge=0.3, ridge_of="absolute", solver=Solver(form="w"))
    assert_equal(
        fit.info.factor @ fit.info.factor.mT,
        f_syn @ f_syn.mT + 0.3 * torch.eye(9, dtype=torch.float64),
        1e-12,
    )


def test_predict_is_differentiable_in_the_features() -> None:
    f_syn, y_syn, f_real, _ = problem(9, 5, 4, 2)
    fit = krr_fit(f_syn.requires_grad_(), y_syn, bias=1.0)
    assert not fit.alpha.requires_grad
    assert torch.autograd.gradcheck(fit.predict, f_real.requires_grad_())


def test_autocast_does_not_reach_the_fit() -> None:
    f_syn, y_syn, f_real, _ = (x.float() for x in problem(9, 5, 4, 2))
    plain = krr_fit(f_syn, y_syn).predict(f_real)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(krr_fit(f_syn, y_syn).predict(f_real), plain)


def test_bad_input_is_named() -> None:
    fit = krr_fit(torch.eye(3), torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"f must be \[..., B, 3\], got shape \(2, 4\)"):
        fit.predict(torch.ones(2, 4))
    with pytest.raises(TypeError, match="KRRFit.predict: .* one dtype"):
        fit.predict(torch.ones(2, 3).double())
    with pytest.raises(ValueError, match="krr_fit: f_syn must have at least one row"):
        krr_fit(torch.ones(0, 3), torch.ones(0, 2))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(9, 5, 1, 2), (5, 9, 1, 3), (1, 1, 1, 1)])
def test_leave_one_out_is_the_fit_without_the_row(
    shape: tuple[int, int, int, int], weighted: bool, form: str
) -> None:
    f_syn, y_syn, _, _ = problem(*shape)
    weights = torch.arange(1, shape[0] + 1).double() % 3 if weighted else None
    kernel = {"bias": 0.5, "scale": 2.0}
    fit = krr_fit(f_syn, y_syn, ridge=0.1, solver=Solver(form=form), weights=weights, **kernel)
    for i in range(shape[0]):
        rest = torch.arange(shape[0]) != i
        options = {"ridge": fit.info.ridge, "ridge_of": "absolute", **kernel}
        if weights is not None:
            options["weights"] = weights[rest]
        prediction = krr_predict(f_syn[rest], y_syn[rest], f_syn[i : i + 1], **options)
        assert_equal(fit.loo_residuals[i], y_syn[i] - prediction[0], 1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_weights_of_the_rows(form: str) -> None:
    f_syn, y_syn, f_real, _ = problem(9, 6, 5, 2)
    weights = torch.rand(9, dtype=torch.float64) + 0.1
    kernel = {"ridge": 0.1, "bias": 0.5, "scale": 2.0, "weights": weights}
    fit = krr_fit(f_syn, y_syn, solver=Solver(form=form), **kernel)
    assert fit.weights.shape == (6, 2) and fit.intercept.shape == (2,)
    assert_equal(fit.predict(f_real), krr_predict(f_syn, y_syn, f_real, **kernel), 1e-11)
    k_rs = 2.0 * f_real @ f_syn.T + 0.5
    assert_equal(k_rs @ fit.alpha, fit.predict(f_real), 1e-10)


def test_condition_is_that_of_the_solved_system() -> None:
    f_syn, y_syn, _, _ = problem(9, 20, 1, 2, condition=1e4)
    fit = krr_fit(f_syn, y_syn, ridge=1e-3)
    k = f_syn @ f_syn.T
    values = torch.linalg.eigvalsh(k + 1e-3 * k.trace() * torch.eye(9).double())
    assert 0.5 * values[-1] / values[0] < fit.condition <= (1 + 1e-9) * values[-1] / values[0]


@pytest.mark.parametrize("precision", ["float64", "float32", "fast"])
def test_a_fit_predicts_in_its_precision(precision: str) -> None:
    tensors = [x.float() for x in problem(20, 30, 7, 2)]
    fit = krr_fit(*tensors[:2], solver=Solver(precision=precision))
    prediction = krr_predict(*tensors[:3], solver=Solver(precision=precision))
    assert fit.predict(tensors[2]).dtype == torch.float32
    assert_equal(fit.predict(tensors[2]), prediction, 1e-5)
