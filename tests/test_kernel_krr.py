"""krr_mse, krr_predict and krr_fit with every kernel, against the formula, and its derivatives."""

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jvp, vmap

from krrst_fast import (
    Kernel,
    NonFiniteError,
    NotPositiveDefiniteError,
    Solver,
    krr_fit,
    krr_mse,
    krr_predict,
    reference,
)
from krrst_fast.ops import kernel_blocks, kernel_gram
from krrst_fast.ops.kernel import KernelName
from krrst_fast.reference.kernels import OF_PRODUCTS, kernel_matrix
from tests.helpers import BACKEND_NAMES, assert_equal, more_than_twice

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node"),
]
NAMES = get_args(KernelName)
SCALE, BIAS, GAMMA, DEGREE, COEF0 = 1.3, 0.2, 0.3, 2, 0.5
SHAPES = [(7, 5, 9, 3), (13, 31, 4, 1), (31, 6, 20, 11), (1, 1, 1, 1), (70, 20, 90, 4)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def problem(m: int, d: int, b: int, p: int, seed: int = 0) -> list[Tensor]:
    """F_s, Y_s, F_r, Y_r, exact in float32."""
    shapes = (m, d), (m, p), (b, d), (b, p)
    return [draw(*s, seed=4 * seed + i).float().double() for i, s in enumerate(shapes)]


def kernel_of(name: str, gamma: Any = GAMMA) -> Kernel:
    return Kernel(name, gamma if name in ("polynomial", "rbf") else None, DEGREE, COEF0)


def formula(
    f_syn: Tensor, y_syn: Tensor, f_real: Tensor, y_real: Tensor, gamma: Tensor, name: str
) -> Tensor:
    """The loss; the kernel without its undefined derivatives at equal rows."""
    k = _matrix(torch.cat((f_syn, f_real)), f_syn, gamma, name)
    system = k[: len(f_syn)] + 0.1 * torch.eye(len(f_syn), dtype=k.dtype)
    return (k[len(f_syn) :] @ torch.linalg.solve(system, y_syn) - y_real).square().mean()


def _matrix(x: Tensor, y: Tensor, gamma: Tensor, name: str) -> Tensor:
    if name != "arccos":
        return SCALE * kernel_matrix(x, y, name, gamma, DEGREE, COEF0) + BIAS
    squares = x.square().sum(-1), y.square().sum(-1)
    return SCALE * reference.kernels.of_products(x @ y.mT, *squares, 1.0, name, 1, 0.0) + BIAS


def loss(name: str, **how: Any) -> Callable[..., Tensor]:
    def compute(*tensors: Tensor) -> Tensor:
        *given, gamma = tensors
        settings: dict[str, Any] = {"ridge_of": "absolute", "scale": SCALE, "bias": BIAS}
        return krr_mse(*given, ridge=0.1, kernel=kernel_of(name, gamma), **settings, **how)

    return compute


def evaluate(function: Callable[..., Tensor], tensors: list[Tensor], dtype: torch.dtype) -> Any:
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in tensors]
    value = function(*leaves)
    gradients = torch.autograd.grad(value, leaves, allow_unused=True)
    return [value.detach(), *(x for x in gradients if x is not None)]


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradients(shape: tuple[int, ...], name: str, backend: str) -> None:
    tensors = [*problem(*shape), torch.tensor(GAMMA).double()]
    if len(tensors[0]) > 4:
        tensors[0][3] = tensors[0][2]  # equal rows
    got = evaluate(loss(name, solver=Solver(backend=backend)), tensors, torch.float64)
    exact = evaluate(lambda *t: formula(*t, name=name), tensors, torch.float64)
    for a, b in zip(got, exact, strict=True):
        assert_equal(a, b, 1e-11, name)


@pytest.mark.parametrize("name", NAMES)
def test_float32_is_at_most_twice_as_wrong_as_plain_pytorch(name: str) -> None:
    mine, plain = [], []
    for seed in range(40):
        tensors = [*problem(20, 30, 40, 3, seed=seed), torch.tensor(GAMMA).float().double()]
        exact = evaluate(lambda *t: formula(*t, name=name), tensors, torch.float64)
        for found, function in (
            (mine, loss(name)),
            (plain, lambda *t: formula(*t, name=name)),
        ):
            got = evaluate(function, tensors, torch.float32)
            pairs = zip(got, exact, strict=True)
            found.append(torch.stack([(a.double() - b).norm() / b.norm() for a, b in pairs]))
    assert not more_than_twice(torch.stack(mine), torch.stack(plain), 6e-8)


@pytest.mark.parametrize("name", NAMES)
def test_every_derivative(name: str) -> None:
    tensors = [x.requires_grad_() for x in problem(6, 4, 5, 2)]
    gamma = torch.tensor(GAMMA, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        tensors[0][3] = tensors[0][2]
    if name not in ("polynomial", "rbf"):
        gamma.requires_grad_(False)
    function = loss(name)
    checks: dict[str, Any] = {"check_forward_ad": True, "check_batched_grad": True}
    if name == "arccos":  # whose second derivative jumps where rows are equal
        with torch.no_grad():
            tensors[0][3] += 1
    assert gradcheck(function, [*tensors, gamma], **checks)
    assert gradgradcheck(function, [*tensors, gamma], check_fwd_over_rev=True)


@pytest.mark.parametrize("name", OF_PRODUCTS)
def test_transforms(name: str) -> None:
    stacked = [torch.stack(x) for x in zip(*(problem(6, 4, 5, 2, seed=s) for s in range(3)))]
    gamma = torch.tensor(GAMMA).double()

    def function(*tensors: Tensor) -> Tensor:
        return loss(name)(*tensors, gamma)

    each = torch.stack([function(*(x[i] for x in stacked)) for i in range(3)])
    slopes = torch.stack([grad(function)(*(x[i] for x in stacked)) for i in range(3)])
    assert_equal(function(*stacked), each, 1e-12)
    assert_equal(vmap(function)(*stacked), each, 1e-12)
    assert_equal(vmap(grad(function))(*stacked), slopes, 1e-12)
    one = [x[0] for x in stacked]
    second = hessian(function)(*one)
    assert second.isfinite().all() and second.abs().max() > 0
    tangent = draw(6, 4, seed=9)
    _, slope = jvp(lambda f: function(f, *one[1:]), (one[0],), (tangent,))
    assert_equal(slope, (tangent * slopes[0]).sum(), 1e-12)


@pytest.mark.parametrize("name", OF_PRODUCTS)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled(name: str, backend: str) -> None:
    tensors = [*problem(6, 4, 5, 2), torch.tensor(GAMMA).double()]
    for function in (loss(name), grad(loss(name))):
        torch._dynamo.reset()
        compiled = torch.compile(function, backend=backend, fullgraph=True)
        assert_equal(compiled(*tensors), function(*tensors), 1e-12, backend)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ridge_of", ["absolute", "trace", "mean_diagonal"])
def test_a_whole_weight_is_that_many_rows(name: str, ridge_of: Any) -> None:
    f_syn, y_syn, f_real, _ = problem(6, 4, 5, 2)
    counts = torch.tensor([1, 2, 1, 0, 3, 1])
    how: dict[str, Any] = {"ridge": 0.1, "ridge_of": ridge_of, "bias": BIAS, "scale": SCALE}
    how["kernel"] = kernel_of(name)
    repeated = f_syn.repeat_interleave(counts, 0), y_syn.repeat_interleave(counts, 0)
    exact = krr_predict(*repeated, f_real, **how)
    assert_equal(krr_predict(f_syn, y_syn, f_real, weights=counts.double(), **how), exact, 1e-11)
    fit = krr_fit(f_syn, y_syn, weights=counts.double(), **how)
    assert_equal(fit.predict(f_real), exact, 1e-11)


def test_a_gamma_for_each_problem() -> None:
    tensors = problem(6, 4, 5, 2)
    gammas = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    together = krr_mse(*tensors, kernel=Kernel("rbf", gamma=gammas))
    each = [krr_mse(*tensors, kernel=Kernel("rbf", gamma=g)) for g in gammas.tolist()]
    assert_equal(together, torch.stack(each), 1e-12)
    fit = krr_fit(*tensors[:2], kernel=Kernel("rbf", gamma=gammas))
    for i, gamma in enumerate(gammas.tolist()):
        alone = krr_fit(*tensors[:2], kernel=Kernel("rbf", gamma=gamma))
        assert_equal(fit.predict(tensors[2])[i], alone.predict(tensors[2]), 1e-12)


@pytest.mark.parametrize("name", OF_PRODUCTS)
@pytest.mark.parametrize("d", [5, 80])  # products are kept where they are no more than features
def test_blocks_change_nothing(d: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [*problem(40, d, 70, 3), torch.tensor(GAMMA).double()]
    whole = evaluate(loss(name), tensors, torch.float64)
    monkeypatch.setattr(kernel_blocks, "_BLOCK", 150)
    monkeypatch.setattr(kernel_gram, "_AT_ONCE", 8)
    for a, b in zip(evaluate(loss(name), tensors, torch.float64), whole, strict=True):
        assert_equal(a, b, 1e-12, name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
def test_a_fit_predicts_and_leaves_out(name: str, batch: tuple[int, ...]) -> None:
    f_syn, y_syn, f_real = (
        draw(*batch, *s, seed=i) for i, s in enumerate(((6, 4), (6, 2), (5, 4)))
    )
    weights = torch.linspace(0.5, 2, 6).double()
    how: dict[str, Any] = {"bias": BIAS, "scale": SCALE, "kernel": kernel_of(name)}
    fit = krr_fit(f_syn, y_syn, ridge=0.1, weights=weights, **how)
    exact = krr_predict(f_syn, y_syn, f_real, ridge=0.1, weights=weights, **how)
    assert_equal(fit.predict(f_real), exact, 1e-12)
    assert fit.predict(f_real[..., :0, :]).shape == (*batch, 0, 2)
    assert fit.info.condition.shape == batch
    how |= {"ridge": fit.info.ridge, "ridge_of": "absolute"}
    for i in range(6):
        rest = [k for k in range(6) if k != i]
        without = f_syn[..., rest, :], y_syn[..., rest, :], f_syn[..., i : i + 1, :]
        predicted = krr_predict(*without, weights=weights[rest], **how)
        left_out = fit.loo_residuals[..., i : i + 1, :]
        assert_equal(left_out, y_syn[..., i : i + 1, :] - predicted, 1e-10)
    leaf = f_real.clone().requires_grad_()
    assert gradcheck(fit.predict, (leaf,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_precisions(dtype: torch.dtype) -> None:
    tensors = [x.to(dtype) for x in problem(20, 6, 9, 2)]
    for name in NAMES:
        how: dict[str, Any] = {"ridge": 0.1, "kernel": kernel_of(name)}
        exact = krr_predict(*(x.double() for x in tensors[:3]), **how)
        for precision in (None, "float32", "float64"):
            solver = Solver(precision=precision)
            got = krr_predict(*tensors[:3], solver=solver, **how)
            assert got.dtype == torch.float32
            assert_equal(got.double(), exact, 2e-5, name)
            fit = krr_fit(*tensors[:2], solver=solver, **how)
            assert_equal(fit.predict(tensors[2]).double(), exact, 2e-5, name)
        fast = krr_predict(*tensors[:3], solver=Solver(precision="fast"), **how)
        assert_equal(fast.double(), exact, 2e-2, name)


def test_rows_that_are_zero_have_no_direction() -> None:
    f_syn, y_syn, f_real, y_real = problem(6, 4, 5, 2)
    f_syn[1] = f_real[2] = 0
    for name in NAMES:
        leaves = [x.clone().requires_grad_() for x in (f_syn, f_real)]
        value = krr_mse(leaves[0], y_syn, leaves[1], y_real, kernel=name, ridge=0.1)
        found = torch.autograd.grad(value, leaves)
        assert all(x.isfinite().all() for x in found), name
    prediction = krr_predict(f_syn, y_syn, f_real, kernel="cosine")
    assert torch.equal(prediction[2], torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_the_cosine_of_any_size(size: float) -> None:
    f_syn, y_syn, f_real, _ = (x.float() for x in problem(6, 4, 5, 2))
    exact = krr_predict(f_syn, y_syn, f_real, kernel="cosine", ridge=0.1)
    got = krr_predict(size * f_syn, y_syn, f_real / size, kernel="cosine", ridge=0.1)
    assert_equal(got, exact, 1e-5)


BAD: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: Kernel("cubic"), ValueError, "Kernel: name must be one of .*'arccos'.*got 'cubic'"),
    (lambda: Kernel("rbf", gamma=0.0), ValueError, "Kernel: gamma must be positive"),
    (lambda: Kernel("rbf", gamma=torch.tensor(-1.0)), ValueError, "Kernel: gamma must be positive"),
    (lambda: Kernel("rbf", gamma="scale"), TypeError, "Kernel: gamma must be a number"),
    (lambda: Kernel("rbf", gamma=torch.tensor(1)), TypeError, "gamma tensor must be floating"),
    (lambda: Kernel("rbf", gamma=torch.tensor(float("inf"))), ValueError, "gamma must be finite"),
    (lambda: Kernel("linear", gamma=1.0), ValueError, "gamma must be None with 'linear', got 1.0"),
    (lambda: Kernel("polynomial", degree=0), ValueError, "degree must be from 1 to 100, got 0"),
    (lambda: Kernel("polynomial", degree=2.5), TypeError, "degree must be a whole number, got 2.5"),
    (lambda: Kernel("polynomial", coef0=float("nan")), ValueError, "coef0 must be finite"),
    (lambda: _call(kernel="gauss"), ValueError, "krr_mse: kernel must be one of .* got 'gauss'"),
    (lambda: _call(kernel=None), TypeError, "krr_mse: kernel must be a name or a Kernel, got None"),
    (
        lambda: _call(kernel="rbf", solver=Solver(form="w")),
        ValueError,
        "krr_mse: form must be 'auto' or 'k' with kernel 'rbf', got 'w'",
    ),
    (
        lambda: _call(kernel=Kernel("rbf", gamma=torch.ones(4))),
        ValueError,
        "krr_mse: the leading dimensions must broadcast.*gamma",
    ),
    (
        lambda: krr_fit(*problem(3, 2, 1, 1)[:2], kernel="rbf", intercept=True),
        ValueError,
        "krr_fit: intercept must be False with kernel 'rbf'",
    ),
    (
        lambda: krr_fit(*problem(3, 2, 1, 1)[:2], kernel="rbf").weights,
        AttributeError,
        "KRRFit.weights: only the linear kernel has them",
    ),
    (
        lambda: krr_fit(*problem(3, 2, 1, 1)[:2], kernel="rbf").predict(draw(2, 3)),
        ValueError,
        r"KRRFit.predict: f must be \[\.\.\., B, 2\], got shape \(2, 3\)",
    ),
    (
        lambda: krr_fit(*problem(3, 2, 1, 1)[:2], kernel="rbf").predict(draw(2, 2).float()),
        TypeError,
        "KRRFit.predict: alpha and f must have one dtype",
    ),
    (
        lambda: _call(kernel=Kernel("polynomial", degree=1, coef0=-50.0), ridge_of="absolute"),
        NotPositiveDefiniteError,
        "non-positive pivot at row 0 after raising the ridge 3 times",
    ),
]


def _call(**how: Any) -> Tensor:
    tensors = [torch.stack([x] * 3) for x in problem(6, 4, 5, 2)]
    return krr_mse(*tensors, **how)


@pytest.mark.parametrize("call, error, match", BAD)
def test_errors_name_what_is_wrong(
    call: Callable[[], Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_finite_is_named(name: str, bad: float) -> None:
    for number, what in enumerate(("f_syn", "y_syn", "f_real", "y_real")):
        tensors = problem(6, 4, 5, 2)
        tensors[number][2, 1] = bad
        with pytest.raises(NonFiniteError, match=f"krr_mse: {what} holds NaN or infinity.*row 2"):
            krr_mse(*tensors, kernel=name)
