"""The CUDA operators of Cholesky factors and solutions, on a device."""

import pytest
import torch
from torch import Tensor

from krrst_fast import operators, reference
from tests.on_device import captured, no_waits

ops = torch.ops.krrst_fast
DTYPES = [(torch.float32, False), (torch.float32, True), (torch.float64, False)]
# Round the tiles of 32 and 64, and what the library is made for.
SIZES = [0, 1, 2, 31, 32, 33, 63, 64, 65, 127, 129, 257, 1000, 2048, 4096]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use"),
    pytest.mark.skipif(not operators.HAS_CUDA_EXTENSION, reason=operators.CUDA_EXTENSION),
]


def systems(
    problems: int, m: int, dtype: torch.dtype, condition: float = 1e4, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """k [N, M, M] and ridge [N] on the device, exact in dtype, and k + ridge I in float64.

    Fifty grams, each with many ridges: torch orthogonalises one matrix after the other.
    """
    generator = torch.Generator(device="cuda").manual_seed(seed + m)
    few = min(problems, 50)
    x = torch.randn(few, m, m, dtype=torch.float64, device="cuda", generator=generator)
    q = torch.linalg.qr(x)[0].repeat(-(-problems // few), 1, 1)[:problems]
    spectrum = torch.logspace(0, -torch.tensor(condition).log10().item(), m, dtype=torch.float64)
    k = ((q * spectrum.cuda()) @ q.mT).to(dtype)
    k = ((k + k.mT) / 2).contiguous()
    ridge = torch.linspace(0.5, 1, problems, dtype=dtype, device="cuda") / condition
    eye = torch.eye(m, dtype=torch.float64, device="cuda")
    return k, ridge, k.double() + ridge.double()[:, None, None] * eye


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator(device="cuda").manual_seed(len(shape) + sum(shape))
    return torch.randn(*shape, dtype=dtype, device="cuda", generator=generator)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """x [..., I, J] in every way memory can hold it; what is not x is NaN."""
    wide = x.new_full((*x.shape[:-2], 2 * x.shape[-2], 3 * x.shape[-1]), float("nan"))
    wide[..., ::2, ::3] = x
    by_columns = x.mT.contiguous().mT
    return {"by rows": x.contiguous(), "by columns": by_columns, "sliced": wide[..., ::2, ::3]}


def solution(lower: Tensor, y: Tensor) -> Tensor:
    return torch.cholesky_solve(y.double(), lower.double())


def assert_no_worse(got: Tensor, plain: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """At most twice as wrong as torch in the same precision, or as M roundings that add up."""
    if exact.numel() == 0:
        return
    floor = torch.finfo(dtype).eps * exact.shape[-2] ** 0.5 * exact.norm().item()
    error, allowed = (got - exact).norm().item(), 2 * (plain - exact).norm().item() + floor
    assert error <= allowed, f"error {error:.3e} > allowed {allowed:.3e}"


@pytest.mark.parametrize("dtype,float64", DTYPES)
@pytest.mark.parametrize("m", SIZES)
def test_cholesky(m: int, dtype: torch.dtype, float64: bool) -> None:
    result = torch.float64 if float64 else dtype
    k, ridge, system = systems(1, m, dtype)
    for p in (0, 1, 10, 65):
        y = draw(m, p, dtype=dtype)
        factor, half, pivot = ops.cholesky(k[0], ridge[0], y, float64)
        assert pivot.item() == 0 and pivot.dtype == torch.int32
        assert factor.dtype == half.dtype == result and factor.mT.is_contiguous()
        assert half.is_contiguous() and torch.equal(factor, factor.tril())
        if result == torch.float64:
            eps = torch.finfo(result).eps
            close = torch.testing.assert_close
            close(factor @ factor.mT, system[0], rtol=0, atol=4 * eps * max(m, 1) ** 0.5)
            close(factor @ half, y.double(), rtol=0, atol=200 * eps * max(m, 1) ** 0.5)


@pytest.mark.parametrize("m", SIZES)
def test_cholesky_is_no_worse_than_torch(m: int) -> None:
    """Over eight systems together: of one, either may be lucky."""
    names = ("solution", "half")
    found: dict[str, list[list[Tensor]]] = {name: [] for name in names}
    for seed in range(8 if m < 1000 else 2):
        k, ridge, system = systems(1, m, torch.float32, seed=100 * seed)
        y = draw(m, 10, dtype=torch.float32)
        factor, half, _ = ops.cholesky(k[0], ridge[0], y, False)
        exact, plain = torch.linalg.cholesky(system[0]), torch.linalg.cholesky(system[0].float())
        right = draw(m, 3, dtype=torch.float64)
        found["solution"].append([solution(lower, right) for lower in (factor, plain, exact)])
        halves = [
            torch.linalg.solve_triangular(lower, y.to(lower.dtype), upper=False).double()
            for lower in (plain, exact)
        ]
        found["half"].append([half.double(), *halves])
    for name in names:
        assert_no_worse(*(torch.stack(x) for x in zip(*found[name])), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "problems,m", [(1, 1), (300, 25), (70_000, 4), (40, 64), (33, 128), (3, 300)]
)
def test_batched(problems: int, m: int, dtype: torch.dtype) -> None:
    k, ridge, system = systems(problems, m, dtype, 1e2)
    factor, pivot = ops.batched_cholesky(k, ridge)
    assert factor.dtype == torch.float64 and factor.mT.is_contiguous() and not pivot.any()
    assert torch.equal(factor, factor.tril())
    tolerance = {"rtol": 0, "atol": 4 * torch.finfo(torch.float64).eps * m**0.5}
    torch.testing.assert_close(factor @ factor.mT, system, **tolerance)
    for p in (1, 5, 70):
        y = draw(problems, m, p, dtype=dtype)
        x = ops.batched_cholesky_solve(y, factor)
        assert x.dtype == dtype and x.mT.is_contiguous()
        expected = torch.linalg.solve(system, y.double())
        tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 2e-12 * m}
        torch.testing.assert_close(x.double(), expected, **tolerance)


@pytest.mark.parametrize("m", [25, 65, 130])
def test_layouts(m: int) -> None:
    k, ridge, _ = systems(3, m, torch.float32)
    y = draw(3, m, 7, dtype=torch.float32)
    factor, _ = ops.batched_cholesky(k, ridge)
    x = ops.batched_cholesky_solve(y, factor)
    _, half, _ = ops.cholesky(k[0], ridge[0], y[0], False)
    for layout in layouts(k).values():
        assert torch.equal(ops.batched_cholesky(layout, ridge.double())[0], factor)
    for layout in layouts(y).values():
        assert torch.equal(ops.cholesky(k[0], ridge[0], layout[0], False)[1], half)
        for lower in layouts(factor).values():
            assert torch.equal(ops.batched_cholesky_solve(layout, lower), x)
    assert torch.equal(ops.batched_cholesky(k[:1].expand(3, -1, -1), ridge)[0][0], factor[0])


@pytest.mark.parametrize("bad", [-1.0, 0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("m", [1, 25, 64, 65, 130])
def test_a_bad_pivot_at_every_position(m: int, bad: float) -> None:
    k = torch.eye(m, device="cuda").repeat(m, 1, 1)
    k.diagonal(dim1=1, dim2=2).diagonal().fill_(bad)
    numbers = torch.arange(1, m + 1, device="cuda", dtype=torch.int32)
    factor, pivot = ops.batched_cholesky(k, torch.zeros(m, device="cuda"))
    assert torch.equal(pivot, numbers)
    assert ops.batched_cholesky_solve(k[:, :, :1], factor).isnan().all()
    zero = torch.zeros((), device="cuda")
    for i in {0, m // 2, m - 1}:
        lower, half, number = ops.cholesky(k[i], zero, k[i], False)
        assert number.item() == i + 1
        assert lower.diagonal()[i:].isnan().all() and half[i:].isnan().all()
        assert torch.equal(lower[:, :i], torch.eye(m, device="cuda")[:, :i])


def test_nothing_waits_for_the_device_and_a_graph_replays_it() -> None:
    k, ridge, system = systems(1, 1000, torch.float32)
    y = draw(1000, 10, dtype=torch.float32)
    batch, ridges, _ = systems(50, 70, torch.float32)

    def work() -> tuple[Tensor, ...]:
        factors, pivots = ops.batched_cholesky(batch, ridges)
        solutions = ops.batched_cholesky_solve(batch, factors)
        return *ops.cholesky(k[0], ridge[0], y, False), factors, pivots, solutions

    graph, got = captured(work)
    with no_waits():
        work()
    k.mul_(2)
    batch.mul_(2)
    graph.replay()
    for a, b in zip(got, work()):
        assert torch.equal(a, b)


def test_the_same_bits_every_time() -> None:
    k, ridge, _ = systems(1, 777, torch.float32)
    y = draw(777, 33, dtype=torch.float32)
    first = ops.cholesky(k[0], ridge[0], y, False)
    for _ in range(20):
        for got, want in zip(ops.cholesky(k[0], ridge[0], y, False), first):
            assert torch.equal(got, want)


@pytest.mark.parametrize("dtype,float64", DTYPES)
def test_opcheck(dtype: torch.dtype, float64: bool) -> None:
    k, ridge, _ = systems(2, 65, dtype)
    y = draw(2, 65, 3, dtype=dtype)
    check = torch.library.opcheck
    check(ops.cholesky.default, (k[0], ridge[0], y[0], float64))
    check(ops.batched_cholesky.default, (k, ridge))
    check(ops.batched_cholesky_solve.default, (y, ops.batched_cholesky(k, ridge)[0]))


def test_a_wild_call_is_refused() -> None:
    k, ridge, _ = systems(2, 5, torch.float32)
    y = draw(2, 5, 3, dtype=torch.float32)
    factor = reference.batched_cholesky(k, ridge)[0]
    wild = [
        lambda: ops.cholesky(k, ridge[0], y[0], False),
        lambda: ops.cholesky(k[0], ridge, y[0], False),
        lambda: ops.cholesky(k[0], ridge[0], y[0].double(), False),
        lambda: ops.cholesky(k[0], ridge[0], y[0, :3], False),
        lambda: ops.cholesky(k[0].half(), ridge[0], y[0].half(), False),
        lambda: ops.cholesky(k[0], ridge[0].cpu(), y[0], False),
        lambda: ops.batched_cholesky(k, ridge[:1]),
        lambda: ops.batched_cholesky(k[:, :3], ridge),
        lambda: ops.batched_cholesky_solve(y, factor.float()),
        lambda: ops.batched_cholesky_solve(y[:, :3], factor),
        lambda: ops.batched_cholesky_solve(y.cpu(), factor),
    ]
    for call in wild:
        with pytest.raises(RuntimeError):
            call()
