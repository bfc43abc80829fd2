"""krr_path: many ridges from one decomposition, each as a fit of its own."""

from typing import Any

import pytest
import torch

from krrst_fast import NonFiniteError, NotPositiveDefiniteError, krr_fit, krr_path
from tests.helpers import assert_equal, problem

RIDGES = [1e-4, 1e-2, 1.0]


@pytest.mark.parametrize("ridge_of", ["trace", "mean_diagonal", "absolute"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (13, 7, 5, 3), (7, 13, 5, 3)])
def test_each_ridge_as_a_fit_of_its_own(sizes: tuple, weighted: bool, ridge_of: str) -> None:
    f_syn, y_syn, f_real, _ = problem(*sizes)
    weights = torch.arange(1, sizes[0] + 1).double() % 3 if weighted else None
    for bias in (0.0, 0.5):
        options = {"ridge_of": ridge_of, "bias": bias, "scale": 2.0, "weights": weights}
        path = krr_path(f_syn, y_syn, RIDGES, **options)
        for i, ridge in enumerate(RIDGES):
            fit = krr_fit(f_syn, y_syn, ridge=ridge, **options)
            assert_equal(path.predict(f_real)[i], fit.predict(f_real), 1e-9)
            assert_equal(path.weights[i], fit.weights, 1e-9)
            assert_equal(path.intercept[i], fit.intercept, 1e-9)
            assert_equal(path.loo_residuals[i], fit.loo_residuals, 1e-9)
            assert_equal(path.lam[i], fit.info.ridge, 1e-12)


def test_leading_dimensions() -> None:
    each = [problem(9, 12, 4, 2, seed=seed) for seed in range(6)]
    f_syn, y_syn, f_real, _ = (torch.stack(x).reshape(2, 3, *x[0].shape) for x in zip(*each))
    path = krr_path(f_syn, y_syn, RIDGES, bias=1.0)
    assert path.loo_mse.shape == (3, 2, 3) and path.best.shape == (2, 3)
    for i, (f, y, q, _) in enumerate(each):
        alone = krr_path(f, y, RIDGES, bias=1.0)
        assert_equal(path.predict(f_real)[:, i // 3, i % 3], alone.predict(q), 1e-11)
        assert_equal(path.loo_mse[:, i // 3, i % 3], alone.loo_mse, 1e-11)
        assert path.best[i // 3, i % 3] == alone.best


def test_the_best_ridge_is_the_best_of_all_that_are_left_out() -> None:
    """Noise in the targets: too little ridge follows it, too much forgets the rest."""
    draw = torch.Generator().manual_seed(0)
    f = torch.randn(40, 30, dtype=torch.float64, generator=draw)
    y = 2 * f[:, :1] + torch.randn(40, 1, dtype=torch.float64, generator=draw)
    ridges = [1e-3, 10.0, 1e5]
    path = krr_path(f, y, ridges, ridge_of="absolute")
    left_out = []
    for ridge in ridges:
        errors = []
        for i in range(40):
            rest = torch.arange(40) != i
            fit = krr_fit(f[rest], y[rest], ridge=ridge, ridge_of="absolute")
            errors.append((fit.predict(f[i : i + 1]) - y[i]).square())
        left_out.append(torch.stack(errors).mean())
    assert_equal(path.loo_mse, torch.stack(left_out), 1e-9)
    assert path.best == 10.0


def test_weighted_mean_of_what_is_left_out() -> None:
    f, y, _, _ = problem(8, 5, 1, 2)
    weights = torch.tensor([1.0, 2.0, 0.0, 1.0, 1.0, 3.0, 1.0, 1.0]).double()
    path = krr_path(f, y, RIDGES, weights=weights)
    squares = path.loo_residuals.square().mean(-1)
    assert_equal(path.loo_mse, (squares * weights).sum(-1) / 10, 1e-13)


def test_float32_inputs_are_decomposed_in_float64() -> None:
    f, y, q, _ = (x.float() for x in problem(30, 40, 5, 2, condition=1e6))
    path = krr_path(f, y, [1e-6])
    exact = krr_path(f.double(), y.double(), [1e-6])
    assert path.predict(q).dtype == torch.float32
    assert ((path.weights - exact.weights).norm() / exact.weights.norm()) < 1e-6


def test_bad_input_is_named() -> None:
    f, y = torch.eye(3), torch.ones(3, 2)
    for ridges, message in (
        ([], r"ridges must be \[R\], R > 0, got shape \(0,\)"),
        ([[1.0]], r"ridges must be \[R\]"),
        ([1.0, 0.0], "ridges must be positive and finite, got"),
        ([float("nan")], "ridges must be positive"),
    ):
        with pytest.raises(ValueError, match=f"krr_path: {message}"):
            krr_path(f, y, ridges)
    with pytest.raises(TypeError, match="krr_path.. got an unexpected keyword argument 'ridge'"):
        krr_path(f, y, [1.0], ridge=1.0)
    with pytest.raises(NonFiniteError, match="krr_path: y_syn holds NaN"):
        krr_path(f, y * float("nan"), [1.0])
    with pytest.raises(ValueError, match="krr_path: f_syn must have at least one row"):
        krr_path(f[:0], y[:0], [1.0])
    path = krr_path(f, y, [1.0])
    with pytest.raises(ValueError, match=r"predict: f must be \[..., B, 3\], got .*\(2, 4\)"):
        path.predict(torch.ones(2, 4))
    with pytest.raises(NonFiniteError, match="KRRPath.predict: f holds NaN"):
        path.predict(torch.full((2, 3), float("nan")))


@pytest.mark.parametrize("ridges", ["meta", "list", "words"])
def test_ridges_that_are_no_numbers(ridges: str) -> None:
    f_syn, y_syn, *_ = problem(5, 7, 3, 2)
    empty = torch.empty((), device="meta")
    given = {"meta": empty.expand(2), "list": [empty, empty], "words": ["a", "b"]}[ridges]
    with pytest.raises(TypeError, match="krr_path: ridges must be numbers, or a tensor of them: "):
        krr_path(f_syn, y_syn, ridges=given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("intercept", [False, True])
def test_eigenvalues_that_are_nothing_beside_the_ridge(
    dtype: torch.dtype, batch: tuple[int, ...], intercept: bool
) -> None:
    """Of rows in few dimensions most eigenvalues are rounding: they need no eigenvectors."""
    draw = torch.Generator().manual_seed(0)
    low, wide, y = (
        torch.randn(*batch, *size, generator=draw, dtype=torch.float64)
        for size in ((40, 5), (5, 60), (40, 3))
    )
    f = (low @ wide).to(dtype).double()
    ridges = [1e-2, 1.0, 100.0]
    settings: dict[str, Any] = {"ridge_of": "absolute", "intercept": intercept}
    path = krr_path(f.to(dtype), y.to(dtype), ridges, **settings)
    assert path._spectrum.some is not None and path._spectrum.some <= 6
    tolerance = 2e-5 if dtype == torch.float32 else 1e-9
    for i, ridge in enumerate(ridges):
        fit = krr_fit(f, y.to(dtype).double(), ridge=ridge, **settings)
        left_out = path.loo_residuals[i].double()
        assert_equal(left_out, fit.loo_residuals, tolerance)
        mean_square = fit.loo_residuals.square().mean(-2)
        assert_equal(path.loo_mse_per_target[i].double(), mean_square, tolerance)
        assert_equal(path.weights[i].double(), fit.weights, 10 * tolerance)
    best = path.fit_best(per_target=True)
    for p in range(3):
        target = y.to(dtype).double()[..., p : p + 1]
        ridge = best.ridge[..., p].double()
        fit = krr_fit(f, target, ridge=ridge, **settings)
        assert_equal(best.alpha[..., p : p + 1].double(), fit.alpha, tolerance / ridge.min().item())


def test_no_targets() -> None:
    path = krr_path(torch.ones(2, 3), torch.empty(2, 0), [0.1, 1.0])
    assert torch.equal(path.loo_mse, torch.zeros(2)) and path.weights.shape == (2, 3, 0)


def test_no_features() -> None:
    path = krr_path(torch.empty(3, 0), torch.ones(3, 2), [0.1], ridge_of="absolute")
    assert torch.equal(path.predict(torch.empty(4, 0)), torch.zeros(1, 4, 2))
    assert_equal(path.loo_mse, torch.ones(1), 1e-6)
    with pytest.raises(NotPositiveDefiniteError, match="below the rounding"):
        krr_path(torch.empty(3, 0), torch.ones(3, 2), [0.1])
