"""Triton's residual and mean square, of a prediction and of the product that predicts."""

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


@pytest.mark.parametrize(
    "shape", [(1, 1), (15, 63), (16, 64), (17, 65), (131, 7), (1030, 3)], ids=str
)
def test_residual_mse(kernels: Callable, shape: tuple[int, int]) -> None:
    prediction, y = normal(*shape), normal(1, *shape)[0]
    got = kernels("residual_mse.residual_mse", prediction, y)
    check(got, reference.residual_mse(prediction.double(), y.double()), 0.0)


def test_any_strides(kernels: Callable) -> None:
    wide = torch.full((40, 70), torch.nan)
    prediction = wide.mT[3:68:2, 1:39].copy_(normal(33, 38))
    y = torch.full((76, 33), torch.nan)[::2].mT.copy_(normal(38, 33).mT)
    got = kernels("residual_mse.residual_mse", prediction, y)
    check(got, reference.residual_mse(prediction.double(), y.double()), 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.25, torch.tensor(2.0**-20)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (19, 600, 5), (33, 0, 3), (66, 40, 17)], ids=str)
def test_predicted(
    kernels: Callable, shape: tuple[int, int, int], scale: float | Tensor, dtype: torch.dtype
) -> None:
    b, d, p = shape
    f, w, y = normal(b, d).to(dtype), normal(d, p), normal(b, p)
    offset = normal(p, 2)[:, 0] if b % 2 else None
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
    residual, loss = kernels("residual_mse.residual_mse", torch.empty(shape), torch.empty(shape))
    assert residual.shape == shape and loss.isnan()
    f, w, y = torch.ones(shape[0], 4), torch.ones(4, shape[1]), torch.empty(shape)
    residual, loss = kernels("residual_mse.predicted_residual_mse", f, w, y, 1.0, None)
    assert residual.shape == shape and loss.isnan()


def test_the_same_bits_each_time(kernels: Callable) -> None:
    prediction, y = normal(70, 90), normal(90, 70).mT
    first, second = (kernels("residual_mse.residual_mse", prediction, y) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
