"""Kernels as functions of inner products, and their derivatives, against their definition."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from krrst_fast import operators
from krrst_fast.reference import kernels
from krrst_fast.reference.kernels import OF_PRODUCTS, kernel_matrix
from tests.helpers import assert_equal

EXTENSION = pytest.mark.skipif(not operators.HAS_EXTENSION, reason=operators.EXTENSION)
OPS = torch.ops.krrst_fast
SHAPES = [(1, 1, 1), (0, 3, 2), (3, 0, 2), (3, 2, 0), (7, 5, 3), (13, 300, 17), (37, 41, 130)]
COEF0 = 0.5


def rows(*shape: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=draw) / max(shape[-1], 1) ** 0.5


def operands(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return x @ y.mT, x, y, x.square().sum(-1), y.square().sum(-1)


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
    """Gradients of sum(weight * k) to x and y, by autograd of a definition that has them."""
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    if kernel == "arccos":  # at equal rows the definition divides by zero
        values = kernels.of_products(*(operands(x, y)[k] for k in (0, 3, 4)), kernel, 1, 0.0)
    else:
        values = kernel_matrix(x, y, kernel, 1.0, degree, COEF0)
    return list(torch.autograd.grad((weight * values).sum(), (x, y)))


def check_everything() -> None:
    for number, (x, y) in enumerate(pairs()):
        of = operands(x, y)
        for kernel in OF_PRODUCTS:
            for degree in (1, 2, 3, 7) if kernel == "polynomial" else (3,):
                what = f"pair {number}, {kernel} {degree}, {tuple(of[0].shape)}"
                exact = kernel_matrix(x, y, kernel, 1.0, degree, COEF0)
                numbers = kernel, degree, COEF0
                double, single = (OPS.kernel_values(*of, *numbers, s) for s in (False, True))
                assert_equal(double, exact, 3e-14, what)
                assert single.dtype == torch.float32
                assert_equal(single.double(), exact, 7e-8, what)
                weight = rows(*exact.shape, seed=3)
                for w, tolerance in ((weight, 0.0), (weight.float(), 7e-8)):
                    values, slope, own, column = OPS.kernel_slopes(*of, w, *numbers, True)
                    assert values.dtype == w.dtype
                    assert_equal(values.double(), exact, max(3e-14, tolerance), what)
                    found = slope @ y + own[..., None] * x, slope.mT @ x + column[..., None] * y
                    right = derivative(x, y, w.double(), kernel, degree)
                    size = max([1.0, *(z.abs().max().item() for z in (x, y) if z.numel())])
                    for got, wanted in zip(found, right):
                        assert_equal(got, wanted, 1e-12 * size, what)
                none, *same = OPS.kernel_slopes(*of, w, *numbers, False)
                assert none.numel() == 0
                assert all(torch.equal(a, b) for a, b in zip(same, (slope, own, column)))


def test_the_reference_is_the_definition() -> None:
    x, y = rows(2, 9, 6), rows(2, 11, 6, seed=1)
    of, weight = operands(x, y), rows(2, 9, 11, seed=3)
    for kernel in OF_PRODUCTS:
        exact = kernel_matrix(x, y, kernel, 1.0, 3, COEF0)
        values, slope, own, column = kernels.kernel_slopes(*of, weight, kernel, 3, COEF0, True)
        assert_equal(kernels.kernel_values(*of, kernel, 3, COEF0, False), exact, 1e-14)
        assert_equal(values, exact, 1e-14)
        for got, wanted in zip(
            (slope @ y + own[..., None] * x, slope.mT @ x + column[..., None] * y),
            derivative(x, y, weight, kernel, 3),
        ):
            assert_equal(got, wanted, 1e-13)


@EXTENSION
def test_the_operators_are_the_definition() -> None:
    check_everything()


@EXTENSION
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    # The set is chosen once a process, so each gets a process of its own.
    code = "from tests.test_kernel_functions import check_everything; check_everything()"
    env = {**os.environ, "KRRST_FAST_ISA": isa, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parent.parent
    run = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=root, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


@EXTENSION
def test_exponential_and_angle_to_the_last_digits() -> None:
    """Through the operators: the exponential over its range, the angle over all cosines."""
    norms = torch.logspace(-12, 1.45, 4001, dtype=torch.float64)[:, None]  # squares up to 795
    zero = torch.zeros(1, 1, dtype=torch.float64)
    values = OPS.kernel_values(*operands(norms, zero), "rbf", 3, 1.0, False)[:, 0]
    exact = torch.exp(-norms[:, 0].square())
    normal = exact > 1e-307
    assert ((values - exact).abs() <= 4e-16 * exact)[normal].all()
    assert (values[~normal] <= 1e-307).all() and values[-1] == 0
    turn = torch.linspace(0, torch.pi, 4001, dtype=torch.float64)
    x = torch.stack((turn.cos(), turn.sin()), 1)
    y = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    values = OPS.kernel_values(*operands(x, y), "arccos", 3, 1.0, False)[:, 0]
    exact = (turn.sin() + (torch.pi - turn) * turn.cos()) / torch.pi
    assert_equal(values, exact, 1e-15)


@EXTENSION
def test_what_is_not_a_number_stays_so() -> None:
    for bad in (float("nan"), float("inf")):
        x, y = rows(4, 3), rows(5, 3, seed=1)
        x[1, 2] = bad
        for kernel in OF_PRODUCTS:
            values = OPS.kernel_values(*operands(x, y), kernel, 3, 1.0, False)
            assert values[[0, 2, 3]].isfinite().all()
            # A distance that is infinite has a kernel of 0, as the formula says.
            assert not values[1].isfinite().all() or (kernel == "rbf" and bad == float("inf"))


@EXTENSION
def test_near_rows_far_from_zero() -> None:
    """A distance of 1e-4 of the norm: of the sum of squares only 8 digits are left."""
    x = 1e4 * rows(50, 20)
    y = x + rows(50, 20, seed=1)
    right = torch.exp(-(x - y).square().sum(1))
    for single, tolerance in ((False, 1e-14), (True, 7e-8)):
        values = OPS.kernel_values(*operands(x, y), "rbf", 3, 1.0, single).diagonal()
        assert_equal(values.double(), right, tolerance)
    plain = kernels.kernel_values(*operands(x, y), "rbf", 3, 1.0, False).diagonal()
    assert (plain - right).abs().max() > 1e-10


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
        lambda: OPS.kernel_values(*of, "cubic", 3, 1.0, False),
        lambda: OPS.kernel_values(*of, "polynomial", 0, 1.0, False),
        lambda: OPS.kernel_values(of[0].float(), *of[1:], "rbf", 3, 1.0, False),
        lambda: OPS.kernel_values(of[0], of[2], of[1], *of[3:], "rbf", 3, 1.0, False),
        lambda: OPS.kernel_values(*of[:3], of[4], of[3], "rbf", 3, 1.0, False),
        lambda: OPS.kernel_slopes(*of, rows(5, 4), "rbf", 3, 1.0, False),
    ):
        with pytest.raises(RuntimeError, match="kernel_"):
            call()
