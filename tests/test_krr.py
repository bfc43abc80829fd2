"""krr_mse and krr_predict: the method's formula, its gradients, its accuracy, its errors."""

import pytest
import torch
from torch import Tensor

from krrst_fast import Solver, krr_mse, krr_predict
from krrst_fast.planner import FORMS
from tests.helpers import (
    BACKEND_NAMES,
    NAMES,
    SHAPES,
    assert_equal,
    formula,
    loss_and_gradients,
    problem,
)

CONDITIONS = [1e2, 1e6, "duplicates"]
KERNELS = [
    {},
    {"bias": 1.0},
    {"bias": 0.5, "scale": 2.0, "ridge": 1e-2, "ridge_of": "mean_diagonal"},
    {"bias": 0.5, "scale": 2.0, "ridge": 1e-3, "detach_ridge": False},
    {"ridge": 1e-2, "ridge_of": "mean_diagonal", "detach_ridge": False},
    {"ridge": 0.1, "ridge_of": "absolute"},
]


def _forms(m: int, d: int) -> list[str]:
    """The forms a well-posed float64 comparison allows: primal needs M > D to be as accurate."""
    return [form for form in FORMS if form != "primal" or m > d]


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_float64_equals_the_formula(
    shape: tuple[int, int, int, int], condition: float | str, backend: str
) -> None:
    tensors = problem(*shape, condition=condition)
    exact = loss_and_gradients(formula, tensors)
    # Two ways to round differ by as much as the condition number amplifies some roundings: at 1e6
    # that is 2e-9, and the formula itself keeps few more digits.
    tolerance = max(1e-10, 8 * 2**-52 * _condition(tensors[0]))
    for form in _forms(*shape[:2]):
        got = loss_and_gradients(
            lambda *t, form=form: krr_mse(*t, bias=1.0, solver=Solver(form=form, backend=backend)),
            tensors,
        )
        for name, a, b in zip(("loss", *NAMES), got, exact):
            assert_equal(a, b, tolerance, f"{form} {name}")


def _condition(f_syn: Tensor) -> float:
    k = f_syn @ f_syn.mT + 1.0
    eigenvalues = torch.linalg.eigvalsh(k) + 1e-6 * k.trace()
    return (eigenvalues[-1] / eigenvalues[0]).item()


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_is_at_most_twice_as_wrong_as_the_formula(
    shape: tuple[int, int, int, int], condition: float | str
) -> None:
    # Median and 90th percentile over draws: the error of a single 2 x 2 draw is luck (in 1500 draws
    # of it both sides have the same quantiles, and one draw of them makes up the mean; in 64 the
    # 90th percentiles differed by 4.2 on one processor).
    forms = _forms(*shape[:2])
    plain_errors, errors = [], []
    draws = 400 if shape[0] < 8 else 32 if shape[0] > 128 else 64
    for seed in range(draws):
        tensors = problem(*shape, condition=condition, seed=seed)
        exact = loss_and_gradients(formula, tensors)
        plain = loss_and_gradients(formula, tensors, torch.float32)
        plain_errors.append(_relative_errors(plain, exact))
        got = [
            loss_and_gradients(
                lambda *t, form=form: krr_mse(*t, bias=1.0, solver=Solver(form=form)),
                tensors,
                torch.float32,
            )
            for form in forms
        ]
        errors.append(torch.stack([_relative_errors(values, exact) for values in got]))
    for quantile in (0.5, 0.9):
        allowed = torch.stack(plain_errors).quantile(quantile, dim=0)
        # To store the exact result in float32 costs half a unit in the last place.
        ratio = torch.stack(errors).quantile(quantile, dim=0) / (allowed + 2.0**-24)
        assert ratio.max() <= 2.0, f"times as wrong as the formula, {forms}: {ratio}"


def _relative_errors(got: list[Tensor], exact: list[Tensor]) -> Tensor:
    return torch.stack([(a.double() - b).norm() / b.norm() for a, b in zip(got, exact)])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("form", FORMS)
def test_every_kernel_and_form_against_the_reference(form: str, kernel: dict) -> None:
    for shape in [(20, 33, 11, 4), (33, 20, 11, 4), (1, 1, 1, 1), (5, 1, 2, 1)]:
        tensors = problem(*shape)
        ridge = torch.tensor(kernel.get("ridge", 1e-3), dtype=torch.float64)
        settings = {key: value for key, value in kernel.items() if key != "ridge"}

        def loss(*t: Tensor, settings: dict = settings, **which: str) -> Tensor:
            return krr_mse(*t[:4], ridge=t[4], **settings, solver=Solver(**which))

        got = loss_and_gradients(lambda *t: loss(*t, form=form), [*tensors, ridge])
        exact = loss_and_gradients(lambda *t: loss(*t, backend="reference"), [*tensors, ridge])
        for name, a, b in zip(("loss", *NAMES, "ridge"), got, exact):
            assert_equal(a, b, 1e-10, f"{shape} {name}")


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: str) -> None:
    tensors = [x.requires_grad_() for x in problem(6, 5, 4, 3)]
    ridge = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    for detach in (False,):
        assert torch.autograd.gradcheck(
            lambda *t, d=detach: krr_mse(
                *t[:4], ridge=t[4], bias=0.3, scale=1.7, detach_ridge=d, solver=Solver(form=form)
            ),
            (*tensors, ridge),
        )
    assert torch.autograd.gradcheck(
        lambda *t: krr_predict(*t, ridge=0.1, ridge_of="absolute", solver=Solver(form=form)),
        tensors[:3],
    )


@pytest.mark.parametrize("form", FORMS)
def test_prediction_with_a_loss_of_ones_own(form: str) -> None:
    tensors = problem(9, 7, 5, 3)

    def loss(predict, *t: Tensor) -> Tensor:
        return torch.nn.functional.smooth_l1_loss(predict(*t[:3]), t[3])

    got = loss_and_gradients(
        lambda *t: loss(lambda *x: krr_predict(*x, bias=1.0, solver=Solver(form=form)), *t), tensors
    )
    exact = loss_and_gradients(
        lambda *t: loss(
            lambda *x: krr_predict(*x, bias=1.0, solver=Solver(backend="reference")), *t
        ),
        tensors,
    )
    for a, b in zip(got, exact):
        assert_equal(a, b, 1e-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("wanted", range(4))
def test_one_gradient_wanted(form: str, wanted: int) -> None:
    tensors = problem(8, 6, 5, 3)
    exact = loss_and_gradients(lambda *t: krr_mse(*t, solver=Solver(backend="reference")), tensors)[
        1 + wanted
    ]
    tensors[wanted].requires_grad_()
    krr_mse(*tensors, solver=Solver(form=form)).backward()
    assert_equal(tensors[wanted].grad, exact, 1e-10)
    assert all(x.grad is None for i, x in enumerate(tensors) if i != wanted)


def _sliced(x: Tensor) -> Tensor:
    wide = x.new_full((2 * len(x), 3 * x.shape[1]), float("nan"))
    wide[::2, 1::3] = x
    return wide[::2, 1::3]


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("form", FORMS)
def test_transposed_and_sliced_inputs(form: str, backend: str) -> None:
    tensors = problem(12, 9, 7, 12)
    exact = loss_and_gradients(lambda *t: krr_mse(*t, solver=Solver(backend="reference")), tensors)
    for layout in (lambda x: x.mT.contiguous().mT, _sliced):
        leaves = [layout(x).requires_grad_() for x in tensors]
        value = krr_mse(*leaves, solver=Solver(form=form, backend=backend))
        got = [value.detach(), *torch.autograd.grad(value, leaves)]
        for name, a, b in zip(("loss", *NAMES), got, exact):
            assert_equal(a, b, 1e-10, name)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_learnt_predicts_zero(form: str) -> None:
    tensors = [torch.randn(*size) for size in ((0, 3), (0, 2), (4, 3), (4, 2))]
    loss, *grads = loss_and_gradients(
        lambda *t: krr_mse(*t, solver=Solver(form=form), bias=1.0), tensors, torch.float32
    )
    assert loss == tensors[3].square().mean()
    assert [g.shape for g in grads] == [x.shape for x in tensors]
    assert_equal(grads[3], tensors[3] / 4, 1e-6)


def test_no_rows_to_predict() -> None:
    f_syn, y_syn, _, _ = problem(4, 3, 2, 2)
    for form in FORMS:
        assert krr_predict(f_syn, y_syn, f_syn[:0], solver=Solver(form=form)).shape == (0, 2)


def test_gradients_add_up_and_scale_with_the_one_that_comes_in() -> None:
    tensors = problem(8, 6, 5, 3)
    _, *plain = loss_and_gradients(krr_mse, tensors)
    _, *scaled = loss_and_gradients(lambda *t: -3.0 * krr_mse(*t), tensors)
    for a, b in zip(plain, scaled):
        assert_equal(b, -3.0 * a, 1e-12)


def test_create_graph_changes_no_gradient() -> None:
    tensors = problem(4, 3, 5, 2)
    exact = loss_and_gradients(krr_mse, tensors)
    leaves = [x.clone().requires_grad_() for x in tensors]
    got = torch.autograd.grad(krr_mse(*leaves), leaves, create_graph=True)
    for a, b in zip(got, exact[1:]):
        assert_equal(a, b, 1e-9)


def test_same_bits_on_any_number_of_threads() -> None:
    tensors = problem(200, 300, 100, 12)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        k = torch.ops.krrst_fast.gram(tensors[0].float(), 1.0, 1.0)
        w = torch.ops.krrst_fast.thin_matmul(tensors[0].float().mT, tensors[1].float())
        results.append((k, w))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_autocast_does_not_reach_the_solve() -> None:
    tensors = [x.float() for x in problem(16, 8, 5, 3, condition=1e6)]
    plain = loss_and_gradients(krr_mse, tensors, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = loss_and_gradients(krr_mse, tensors, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast))


# Tracing and code generation run into torch's own deprecations.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("engine", ["aot_eager", "inductor"])
def test_compiled_gives_the_same_numbers(engine: str) -> None:
    tensors = problem(40, 30, 20, 5)

    def loss(*t: Tensor) -> Tensor:
        return 2.0 * krr_mse(t[0].relu(), *t[1:], bias=1.0) + 1.0

    plain = loss_and_gradients(loss, tensors)
    compiled = loss_and_gradients(torch.compile(loss, backend=engine, fullgraph=True), tensors)
    for a, b in zip(plain, compiled):
        assert_equal(b, a, 1e-10)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_for_changing_sizes(dynamic: bool | None) -> None:
    compiled = torch.compile(krr_mse, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for sizes in [(8, 30, 6, 5), (8, 30, 7, 5), (9, 31, 7, 3), (40, 12, 9, 5)]:
        tensors = problem(*sizes)
        plain = loss_and_gradients(krr_mse, tensors)
        for a, b in zip(plain, loss_and_gradients(compiled, tensors)):
            assert_equal(b, a, 1e-10, str(sizes))


def test_a_shape_without_values() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    tensors = [x.requires_grad_() for x in problem(6, 4, 5, 2)]
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fakes = [mode.from_tensor(x) for x in tensors]
        loss = krr_mse(*fakes)
        grads = torch.autograd.grad(loss, fakes)
    assert [g.shape for g in grads] == [x.shape for x in tensors]
    meta = [torch.empty_like(x, device="meta") for x in tensors]
    assert krr_mse(*meta).shape == ()


def test_a_failed_factor_is_retried_with_more_ridge(caplog: pytest.LogCaptureFixture) -> None:
    f_syn, y_syn, f_real, y_real = (x.float() for x in problem(300, 5, 20, 2))
    tensors = (f_syn, y_syn, f_real, y_real)
    # A gram of rank 5 with 300 rows: in float32 a ridge of 1e-9 of the trace is below its rounding.
    loss, info = krr_mse(*tensors, ridge=1e-9, solver=Solver(form="w"), return_info=True)
    assert info.retries > 0
    assert "ridge raised" in caplog.text
    trace = f_syn.square().sum()
    assert_equal(info.ridge / trace, torch.tensor(1e-9) * 10.0**info.retries, 1e-4)
    raised = krr_mse(*tensors, ridge=1e-9 * 10.0 ** info.retries.item(), solver=Solver(form="w"))
    assert_equal(loss, raised, 1e-3)


def test_info() -> None:
    tensors = problem(20, 50, 7, 3, condition=1e4)
    _, info = krr_mse(*tensors, ridge=1e-3, return_info=True)
    k = tensors[0] @ tensors[0].mT
    assert_equal(info.ridge, 1e-3 * k.trace(), 1e-12)
    ridged = torch.linalg.eigvalsh(k + info.ridge * torch.eye(20))
    exact = ridged[-1] / ridged[0]
    assert exact / 2 < info.condition <= exact * (1 + 1e-9)
    assert info.retries == 0
    assert info.form == "w"
