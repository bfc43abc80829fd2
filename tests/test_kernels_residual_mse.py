"""The Triton residual of a prediction and its mean square."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from krrst_fast import reference
from tests.helpers import assert_within, rounding_of_sums

ROUNDING = 2**-22


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def check(got: tuple[Tensor, Tensor], exact: tuple[Tensor, ...], lost: Tensor | float) -> None:
    """`lost` is what the residual may have lost before targets were subtracted."""
    residual, loss = exact
    lost = lost + 2**-23 * residual.abs()
    assert_within(got[0], residual, lost)
    # A sum of squares, each of which has what its residual lost.
    squares = 2**-23 * (4 + residual.numel() ** 0.5) * loss
    assert_within(got[1], loss, squares + (2 * residual.abs() * lost + lost**2).mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.25, torch.tensor(2.0**-20)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (19, 600, 5), (33, 0, 3), (66, 40, 17)], ids=str)
def test_predicted(
    kernels: Callable, shape: tuple[int, int, int], scale: float | Tensor, dtype: torch.dtype
) -> None:
    b, d, p = shape
    offset = normal(p, 2)[:, 0] if b % 2 else None
    check_predicted(kernels, normal(b, d).to(dtype), normal(d, p), normal(b, p), scale, offset)


@pytest.mark.parametrize("shape", [(15, 63), (16, 64), (17, 65), (131, 7), (1030, 3)], ids=str)
def test_edges_of_blocks(kernels: Callable, shape: tuple[int, int]) -> None:
    b, p = shape
    check_predicted(kernels, normal(b, 3), normal(3, p), normal(1, b, p)[0], 1.0, None)


def test_targets_of_any_strides(kernels: Callable) -> None:
    y = torch.full((76, 33), torch.nan)[::2].mT.copy_(normal(38, 33).mT)
    check_predicted(kernels, normal(33, 20), normal(20, 38), y, 1.0, None)


def check_predicted(
    kernels: Callable,
    f: Tensor,
    w: Tensor,
    y: Tensor,
    scale: float | Tensor,
    offset: Tensor | None,
) -> None:
    got = kernels("residual_mse.predicted_residual_mse", f, w, y, scale, offset)
    f, w, y = f.double(), w.double(), y.double()
    offset = None if offset is None else offset.double()
    exact = reference.predicted_residual_mse(f, w, y, scale, offset)
    terms = ROUNDING * f.norm(dim=1).max() * w.norm(dim=0)
    lost = abs(scale) * (rounding_of_sums(f, w, torch.float32) + terms)
    # The sum with the offset is rounded before targets are subtracted.
    check(got, exact, lost + 2**-23 * (exact[0] + y).abs())


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_the_mean_of_nothing_is_nan(kernels: Callable, shape: tuple[int, int]) -> None:
    f, w, y = torch.ones(shape[0], 4), torch.ones(4, shape[1]), torch.empty(shape)
    residual, loss = kernels("residual_mse.predicted_residual_mse", f, w, y, 1.0, None)
    assert residual.shape == shape and loss.isnan()


def test_the_same_bits_each_time(kernels: Callable) -> None:
    call = normal(70, 90), normal(90, 50), normal(50, 70).mT, 1.0, None
    first, second = (kernels("residual_mse.predicted_residual_mse", *call) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
