"""Row weights, half precision, "fast", "flag": each against the formula."""

from typing import Any

import pytest
import torch
from torch import Tensor

from krrst_fast import SolveInfo, Solver, krr_fit, krr_mse, reference
from krrst_fast.planner import FORMS
from tests.helpers import NAMES, assert_equal, loss_and_gradients, problem

RIDGES_OF = ["trace", "mean_diagonal", "absolute"]


@pytest.mark.parametrize("ridge_of", RIDGES_OF)
@pytest.mark.parametrize("form", FORMS)
def test_a_whole_weight_is_as_many_rows(form: str, ridge_of: str) -> None:
    for sizes in [(8, 12, 5, 3), (12, 5, 6, 2)]:
        f_syn, y_syn, f_real, y_real = problem(*sizes)
        weights = torch.arange(sizes[0]).double() % 4  # 0, 1, 2, 3, 0, ...
        copies = torch.arange(sizes[0]).repeat_interleave(weights.long())
        for bias in (0.0, 0.7):
            options = {"ridge": 0.1, "ridge_of": ridge_of, "bias": bias, "scale": 2.0}
            weighted = krr_mse(
                f_syn, y_syn, f_real, y_real, weights=weights, solver=Solver(form=form), **options
            )
            repeated = krr_mse(
                f_syn[copies],
                y_syn[copies],
                f_real,
                y_real,
                solver=Solver(backend="reference"),
                **options,
            )
            assert_equal(weighted, repeated, 1e-12)


@pytest.mark.parametrize("ridge_of", RIDGES_OF)
@pytest.mark.parametrize("detach", [True, False])
def test_gradients_with_weights(ridge_of: str, detach: bool) -> None:
    tensors = problem(5, 4, 6, 2)
    weights = torch.rand(5, dtype=torch.float64) + 0.1

    def plain(f_syn: Tensor, y_syn: Tensor, f_real: Tensor, y_real: Tensor, w: Tensor) -> Tensor:
        # The stationary point of sum_i w_i |f(x_i) - y_i|^2 + lam |f|^2.
        k = f_syn @ f_syn.T + 1
        total = (w * k.diagonal()).sum() / (w.sum() if ridge_of == "mean_diagonal" else 1)
        lam = 0.1 * (total.detach() if detach else total) if ridge_of != "absolute" else 0.1
        alpha = torch.linalg.solve(w[:, None] * k + lam * torch.eye(5).double(), w[:, None] * y_syn)
        return (((f_real @ f_syn.T + 1) @ alpha - y_real) ** 2).mean()

    def ours(*t: Tensor) -> Tensor:
        options = {"ridge": 0.1, "ridge_of": ridge_of, "detach_ridge": detach, "bias": 1.0}
        return krr_mse(*t[:4], weights=t[4], **options)

    exact = loss_and_gradients(plain, [*tensors, weights])
    for name, a, b in zip(
        ("loss", *NAMES, "weights"), loss_and_gradients(ours, [*tensors, weights]), exact
    ):
        assert_equal(a, b, 1e-11, name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    rounded = [x.to(dtype) for x in problem(20, 30, 9, 4)]
    leaves = [x.clone().requires_grad_() for x in rounded]
    loss = krr_mse(*leaves, bias=1.0, ridge=1e-3)
    assert loss.dtype == torch.float32
    grads = torch.autograd.grad(loss, leaves)
    exact = loss_and_gradients(
        lambda *t: krr_mse(*t, bias=1.0, ridge=1e-3), [x.float() for x in rounded], torch.float32
    )
    assert loss == exact[0]
    for a, b in zip(grads, exact[1:]):
        assert a.dtype == dtype and torch.equal(a, b.to(dtype))
    mixed = krr_mse(rounded[0], rounded[1].float(), rounded[2], rounded[3].float())
    assert mixed == krr_mse(*(x.float() for x in rounded))


def _relative(got: list[Tensor], exact: list[Tensor]) -> float:
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(got, exact))


@pytest.mark.parametrize("form", FORMS)
def test_float64_on_float32_inputs_leaves_only_the_rounding_of_the_result(form: str) -> None:
    sizes = (60, 40, 20, 5) if form == "primal" else (40, 60, 20, 5)
    tensors = [x.float() for x in problem(*sizes, condition=1e6)]
    exact = loss_and_gradients(
        lambda *t: krr_mse(*t, solver=Solver(form=form)), tensors, torch.float64
    )
    got = loss_and_gradients(
        lambda *t: krr_mse(*t, solver=Solver(form=form, precision="float64")),
        tensors,
        torch.float32,
    )
    assert all(x.dtype == torch.float32 for x in got)
    assert _relative(got, exact) < 2.0**-23
    single = loss_and_gradients(
        lambda *t: krr_mse(*t, solver=Solver(form=form, precision="float32")),
        tensors,
        torch.float64,
    )
    assert all(x.dtype == torch.float64 for x in single)
    assert 1e-8 < _relative(single, exact) < 1e-2


@pytest.mark.parametrize("factor", [1e-4, 1.0, 1e4, 1e15])
@pytest.mark.parametrize("form", FORMS)
def test_fast_is_the_exact_regression_on_rounded_features(form: str, factor: float) -> None:
    sizes = (60, 40, 20, 5) if form == "primal" else (40, 60, 20, 5)
    tensors = [x.float() for x in problem(*sizes, condition=1e4)]
    tensors[0], tensors[2] = tensors[0] * factor, tensors[2] * factor
    f_syn, f_real = reference.round_features(tensors[0], tensors[2])
    rounded = [f_syn, tensors[1], f_real, tensors[3]]
    fast = loss_and_gradients(
        lambda *t: krr_mse(*t, solver=Solver(form=form, precision="fast")), tensors, torch.float32
    )
    same = loss_and_gradients(
        lambda *t: krr_mse(*t, solver=Solver(form=form)), rounded, torch.float32
    )
    for a, b in zip(fast, same):
        assert torch.equal(a, b)
    exact = loss_and_gradients(
        lambda *t: krr_mse(*t, solver=Solver(form=form)), tensors, torch.float64
    )
    assert 1e-6 < _relative(fast, exact) < 0.1
    for f, r in ((tensors[0], f_syn), (tensors[2], f_real)):
        large = f.abs() > f.abs().max() * 1e-6
        assert ((r - f).abs() <= 2.0**-11 * f.abs())[large].all()
        assert not torch.equal(r, f)


def test_rounding_keeps_equal_rows_equal_and_batches_apart() -> None:
    f = problem(6, 50, 5, 2)[0].float()
    larger = torch.cat((f * 3e3, f))
    syn, real = reference.round_features(f, larger)
    assert torch.equal(syn, real[6:])
    many, _ = reference.round_features(torch.stack((f, f * 1e9)), None)
    alone, _ = reference.round_features(f * 1e9, None)
    assert torch.equal(many[1], alone)
    zero, _ = reference.round_features(torch.zeros(3, 4), None)
    assert torch.equal(zero, torch.zeros(3, 4))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batched", [False, True])
def test_flag_reports_and_raise_raises(form: str, batched: bool) -> None:
    good = [x.float() for x in problem(6, 4, 5, 2)]
    bad = [torch.zeros_like(good[0]), *good[1:]]
    tensors = [torch.stack(pair) for pair in zip(good, bad)] if batched else bad
    loss, info = krr_mse(
        *tensors, ridge=0.01, solver=Solver(form=form, check="flag"), return_info=True
    )
    assert info.failed.tolist() == ([False, True] if batched else True)
    assert loss.isnan().tolist() == info.failed.tolist()
    if batched:
        assert_equal(loss[0], krr_mse(*good, ridge=0.01, solver=Solver(form=form)), 1e-5)
    fit = krr_fit(
        *(x.float() for x in problem(6, 4, 5, 2)[:2]), solver=Solver(form=form, check="flag")
    )
    assert not fit.info.failed


def test_flag_climbs_the_ladder_when_asked_to() -> None:
    f_syn, y_syn, f_real, y_real = (x.float() for x in problem(300, 5, 20, 2))

    def solved(**how: Any) -> tuple[Tensor, SolveInfo]:
        solver = Solver(form="w", **how)
        return krr_mse(f_syn, y_syn, f_real, y_real, ridge=1e-17, solver=solver, return_info=True)

    _, info = solved(check="flag")
    assert info.failed and info.retries == 0
    loss, info = solved(check="flag", max_retries=14)
    same, raised = solved(max_retries=14)
    assert not info.failed and info.retries == raised.retries > 0
    assert_equal(loss, same, 1e-3)


def test_flag_reads_nothing_back() -> None:
    """On tensors that have no values, whatever looks at one raises."""
    tensors = [torch.empty(*size, device="meta") for size in ((6, 4), (6, 2), (5, 4), (5, 2))]
    weights = torch.empty(6, device="meta")
    for form in FORMS:
        leaves = [x.clone().requires_grad_() for x in tensors]
        loss, info = krr_mse(
            *leaves,
            solver=Solver(form=form, check="flag", max_retries=2, precision="fast"),
            return_info=True,
            weights=weights,
        )
        assert info.failed.shape == () and loss.shape == ()
        torch.autograd.grad(loss, leaves)


def test_a_ridge_tensor_of_another_dtype_and_shape() -> None:
    tensors = [x.float() for x in problem(8, 12, 5, 2)]
    ridge = torch.tensor(0.01, dtype=torch.float64, requires_grad=True)
    loss = krr_mse(*tensors, ridge=ridge)
    assert_equal(loss, krr_mse(*tensors, ridge=0.01), 1e-6)
    (grad,) = torch.autograd.grad(loss, ridge)
    step = 1e-4
    double = [x.double() for x in tensors]
    slope = krr_mse(*double, ridge=0.01 + step) - krr_mse(*double, ridge=0.01 - step)
    assert grad.dtype == torch.float64
    assert_equal(grad, slope / (2 * step), 1e-3)


@pytest.mark.parametrize("factor", [1e-17, 1e-4, 1.0, 3e4, 1e20])
def test_half_features_are_the_rounded_ones_times_a_power_of_two(factor: float) -> None:
    generator = torch.Generator().manual_seed(0)
    f_syn, f_real = (factor * torch.randn(n, 17, generator=generator) for n in (5, 9))
    x_syn, x_real, unit = reference.half_features(f_syn, f_real.mT.contiguous().mT)
    assert x_syn.dtype == x_real.dtype == torch.float16 and unit.log2() == unit.log2().round()
    rounded = reference.round_features(f_syn, f_real)
    for half, whole, f in zip((x_syn, x_real), rounded, (f_syn, f_real)):
        assert torch.equal(half.float() / unit, whole)
        # 11 bits, and what is far below the largest entry is absolute.
        assert ((whole - f).abs() <= 2**-11 * f.abs() + 2**-39 * f_syn.abs().max()).all()
    nothing = reference.half_features(torch.zeros(0, 3), torch.zeros(2, 3))
    assert nothing[0].shape == (0, 3) and not nothing[1].any() and nothing[2] == 1
