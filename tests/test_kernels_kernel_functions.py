"""The Triton kernels of kernels as functions of inner products."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from krrst_fast.reference import kernels as reference
from krrst_fast.reference.kernels import OF_PRODUCTS
from tests.helpers import assert_equal
from tests.test_kernel_functions import COEF0, operands, rows

SHAPES = [(1, 1, 1), (0, 3, 2), (3, 0, 2), (7, 5, 3), (17, 65, 4), (33, 130, 3)]


def check(kernels: Callable, x: Tensor, y: Tensor, kernel: str, degree: int, same: int) -> None:
    of = operands(x, y, same=same)
    numbers, weight = (kernel, degree, COEF0), rows(*of[0].shape, seed=5)
    values = kernels("kernel_functions.kernel_values", *of, *numbers)
    assert_equal(values, reference.kernel_values(*of, *numbers), 1e-14, kernel)
    for needs in (True, False):
        got = kernels("kernel_functions.kernel_slopes", *of, weight, *numbers, needs)
        exact = reference.kernel_slopes(*of, weight, *numbers, needs)
        # The sine of an angle that is rounding is 1e-8, or 0 in the reference.
        for a, b in zip(got, exact, strict=True):
            assert_equal(a, b, 1e-8 if kernel == "arccos" else 1e-13, kernel)


@pytest.mark.parametrize("kernel", OF_PRODUCTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_reference(kernels: Callable, shape: tuple[int, int, int], kernel: str) -> None:
    i, j, d = shape
    check(kernels, rows(i, d), rows(j, d, seed=1), kernel, 3, -1)
    check(kernels, rows(2, i, d), rows(2, j, d, seed=1), kernel, 3, -1)


@pytest.mark.parametrize("degree", [1, 2, 7, 100])
def test_degrees(kernels: Callable, degree: int) -> None:
    check(kernels, rows(5, 3) / 3, rows(4, 3, seed=1) / 3, "polynomial", degree, -1)


@pytest.mark.parametrize("kernel", OF_PRODUCTS)
def test_equal_opposite_and_zero_rows(kernels: Callable, kernel: str) -> None:
    y = rows(20, 4)
    y[2], y[4], y[5] = 0, y[3], -y[3]
    check(kernels, y[3:9], y, kernel, 3, 3)
    check(kernels, y, y, kernel, 3, 0)


@pytest.mark.parametrize("kernel", OF_PRODUCTS)
def test_nan_stays(kernels: Callable, kernel: str) -> None:
    x = rows(4, 3)
    x[1, 2] = torch.nan
    values = kernels("kernel_functions.kernel_values", *operands(x, x, same=0), kernel, 3, COEF0)
    assert values[1].isnan().all() and values[2:, 2:].isfinite().all()


@pytest.mark.parametrize("kernel", ["rbf", "polynomial"])
@pytest.mark.parametrize("degree", [1, 3])
def test_what_is_not_finite_stays_where_the_reference_has_it(
    kernels: Callable, kernel: str, degree: int
) -> None:
    of, weight = operands(rows(4, 3), rows(5, 3, seed=1)), rows(4, 5, seed=5)
    numbers = kernel, degree, COEF0
    for bad in (torch.nan, torch.inf):
        for tensor in (weight, of[0]):
            kept, tensor[1, 2] = tensor[1, 2].clone(), bad
            got = kernels("kernel_functions.kernel_slopes", *of, weight, *numbers, True)
            exact = reference.kernel_slopes(*of, weight, *numbers, True)
            tensor[1, 2] = kept
            for a, b in zip(got, exact, strict=True):
                torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-12, atol=1e-12, equal_nan=True)


def test_arccos_has_no_gamma_at_any_weight(kernels: Callable) -> None:
    of, weight = operands(rows(4, 3), rows(5, 3, seed=1)), rows(4, 5, seed=5)
    weight[1, 2] = torch.inf
    numbers = "arccos", 1, COEF0, False
    assert kernels("kernel_functions.kernel_slopes", *of, weight, *numbers)[4] == 0


@pytest.mark.parametrize("kernel", OF_PRODUCTS)
def test_float32_sums_gamma_in_float64(kernels: Callable, kernel: str) -> None:
    of = operands(rows(4, 3), rows(5, 3, seed=1), same=-1)
    single = *(x.float() for x in of[:5]), *of[5:]
    weight, numbers = rows(4, 5, seed=5).float(), (kernel, 3, COEF0, True)
    got = kernels("kernel_functions.kernel_slopes", *single, weight, *numbers)
    exact = reference.kernel_slopes(*single, weight, *numbers)
    assert [x.dtype for x in got] == [x.dtype for x in exact]
    for a, b in zip(got, exact, strict=True):
        assert_equal(a, b, 1e-5, kernel)
