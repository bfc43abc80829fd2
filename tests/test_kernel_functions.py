"""Kernels as functions of inner products, and their derivatives, against their definition."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from krrst_fast import operators
from krrst_fast.reference import kernels
from krrst_fast.reference.kernels import OF_PRODUCTS, kernel_matrix
from tests.helpers import assert_equal, run_with

EXTENSION = pytest.mark.skipif(not operators.HAS_EXTENSION, reason=operators.EXTENSION)
OPS = torch.ops.krrst_fast
SHAPES = [(1, 1, 1), (0, 3, 2), (3, 0, 2), (3, 2, 0), (7, 5, 3), (13, 300, 17), (37, 41, 130)]
COEF0, GAMMA = 0.5, 0.7


def rows(*shape: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=draw) / max(shape[-1], 1) ** 0.5


def operands(x: Tensor, y: Tensor, gamma: float = GAMMA, same: int = -1) -> tuple[Any, ...]:
    """What the operators take."""
    numbers = x.new_full(x.shape[:-2], gamma, dtype=torch.float64)
    return x @ y.mT, x, y, x.square().sum(-1), y.square().sum(-1), numbers, same


def pairs() -> Iterator[tuple[Tensor, Tensor]]:
    """Rows x and y: ugly shapes, batches, equal and opposite and zero rows, far and near ones."""
    for shape in SHAPES:
        i, j, d = shape
        yield rows(i, d), rows(j, d, seed=1)
        yield rows(3, i, d), rows(3, j, d, seed=1)
    x = rows(9, 6)
    x[2], x[4], x[5] = 0, x[3], -x[3]
    yield x, x
    yield 100 * x, x  # of a distance whose exponential is below every number
    yield x + 100, x + 100 + 1e-3 * rows(9, 6, seed=2)


def derivative(x: Tensor, y: Tensor, weight: Tensor, kernel: str, degree: int) -> list[Tensor]:
    """Gradients of sum(weight * k) to x, y and gamma, by autograd of a definition that has them."""
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    gamma = x.new_full(x.shape[:-2], GAMMA, requires_grad=True)
    number = gamma[..., None, None]
    if kernel == "arccos":  # at equal rows the definition divides by zero
        of = x @ y.mT, x.square().sum(-1), y.square().sum(-1), gamma
        values = kernels.of_products(*of, kernel, 1, 0.0) + 0 * number
    elif kernel == "rbf" and x.shape[-1]:  # with one gamma for each problem
        distance = (x[..., :, None, :] - y[..., None, :, :]).square().sum(-1)
        values = torch.exp(-number * distance)
    else:
        values = kernel_matrix(x, y, kernel, number, degree, COEF0) + 0 * number
    return list(torch.autograd.grad((weight * values).sum(), (x, y, gamma)))


def check(x: Tensor, y: Tensor, kernel: str, degree: int, by: Any, tolerance: float) -> None:
    """The values and the derivative for rows of one dtype, against float64."""
    of, numbers = operands(x, y), (kernel, degree, COEF0)
    wide = x.double(), y.double()
    exact = kernel_matrix(*wide, kernel, GAMMA, degree, COEF0)
    weight = rows(*exact.shape, seed=3).to(x.dtype)
    values = by.kernel_values(*of, *numbers)
    assert values.dtype == x.dtype
    what = f"{kernel} {degree}, {tuple(exact.shape)}, {x.dtype}"
    assert_equal(values.double(), exact, tolerance, what)
    *found, near = by.kernel_slopes(*of, weight, *numbers, True)
    same, slope, own, column, d_gamma = found
    assert_equal(same.double(), exact, tolerance, what)
    assert near.shape == () and d_gamma.dtype == torch.float64
    none, *others = by.kernel_slopes(*of, weight, *numbers, False)
    assert none.numel() == 0
    assert all(torch.equal(a, b) for a, b in zip(others, (*found[1:], near)))
    if x.dtype == torch.float32 and near.item():
        return  # as it says, the products lose digits
    got = slope @ y + own[..., None] * x, slope.mT @ x + column[..., None] * y, d_gamma
    right = derivative(*wide, weight.double(), kernel, degree)
    size = max([1.0, *(z.abs().max().item() for z in wide if z.numel())])
    for a, b in zip(got, right):
        assert_equal(a.double(), b, 30 * tolerance * size, what)


def check_everything(by: Any = OPS) -> None:
    for x, y in pairs():
        for kernel in OF_PRODUCTS:
            for degree in (1, 2, 3, 7) if kernel == "polynomial" else (3,):
                check(x, y, kernel, degree, by, 3e-14)
                check(x.float(), y.float(), kernel, degree, by, 4e-6)


def test_the_reference_is_the_definition() -> None:
    x, y = rows(2, 9, 6), rows(2, 11, 6, seed=1)
    for kernel in OF_PRODUCTS:
        check(x, y, kernel, 3, kernels, 3e-14)


@pytest.mark.parametrize("by", [kernels, pytest.param(OPS, marks=EXTENSION)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_and_itself(dtype: torch.dtype, by: Any) -> None:
    """Of rows 3 .. 5 and all: the kernel is exact, and has no derivative made of rounding."""
    y = (1e3 * rows(9, 6)).to(dtype)
    of = operands(y[3:6], y, same=3)
    for kernel, itself in (("rbf", torch.ones(3)), ("arccos", of[3][3:6])):
        values = by.kernel_values(*of, kernel, 3, COEF0)
        exact = itself.to(dtype) if kernel == "rbf" else y[3:6].square().sum(1)
        assert_equal(values[:, 3:6].diagonal(), exact, 1e-6 if dtype == torch.float32 else 1e-14)
        _, slope, _, _, d_gamma, near = by.kernel_slopes(
            *of, torch.ones(3, 9, dtype=dtype), kernel, 3, COEF0, False
        )
        if kernel == "rbf":
            assert (slope[:, 3:6].diagonal() == 0).all() and d_gamma == 0 and near == 0


@EXTENSION
def test_the_operators_are_the_definition() -> None:
    check_everything()


@EXTENSION
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    run_with(isa, "test_kernel_functions", "check_everything")


@EXTENSION
def test_exponential_and_angle_to_the_last_digits() -> None:
    """Through the operators: the exponential over its range, the angle over all cosines."""
    norms = torch.logspace(-12, 1.45, 4001, dtype=torch.float64)[:, None]  # squares up to 795
    zero = torch.zeros(1, 1, dtype=torch.float64)
    values = OPS.kernel_values(*operands(norms, zero, 1.0), "rbf", 3, 1.0)[:, 0]
    exact = torch.exp(-norms[:, 0].square())
    normal = exact > 1e-307
    assert ((values - exact).abs() <= 4e-16 * exact)[normal].all()
    assert (values[~normal] <= 1e-307).all() and values[-1] == 0
    turn = torch.linspace(0, torch.pi, 4001, dtype=torch.float64)
    x = torch.stack((turn.cos(), turn.sin()), 1)
    y = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    values = OPS.kernel_values(*operands(x, y), "arccos", 3, 1.0)[:, 0]
    exact = (turn.sin() + (torch.pi - turn) * turn.cos()) / torch.pi
    assert_equal(values, exact, 1e-15)


@EXTENSION
def test_what_is_not_a_number_stays_so() -> None:
    for bad in (float("nan"), float("inf")):
        x, y = rows(4, 3), rows(5, 3, seed=1)
        x[1, 2] = bad
        for kernel in OF_PRODUCTS:
            values = OPS.kernel_values(*operands(x, y), kernel, 3, 1.0)
            assert values[[0, 2, 3]].isfinite().all()
            # A distance that is infinite has a kernel of 0, as the formula says.
            assert not values[1].isfinite().all() or (kernel == "rbf" and bad == float("inf"))


@EXTENSION
def test_near_rows_far_from_zero() -> None:
    """A distance of 1e-4 of the norm: of the sum of squares 8 digits are left, or none."""
    x = (1e4 * rows(50, 20)).float()
    y = x + rows(50, 20, seed=1).float()
    right = torch.exp(-(x.double() - y.double()).square().sum(1))
    for dtype, tolerance, lost in ((torch.float64, 1e-14, 1e-10), (torch.float32, 3e-7, 0.1)):
        of = operands(x.to(dtype), y.to(dtype), 1.0)
        values = OPS.kernel_values(*of, "rbf", 3, 1.0).diagonal()
        assert_equal(values.double(), right, tolerance)
        assert OPS.kernel_slopes(*of, of[0], "rbf", 3, 1.0, False)[-1] == 50
        plain = kernels.kernel_values(*of, "rbf", 3, 1.0).diagonal()
        assert (plain - right).abs().max() > lost


@EXTENSION
def test_the_same_bits_on_any_number_of_threads() -> None:
    of, before = operands(rows(150, 30), rows(170, 30, seed=1)), torch.get_num_threads()
    weight = rows(150, 170, seed=2)
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(OPS.kernel_slopes(*of, weight, "arccos", 3, 1.0, True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


@EXTENSION
def test_operators_refuse_what_does_not_fit() -> None:
    of = operands(rows(4, 3), rows(5, 3, seed=1))
    for call in (
        lambda: OPS.kernel_values(*of, "cubic", 3, 1.0),
        lambda: OPS.kernel_values(*of, "polynomial", 0, 1.0),
        lambda: OPS.kernel_values(of[0].float(), *of[1:], "rbf", 3, 1.0),
        lambda: OPS.kernel_values(of[0], of[2], of[1], *of[3:], "rbf", 3, 1.0),
        lambda: OPS.kernel_values(*of[:3], of[4], of[3], *of[5:], "rbf", 3, 1.0),
        lambda: OPS.kernel_values(*of[:5], of[5].float(), -1, "rbf", 3, 1.0),
        lambda: OPS.kernel_values(*of[:5], of[5].expand(2), -1, "rbf", 3, 1.0),
        lambda: OPS.kernel_slopes(*of, rows(5, 4), "rbf", 3, 1.0, False),
        lambda: OPS.kernel_slopes(*of, rows(4, 5).float(), "rbf", 3, 1.0, False),
    ):
        with pytest.raises(RuntimeError, match="kernel_"):
            call()


@pytest.mark.parametrize("many", [(), (2,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype: torch.dtype, many: tuple[int, ...]) -> None:
    x, y = rows(*many, 4, 3).to(dtype), rows(*many, 5, 3, seed=1).to(dtype)
    for kernel in OF_PRODUCTS:
        of, weight = operands(x, y), rows(*many, 4, 5, seed=2).to(dtype)
        torch.library.opcheck(OPS.kernel_values.default, (*of, kernel, 2, COEF0))
        for needs in (False, True):
            torch.library.opcheck(OPS.kernel_slopes.default, (*of, weight, kernel, 2, COEF0, needs))
