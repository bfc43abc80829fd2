"""The operators for many small problems: values, layouts, instruction sets, threads, wild calls."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from krrst_fast import operators
from tests.helpers import assert_within, rounding_of_sums, run_with

EXTENSION = pytest.mark.skipif(not operators.HAS_EXTENSION, reason=operators.EXTENSION)
DTYPES = [torch.float32, torch.float64]
# Round the tiles (3, 4, 5, 6 and their multiples), the vectors (2 to 16) and the limit of dot
# products (64).
SIZES = [0, 1, 3, 5, 25, 47, 48, 49, 97]
DEPTHS = [0, 1, 7, 16, 17, 640]
ops = torch.ops.krrst_fast


def layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """x [N, I, J] in every way memory can hold it; what is not x is NaN."""
    yield "contiguous", x.contiguous()
    yield "transposed", x.mT.contiguous().mT
    wide = x.new_full((x.shape[0], 2 * x.shape[1], 3 * x.shape[2]), float("nan"))
    wide[:, ::2, ::3] = x
    yield "sliced", wide[:, ::2, ::3]
    wide = x.new_full((x.shape[0], x.shape[1] + 2, x.shape[2] + 1), float("nan"))
    wide[:, 1:-1, 1:] = x
    yield "padded", wide[:, 1:-1, 1:]
    yield "problems last", x.permute(1, 2, 0).contiguous().permute(2, 0, 1)


def draw(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def exactly(x: Tensor) -> np.ndarray:
    """x in twice as many digits, or for float64 in as many more as the processor has."""
    return x.numpy().astype(np.float64 if x.dtype == torch.float32 else np.longdouble)


def assert_near(got: Tensor, exact: np.ndarray, allowed: Tensor, what: str) -> None:
    """No entry is further from the exact one than `allowed`; NaN is."""
    assert got.shape == exact.shape, what
    over = np.abs(exactly(got) - exact) - allowed.numpy()
    assert (over <= 0).all(), f"{what}: {over.max():.3e} more than allowed"


def matmul_cases() -> list[tuple[int, int, int, int]]:
    cases = [(3, i, k, j) for k in DEPTHS for i, j in zip(SIZES, reversed(SIZES))]
    cases += [(2, 25, k, j) for k in (1, 17, 640) for j in (1, 5, 16, 64, 97)]
    # So many problems that each is one task; so large ones that each is cut; none.
    cases += [(70, 25, 33, 5), (70, 7, 3, 2), (2, 130, 20, 1000), (1, 300, 140, 3), (0, 3, 4, 5)]
    return cases


def check_matmul(problems: int, rows: int, depth: int, columns: int, dtype: torch.dtype) -> None:
    x, y = draw(problems, rows, depth, dtype=dtype), draw(problems, depth, columns, dtype=dtype)
    exact, allowed = exactly(x) @ exactly(y), rounding_of_sums(x, y, dtype)
    for name_a, a in layouts(x):
        for name_b, b in layouts(y):
            out = ops.batched_matmul(a, b)
            assert out.is_contiguous() and out.dtype == dtype
            what = f"{problems}x{rows}x{depth}x{columns} {dtype} {name_a} {name_b}"
            assert_near(out, exact, allowed, what)


def check_gram(problems: int, n: int, depth: int, dtype: torch.dtype) -> None:
    x = draw(problems, n, depth, dtype=dtype)
    exact = 2 * (exactly(x) @ exactly(x.mT)) + 0.5
    what = f"gram {problems}x{n}x{depth} {dtype}"
    k = ops.gram(x, 2.0, 0.5)
    assert k.is_contiguous() and torch.equal(k, k.mT) and k.dtype == dtype, what
    bias = torch.finfo(dtype).eps  # 0.5 may be far from what is added to it
    assert_near(k, exact, 2 * rounding_of_sums(x, x.mT, dtype) + bias, what)
    for name, layout in layouts(x):
        assert torch.equal(ops.gram(layout, 2.0, 0.5), k), f"{what} {name}"
        if problems:
            assert torch.equal(ops.gram(layout[-1], 2.0, 0.5), k[-1]), f"{what} {name}"


def systems(problems: int, m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Grams [N, M, M] of condition about 1e3, exact in `dtype`, and ridges [N]."""
    x = draw(problems, m, m + 3, dtype=dtype, seed=m)
    k = (x @ x.mT) / (m + 3)
    return (k + k.mT) / 2, torch.linspace(0.01, 0.02, problems, dtype=dtype)


def check_cholesky(problems: int, m: int, columns: int, dtype: torch.dtype) -> None:
    """Judged by what is left of the equations: factors that differ may both be right."""
    k, ridge = systems(problems, m, dtype)
    ridged = k.double() + ridge.double()[:, None, None] * torch.eye(m, dtype=torch.float64)
    what = f"cholesky {problems}x{m}x{columns} {dtype}"
    factor, pivot = ops.batched_cholesky(k, ridge)
    assert factor.dtype == torch.float64 and factor.mT.is_contiguous(), what
    assert pivot.dtype == torch.int32 and torch.equal(pivot, torch.zeros_like(pivot)), what
    assert torch.equal(factor, factor.tril()), what
    # An entry is a sum of at most M products of what was rounded before.
    system, size = exactly(ridged), factor.abs() @ factor.abs().mT
    left = as_double(exactly(factor) @ exactly(factor.mT) - system)
    eps = torch.finfo(torch.float64).eps * (2 + m**0.5)
    assert_near(left, np.zeros(system.shape), eps * size, what)
    for name, layout in layouts(k):
        assert torch.equal(ops.batched_cholesky(layout, ridge)[0], factor), f"{what} {name}"

    y = draw(problems, m, columns, dtype=dtype)
    x = ops.batched_cholesky_solve(y, factor)
    assert x.dtype == dtype and x.mT.is_contiguous(), what
    left = as_double(system @ exactly(x) - exactly(y))
    # Two substitutions in float64, and the solution is rounded to its dtype.
    allowed = 2 * eps * size @ x.double().abs() + 2 * eps * y.double().abs()
    allowed += torch.finfo(dtype).eps / 2 * (ridged.abs() @ x.double().abs())
    assert_near(left, np.zeros(y.shape), allowed, what)
    for name, layout in layouts(y):
        for name_factor, lower in layouts(factor):
            got = ops.batched_cholesky_solve(layout, lower)
            assert torch.equal(got, x), f"{what} {name} {name_factor}"


def as_double(x: np.ndarray) -> Tensor:
    return torch.from_numpy(x.astype(np.float64))


def check_everything() -> None:
    """What each instruction set is asked, with fewer sizes than the default one."""
    for dtype in DTYPES:
        for case in matmul_cases()[::3]:
            check_matmul(*case, dtype)
        for n in SIZES:
            for depth in (1, 17, 640):
                check_gram(2, n, depth, dtype)
        for m in SIZES:
            check_cholesky(2, m, 5, dtype)
        check_cholesky(3, 17, 40, dtype)


@EXTENSION
@pytest.mark.parametrize("dtype", DTYPES)
def test_matmul_in_every_layout(dtype: torch.dtype) -> None:
    for case in matmul_cases():
        check_matmul(*case, dtype)


@EXTENSION
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth", DEPTHS)
def test_gram_in_every_layout(depth: int, dtype: torch.dtype) -> None:
    for n in [*SIZES, 63, 64]:
        check_gram(2, n, depth, dtype)
    many = 17 if depth < 100 else 1
    for problems, n in ((0, 3), (1, 25), (1, 193), (17, 5), (many, 200), (70, 7)):
        check_gram(problems, n, depth, dtype)


@EXTENSION
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", SIZES)
def test_cholesky_in_every_layout(m: int, dtype: torch.dtype) -> None:
    for columns in (0, 1, 5, 8, 33):
        check_cholesky(2, m, columns, dtype)
    check_cholesky(0, m, 3, dtype)
    check_cholesky(70, min(m, 25), 5, dtype)


@EXTENSION
def test_expanded_operands() -> None:
    """A stride of zero: one matrix for all problems, one row or column repeated."""
    x, y = draw(1, 25, 33, dtype=torch.float32), draw(3, 33, 17, dtype=torch.float32)
    assert torch.equal(
        ops.batched_matmul(x.expand(3, -1, -1), y), ops.batched_matmul(x.repeat(3, 1, 1), y)
    )
    for shape in ((3, 25, 1), (3, 1, 33), (1, 1, 1)):
        a = draw(*shape, dtype=torch.float32).expand(3, 25, 33)
        for left, right in ((a, y), (y.mT, a.mT), (a, a.mT)):
            exact, allowed = left.double() @ right.double(), rounding_of_sums(left, right, a.dtype)
            assert_within(ops.batched_matmul(left, right), exact, allowed)
        assert_within(ops.gram(a, 1.0, 0.0), exact, allowed)
    k, ridge = systems(1, 25, torch.float32)
    factor, pivot = ops.batched_cholesky(k.expand(4, -1, -1), ridge.expand(4))
    assert not pivot.any() and torch.equal(factor[0], factor[3])
    solution = ops.batched_cholesky_solve(
        y[:1, :25, :1].expand(4, 25, 6), factor[:1].expand(4, -1, -1)
    )
    torch.testing.assert_close(solution[0, :, 0], solution[3, :, 5], rtol=0, atol=0)


@EXTENSION
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    run_with(isa, "test_batched_ops", "check_everything")


@EXTENSION
@pytest.mark.parametrize("problems", [1, 3, 65])
def test_the_same_bits_on_any_number_of_threads(problems: int) -> None:
    x = draw(problems, 150, 201, dtype=torch.float32)
    y = draw(problems, 201, 70, dtype=torch.float32)
    k, ridge = systems(problems, 70, torch.float32)

    def all_ops() -> list[Tensor]:
        factor, pivot = ops.batched_cholesky(k, ridge)
        return [
            ops.gram(x, 1.0, 1.0),
            ops.gram(x[:, :40], 1.0, 1.0),
            ops.batched_matmul(x, y),
            ops.batched_matmul(x, y.mT.contiguous().mT),
            ops.batched_matmul(x.mT, x[..., :5]),
            factor,
            ops.batched_cholesky_solve(y[:, :70], factor),
        ]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = all_ops()
        for threads in (2, 3, 8):
            torch.set_num_threads(threads)
            for a, b in zip(alone, all_ops()):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


@EXTENSION
@pytest.mark.parametrize("bad", [-1.0, 0.0, float("nan"), float("inf")])
def test_a_bad_pivot_is_reported_and_its_factor_is_nan(bad: float) -> None:
    for m, at in ((1, 0), (5, 0), (5, 4), (25, 13), (70, 69)):
        k = torch.eye(m).repeat(3, 1, 1)
        k[1, at, at] = bad
        factor, pivot = ops.batched_cholesky(k, torch.zeros(3))
        assert pivot.tolist() == [0, at + 1, 0]
        assert factor[1].isnan().all() and torch.equal(factor[[0, 2]], k[[0, 2]].double())
        assert ops.batched_cholesky_solve(k, factor)[1].isnan().all()
    k = torch.eye(9).repeat(2, 1, 1)
    k[0, 7, 2] = k[0, 2, 7] = float("nan")
    assert ops.batched_cholesky(k, torch.ones(2))[1].tolist() == [8, 0]
    assert ops.batched_cholesky(k, torch.tensor([1.0, float("nan")]))[1].tolist() == [8, 1]


@EXTENSION
def test_what_is_not_finite_stays_where_it_is() -> None:
    """A NaN beside a row, or in another problem, does not leak into a sum over padded vectors."""
    for depth in (5, 17, 33):
        a, b = torch.ones(3, 6, depth), torch.ones(3, depth, 4)
        a[1, 2, -1], b[2, 0, 3] = float("inf"), float("nan")
        for columns in (b, b.mT.contiguous().mT):
            out = ops.batched_matmul(a, columns)
            assert torch.equal(out.nan_to_num(7.0, 8.0), (a @ b).nan_to_num(7.0, 8.0))
        k = ops.gram(a, 1.0, 0.0)
        assert torch.equal(k, a @ a.mT)


@pytest.mark.parametrize(
    "n,m,d,p,dtype",
    [(3, 25, 40, 5, torch.float32), (1, 1, 1, 1, torch.float64), (2, 3, 5, 2, torch.float64)],
)
def test_opcheck(n: int, m: int, d: int, p: int, dtype: torch.dtype) -> None:
    x, y = draw(n, m, d, dtype=dtype), draw(n, d, p, dtype=dtype)
    check = torch.library.opcheck
    check(ops.gram.default, (x, 2.0, 0.5))
    check(ops.gram.default, (x.mT, 2.0, 0.5))
    check(ops.batched_matmul.default, (x, y))
    check(ops.batched_matmul.default, (y.mT, x.mT))
    k, ridge = systems(n, m, dtype)
    check(ops.batched_cholesky.default, (k, ridge))
    factor = ops.batched_cholesky(k, ridge)[0]
    check(ops.batched_cholesky_solve.default, (x, factor))
    check(ops.batched_cholesky_solve.default, (x.mT.contiguous().mT, factor.contiguous()))


@EXTENSION
def test_a_wild_call_is_refused() -> None:
    one, k = torch.ones(2, 3, 4), torch.ones(2, 3, 3)
    factor = k.double()
    wild = [
        lambda: ops.gram(torch.ones(3), 1.0, 0.0),
        lambda: ops.gram(torch.ones(2, 2, 3, 4), 1.0, 0.0),
        lambda: ops.gram(one.int(), 1.0, 0.0),
        lambda: ops.batched_matmul(one, one),
        lambda: ops.batched_matmul(one, one[:1].mT),
        lambda: ops.batched_matmul(one[0], one[0].mT),
        lambda: ops.batched_matmul(one, one.mT.double()),
        lambda: ops.batched_matmul(one.half(), one.mT.half()),
        lambda: ops.batched_cholesky(one, torch.ones(2)),
        lambda: ops.batched_cholesky(k, torch.ones(3)),
        lambda: ops.batched_cholesky(k, torch.ones(())),
        lambda: ops.batched_cholesky(k[0], torch.ones(3)),
        lambda: ops.batched_cholesky(k.int(), torch.ones(2)),
        lambda: ops.batched_cholesky_solve(one, k),
        lambda: ops.batched_cholesky_solve(one.mT, factor),
        lambda: ops.batched_cholesky_solve(one[:1], factor),
        lambda: ops.batched_cholesky_solve(one, one.double()),
    ]
    for call in wild:
        with pytest.raises(RuntimeError):
            call()
