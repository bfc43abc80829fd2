"""The Triton gram: twice as wrong as PyTorch at most, symmetric, the same bits each time."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from krrst_fast import reference
from tests.interpreted import assert_twice

# Block edges of the small block (64) and the depth of its steps (16, 32, 64), ones and primes.
SHAPES = [(1, 1), (1, 70), (5, 3), (63, 65), (64, 64), (65, 63), (67, 131), (130, 17), (3, 700)]
DTYPES = [torch.float32, torch.float16]
# What a sum of D products may lose by its order alone, where PyTorch's happens to be exact.
ROUNDING = 2**-22


def features(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def check(got: Tensor, x: Tensor, scale: float, bias: float) -> None:
    plain = reference.gram(x.float(), scale, bias)
    exact = reference.gram(x.double(), scale, bias)
    assert got.dtype == torch.float32
    assert_twice(got, plain, exact, ROUNDING * x.double().square().sum(-1).max() * abs(scale))
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
    got, trace = kernels("gram.ridged_gram", torch.empty(shape), 2.0, 0.5, 0.0, "absolute")
    assert got.shape == (*shape[:-1], shape[-2])
    assert torch.equal(got, torch.full_like(got, 0.5))
    assert torch.equal(trace, torch.full(shape[:-2], 0.5 * shape[-2]))


@pytest.mark.parametrize("ridge_of", reference.RIDGE_OF)
@pytest.mark.parametrize("n", [1, 64, 67, 200])
def test_trace_and_ridge(kernels: Callable, n: int, ridge_of: str) -> None:
    x = features(n, 300)
    arguments = (0.5, 1.0, 0.01, ridge_of)
    got, trace = kernels("gram.ridged_gram", x, *arguments)
    plain, plain_trace = reference.ridged_gram(x, *arguments)
    exact, exact_trace = reference.ridged_gram(x.double(), *arguments)
    assert_twice(got, plain, exact, ROUNDING * exact.abs().max())
    assert_twice(trace, plain_trace, exact_trace, ROUNDING * exact_trace)


def test_a_scale_and_a_ridge_for_each_problem(kernels: Callable) -> None:
    x = features(2, 3, 20, 33, dtype=torch.float16)
    scale, ridge = torch.rand(2, 3) + 0.5, torch.rand(2, 3)
    got, trace = kernels("gram.ridged_gram", x, scale, 1.0, ridge, "mean_diagonal")
    plain, _ = reference.ridged_gram(x.float(), scale, 1.0, ridge, "mean_diagonal")
    exact, exact_trace = reference.ridged_gram(
        x.double(), scale.double(), 1.0, ridge.double(), "mean_diagonal"
    )
    assert_twice(got, plain, exact, ROUNDING * exact.abs().max())
    assert_twice(trace, exact_trace.float(), exact_trace, ROUNDING * exact_trace.max())
    one, _ = kernels("gram.ridged_gram", x[0, 1], scale[0, 1], 1.0, ridge[0, 1], "mean_diagonal")
    assert torch.equal(got[0, 1], one)


def test_the_same_bits_each_time(kernels: Callable) -> None:
    x = features(70, 600)
    assert torch.equal(*(kernels("gram.gram", x, 1.0, 1.0) for _ in range(2)))
