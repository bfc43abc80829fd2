"""Every derivative of every operator, eager and compiled, by numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, grad_and_value, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from krrst_fast import (
    NotPositiveDefiniteError,
    RidgeHead,
    Solver,
    gram,
    krr_fit,
    krr_mse,
    krr_predict,
    krr_predict_from_gram,
    reference,
    ridge_solve,
)
from krrst_fast.planner import FORMS
from tests.helpers import assert_equal, problem

# Of torch: forward mode, torch.compile and torch.func.linearize, each the first time it is used.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node"),
]

Function = Callable[..., Any]

F_SYN, Y_SYN, F_REAL, Y_REAL = problem(6, 3, 7, 2)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
ONE_HOT = torch.nn.functional.one_hot(LABELS, 3).double()
WEIGHTS = torch.linspace(0.5, 2, 6).double()
KERNEL: dict[str, Any] = {
    **{"ridge": 0.3, "ridge_of": "trace", "detach_ridge": False},
    **{"scale": 0.7, "bias": 0.5},
}
GRAM: dict[str, Any] = {"ridge": 0.3, "ridge_of": "trace", "detach_ridge": False}
FIT = krr_fit(F_SYN, Y_SYN, ridge=0.3, bias=0.5)
HEAD = RidgeHead(num_classes=3, ridge=0.3, ridge_of="trace", detach_ridge=False)
PROBE = RidgeHead(ridge=0.3, ridge_of="trace", bias=0.5).fit(F_SYN, Y_SYN)


def _solved(k: Tensor, y: Tensor) -> Tensor:
    """The formula by an inverse: torch's linalg.solve has wrong derivatives in forward mode.

    jacfwd(jacfwd(f)) and vmap(hessian(f)) of it are silently wrong in torch 2.13 (pytorch#192540).
    """
    lam = reference.absolute_ridge(k, 0.3, "trace", False)
    return torch.linalg.inv(k + lam * torch.eye(len(k), dtype=k.dtype)) @ y


def _predicted(f: Tensor, y: Tensor, scale: float = 1.0, bias: float = 0.0) -> Tensor:
    return reference.gram(torch.cat((F_REAL, f)), scale, bias)[: len(F_REAL), len(F_REAL) :] @ (
        _solved(reference.gram(f, scale, bias), y)
    )


def _by_form(form: str) -> tuple[Function, Function]:
    return (
        lambda f: krr_mse(f, Y_SYN, F_REAL, Y_REAL, **KERNEL, solver=Solver(form=form)),
        lambda f: (_predicted(f, Y_SYN, 0.7, 0.5) - Y_REAL).square().mean(),
    )


def _weighted(f: Tensor) -> Tensor:
    """Row weights as the formula has them: rows, targets and the constant times their roots."""
    root = WEIGHTS.sqrt()[:, None]
    rows = root * torch.cat((f * 0.7**0.5, torch.full_like(f[:, :1], 0.5**0.5)), -1)
    k_rs = torch.cat((F_REAL * 0.7**0.5, torch.full_like(F_REAL[:, :1], 0.5**0.5)), -1) @ rows.mT
    return (k_rs @ _solved(rows @ rows.mT, root * Y_SYN) - Y_REAL).square().mean()


def _plain_head(f: Tensor) -> Tensor:
    return _predicted(f, ONE_HOT).square().sum()


OPERATORS: dict[str, tuple[Function, Function]] = {
    **{f"krr_mse {form}": _by_form(form) for form in FORMS},
    "krr_mse weights": (
        lambda f: krr_mse(f, Y_SYN, F_REAL, Y_REAL, weights=WEIGHTS, **KERNEL),
        _weighted,
    ),
    "krr_predict": (
        lambda f: krr_predict(f, Y_SYN, F_REAL, **KERNEL).square().sum(),
        lambda f: _predicted(f, Y_SYN, 0.7, 0.5).square().sum(),
    ),
    "krr_predict_from_gram": (
        lambda f: krr_predict_from_gram(f @ f.mT, F_REAL @ f.mT, Y_SYN, **GRAM).square().sum(),
        lambda f: _predicted(f, Y_SYN).square().sum(),
    ),
    "ridge_solve": (
        lambda f: ridge_solve(f @ f.mT, Y_SYN, ridge=0.3).square().sum(),
        lambda f: _solved(f @ f.mT, Y_SYN).square().sum(),
    ),
    "gram": (
        lambda f: gram(f, scale=0.7, bias=0.5).square().sum(),
        lambda f: reference.gram(f, 0.7, 0.5).square().sum(),
    ),
    "KRRFit.predict": (
        lambda f: FIT.predict(f).square().sum(),
        lambda f: (f @ FIT.weights + FIT.intercept).square().sum(),
    ),
    "RidgeHead": (lambda f: HEAD(f, LABELS, F_REAL).square().sum(), _plain_head),
    "RidgeHead.predict": (
        lambda f: PROBE.predict(f).square().sum(),
        lambda f: (f @ PROBE.weights + PROBE.intercept).square().sum(),
    ),
}

PAIR = torch.stack((F_SYN, 2 * F_SYN))
TRANSFORMS: dict[str, Callable[[Function], Tensor]] = {
    "grad": lambda f: grad(f)(F_SYN),
    "grad_and_value": lambda f: torch.cat([x.flatten() for x in grad_and_value(f)(F_SYN)]),
    "vjp": lambda f: vjp(f, F_SYN)[1](torch.tensor(2.0).double())[0],
    "jacrev": lambda f: jacrev(f)(F_SYN),
    "vmap": lambda f: vmap(f)(PAIR),
    "vmap of grad": lambda f: vmap(grad(f))(PAIR),
    "vmap of vmap of grad": lambda f: vmap(vmap(grad(f)))(PAIR[None]),
    "grad of vmap": lambda f: grad(lambda x: vmap(f)(torch.stack((x, 2 * x))).sum())(F_SYN),
    "jvp": lambda f: jvp(f, (F_SYN,), (F_SYN + 1,))[1],
    "jacfwd": lambda f: jacfwd(f)(F_SYN),
    "hessian": lambda f: hessian(f)(F_SYN),
    "jacrev of jacrev": lambda f: jacrev(jacrev(f))(F_SYN),
}
EAGER = {  # torch.compile fails to trace the first two, whatever the function
    "jacfwd of jacfwd": lambda f: jacfwd(jacfwd(f))(F_SYN),
    "vmap of hessian": lambda f: vmap(hessian(f))(PAIR),
    "linearize": lambda f: linearize(f, F_SYN)[1](F_SYN + 1),
}
COMPILERS = [
    "none",
    "eager",
    pytest.param("aot_eager", marks=pytest.mark.slow),
    pytest.param("inductor", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_transform_of_every_operator(operator: str, compiler: str) -> None:
    function, formula = OPERATORS[operator]

    transforms = {**TRANSFORMS, **(EAGER if compiler == "none" else {})}

    def all_of(f: Function) -> dict[str, Tensor]:
        return {name: transform(f) for name, transform in transforms.items()}

    if compiler == "none":
        got = all_of(function)
    else:
        torch._dynamo.reset()
        got = torch.compile(lambda: all_of(function), backend=compiler, fullgraph=True)()
    for name, exact in all_of(formula).items():
        assert exact.abs().max() > 1e-6, name
        assert_equal(got[name], exact, 1e-9)


def _solve(f: Tensor, y: Tensor, ridge: Tensor) -> Tensor:
    return ridge_solve(f @ f.mT, y, ridge=ridge)


def _from_gram(f: Tensor, y: Tensor, q: Tensor, ridge: Tensor) -> Tensor:
    return krr_predict_from_gram(f @ f.mT, q @ f.mT, y, ridge=ridge, detach_ridge=False)


def _leaves(*names: str) -> list[Tensor]:
    f_syn, y_syn, f_real, y_real = problem(4, 3, 5, 2, seed=1)
    ridge, weights = torch.tensor(0.3).double(), torch.linspace(0.5, 2, 4).double()
    given = {"f": f_syn, "y": y_syn, "q": f_real, "t": y_real, "r": ridge, "w": weights}
    return [given[name].requires_grad_() for name in names]


TWICE: dict[str, tuple[Function, list[Tensor]]] = {
    **{
        f"krr_mse {form}": (
            lambda f, y, q, t, r, form=form: krr_mse(
                *(f, y, q, t), **{**KERNEL, "ridge": r}, solver=Solver(form=form)
            ),
            _leaves(*"fyqtr"),
        )
        for form in FORMS
    },
    "krr_mse absolute": (
        lambda f, y, q, t, r: krr_mse(f, y, q, t, ridge=r, ridge_of="absolute"),
        _leaves(*"fyqtr"),
    ),
    "krr_mse weights": (
        lambda f, y, q, t, w: krr_mse(f, y, q, t, weights=w, **KERNEL),
        _leaves(*"fyqtw"),
    ),
    "krr_mse of features alone": (
        lambda f: krr_mse(f, *problem(4, 3, 5, 2, seed=1)[1:], **KERNEL),
        _leaves("f"),
    ),
    "krr_predict": (
        lambda f, y, q, r: krr_predict(f, y, q, **{**KERNEL, "ridge": r}),
        _leaves(*"fyqr"),
    ),
    "krr_mse batch": (
        lambda f, y, q, t: krr_mse(torch.stack((f, 2 * f)), y, q, t, **KERNEL),
        _leaves(*"fyqt"),
    ),
    "ridge_solve": (_solve, _leaves(*"fyr")),
    "krr_predict_from_gram": (_from_gram, _leaves(*"fyqr")),
    "gram": (lambda f: gram(f, scale=0.7, bias=0.5), _leaves("f")),
    "KRRFit.predict": (FIT.predict, _leaves("q")),
}


@pytest.mark.parametrize("operator", TWICE)
def test_forward_mode_and_second_derivatives_by_finite_differences(operator: str) -> None:
    function, leaves = TWICE[operator]
    assert gradcheck(function, leaves, check_forward_ad=True)
    assert gradgradcheck(function, leaves, check_fwd_over_rev=True)


def _third(function: Function) -> list[Tensor]:
    """A third derivative of arguments that are all computed from one tensor."""
    f = F_SYN.clone().requires_grad_()
    loss = function(f, f[:, :2] * 2, f * 3, Y_REAL[:6])
    (first,) = torch.autograd.grad(loss, f, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), f, create_graph=True)
    return list(torch.autograd.grad(second.square().sum(), f))


def _outer(function: Function) -> list[Tensor]:
    """Autograd through gradients that torch.func took, also to what they were not taken to."""
    f, y = F_SYN.clone().requires_grad_(), Y_REAL.clone().requires_grad_()
    gradients = vmap(grad(lambda x: function(x, Y_SYN, F_REAL, y)))(torch.stack((f, 2 * f)))
    return list(torch.autograd.grad(gradients.square().sum(), (f, y)))


@pytest.mark.parametrize("derive", [_third, _outer])
def test_third_and_mixed_derivatives(derive: Callable[[Function], list[Tensor]]) -> None:
    got = derive(lambda *t: krr_mse(*t, **KERNEL))
    for a, b in zip(got, derive(lambda *t: reference.krr_mse(*t, **KERNEL))):
        assert_equal(a, b, 1e-9)


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_second_derivatives_are_as_exact_as_those_of_plain_pytorch(precision: str) -> None:
    """Over draws; with TF32 and bfloat16 products allowed, which the operators do not use."""
    worse, kernel = [], {**KERNEL, "ridge": 1e-4}
    for seed in range(9):
        exact, errors = problem(40, 60, 30, 5, condition=1e3, seed=seed), []
        direction = torch.randn(40, 60, generator=torch.Generator().manual_seed(seed)).double()

        def product(function: Function, tensors: list[Tensor], v: Tensor) -> Tensor:
            leaf = tensors[0].clone().requires_grad_()
            (g,) = torch.autograd.grad(function(leaf, *tensors[1:]), leaf, create_graph=True)
            return torch.autograd.grad((g * v).sum(), leaf)[0].double()

        true = product(lambda *t: reference.krr_mse(*t, **kernel), exact, direction)
        single = [x.float() for x in exact]
        for function in (
            lambda *t: krr_mse(*t, **kernel, solver=Solver(precision=precision)),
            lambda *t: reference.krr_mse(*t, **kernel),
        ):
            got = product(function, single, direction.float())
            errors.append(((got - true).norm() / true.norm()).item())
        worse.append(errors[0] / errors[1])
    assert sorted(worse)[4] < 2, worse


@pytest.mark.parametrize("rows", [40, 520])  # factored in float64, and in float32
def test_no_switch_rounds_a_derivative(rows: int) -> None:
    def derivatives() -> list[Tensor]:
        tensors = [x.float() for x in problem(rows, 600, 30, 5, seed=3)]
        tangent = jvp(lambda f: krr_mse(f, *tensors[1:]), (tensors[0],), (tensors[0] + 1,))[1]
        return [tangent, _hessian_times_one(tensors)]

    exact = derivatives()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            got = derivatives()
    finally:
        torch.set_float32_matmul_precision(before)
    for a, b in zip(got, exact):
        assert_equal(a, b, 1e-4)


def _hessian_times_one(tensors: list[Tensor]) -> Tensor:
    leaf = tensors[0].clone().requires_grad_()
    (first,) = torch.autograd.grad(krr_mse(leaf, *tensors[1:]), leaf, create_graph=True)
    return torch.autograd.grad(first.sum(), leaf)[0]


def test_a_derivative_without_a_ridge_that_suffices_raises() -> None:
    f = torch.ones(6, 3).double()
    with pytest.raises(NotPositiveDefiniteError, match="krr_mse: for this derivative the ridge"):
        jvp(lambda x: krr_mse(x, Y_SYN, F_REAL, Y_REAL, ridge=1e-30), (f,), (f,))


def test_info_is_refused_where_it_would_outlive_a_transform() -> None:
    with pytest.raises(ValueError, match="krr_predict: return_info must be False in forward mode"):
        jvp(lambda f: krr_predict(f, Y_SYN, F_REAL, return_info=True)[0], (F_SYN,), (F_SYN,))


def test_targets_may_be_made_under_inference_mode() -> None:
    f_syn, y_syn, f_real, y_real = problem(6, 3, 7, 2)
    f_syn.requires_grad_()
    exact = torch.autograd.grad(krr_mse(f_syn, y_syn, f_real, y_real), f_syn)[0]
    with torch.inference_mode():
        frozen = [x.clone() for x in (y_syn, f_real, y_real)]
        gram_syn, gram_real = f_syn @ f_syn.mT, f_real @ f_syn.mT
    assert_equal(torch.autograd.grad(krr_mse(f_syn, *frozen), f_syn)[0], exact, 1e-12)
    y_syn.requires_grad_()

    def losses(k: Tensor, k_real: Tensor, f: Tensor, y: Tensor) -> list[Tensor]:
        return [
            krr_mse(f_syn.detach(), y_syn, f, y),
            ridge_solve(k, y_syn, ridge=0.1).square().sum(),
            krr_predict_from_gram(k, k_real, y_syn, ridge=0.1).square().sum(),
        ]

    trained = losses(gram_syn, gram_real, *frozen[1:])
    for loss, plain in zip(trained, losses(gram_syn.clone(), gram_real.clone(), f_real, y_real)):
        a, b = (torch.autograd.grad(x, y_syn)[0] for x in (loss, plain))
        assert_equal(a, b, 1e-12)
    with torch.inference_mode():
        fit = krr_fit(f_syn, y_syn, ridge=0.1)
    query = f_real.clone().requires_grad_()
    assert_equal(
        torch.autograd.grad(fit.predict(query).sum(), query)[0],
        fit.weights.sum(-1).expand_as(query),
        1e-12,
    )


def test_targets_may_change_between_loss_and_backward() -> None:
    f_syn, y_syn, f_real, y_real = problem(6, 3, 7, 2)
    f_syn.requires_grad_()
    exact = torch.autograd.grad(krr_mse(f_syn, y_syn, f_real, y_real), f_syn)[0]
    loss = krr_mse(f_syn, y_syn, f_real, y_real)
    y_real.zero_()
    assert_equal(torch.autograd.grad(loss, f_syn)[0], exact, 1e-12)
