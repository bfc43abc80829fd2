"""The Triton gram: no more than rounding is wrong, symmetric, the same bits each time."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from krrst_fast import reference
from tests.helpers import assert_within, rounding_of_sums

# Block edges of the small block (64) and the depth of its steps (16, 32, 64), ones and primes.
SHAPES = [(1, 1), (1, 70), (5, 3), (63, 65), (64, 64), (65, 63), (67, 131), (130, 17), (3, 700)]
DTYPES = [torch.float32, torch.float16]
# What the two terms of a number leave of it.
ROUNDING = 2**-22


def features(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def allowed(x: Tensor, scale: float | Tensor, bias: float) -> Tensor:
    """Rounding of a gram, and of its scale and bias."""
    x, scale = x.double(), torch.as_tensor(scale, dtype=torch.float64)[..., None, None].abs()
    terms = ROUNDING * x.square().sum(-1).amax(-1)[..., None, None]
    return scale * (rounding_of_sums(x, x.mT, torch.float32) + terms) + 2**-23 * abs(bias)


def check(got: Tensor, x: Tensor, scale: float, bias: float) -> None:
    assert got.dtype == torch.float32
    assert_within(got, reference.gram(x.double(), scale, bias), allowed(x, scale, bias))
    assert torch.equal(got, got.mT), "not symmetric"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gram(kernels: Callable, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = features(*shape, dtype=dtype)
    check(kernels("gram.gram", x, 1.5, -0.25), x, 1.5, -0.25)


@pytest.mark.parametrize("precision", ["tf32x3", "ieee"])
@pytest.mark.parametrize("layout", ["columns", "every second", "a part", "backwards in a batch"])
def test_any_strides(kernels: Callable, layout: str, precision: str) -> None:
    wide = torch.full((90, 150), torch.nan)
    x = {
        "columns": lambda: features(70, 66).mT,
        "every second": lambda: wide[::2, ::2],
        "a part": lambda: wide[3:70, 5:72],
        "backwards in a batch": lambda: features(40, 3, 20).permute(1, 2, 0),
    }[layout]()
    if x.isnan().any():
        x.copy_(features(*x.shape))
    check(kernels("gram.gram", x, 1.0, 1.0, input_precision=precision), x, 1.0, 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_blocks(kernels: Callable, dtype: torch.dtype) -> None:
    x = features(385, 16, dtype=dtype)
    check(kernels("gram.gram", x, 1.0, 0.0), x, 1.0, 0.0)


def test_bands(kernels: Callable) -> None:
    """More rows of blocks than are computed together."""
    x = features(577, 3)
    check(kernels("gram.gram", x, 1.0, 0.0), x, 1.0, 0.0)


@pytest.mark.parametrize("cut", [(1, 256, 128), (2, 128, 64), (3, 64, 64)], ids=str)
def test_splits_and_runs(kernels: Callable, cut: tuple[int, int, int]) -> None:
    x = features(67, 190, dtype=torch.float16)
    check(kernels("gram.gram", x, 1.0, 0.0, cut=cut), x, 1.0, 0.0)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0), (2, 0, 3), (0, 3, 2), (2, 3, 0)])
def test_nothing(kernels: Callable, shape: tuple[int, ...]) -> None:
    got = kernels("gram.gram", torch.empty(shape), 2.0, 0.5)
    assert got.shape == (*shape[:-1], shape[-2])
    assert torch.equal(got, torch.full_like(got, 0.5))


def test_a_scale_for_each_problem(kernels: Callable) -> None:
    x = features(2, 3, 20, 33, dtype=torch.float16)
    scale = torch.rand(2, 3, generator=torch.Generator().manual_seed(0)) + 0.5
    got = kernels("gram.gram", x, scale, 1.0)
    exact = reference.gram(x.double(), scale.double()[..., None, None], 1.0)  # type: ignore[arg-type]
    assert_within(got, exact, allowed(x, scale, 1.0) + 2**-23 * exact.abs())
    assert torch.equal(got[0, 1], kernels("gram.gram", x[0, 1], scale[0, 1], 1.0))


def test_the_same_bits_each_time(kernels: Callable) -> None:
    x = features(70, 600)
    assert torch.equal(*(kernels("gram.gram", x, 1.0, 1.0) for _ in range(2)))
