"""vmap, torch.func and torch.compile of every function: the numbers of a loop, or of eager."""

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

from krrst_fast import (
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

WEIGHTS = torch.linspace(0.5, 2, 6).double()


def _given(f_syn: Tensor, y_syn: Tensor, f_real: Tensor, y_real: Tensor) -> Tensor:
    k_ss, k_rs = f_syn @ f_syn.mT, f_real @ f_syn.mT
    return (krr_predict_from_gram(k_ss, k_rs, y_syn, ridge=0.1) - y_real).square().mean()


FUNCTIONS = {
    **{
        form: lambda *t, form=form: krr_mse(*t, solver=Solver(form=form), bias=1.0)
        for form in FORMS
    },
    "weights": lambda *t: krr_mse(*t, weights=WEIGHTS, ridge=0.1, bias=1.0, detach_ridge=False),
    "flag": lambda *t: krr_mse(*t, solver=Solver(check="flag", precision="float32"), ridge=0.1),
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


SCHEDULES = {
    **{
        f"krr_mse {form}": lambda s, *t, form=form: krr_mse(
            *t, scale=1 / s, bias=s + 1, ridge=0.1 * s, solver=Solver(form=form)
        )
        for form in FORMS
    },
    "weights": lambda s, *t: krr_mse(*t, scale=1 / s, bias=s - 1.0, weights=WEIGHTS, ridge=0.1),
    "gram": lambda s, *t: gram(t[0], scale=1 / s, bias=s + 1).square().mean(),
    "krr_fit": lambda s, *t: (
        krr_fit(*t[:2], scale=1 / s, bias=s + 1, ridge=0.1).predict(t[2]).sum()
    ),
    "weighted krr_fit": lambda s, *t: (
        krr_fit(*t[:2], scale=1 / s, bias=s + 1, ridge=0.1, weights=WEIGHTS).predict(t[2]).sum()
    ),
    "krr_path": lambda s, *t: krr_path(*t[:2], [0.1], scale=1 / s, bias=s + 1).predict(t[2]).sum(),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", [int, float])
@pytest.mark.parametrize("compiler", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_of_numbers_is_compiled_once_and_right(
    name: str, compiler: str, kind: type
) -> None:
    torch._dynamo.reset()
    function = SCHEDULES[name]
    compiled = torch.compile(function, backend=compiler, fullgraph=True)
    tensors = [x.requires_grad_() for x in problem(6, 3, 7, 2)]
    for step in range(1, 12):  # from the ninth value on, a graph for each is refused
        value, exact = (f(kind(step), *tensors) for f in (compiled, function))
        assert_equal(value.detach(), exact.detach(), 1e-9)
        if exact.requires_grad:
            pair = (torch.autograd.grad(x, tensors, allow_unused=True) for x in (value, exact))
            for a, b in zip(*pair):
                assert (a is None) == (b is None)
                if a is not None and b is not None:
                    assert_equal(a, b, 1e-9)
