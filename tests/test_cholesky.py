"""The operator `cholesky`, whoever computes it: values, the ridge, layouts, pivots."""

import pytest
import torch

from krrst_fast import operators
from tests.helpers import assert_equal, features

op = torch.ops.krrst_fast.cholesky
DTYPES = [(torch.float32, False), (torch.float32, True), (torch.float64, False)]


def test_a_cuda_extension_is_loaded_or_says_why_not() -> None:
    assert operators.CUDA_EXTENSION.startswith("not loaded: ") != operators.HAS_CUDA_EXTENSION


@pytest.mark.parametrize("dtype,float64", DTYPES)
@pytest.mark.parametrize("m,p", [(0, 3), (1, 1), (5, 0), (33, 7), (65, 2)])
def test_values(m: int, p: int, dtype: torch.dtype, float64: bool) -> None:
    generator = torch.Generator().manual_seed(m)
    x = features(m, m + 3, 1e2, generator).to(dtype)
    k, ridge = x @ x.mT, torch.tensor(0.25, dtype=dtype)
    k = k.tril() + k.tril(-1).mT  # a library may add up the halves in different orders
    y = torch.randn(m, p, dtype=dtype, generator=generator)
    factor, half, pivot = op(k, ridge, y, float64)
    result = torch.float64 if float64 else dtype
    assert factor.dtype == half.dtype == result and factor.mT.is_contiguous()
    assert torch.equal(factor, factor.tril()) and pivot.item() == 0
    exact = k.double() + 0.25 * torch.eye(m, dtype=torch.float64)
    tolerance = 50 * torch.finfo(result).eps
    assert_equal(factor.double() @ factor.double().mT, exact, tolerance)
    assert_equal(factor.double() @ half.double(), y.double(), tolerance)


def test_a_bad_pivot_is_numbered() -> None:
    for at in (0, 3, 4):
        k = torch.eye(5)
        k[at, at] = -2.0
        assert op(k, torch.tensor(1.0), torch.ones(5, 1), False)[2] == at + 1


@pytest.mark.parametrize("dtype,float64", DTYPES)
@pytest.mark.parametrize("m,p", [(1, 1), (6, 4)])
def test_opcheck(m: int, p: int, dtype: torch.dtype, float64: bool) -> None:
    k, y = torch.eye(m, dtype=dtype), torch.ones(m, p, dtype=dtype)
    ridge = torch.tensor(1.0, dtype=dtype)
    torch.library.opcheck(op.default, (k, ridge, y, float64))
    torch.library.opcheck(op.default, (k.mT, ridge, y.mT.contiguous().mT, float64))
