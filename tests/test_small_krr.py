"""The operators that compute a small problem, or a batch, in one call each way."""

import logging
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from krrst_fast import (
    NonFiniteError,
    NotPositiveDefiniteError,
    Solver,
    krr_mse,
    krr_predict,
    operators,
    reference,
)
from krrst_fast.backends import cpp
from krrst_fast.planner import FORMS
from krrst_fast.reference import RIDGE_OF
from tests.helpers import Calls, more_than_twice, run_with
from tests.test_batched_ops import draw, layouts

EXTENSION = pytest.mark.skipif(not operators.HAS_EXTENSION, reason=operators.EXTENSION)
OPS = torch.ops.krrst_fast
SIZES = [  # M, D, B, P: ones, primes, M > D, fewer and more numbers than a vector
    (1, 1, 1, 1),
    (2, 3, 5, 1),
    (3, 1, 2, 4),
    (7, 13, 11, 3),
    (40, 8, 9, 2),
    (17, 131, 13, 47),
    (64, 128, 33, 10),
]
EVERYTHING = 31
SCALE, BIAS = 1.3, 0.7


def inputs(m: int, d: int, b: int, p: int, *many: int, dtype: torch.dtype) -> list[Tensor]:
    """F_s, Y_s, F_r, Y_r and ridges of problems whose condition is about a hundred."""
    shapes = (m, d), (m, p), (b, d), (b, p)
    tensors = [draw(*many, *shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
    return [*tensors, 0.5 + draw(*many, dtype=dtype, seed=4).sigmoid()]


def both_passes(
    tensors: list[Tensor],
    form: str,
    bias: float,
    ridge_of: str,
    detach: bool,
    predicts: bool,
    by: Any = OPS,
) -> list[Tensor]:
    """The result, and the gradients of its product with random numbers, by the operators."""
    f_syn, y_syn, f_real, y_real, ridge = tensors
    target = None if predicts else y_real
    how = ridge_of, SCALE, bias, form
    loss, readout, factor, _, count, _, base, coefficients, kept, met = by.krr_forward(
        f_syn, y_syn, f_real, target, ridge, 0.0, ridge_of, 3, *how[1:]
    )
    assert met.item() == 0 and not count.any()
    value = readout if predicts else loss
    grads = by.krr_backward(
        *(draw(*value.shape, dtype=value.dtype, seed=9), f_syn, y_syn, f_real),
        *(None if predicts else readout, factor, count, base, coefficients, kept, ridge, 0.0),
        *(ridge_of, detach, SCALE, bias, form, EVERYTHING),
    )
    assert all(x.is_contiguous() for x in grads)
    return [value, *grads]


def by_autograd(
    tensors: list[Tensor], bias: float, ridge_of: str, detach: bool, predicts: bool
) -> list[Tensor]:
    """The same by the formula, LU and autograd."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    kernel: dict[str, Any] = {
        **{"ridge": leaves[4], "ridge_of": ridge_of, "detach_ridge": detach},
        **{"scale": SCALE, "bias": bias},
    }
    if predicts:
        value = reference.krr_predict(*leaves[:3], **kernel)
    else:
        value = reference.krr_mse(*leaves[:4], **kernel)
    seed = draw(*value.shape, dtype=value.dtype, seed=9)
    grads = torch.autograd.grad(value, leaves, seed, materialize_grads=True)
    return [value.detach(), *grads]


def settings() -> Iterator[tuple[float, str, bool, bool]]:
    yield from product((0.0, BIAS), RIDGE_OF, (True, False), (True, False))


def errors(got: list[Tensor], exact: list[Tensor], predicts: bool) -> list[float]:
    """Errors relative to the largest entry; a prediction has no gradient to Y_r."""
    assert [x.shape for x in got] == [x.shape for x in exact]
    assert all(x.isfinite().all() for x in got)
    pairs = [(a, b) for i, (a, b) in enumerate(zip(got, exact)) if not (predicts and i == 4)]
    # Where a gradient cancels, its size is that of what cancels, about 1.
    return [((a - b).abs().max() / b.abs().max().clamp(min=1.0)).item() for a, b in pairs]


def check_size(size: tuple[int, int, int, int], many: tuple[int, ...], by: Any = OPS) -> None:
    tensors = inputs(*size, *many, dtype=torch.float64)
    for bias, ridge_of, detach, predicts in settings():
        exact = by_autograd(tensors, bias, ridge_of, detach, predicts)
        for form in FORMS:
            got = both_passes(tensors, form, bias, ridge_of, detach, predicts, by)
            worst = max(errors(got, exact, predicts))
            assert worst < 1e-10, f"{size} {many} {form} {bias} {ridge_of} {detach}: {worst:.2e}"


def check_everything() -> None:
    """What each instruction set is asked."""
    for size in SIZES:
        check_size(size, ())
    check_size((7, 13, 11, 3), (3,))


@pytest.mark.parametrize("many", [(), (1,), (5,)])
@pytest.mark.parametrize("size", SIZES)
def test_in_float64_they_are_the_formula(
    size: tuple[int, int, int, int], many: tuple[int, ...]
) -> None:
    check_size(size, many)


@pytest.mark.parametrize("size", [(1, 1, 1, 1), (7, 13, 11, 3), (40, 8, 9, 2)])
def test_the_fallbacks_are_the_formula(size: tuple[int, int, int, int]) -> None:
    check_size(size, (), reference)
    check_size(size, (2,), reference)


@EXTENSION
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    run_with(isa, "test_small_krr", "check_everything")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [(7, 13, 11, 3), (64, 128, 33, 10), (30, 128, 128, 300)])
def test_float32_is_at_most_twice_as_wrong_as_plain_pytorch(
    size: tuple[int, int, int, int], form: str
) -> None:
    if form == "primal":  # which is for M > D
        size = size[1], size[0], size[2], min(size[3], 10)
    mine, plain = [], []
    how = BIAS, "trace", False, False
    for seed in range(24):
        tensors = inputs(*size, dtype=torch.float64)
        tensors = [x + draw(*x.shape, dtype=x.dtype, seed=100 + seed) for x in tensors[:4]]
        tensors = [x.float().double() for x in [*tensors, torch.tensor(1e-3)]]
        exact, single = by_autograd(tensors, *how), [x.float() for x in tensors]
        mine.append(errors(both_passes(single, form, *how), exact, False))
        plain.append(errors(by_autograd(single, *how), exact, False))
    assert not more_than_twice(torch.tensor(mine), torch.tensor(plain), 2.0**-24)


@EXTENSION
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [(1, 1, 1, 1), (7, 13, 11, 3), (25, 40, 20, 17)])
def test_any_strides(size: tuple[int, int, int, int], form: str) -> None:
    tensors = inputs(*size, 2, dtype=torch.float64)
    for predicts in (False, True):
        how = form, BIAS, "trace", False, predicts
        exact = both_passes(tensors, *how)
        for i in range(4):
            for name, laid in layouts(tensors[i]):
                changed = [*tensors[:i], laid, *tensors[i + 1 :]]
                worst = max(errors(both_passes(changed, *how), exact, predicts))
                assert worst < 1e-12, f"tensor {i} {name}: {worst:.2e}"
                single = [x[1] for x in changed]
                again = both_passes([x.contiguous() for x in single], *how)
                assert max(errors(both_passes(single, *how), again, predicts)) < 1e-12, name


@pytest.mark.parametrize("form", FORMS)
def test_what_is_expanded(form: str) -> None:
    """A stride of zero: one matrix for all problems, one gradient for all predictions."""
    one = inputs(7, 13, 11, 3, dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for x in one[:3]]
    solver = Solver(form=form, backend="auto")  # type: ignore[arg-type]
    many = [x.expand(4, *x.shape) for x in leaves]
    krr_predict(*many, ridge=0.1, solver=solver).sum().backward()
    exact = [x.clone().requires_grad_() for x in one[:3]]
    kernel: dict[str, Any] = {"ridge": 0.1, "ridge_of": "trace", "scale": 1.0, "bias": 0.0}
    (4 * reference.krr_predict(*exact, detach_ridge=True, **kernel).sum()).backward()
    for x, y in zip(leaves, exact):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-10, atol=1e-10)


@EXTENSION
@pytest.mark.parametrize("form", FORMS)
def test_the_gradients_that_are_asked_for(form: str) -> None:
    tensors = inputs(7, 5, 11, 3, dtype=torch.float64)
    all_of_them = both_passes(tensors, form, BIAS, "trace", False, False)[1:]
    f_syn, y_syn, f_real, y_real, ridge = tensors
    loss, readout, factor, _, count, _, base, coefficients, kept, _ = OPS.krr_forward(
        f_syn, y_syn, f_real, y_real, ridge, 0.0, "trace", 0, SCALE, BIAS, form
    )
    saved = f_syn, y_syn, f_real, readout, factor, count, base, coefficients, kept
    gradient = draw(*loss.shape, dtype=loss.dtype, seed=9)
    for needs in range(EVERYTHING + 1):
        found = OPS.krr_backward(
            gradient, *saved, ridge, 0.0, "trace", False, SCALE, BIAS, form, needs
        )
        wanted = [x for i, x in enumerate(all_of_them) if needs >> i & 1]
        assert len(found) == len(wanted) and all(map(torch.equal, found, wanted)), needs


@EXTENSION
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("many", [(), (5,)])
def test_the_same_bits_on_any_number_of_threads(many: tuple[int, ...], form: str) -> None:
    tensors = inputs(70, 300, 130, 33, *many, dtype=torch.float32)
    how = form, BIAS, "trace", False, False
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = both_passes(tensors, *how)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert all(map(torch.equal, alone, both_passes(tensors, *how)))
    finally:
        torch.set_num_threads(before)


def calls_of(function: Callable[[], Any]) -> list[str]:
    with Calls() as calls:
        function()
    return [name for name in calls.names if name.startswith("krrst_fast::")]


@EXTENSION
def test_a_small_problem_takes_one_operator_for_each_pass() -> None:
    f_syn, y_syn, f_real, y_real, _ = inputs(10, 64, 20, 8, dtype=torch.float32)
    f_syn.requires_grad_(), y_syn.requires_grad_()
    losses: list[Tensor] = []
    forward = calls_of(lambda: losses.append(krr_mse(f_syn, y_syn, f_real, y_real, bias=1.0)))
    assert forward == ["krrst_fast::krr_forward"]
    assert calls_of(losses[0].backward) == ["krrst_fast::krr_backward"]


@EXTENSION
@pytest.mark.parametrize("check", ["raise", "flag"])
@pytest.mark.parametrize("many", [False, True])
def test_a_ridge_is_raised_as_step_by_step(
    many: bool, check: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ones = torch.ones(2, 1, dtype=torch.float64)  # a Gram of ones: 1 + 1e-16 is 1
    tensors = [ones, torch.tensor([[1.0], [2.0]]).double(), ones, ones]
    ridge = torch.tensor(1e-17, dtype=torch.float64)
    if many:
        tensors = [torch.stack((x, x)) for x in tensors]
        ridge = torch.tensor([1e-17, 1.0], dtype=torch.float64)
    solver = Solver(form="k", max_retries=3, check=check)  # type: ignore[arg-type]
    found = []
    for whole in (True, False):
        monkeypatch.setattr(cpp, "_in_steps", not whole)
        caplog.clear()
        leaf = ridge.clone().requires_grad_()
        with caplog.at_level(logging.WARNING, logger="krrst_fast"):
            loss, info = krr_mse(
                *tensors, ridge=leaf, ridge_of="absolute", solver=solver, return_info=True
            )
        messages = [record.getMessage() for record in caplog.records]
        assert bool(messages) == (check == "raise")
        grad = torch.autograd.grad(loss.sum(), leaf)[0]
        found.append(([loss, info.ridge, info.retries, info.pivot, info.factor, grad], messages))
    assert found[0][0][2].flatten()[0] == 2 and not found[0][0][3].any()
    for a, b in zip(found[0][0], found[1][0]):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-9, atol=0)
    assert found[0][1] == found[1][1]


@EXTENSION
@pytest.mark.parametrize("retries", [0, 2])
@pytest.mark.parametrize("form", FORMS)
def test_what_fails_is_reported_and_nan(form: str, retries: int) -> None:
    tensors = inputs(6, 4, 3, 2, 3, dtype=torch.float64)
    f_syn, y_syn, f_real, y_real, ridge = tensors
    ridge[1] = -1e6
    _, _, factor, lam, count, pivot, *_, met = OPS.krr_forward(
        f_syn, y_syn, f_real, y_real, ridge, 0.0, "absolute", retries, 1.0, 0.0, form
    )
    assert met.item() == 1 + 2 + (4 if retries else 0)
    assert pivot.tolist() == [0, 1, 0] and count.tolist() == [0, retries, 0]
    assert lam[1] == -1e6 * 10**retries and factor[1].isnan().all()
    assert not factor[[0, 2]].isnan().any()
    zero = OPS.krr_forward(
        *(0 * f_syn[0], y_syn[0], f_real[0], y_real[0], None, 1.0, "trace", 0, 1.0, 0.0, form)
    )
    assert zero[-1].item() & 1 and zero[5].item() == 1 and zero[2].isnan().all()


@pytest.mark.parametrize("name", ["f_syn", "y_syn", "f_real", "y_real"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("many", [(), (3,)])
def test_what_is_not_finite_is_named(many: tuple[int, ...], bad: float, name: str) -> None:
    tensors = dict(
        zip(("f_syn", "y_syn", "f_real", "y_real"), inputs(5, 9, 4, 2, *many, dtype=torch.float32))
    )
    tensors[name][..., -1, 1] = bad
    with pytest.raises(NonFiniteError, match=f"krr_mse: {name} holds NaN or infinity"):
        krr_mse(**tensors)
    loss, info = krr_mse(**tensors, solver=Solver(check="flag"), return_info=True)
    assert not loss.isfinite().any() and bool(info.failed.all()) == (name == "f_syn")
    if name != "y_real":
        del tensors["y_real"]
        with pytest.raises(NonFiniteError, match=f"krr_predict: {name} holds NaN or infinity"):
            krr_predict(**tensors)


def test_one_bad_problem_leaves_the_others() -> None:
    tensors = inputs(5, 9, 4, 2, 3, dtype=torch.float32)[:4]
    good = krr_mse(*tensors, ridge=0.1)
    tensors[0][1, 2, 3] = float("nan")
    loss = krr_mse(*tensors, ridge=0.1, solver=Solver(check="flag"))
    assert loss[1].isnan() and torch.equal(loss[[0, 2]], good[[0, 2]])


def test_a_zero_trace_is_explained() -> None:
    f_syn, y_syn, f_real, y_real, _ = inputs(5, 9, 4, 2, dtype=torch.float32)
    with pytest.raises(NotPositiveDefiniteError, match="the ridge is 0 because trace"):
        krr_mse(0 * f_syn, y_syn, f_real, y_real)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("many", [(), (2,)])
@pytest.mark.parametrize("predicts", [False, True])
def test_opcheck(predicts: bool, many: tuple[int, ...], form: str) -> None:
    f_syn, y_syn, f_real, y_real, ridge = inputs(6, 4, 5, 3, *many, dtype=torch.float32)
    target, kernel = None if predicts else y_real, ("trace", 1, 2.0, 0.5, form)
    forward = f_syn, y_syn, f_real, target, ridge, 0.0, *kernel
    torch.library.opcheck(OPS.krr_forward.default, forward)
    loss, readout, factor, _, count, _, base, coefficients, kept, _ = OPS.krr_forward(*forward)
    saved = factor, count, base, coefficients, kept
    gradient, residual = (readout, None) if predicts else (loss, readout)
    for needs in (EVERYTHING, 2):
        torch.library.opcheck(
            OPS.krr_backward.default,
            (
                *(gradient, f_syn, y_syn, f_real, residual, *saved, None, 0.1, "trace", False),
                *(2.0, 0.5, form, needs),
            ),
        )


@EXTENSION
def test_a_wild_call_is_refused() -> None:
    f_syn, y_syn, f_real, y_real, ridge = inputs(6, 4, 5, 3, 2, dtype=torch.float32)
    right = [f_syn, y_syn, f_real, y_real, ridge, 0.0, "trace", 0, 1.0, 0.0, "w"]
    loss, readout, factor, _, count, _, base, coefficients, kept, _ = OPS.krr_forward(*right)
    wrong: list[tuple[int, Any]] = [
        (0, f_syn[0]),
        (0, f_syn.double()),
        (0, f_syn.half()),
        (1, y_syn[:, :5]),
        (1, y_syn[:1]),
        (2, f_real[..., :3]),
        (3, y_real[:, :, :1]),
        (4, ridge[:1]),
        (4, ridge.double()),
        (6, "size"),
        (10, "dual"),
    ]
    for place, value in wrong:
        with pytest.raises(RuntimeError):
            OPS.krr_forward(*[value if i == place else x for i, x in enumerate(right)])
    right = [loss, f_syn, y_syn, f_real, readout, factor, count, base, coefficients, kept]
    right += [ridge, 0.0, "trace", True, 1.0, 0.0, "w", EVERYTHING]
    wrong = [
        (0, loss[:1]),
        (4, readout[:, 1:]),
        (5, factor[:, 1:, 1:]),
        (5, factor.float()),
        (6, count.int()),
        (7, base[:1]),
        (8, coefficients[:, :2]),
        (9, kept.mT),
        (16, "k"),
    ]
    for place, value in wrong:
        with pytest.raises(RuntimeError):
            OPS.krr_backward(*[value if i == place else x for i, x in enumerate(right)])
