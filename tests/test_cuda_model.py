"""The CUDA Cholesky played on the CPU, thread by thread, against LAPACK."""

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.cuda_model import ORDERS, Model, build

# Round the tiles of 32 and 64, their registers of 4 and the slabs of 16.
SIZES = [1, 2, 4, 5, 31, 32, 33, 63, 64, 65, 127, 129, 200, 257]
PRECISIONS = [(np.float32, np.float32), (np.float32, np.float64), (np.float64, np.float64)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(build(tmp_path_factory.mktemp("cuda_model")))


def systems(
    problems: int, m: int, dtype: type, condition: float = 1e3
) -> tuple[NDArray, NDArray, NDArray]:
    """Symmetric k [N, M, M] and ridge [N], exact in dtype, and k + ridge I in float64."""
    rng = np.random.default_rng(m)
    q = np.linalg.qr(rng.standard_normal((problems, m, m)))[0]
    k = (q * np.logspace(0, -np.log10(condition), m)) @ q.transpose(0, 2, 1)
    k = ((k + k.transpose(0, 2, 1)) / 2).astype(dtype)
    ridge = np.linspace(0.5, 1, problems).astype(dtype) / dtype(condition)
    return k, ridge, k.astype(float) + ridge.astype(float)[:, None, None] * np.eye(m)


def rounding(lower: NDArray, precision: type) -> NDArray:
    """What L L' may lose: an entry is a sum of at most M products of what was rounded before."""
    lower = np.abs(lower.astype(np.float64))
    terms = 2 + lower.shape[-1] ** 0.5
    return np.finfo(precision).eps * terms * (lower @ lower.swapaxes(-1, -2))


def assert_zero(left: NDArray, allowed: NDArray, what: str) -> None:
    """What is left of the equations: factors that differ may both be right."""
    over = np.abs(left) - allowed
    assert (over <= 0).all(), f"{what}: {over.max():.3e} more than allowed"


def assert_factor(lower: NDArray, system: NDArray, result: type, what: str) -> None:
    wide = lower.astype(np.float64)
    assert_zero(wide @ wide.swapaxes(-1, -2) - system, rounding(lower, result), what)


def layouts(x: NDArray) -> Iterator[tuple[str, NDArray]]:
    """x [..., I, J] in every way memory can hold it; what is not x is NaN."""
    yield "by rows", np.ascontiguousarray(x)
    yield "by columns", np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2)
    *rest, rows, columns = x.shape
    wide = np.full((*rest, 2 * rows, 3 * columns), np.nan, x.dtype)
    wide[..., ::2, ::3] = x
    yield "sliced", wide[..., ::2, ::3]
    wide = np.full((*rest, rows + 2, columns + 1), np.nan, x.dtype)
    wide[..., 1:-1, 1:] = x
    yield "padded", wide[..., 1:-1, 1:]


@pytest.mark.parametrize("source,result", PRECISIONS)
@pytest.mark.parametrize("m", SIZES)
def test_factors(model: Model, m: int, source: type, result: type) -> None:
    for condition in (1e2, 1e5):
        problems = 16 if m < 64 else 2
        k, ridge, system = systems(problems, m, source, condition)
        first = None
        for order in ORDERS:
            factor, _, pivot = model.cholesky(k, ridge, result=result, order=order)
            first = factor if first is None else first
            assert np.array_equal(factor, first), f"{order}: the order of threads matters"
        assert not pivot.any() and np.array_equal(factor, np.tril(factor))
        assert_factor(factor, system, result, f"{m}, condition {condition}")


@pytest.mark.parametrize("m", [5, 33, 65, 130])
def test_layouts_and_only_the_lower_triangle(model: Model, m: int) -> None:
    k, ridge, _ = systems(3, m, np.float32)
    expected = model.cholesky(k, ridge)[0]
    k = np.where(np.tri(m, dtype=bool), k, np.float32("nan"))
    for name, layout in layouts(k):
        assert np.array_equal(model.cholesky(layout, ridge)[0], expected), name
    assert np.array_equal(model.cholesky(k, ridge.astype(np.float64))[0], expected)


@pytest.mark.parametrize("source,result", PRECISIONS)
@pytest.mark.parametrize("m,p", [(1, 1), (7, 3), (64, 64), (65, 1), (100, 65), (129, 130)])
def test_half_a_solution(model: Model, m: int, p: int, source: type, result: type) -> None:
    k, ridge, system = systems(1, m, source, 1e2)
    y = np.random.default_rng(p).standard_normal((m, p)).astype(source)
    first = None
    for name, layout in layouts(y) if m in (7, 129) else [("by rows", y)]:
        for order in ORDERS if name == "by rows" else ["forward"]:
            factor, half, pivot = model.cholesky(k, ridge, layout, result=result, order=order)
            first = half if first is None else first
            assert np.array_equal(half, first), f"{name} {order}"
    assert pivot == 0
    assert_factor(factor, system, result, f"{m} x {p}")
    wide, x = factor[0].astype(np.float64), half.reshape(m, p).astype(np.float64)
    terms = np.finfo(result).eps * (2 + m**0.5)
    assert_zero(wide @ x - y, terms * (np.abs(wide) @ np.abs(x) + np.abs(y)), f"{m} x {p}")


@pytest.mark.parametrize("source", [np.float32, np.float64])
@pytest.mark.parametrize("m", [1, 5, 32, 64, 65, 129, 200])
def test_solutions(model: Model, m: int, source: type) -> None:
    k, ridge, system = systems(2, m, source, 1e2)
    factor = model.cholesky(k, ridge)[0]
    for p in (1, 5, 33) if m < 100 else (2, 65):
        y = np.random.default_rng(p).standard_normal((2, m, p)).astype(source)
        first = None
        every = p in (5, 65) and m in (5, 65, 129)
        for name, right in layouts(y) if every else [("by rows", y)]:
            for name_factor, lower in layouts(factor) if name == "by rows" else [("", factor)]:
                for order in ORDERS if name == name_factor == "by rows" else ["backward"]:
                    x = model.solve(right, lower, order)
                    first = x if first is None else first
                    assert np.array_equal(x, first), f"{name} {name_factor} {order}"
        # Two substitutions in float64, and the solution is rounded to its own precision.
        wide = np.abs(x.astype(np.float64))
        terms = 2 * np.finfo(np.float64).eps * (2 + m**0.5) * np.abs(y)
        terms = terms + 2 * rounding(factor, np.float64) @ wide
        terms += np.finfo(source).eps / 2 * (np.abs(system) @ wide)
        assert_zero(system @ x - y, terms, f"{m} x {p}")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("m", [1, 5, 32, 65, 130])
@pytest.mark.parametrize("bad", [-1.0, 0.0, np.nan, np.inf])
def test_a_bad_pivot_at_every_position(model: Model, m: int, bad: float, dtype: type) -> None:
    """Problem i fails at row i; the columns before it are those of the factor, the rest is NaN."""
    positions = np.arange(m) if m <= 32 else np.array([0, 1, 31, 62, 63, 64, m - 2, m - 1])
    k, _, _ = systems(1, m, dtype)
    ridge = np.full(len(positions), 0.25, dtype)
    good = model.cholesky(k, ridge[:1], result=dtype)[0]
    many = np.repeat(k, len(positions), axis=0)
    many[np.arange(len(positions)), positions, positions] = bad - 1 if bad <= 0 else bad
    factor, _, pivot = model.cholesky(many, ridge, result=dtype, order="shuffled")
    assert pivot.tolist() == [i + 1 for i in positions]
    for i, lower in zip(positions, factor):
        expected = np.tril(np.where(np.arange(m) >= i, dtype("nan"), good[0]))
        expected[i, :i] = lower[i, :i] if i else expected[i, :i]
        np.testing.assert_array_equal(lower, expected)
        assert np.isfinite(lower[:, :i]).all()


def test_a_bad_pivot_leaves_other_problems_alone(model: Model) -> None:
    k, ridge, _ = systems(3, 70, np.float32)
    expected = model.cholesky(k, ridge)[0]
    k[1, 66, 2] = np.nan
    factor, _, pivot = model.cholesky(k, ridge)
    assert pivot.tolist() == [0, 67, 0]
    np.testing.assert_array_equal(factor[[0, 2]], expected[[0, 2]])
    assert np.isnan(model.solve(np.ones((3, 70, 2), np.float32), factor)[1]).all()


@pytest.mark.parametrize("scale", [2.0**-120, 2.0**-60, 2.0**100])
def test_the_scale_of_a_system_does_not_matter(model: Model, scale: float) -> None:
    k, ridge, _ = systems(1, 70, np.float32)
    factor = model.cholesky(k, ridge, result=np.float32)[0]
    scaled = model.cholesky(k * scale, ridge * scale, result=np.float32)[0]
    np.testing.assert_allclose(scaled, factor * scale**0.5, rtol=1e-5, atol=1e-5 * scale**0.5)
