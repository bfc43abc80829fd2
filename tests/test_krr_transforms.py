"""vmap, torch.func and torch.compile of every function: the numbers of a loop, or of eager."""

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

from krrst_fast import (
    NotPositiveDefiniteError,
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

WEIGHTS = torch.linspace(0.5, 2, 6).double()


def _given(f_syn: Tensor, y_syn: Tensor, f_real: Tensor, y_real: Tensor) -> Tensor:
    k_ss, k_rs = f_syn @ f_syn.mT, f_real @ f_syn.mT
    return (krr_predict_from_gram(k_ss, k_rs, y_syn, ridge=0.1) - y_real).square().mean()


FUNCTIONS = {
    **{form: lambda *t, form=form: krr_mse(*t, form=form, bias=1.0) for form in FORMS},
    "weights": lambda *t: krr_mse(*t, weights=WEIGHTS, ridge=0.1, bias=1.0, detach_ridge=False),
    "flag": lambda *t: krr_mse(*t, check="flag", ridge=0.1, precision="float32", refine=1),
    "predict": lambda *t: (krr_predict(*t[:3], ridge=0.1) - t[3]).square().mean(),
    "given": _given,
    "solve": lambda *t: ridge_solve(gram(t[0], bias=1.0), t[1], ridge=0.1).square().sum(),
}


def _stack(n: int) -> list[Tensor]:
    return [torch.stack(x) for x in zip(*(problem(6, 9, 5, 2, seed=seed) for seed in range(n)))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_vmap_is_a_loop(name: str) -> None:
    function, tensors = FUNCTIONS[name], _stack(3)
    looped = torch.stack([function(*(x[i] for x in tensors)) for i in range(3)])
    tolerance = 1e-4 if name == "flag" else 1e-10
    assert_equal(vmap(function)(*tensors), looped, tolerance)
    nested = vmap(vmap(function))(*(x[None].expand(2, *x.shape) for x in tensors))
    assert_equal(nested, looped.expand(2, 3), tolerance)


def test_vmap_over_one_argument_along_its_last_dimension() -> None:
    f_syn, y_syn, f_real, y_real = problem(6, 9, 5, 2)
    several = torch.stack((y_syn, 2 * y_syn, -y_syn), -1)
    mapped = vmap(lambda y: krr_mse(f_syn, y, f_real, y_real, bias=1.0), in_dims=2)(several)
    looped = torch.stack([krr_mse(f_syn, s * y_syn, f_real, y_real, bias=1.0) for s in (1, 2, -1)])
    assert_equal(mapped, looped, 1e-11)
    ridges = torch.tensor([0.1, 0.5], dtype=torch.float64)
    by_ridge = vmap(lambda r: krr_mse(f_syn, y_syn, f_real, y_real, ridge=r))(ridges)
    assert_equal(by_ridge, krr_mse(f_syn, y_syn, f_real, y_real, ridge=ridges), 1e-12)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_of_each_problem(name: str) -> None:
    function, tensors = FUNCTIONS[name], _stack(3)
    mapped = vmap(grad(function, argnums=(0, 1)))(*tensors)
    for i in range(3):
        leaves = [x[i].clone().requires_grad_() for x in tensors]
        for a, b in zip(mapped, torch.autograd.grad(function(*leaves), leaves[:2])):
            assert_equal(a[i], b, 1e-3 if name == "flag" else 1e-9)


def test_jacobian_and_batched_gradients() -> None:
    f_syn, y_syn, f_real, _ = problem(6, 9, 5, 2)

    def predict(y: Tensor) -> Tensor:
        return krr_predict(f_syn, y, f_real, ridge=0.1)

    jacobian = jacrev(predict)(y_syn)
    assert_equal(jacobian, torch.autograd.functional.jacobian(predict, y_syn), 1e-11)
    leaf = y_syn.clone().requires_grad_()
    basis = torch.eye(10, dtype=torch.float64).reshape(10, 5, 2)
    (rows,) = torch.autograd.grad(predict(leaf), leaf, basis, is_grads_batched=True)
    assert_equal(rows.reshape(5, 2, 6, 2), jacobian, 1e-11)


def test_a_second_derivative_raises_through_func_too() -> None:
    tensors = problem(6, 9, 5, 2)
    with pytest.raises(RuntimeError, match="krr_mse: is differentiable once"):
        grad(lambda f: grad(krr_mse)(f, *tensors[1:]).square().sum())(tensors[0])


def test_a_failure_inside_vmap_raises() -> None:
    tensors = _stack(3)
    tensors[0][1] = 0
    with pytest.raises(NotPositiveDefiniteError, match="of problem 1"):
        vmap(krr_mse)(*tensors)


def test_what_keeps_a_fit_refuses_vmap_by_name() -> None:
    f_syn, y_syn, f_real, _ = _stack(3)
    with pytest.raises(RuntimeError, match="krr_fit: keeps what it fits, .* leading dimensions"):
        vmap(lambda f, y, q: krr_fit(f, y).predict(q))(f_syn, y_syn, f_real)
    with pytest.raises(RuntimeError, match="krr_path: keeps what it fits"):
        vmap(lambda f, y, q: krr_path(f, y, [1.0]).predict(q))(f_syn, y_syn, f_real)
    fit = krr_fit(f_syn[0], y_syn[0], ridge=0.1)  # to predict with it is no such thing
    assert_equal(vmap(fit.predict)(f_real), fit.predict(f_real), 1e-12)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("batched", [False, True])
def test_compiled_without_a_graph_break(name: str, batched: bool) -> None:
    torch._dynamo.reset()
    function, tensors = FUNCTIONS[name], _stack(3) if batched else problem(6, 9, 5, 2)
    compiled = torch.compile(lambda *t: function(*t).sum(), backend="aot_eager", fullgraph=True)
    leaves = [x.clone().requires_grad_() for x in tensors]
    value, exact = compiled(*leaves), function(*leaves).sum()
    tolerance = 1e-4 if name == "flag" else 1e-10
    assert_equal(value.detach(), exact.detach(), tolerance)
    got = torch.autograd.grad(value, leaves, allow_unused=True)
    for a, b in zip(got, torch.autograd.grad(exact, leaves, allow_unused=True)):
        assert (a is None) == (b is None)
        if a is not None:
            assert_equal(a, b, 10 * tolerance)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_compiled_fit_predicts() -> None:
    f_syn, y_syn, f_real, _ = problem(6, 9, 5, 2)

    def predict(f_syn: Tensor, y_syn: Tensor, f_real: Tensor) -> Tensor:
        return krr_fit(f_syn, y_syn, ridge=0.1).predict(f_real)

    compiled = torch.compile(predict, backend="aot_eager", fullgraph=True)
    assert_equal(compiled(f_syn, y_syn, f_real), predict(f_syn, y_syn, f_real), 1e-11)
