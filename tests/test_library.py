"""The compiled operators: torch's own checks, every instruction set, what a wild call gets."""

import os

import pytest
import torch

from krrst_fast import operators
from krrst_fast.cholesky import CUDA_METHODS, FLOAT64_UP_TO, ridge_factor
from tests.helpers import assert_equal, features, run_with

EXTENSION = pytest.mark.skipif(not operators.HAS_EXTENSION, reason=operators.EXTENSION)
# Round the widths of a panel (12, 24 and 48) and of a packed chunk (128, 256 and 512).
SIZES = [(0, 3), (3, 0), (1, 1), (11, 13), (24, 40), (47, 255), (48, 256), (49, 257), (97, 513)]


def test_the_extension_is_loaded_where_it_must_be() -> None:
    if os.environ.get("KRRST_FAST_EXTENSION") == "1":
        assert operators.EXTENSION.endswith(".so")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n,d", [(3, 5), (70, 33)])
def test_opcheck(n: int, d: int, dtype: torch.dtype) -> None:
    x = torch.randn(n, d, dtype=dtype)
    ops = torch.ops.krrst_fast
    torch.library.opcheck(ops.gram.default, (x, 2.0, 0.5))
    torch.library.opcheck(ops.gram.default, (x.mT, 2.0, 0.5))
    torch.library.opcheck(ops.thin_matmul.default, (x, torch.randn(d, 3, dtype=dtype)))
    k = x @ x.mT + torch.eye(n, dtype=dtype)
    lam = torch.tensor(0.1, dtype=dtype)
    for method in CUDA_METHODS.values():
        torch.library.opcheck(ops.ridge_factor.default, (k, lam, 2, True, *method))
        found = ridge_factor(k, lam, 0, True, method)
        how = found.factor, found.inverse, *method
        torch.library.opcheck(ops.factored_solve.default, (x, *how))


@EXTENSION
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n,d", SIZES)
def test_kernels_against_float64(n: int, d: int, dtype: torch.dtype) -> None:
    _compare(n, d, dtype)


@EXTENSION
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    run_with(isa, "test_library", "compare_all")


def compare_all() -> None:
    for dtype in (torch.float32, torch.float64):
        for n, d in SIZES:
            _compare(n, d, dtype)


def _compare(n: int, d: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(n)
    exact = torch.randn(n, d, dtype=torch.float64, generator=generator)
    wide = exact.new_full((n, 2 * d), float("nan"))
    wide[:, ::2] = exact
    tolerance = {torch.float32: 2e-6, torch.float64: 4e-15}[dtype] * max(d, 1) ** 0.5 * 8
    layouts = [exact.to(dtype), exact.to(dtype).mT.contiguous().mT, wide.to(dtype)[:, ::2]]
    for x in layouts:
        k = torch.ops.krrst_fast.gram(x, 2.0, 0.5)
        assert_equal(
            k.double(),
            2.0 * exact.to(dtype).double() @ exact.to(dtype).double().mT + 0.5,
            tolerance,
        )
        assert torch.equal(k, k.mT)
        for p in (0, 1, 5, 8, 9, 33):
            b = torch.randn(d, p, dtype=dtype, generator=generator)
            for columns in (b, b.mT.contiguous().mT):
                out = torch.ops.krrst_fast.thin_matmul(x, columns)
                assert out.is_contiguous()
                assert_equal(out.double(), x.double() @ b.double(), tolerance)


def test_a_wild_call_is_refused() -> None:
    with pytest.raises(RuntimeError):
        torch.ops.krrst_fast.gram(torch.ones(2, 2, 3, 4), 1.0, 0.0)
    with pytest.raises(RuntimeError):
        torch.ops.krrst_fast.thin_matmul(torch.ones(2, 3), torch.ones(4, 2))


def test_ridge_factor_prefers_float64_only_where_it_is_free() -> None:
    generator = torch.Generator().manual_seed(0)
    for n, dtype in (
        (FLOAT64_UP_TO, torch.float64),
        (FLOAT64_UP_TO + 1, torch.float32),
    ):
        k = features(n, n, 1e2, generator).float()
        k = k @ k.mT
        factor, ridge, retries, *_ = ridge_factor(k, torch.tensor(0.5), 0, True)
        assert factor.dtype == dtype and retries == 0 and ridge == 0.5
        assert_equal(factor.double() @ factor.double().mT, k.double() + 0.5 * torch.eye(n), 1e-5)
