"""Features whose squares leave the range of their precision: right, or an error that says so."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

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
from krrst_fast.planner import FORMS
from tests.helpers import assert_equal, problem

F = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]])
Y = torch.tensor([[1.0], [2.0]])


@pytest.mark.parametrize("form", ["k", "primal"])
def test_the_condition_number_does_not_depend_on_the_scale(form: str) -> None:
    f, y, *_ = problem(600, 300, 1, 2)
    solver = Solver(form=form)
    exact = krr_fit(f, y, ridge=1e-3, solver=solver).condition
    for scale in (1e80, 1e-80, 1e3):
        assert_equal(krr_fit(f * scale, y, ridge=1e-3, solver=solver).condition, exact, 1e-9)
    for scale in (1e8, 1e-8, 1.0):
        single = krr_fit((f * scale).float(), y.float(), ridge=1e-3, solver=solver)
        assert_equal(single.condition.double(), exact, 1e-3)


def test_the_condition_number_does_not_depend_on_the_default_dtype() -> None:
    fit = krr_fit(F, Y, ridge=1e-3)
    expected = fit.condition
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(fit.condition, expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("scale", [1.0, 1e25, 1e-15])
def test_leave_one_out_residuals_do_not_depend_on_the_scale(scale: float) -> None:
    solver = Solver(precision="float64")
    exact = krr_fit(F.double(), Y.double(), ridge=0.5).loo_residuals
    assert_equal(krr_fit(F * scale, Y, ridge=0.5, solver=solver).loo_residuals, exact, 1e-6)


@pytest.mark.parametrize("scale", [1e-20, 1e-25])
@pytest.mark.parametrize("precision", [None, "float64"])
def test_dual_coefficients_beyond_the_range_raise(scale: float, precision: str | None) -> None:
    with pytest.raises((NonFiniteError, NotPositiveDefiniteError)) as caught:
        krr_fit(F * scale, Y, ridge=0.5, solver=Solver(precision=precision))
    assert "scale them up" in str(caught.value) or "nearer to 1" in str(caught.value)


def test_a_result_that_float32_cannot_hold_raises() -> None:
    with pytest.raises(NonFiniteError, match="y_syn up to 2e.30.*nearer to 1"):
        krr_mse(F, Y * 1e30, F, Y, solver=Solver(precision="float64"))
    with pytest.raises(NonFiniteError, match="f_syn up to 2e.25.*nearer to 1"):
        krr_mse(F * 1e25, Y, F * 1e25, Y)


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e-139, 1.0, 1e139, 1e160])
def test_a_path_is_right_or_refuses(scale: float) -> None:
    f, y = F.double() * scale, Y.double()
    if not 1e-140 < scale < 1e140:
        with pytest.raises(NonFiniteError, match="krr_path: f_syn must have its largest entry"):
            krr_path(f, y, [0.1, 1.0])
        return
    exact = krr_path(F.double(), y, [0.1, 1.0])
    assert_equal(krr_path(f, y, [0.1, 1.0]).predict(f), exact.predict(F.double()), 1e-9)


def test_a_nan_in_a_subclass_is_found() -> None:
    class Named(torch.Tensor):
        pass

    f_real: Tensor = torch.full((2, 3), float("nan")).as_subclass(Named)
    with pytest.raises(NonFiniteError, match="krr_predict: f_real holds NaN"):
        krr_predict(F, Y, f_real)


def test_fits_compare_as_objects() -> None:
    fit = krr_fit(F, Y)
    path = krr_path(F, Y, [1.0])
    assert fit == fit and fit != krr_fit(F, Y) and fit.info == fit.info and path == path


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [1e-60, 1e-40])
def test_a_constant_that_rounds_to_zero_is_one_nonetheless(form: str, bias: float) -> None:
    f, y, q, t = (x.float() for x in problem(12, 5, 6, 2))
    options = {"ridge": 0.1, "solver": Solver(form=form)}
    leaves = [x.clone().requires_grad_() for x in (f, y)]
    loss, info = krr_mse(*leaves, q, t, bias=bias, return_info=True, **options)
    exact = krr_mse(f, y, q, t, **options)
    assert_equal(loss.detach(), exact, 1e-5)
    assert info.factor.shape[-1] == (6 if form == "primal" else 12)
    assert all(x.isfinite().all() for x in torch.autograd.grad(loss, leaves))
    fit = krr_fit(f, y, bias=bias, **options)
    assert_equal(fit.predict(q), krr_predict(f, y, q, **options), 1e-4)


_DOUBLE = Solver(precision="float64")
_LARGE = torch.full((2, 2), 1e30)
_FIT = krr_fit(torch.eye(2), _LARGE, ridge=1e-6, ridge_of="absolute", solver=_DOUBLE)


@pytest.mark.parametrize(
    "call",
    [
        lambda: gram(_LARGE, solver=_DOUBLE),
        lambda: ridge_solve(
            1e-20 * torch.eye(2), _LARGE, ridge=1e-20, ridge_of="absolute", solver=_DOUBLE
        ),
        lambda: krr_predict_from_gram(torch.eye(2), _LARGE, _LARGE, solver=_DOUBLE),
        lambda: krr_predict(torch.eye(2), _LARGE, _LARGE, solver=_DOUBLE),
        lambda: krr_fit(1e-20 * torch.eye(2), _LARGE, solver=_DOUBLE),
        lambda: _FIT.predict(_LARGE),
        lambda: krr_path(torch.eye(2), _LARGE, [0.1]).predict(_LARGE),
        lambda: krr_path(torch.eye(2), _LARGE, [0.1]).fit_best().predict(_LARGE),
    ],
)
def test_what_float32_cannot_hold_is_named(call: Callable[[], Any]) -> None:
    """It is computed in float64, where it is finite, and overflows when it is rounded."""
    with pytest.raises(NonFiniteError, match="finite inputs gave a result that is not"):
        call()
