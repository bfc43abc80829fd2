"""Triton's last product of the gradient: four matrices, one pass."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from krrst_fast import reference
from tests.helpers import assert_within, rounding_of_sums

PRECISIONS = ["fp16x3", "tf32x3"]
# Of more than 64 columns a kernel before writes the terms.
WIDTHS = [19, 67]
# Around the edges of the block of 128 by 128 (64 by 64) and of its steps of 32 (16).
SHAPES = [(1, 1, 1), (3, 5, 2), (63, 129, 33), (128, 64, 32), (129, 65, 31), (7, 131, 70)]
# The product of the two second terms is left out.
ROUNDING = 2**-20


def operands(m: int, d: int, p: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(m * d * p)
    return [torch.randn(n, p, generator=generator) for n in (m, d, m, d)]


def check(got: Tensor, tensors: list[Tensor], scale: float | Tensor) -> None:
    alpha, v, beta, w = (x.double() for x in tensors)
    exact = reference.closing_matmul(alpha, v, beta, w, scale)
    sizes = [x.norm(dim=1).max() for x in (alpha, v, beta, w)]
    terms = ROUNDING * (sizes[0] * sizes[1] + sizes[2] * sizes[3])
    left, right = torch.cat((alpha, -beta), 1), torch.cat((v, w), 1)
    sums = rounding_of_sums(left, right.mT, torch.float32)
    assert_within(got, exact, abs(scale) * (sums + terms))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_closing_matmul(kernels: Callable, shape: tuple[int, int, int], precision: str) -> None:
    tensors = operands(*shape)
    got = kernels("closing_matmul.closing_matmul", *tensors, -0.5, input_precision=precision)
    check(got, tensors, -0.5)


@pytest.mark.parametrize("p", WIDTHS)
def test_matrices_of_very_different_sizes(kernels: Callable, p: int) -> None:
    """alpha, v, beta and w each have a unit of their own."""
    alpha, v, beta, w = operands(20, 30, p)
    tensors = [alpha * 1e-12, v * 1e14, beta * 3e18, w * 1e-17]
    scale = torch.tensor(2.0**-20)
    check(kernels("closing_matmul.closing_matmul", *tensors, scale), tensors, scale)
    tensors = [alpha, v, 0 * beta, w]
    check(kernels("closing_matmul.closing_matmul", *tensors, 1.0), tensors, 1.0)


def test_several_runs(kernels: Callable) -> None:
    tensors = operands(3, 5, 1300)
    check(kernels("closing_matmul.closing_matmul", *tensors, 1.0), tensors, 1.0)


@pytest.mark.parametrize("p", WIDTHS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_any_strides(kernels: Callable, precision: str, p: int) -> None:
    tensors = operands(35, 33, p)
    for i, x in enumerate(tensors):
        wide = torch.full((2 * x.shape[0] + 1, 2 * x.shape[1] + 3), torch.nan)
        view = [wide[1::2, 3::2], wide.mT[: x.shape[1], : x.shape[0]].mT, wide[1:, 3:], wide][i]
        tensors[i] = view[: x.shape[0], : x.shape[1]].copy_(x)
    got = kernels("closing_matmul.closing_matmul", *tensors, 1.0, input_precision=precision)
    check(got, tensors, 1.0)


@pytest.mark.parametrize("p", WIDTHS)
@pytest.mark.parametrize("position", range(4))
def test_what_is_not_finite_is_not_hidden(kernels: Callable, position: int, p: int) -> None:
    tensors = operands(4, 5, p)
    tensors[position][2, 1] = torch.inf
    got = kernels("closing_matmul.closing_matmul", *tensors, 1.0)
    line = got[2] if position % 2 == 0 else got[:, 2]
    assert not line.isfinite().any()


@pytest.mark.parametrize("shape", [(0, 3, 2), (3, 0, 2), (3, 2, 0)], ids=str)
def test_nothing(kernels: Callable, shape: tuple[int, int, int]) -> None:
    m, d, _ = shape
    got = kernels("closing_matmul.closing_matmul", *operands(*shape), 1.0)
    assert torch.equal(got, torch.zeros(m, d))
