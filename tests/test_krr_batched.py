"""Leading dimensions: every problem as if it were alone, whatever is shared between them."""

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
    krr_predict,
    ridge_solve,
)
from krrst_fast.planner import FORMS
from tests.helpers import BACKEND_NAMES, NAMES, assert_equal, loss_and_gradients, problem

WEIGHT = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
KERNELS = [
    {},
    {"bias": 1.0, "scale": 0.5, "ridge_of": "mean_diagonal", "detach_ridge": False},
    {"bias": 0.3, "ridge_of": "absolute"},
]


def _problems(n: int, *sizes: int) -> list[Tensor]:
    """F_s [n, M, D], Y_s [n, M, P], F_r [n, B, D], Y_r [n, B, P]."""
    each = [problem(*sizes, seed=seed) for seed in range(n)]
    return [torch.stack(tensors) for tensors in zip(*each)]


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("form", FORMS)
def test_each_problem_as_if_it_were_alone(form: str, kernel: dict, backend: str) -> None:
    for sizes in [(7, 13, 11, 3), (13, 7, 11, 3), (25, 64, 9, 5), (50, 60, 9, 5), (1, 1, 1, 1)]:
        tensors = _problems(3, *sizes)
        ridge = torch.tensor([0.1, 0.5, 0.02], dtype=torch.float64)

        def losses(*t: Tensor, backend: str = backend) -> Tensor:
            solver = Solver(backend=backend, form=form)
            return krr_mse(*t[:4], ridge=t[4], solver=solver, **kernel)

        got = loss_and_gradients(lambda *t: WEIGHT @ losses(*t), [*tensors, ridge])
        for i in range(3):
            alone = loss_and_gradients(
                lambda *t, i=i: WEIGHT[i] * losses(*t, backend="reference"),
                [x[i] for x in [*tensors, ridge]],
            )
            for name, a, b in zip((*NAMES, "ridge"), got[1:], alone[1:]):
                assert_equal(a[i], b, 1e-10, f"{sizes} {name} of problem {i}")


@pytest.mark.parametrize("form", FORMS)
def test_what_is_shared_is_broadcast(form: str) -> None:
    """Four pool models with features of their own: targets, weights and ridge are the same."""
    f_syn, y_syn, f_real, y_real = _problems(4, 9, 14, 6, 3)
    shared = [f_syn.reshape(2, 2, 9, 14), y_syn[0], f_real.reshape(2, 2, 6, 14), y_real[0]]
    weights = torch.rand(9, dtype=torch.float64) + 0.5
    options = {"ridge": 0.1, "solver": Solver(form=form), "bias": 1.0}

    def total(*t: Tensor) -> Tensor:
        losses = krr_mse(*t[:4], weights=t[4], **options)
        assert losses.shape == (2, 2)
        return losses.sum()

    def looped(*t: Tensor) -> Tensor:
        pairs = [(i, j) for i in range(2) for j in range(2)]
        return sum(
            krr_mse(t[0][i, j], t[1], t[2][i, j], t[3], weights=t[4], **options) for i, j in pairs
        )

    got = loss_and_gradients(total, [*shared, weights])
    for a, b in zip(got, loss_and_gradients(looped, [*shared, weights])):
        assert_equal(a, b, 1e-11)


def test_several_ridges_for_one_problem() -> None:
    tensors = problem(8, 12, 5, 2)
    ridges = torch.tensor([1e-3, 1e-1, 10.0], dtype=torch.float64)
    losses = krr_mse(*tensors, ridge=ridges)
    assert_equal(losses, torch.stack([krr_mse(*tensors, ridge=r.item()) for r in ridges]), 1e-12)


def test_predictions_fits_solves_and_grams_keep_the_leading_dimensions() -> None:
    f_syn, y_syn, f_real, _ = (x.reshape(2, 3, *x.shape[1:]) for x in _problems(6, 9, 14, 6, 3))
    prediction = krr_predict(f_syn, y_syn, f_real, ridge=0.1)
    fit = krr_fit(f_syn, y_syn, ridge=0.1)
    k = gram(f_syn)
    alpha = ridge_solve(k, y_syn, ridge=0.1)
    assert fit.info.factor.shape == (2, 3, 9, 9) and fit.condition.shape == (2, 3)
    assert_equal(fit.predict(f_real), prediction, 1e-12)
    assert_equal(fit.alpha, alpha, 1e-12)
    for i in range(2):
        for j in range(3):
            alone = krr_predict(f_syn[i, j], y_syn[i, j], f_real[i, j], ridge=0.1)
            assert_equal(prediction[i, j], alone, 1e-12)
            assert_equal(k[i, j], f_syn[i, j] @ f_syn[i, j].T, 1e-12)
            condition = krr_fit(f_syn[i, j], y_syn[i, j], ridge=0.1).condition
            assert_equal(fit.condition[i, j], condition, 1e-9)
    one_query = fit.predict(f_real[0, 0])  # the same rows for all fits
    assert_equal(
        one_query[1, 2], krr_fit(f_syn[1, 2], y_syn[1, 2], ridge=0.1).predict(f_real[0, 0]), 1e-12
    )


def test_strided_expanded_and_transposed_batches() -> None:
    tensors = _problems(4, 9, 14, 6, 3)
    exact = loss_and_gradients(lambda *t: krr_mse(*t).sum(), tensors)
    layouts = (
        lambda x: x.mT.contiguous().mT,
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: torch.stack((x, x * float("nan")), 3)[..., 0],
    )
    for layout in layouts:
        leaves = [layout(x).requires_grad_() for x in tensors]
        for a, b in zip(torch.autograd.grad(krr_mse(*leaves).sum(), leaves), exact[1:]):
            assert_equal(a, b, 1e-12)
    expanded = [x[:1].expand(4, *x.shape[1:]) for x in tensors]
    assert_equal(krr_mse(*expanded), krr_mse(*(x[0] for x in tensors)).expand(4), 1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: str) -> None:
    tensors = [x.requires_grad_() for x in _problems(2, 4, 3, 5, 2)]
    ridge = torch.tensor([0.1, 0.3], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *t: krr_mse(
            *t[:4], ridge=t[4], bias=0.3, detach_ridge=False, solver=Solver(form=form)
        ),
        (*tensors, ridge),
    )


@pytest.mark.parametrize("rows", [300, 560])  # factored in float64, and in float32
def test_only_the_problem_that_fails_gets_more_ridge(
    rows: int, caplog: pytest.LogCaptureFixture
) -> None:
    f_syn, y_syn, f_real, y_real = (x.float() for x in _problems(3, rows, 4, 5, 2))
    # Rank 4 with so many rows: a ridge below the rounding of the gram leaves no factor.
    ridges = torch.tensor([1e-2, 1e-17, 1e-2])
    options = {"solver": Solver(form="w", max_retries=14), "return_info": True}
    losses, info = krr_mse(f_syn, y_syn, f_real, y_real, ridge=ridges, **options)
    assert info.retries[1] > 0 and info.retries[0] == info.retries[2] == 0
    assert "raised in 1 of 3 problems" in caplog.text
    assert not info.failed.any()
    for i in (0, 2):
        alone = krr_mse(
            f_syn[i], y_syn[i], f_real[i], y_real[i], ridge=ridges[i], solver=Solver(form="w")
        )
        assert_equal(losses[i], alone, 1e-5 if rows == 300 else 1e-4)
    trace = f_syn[1].square().sum()
    raised = ridges[1].item() * 10.0 ** info.retries[1].item()
    assert_equal(info.ridge[1] / trace, torch.tensor(raised), 1e-4)


def test_the_problem_that_cannot_be_solved_is_named() -> None:
    f_syn, y_syn, f_real, y_real = _problems(3, 6, 4, 5, 2)
    bad = f_syn.clone()
    bad[1] = 0
    with pytest.raises(NotPositiveDefiniteError, match="of problem 1 is 0.*features are zero"):
        krr_mse(bad, y_syn, f_real, y_real)
    bad[1, 2, 3] = float("nan")
    with pytest.raises(NonFiniteError, match="krr_mse: f_syn holds NaN .* row 2 of problem 1"):
        krr_mse(bad, y_syn, f_real, y_real)
    with pytest.raises(NotPositiveDefiniteError, match="of problem 2 .* after raising the ridge 0"):
        ridge_solve(
            torch.eye(4).repeat(3, 1, 1) * torch.tensor([1.0, 1.0, -1.0])[:, None, None],
            torch.ones(4, 1),
            ridge=1e-9,
            ridge_of="absolute",
            solver=Solver(max_retries=0),
        )


def test_no_problem_at_all() -> None:
    tensors = [x[:0] for x in _problems(2, 6, 4, 5, 2)]
    assert krr_predict(*tensors[:3]).shape == (0, 5, 2)
    with pytest.raises(ValueError, match="the mean is over y_real"):
        krr_mse(*tensors)
