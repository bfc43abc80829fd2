"""Triton's skinny products, of features in float32 and of float16 features with two terms."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from krrst_fast import reference
from tests.helpers import assert_within, rounding_of_sums

# Around the edges of the blocks: rows 64 and 128, columns 16, 64 and 128, steps of 32 to 128.
SHAPES = [
    (1, 1, 1),
    (3, 5, 2),
    (63, 129, 16),
    (65, 64, 17),
    (64, 127, 1),
    (67, 31, 65),
    (2, 7, 131),
]
# What the two terms of a number leave of it, where a column has one unit.
ROUNDING = 2**-22


def operands(n: int, k: int, p: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n * k * p)
    a = torch.randn(n, k, generator=generator).to(dtype)
    return a, torch.randn(k, p, generator=generator)


def check(got: Tensor, a: Tensor, b: Tensor) -> None:
    """By columns, so that no large column hides a small one that is wrong."""
    assert got.dtype == torch.float32
    a, b = a.double(), b.double()
    terms = ROUNDING * a.norm(dim=1).max() * b.norm(dim=0)
    assert_within(got, reference.thin_matmul(a, b), rounding_of_sums(a, b, torch.float32) + terms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_thin_matmul(kernels: Callable, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    a, b = operands(*shape, dtype)
    check(kernels("thin_matmul.thin_matmul", a, b), a, b)


@pytest.mark.parametrize("layout", ["b by rows", "b by columns"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_two_matrices_of_features(
    kernels: Callable, shape: tuple[int, int, int], layout: str
) -> None:
    a, b = (x.half() for x in operands(*shape, torch.float16))
    b = b.mT.contiguous().mT if layout == "b by columns" else b
    check(kernels("thin_matmul.thin_matmul", a, b), a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("cut", [(1, 192, 128), (2, 128, 128), (2, 128, 256)], ids=str)
def test_splits_and_runs(kernels: Callable, cut: tuple[int, ...], dtype: torch.dtype) -> None:
    a, b = operands(66, 190, 20, dtype)
    check(kernels("thin_matmul.thin_matmul", a, b, cut=cut), a, b)
    if dtype == torch.float16:
        check(kernels("thin_matmul.thin_matmul", a, b.half(), cut=cut), a, b.half())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["columns", "every second", "a part", "b by columns"])
def test_any_strides(kernels: Callable, layout: str, dtype: torch.dtype) -> None:
    a, b = operands(35, 70, 11, dtype)
    wide = torch.full((72, 145), torch.nan, dtype=dtype)
    if layout == "b by columns":
        b = b.mT.contiguous().mT
    else:
        layouts = {"columns": wide.mT[3:38, 1:71], "every second": wide[::2, 5::2], "a part": wide}
        a = layouts[layout][:35, :70].copy_(a)
    check(kernels("thin_matmul.thin_matmul", a, b), a, b)


def test_columns_of_all_sizes(kernels: Callable) -> None:
    """Each column has a unit of its own: one of 1e30 does not cost the digits of one of 1e-30."""
    a, b = operands(17, 40, 6, torch.float16)
    b = b * torch.tensor([1e30, 1e-30, 1.0, 0.0, 6e4, 1e-5])
    b[3:] *= 2.0**-10
    check(kernels("thin_matmul.thin_matmul", a, b), a, b)


def test_float16_features_at_the_top_of_their_range(kernels: Callable) -> None:
    a, b = operands(5, 300, 3, torch.float16)
    a = (a / a.abs().max() * 32768).half()
    check(kernels("thin_matmul.thin_matmul", a, b), a, b)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_not_hidden(kernels: Callable, value: float) -> None:
    a, b = operands(4, 9, 3, torch.float16)
    b[5, 1] = value
    got = kernels("thin_matmul.thin_matmul", a, b)
    assert not got[:, 1].isfinite().any()
    check(got[:, ::2], a, b[:, ::2])


@pytest.mark.parametrize("shape", [(0, 3, 2), (3, 0, 2), (3, 2, 0), (0, 0, 0)], ids=str)
def test_nothing(kernels: Callable, shape: tuple[int, int, int]) -> None:
    n, k, p = shape
    got = kernels("thin_matmul.thin_matmul", torch.ones(n, k), torch.ones(k, p))
    assert torch.equal(got, torch.zeros(n, p))


def test_the_same_bits_each_time(kernels: Callable) -> None:
    a, b = operands(20, 600, 5, torch.float16)
    assert torch.equal(*(kernels("thin_matmul.thin_matmul", a, b) for _ in range(2)))
