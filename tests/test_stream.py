"""Fits of arrays and of chunks: what krr_fit of all rows at once gives, in less memory."""

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from krrst_fast import NotPositiveDefiniteError, Solver, krr_fit
from krrst_fast.ops import row_sums
from krrst_fast.ops.arrays import is_mapped
from krrst_fast.ops.row_sums import RowSums
from tests.helpers import assert_equal, more_than_twice

SHAPES = [(7, 13), (9, 9), (30, 8), (523, 531), (560, 520)]
KERNELS: list[dict[str, Any]] = [
    {"ridge": 1e-3, "bias": 0.5, "scale": 2.0},
    {"ridge": torch.tensor(0.5), "ridge_of": "absolute"},
    {"ridge": 1e-2, "ridge_of": "mean_diagonal", "intercept": True, "scale": 0.5},
]


def drawn(m: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features away from 0, targets, weights of which one is 0, and queries; exact in float32."""
    draw = torch.Generator().manual_seed(seed)
    f, y, q = (torch.randn(*s, generator=draw) for s in ((m, d), (m, 3), (5, d)))
    weights = 2 * torch.rand(m, generator=draw)
    weights[0] = 0
    return (f + 1).double(), (y + 5).double(), weights.double(), (q + 1).double()


def chunks(*rows: Tensor | np.ndarray, sizes: int | list[int] = 4) -> Iterator[tuple]:
    """Rows in chunks of a size, or of these sizes and the rest."""
    ends = [*itertools.accumulate(sizes)] if isinstance(sizes, list) else []
    ends = ends or [*range(sizes, len(rows[0]), sizes)]  # type: ignore[arg-type]
    for first, last in itertools.pairwise([0, *ends, len(rows[0])]):
        yield tuple(x[first:last] for x in rows)


def mapped(folder: Path, name: str, x: Tensor | np.ndarray) -> np.memmap:
    """X in a file."""
    x = np.asarray(x)
    out = np.memmap(folder / name, x.dtype, "w+", shape=x.shape)
    out[:] = x
    out.flush()
    return np.memmap(folder / name, x.dtype, "r", shape=x.shape)


def relative(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_the_rows_at_once_give(
    shape: tuple[int, int], kernel: dict[str, Any], weighted: bool, tmp_path: Path
) -> None:
    f, y, w, q = drawn(*shape)
    rows = (f, y, w) if weighted else (f, y)
    one = krr_fit(f, y, weights=w if weighted else None, **kernel)
    file = mapped(tmp_path, "f", f)
    fits = [
        krr_fit(file, y.numpy(), weights=w.numpy() if weighted else None, **kernel),
        krr_fit(chunks(*rows, sizes=[1, 1, 0, 2]), **kernel),
        krr_fit(chunks(*(x.numpy() for x in rows), sizes=600), **kernel),
        krr_fit([(file[i:j], y[i:j], w[i:j] if weighted else None) for i, j in ((0, 4), (4, 999))],
                **kernel),
    ]  # fmt: skip
    for fit in fits:
        assert (fit.info.form, fit.info.backend) == (one.info.form, one.info.backend)
        assert_equal(fit.predict(q), one.predict(q), 1e-9)
        assert_equal(fit.predict(q.numpy()), fit.predict(q), 1e-12)
        assert_equal(fit.weights, one.weights, 1e-9)
        assert_equal(fit.intercept, one.intercept, 1e-9)
        assert_equal(fit.info.ridge, one.info.ridge, 1e-10)
        factor, exact = fit.info.factor, one.info.factor
        assert_equal(factor @ factor.mT, exact @ exact.mT, 1e-10)
        assert torch.equal(factor, factor.tril())
        if one.info.form != "primal":
            assert_equal(fit.alpha, one.alpha, 1e-9)
            assert_equal(fit.loo_residuals, one.loo_residuals, 1e-8)
    if one.info.form == "primal":
        for name in ("alpha", "loo_residuals"):
            with pytest.raises(
                AttributeError, match=f"KRRFit.{name}: the rows of arrays and chunk"
            ):
                getattr(fits[0], name)


@pytest.mark.parametrize("form", ["k", "w", "primal"])
@pytest.mark.parametrize("shape", [(7, 13), (30, 8)])
def test_a_form_that_is_asked_for(shape: tuple[int, int], form: str) -> None:
    f, y, w, q = drawn(*shape)
    fit = krr_fit(f.numpy(), y.numpy(), weights=w, bias=0.5, solver=Solver(form=form))
    assert fit.info.form == form
    one = krr_fit(f, y, weights=w, bias=0.5, solver=Solver(form=form))
    assert_equal(fit.predict(q), one.predict(q), 1e-9)
    if form == "primal":
        fit = krr_fit(chunks(f, y, w), bias=0.5, solver=Solver(form=form))
        assert_equal(fit.predict(q), one.predict(q), 1e-9)


def _errors(
    f: Tensor, y: Tensor, q: Tensor, exact: Tensor, **kernel: Any
) -> tuple[list[float], list[float]]:
    """Errors of arrays and of chunks, and of all rows at once twice, in float32.

    Of the predictions of their weights in float64: in float32 these have an error of their own.
    """
    f, y = f.float(), y.float()
    fits = (
        krr_fit(f.numpy(), y.numpy(), **kernel),
        krr_fit(chunks(f, y, sizes=7), **kernel),
        krr_fit(f, y, **kernel),
    )
    array, parts, one = (
        relative(q @ fit.weights.double() + fit.intercept.double(), exact) for fit in fits
    )
    return [array, parts], [one, one]


@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("shape", [(5, 40), (40, 8), (530, 540), (620, 530)])
def test_no_more_wrong_than_the_rows_at_once(
    shape: tuple[int, int], intercept: bool, mean: float
) -> None:
    ours, theirs = [], []
    for seed in range(3 if shape[0] > 100 else 15):
        f, y, _, q = drawn(*shape, seed)
        f, q = ((x + mean).float().double() for x in (f, q))
        kernel: dict[str, Any] = {"ridge": 1e-5, "intercept": intercept}
        exact = krr_fit(f, y, **kernel).predict(q)
        pair = _errors(f, y, q, exact, **kernel)
        ours.append(pair[0])
        theirs.append(pair[1])
    assert not more_than_twice(torch.tensor(ours), torch.tensor(theirs), 1e-7)


def _least_squares(f: Tensor, y: Tensor, q: Tensor, intercept: bool) -> Tensor:
    """Predict for a ridge of 1 by a QR factorisation with large rows first, in float64."""
    f, q = (torch.cat((x, torch.full((len(x), 1), float(intercept))), 1) for x in (f, q))
    penalty = torch.eye(f.shape[1], dtype=f.dtype)
    penalty[-1, -1] = 1 - float(intercept)
    rows, targets = torch.cat((f, penalty)), torch.cat((y, y.new_zeros(len(penalty), y.shape[1])))
    order = rows.norm(dim=1).argsort(descending=True)
    left, upper = torch.linalg.qr(rows[order])
    return q @ torch.linalg.solve_triangular(upper, left.mT @ targets[order], upper=True)


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("least", [3, 512])
@pytest.mark.parametrize("order", ["mixed", "growing", "shrinking", "last"])
@pytest.mark.parametrize("spread", [1.0, 1e3, 1e6])
def test_uneven_rows(
    spread: float, order: str, least: int, intercept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_sums, "_LEAST_ROWS", least)
    ours, theirs = [], []
    for seed in range(9):
        f, y, _, q = drawn(40, 8, seed)
        sizes = torch.logspace(0, np.log10(spread), 40, dtype=torch.float64)
        if order == "last":
            sizes[:-1] = 1
        turned = {"mixed": torch.randperm(40), "shrinking": torch.arange(40).flip(0)}
        f = (f * sizes[turned.get(order, torch.arange(40)), None]).float().double()
        exact = _least_squares(f, y, q, intercept)
        pair = _errors(f, y, q, exact, ridge=1.0, ridge_of="absolute", intercept=intercept)
        ours.append(pair[0])
        theirs.append(pair[1])
    assert not more_than_twice(torch.tensor(ours), torch.tensor(theirs), 1e-6)


def test_uneven_rows_become_even(monkeypatch: pytest.MonkeyPatch) -> None:
    """The root of the Gram becomes a Gram again as soon as enough rows are large."""
    monkeypatch.setattr(row_sums, "_LEAST_ROWS", 3)
    turns, turn = [], RowSums._converted
    monkeypatch.setattr(
        RowSums, "_converted", lambda self, *x: turns.append(self.rows) or turn(self, *x)
    )
    f, y, _, q = drawn(60, 6)
    f[20:] *= 1e6
    fit = krr_fit(chunks(f, y, sizes=3), ridge=1.0, ridge_of="absolute")
    assert_equal(fit.predict(q), _least_squares(f, y, q, False), 1e-3)
    assert turns == [21, 27]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(9, 13), (30, 8)])
def test_dtypes_are_those_of_the_rows_at_once(shape: tuple[int, int], dtype: torch.dtype) -> None:
    f, y, _, q = (x.to(dtype) for x in drawn(*shape))
    for precision in (None, "float64", "float32"):
        solver = Solver(precision=precision)
        one = krr_fit(f, y, ridge=1e-2, solver=solver)
        for fit in (
            krr_fit(f.numpy(), y.numpy(), ridge=1e-2, solver=solver),
            krr_fit(chunks(f, y), ridge=1e-2, solver=solver),
        ):
            assert fit.weights.dtype == fit.intercept.dtype == one.weights.dtype
            assert_equal(fit.predict(q), one.predict(q), 1e-5)
            assert fit.predict(q).dtype == fit.predict(q.numpy()).dtype == one.predict(q).dtype
    swapped = f.numpy().astype(f.numpy().dtype.newbyteorder(">")), y.numpy()[:, ::-1]
    turned = krr_fit(*swapped, ridge=1e-2).predict(q)
    assert_equal(turned.flip(1), krr_fit(f, y, ridge=1e-2).predict(q), 1e-5)


@pytest.mark.parametrize("shape", [(40, 60), (600, 610), (60, 40), (610, 600)])
def test_a_ridge_that_fails_is_raised_or_refused(shape: tuple[int, int]) -> None:
    f, y, _, q = (x.float() for x in drawn(*shape))
    f[:, 3:] = f[:, :1]  # of rank 3
    f[3:, 3:] = f[3:, :1]
    solver = Solver(max_retries=30)
    fit = krr_fit(f.numpy(), y.numpy(), ridge=1e-25, solver=solver)
    assert fit.info.retries > 0
    assert fit.info.ridge == pytest.approx(1e-25 * 10 ** int(fit.info.retries) * float(
        f.double().square().sum()), rel=1e-4)  # fmt: skip
    lower, rows = fit.info.factor.double(), f.double() if shape[0] < shape[1] else f.double().mT
    exact = rows @ rows.mT + fit.info.ridge * torch.eye(len(rows))
    assert_equal(lower @ lower.mT, exact, 1e-5)
    with pytest.raises(NotPositiveDefiniteError, match="after raising the ridge 0 times"):
        krr_fit(f.numpy(), y.numpy(), ridge=1e-25, solver=Solver(max_retries=0))
    flagged = krr_fit(f.numpy(), y.numpy(), ridge=1e-25, solver=Solver(check="flag", max_retries=0))
    assert flagged.info.failed
    assert flagged.weights.isnan().all()
    with pytest.raises(NotPositiveDefiniteError, match="the features are zero"):
        krr_fit(0 * f.numpy(), y.numpy())
    nan = f.clone()
    nan[-1, 0] = torch.nan
    assert krr_fit(nan.numpy(), y.numpy(), solver=Solver(check="flag")).weights.isnan().all()
    assert krr_fit(chunks(nan, y), solver=Solver(check="flag")).weights.isnan().any()


def test_writable_and_private_files(tmp_path: Path) -> None:
    f, y, _, q = drawn(12, 20)
    file = mapped(tmp_path, "f", torch.cat((f, f[:2])))
    exact = krr_fit(f, y).predict(q)
    for mode in ("r", "r+", "c"):
        x = np.memmap(tmp_path / "f", np.float64, mode, shape=(14, 20))[:12]  # type: ignore[call-overload]
        if mode != "r":
            x[3] = 2 * f[3].numpy()
            assert relative(krr_fit(x, y.numpy()).predict(q), exact) > 1e-6
            x[3] = f[3].numpy()
        assert_equal(krr_fit(x, y.numpy()).predict(q), exact, 1e-9)
        assert np.array_equal(x, f.numpy())
    assert is_mapped(np.asarray(file)[2:, ::2])
    assert not is_mapped(f.numpy())
    strided = krr_fit(np.asarray(file)[11::-2, ::-3], y.numpy()[::-2])
    assert_equal(strided.weights, krr_fit(f.flip(0, 1)[::2, ::3], y.flip(0)[::2]).weights, 1e-9)


PEAK = """
import re, sys
from pathlib import Path
import numpy as np
import torch
from krrst_fast import KernelRidge, krr_fit

torch.set_num_threads(1)
rows, features = map(int, sys.argv[2:])
x = np.memmap(sys.argv[1], np.float32, "r", shape=(rows, features))
y = np.random.default_rng(0).standard_normal((rows, 10), dtype=np.float32)
small = np.ones((3, 5), np.float32)
KernelRidge().partial_fit(small, small).fit(small, small).predict(small)
krr_fit(small, small), krr_fit(small.T.copy(), small.T.copy())

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

def chunks():
    for first in range(0, rows, 100):
        yield x[first : first + 100], y[first : first + 100]

model = KernelRidge()
calls = [lambda: krr_fit(x, y), lambda: model.fit(x, y), lambda: model.predict(x)]
if rows > features:
    calls += [lambda: krr_fit(chunks()), lambda: KernelRidge().partial_fit(x, y)]
for call in calls:
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    call()
    print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks Linux")
@pytest.mark.parametrize(
    "shape", [(600, 80_000), pytest.param((96_000, 500), marks=pytest.mark.slow)]
)
def test_memory_is_not_that_of_the_rows(shape: tuple[int, int], tmp_path: Path) -> None:
    """Of a file of 183 MB in MB: blocks, and a Gram of 1 or 8."""
    path = tmp_path / "x"
    np.zeros(shape, np.float32).tofile(path)
    file = np.memmap(path, np.float32, "r+", shape=shape)
    file[: min(shape), : min(shape)] = np.random.default_rng(0).standard_normal(
        (min(shape),) * 2, np.float32
    )
    file.flush()
    command = [sys.executable, "-c", PEAK, str(path), *map(str, shape)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    peaks = [float(line) for line in done.stdout.split()]
    assert len(peaks) >= 3 and max(peaks) < 100, peaks


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1500, 1700), (2600, 1400)])
def test_large_systems(shape: tuple[int, int]) -> None:
    ours, theirs = [], []
    for seed in range(5):
        f, y, _, q = drawn(*shape, seed)
        exact = krr_fit(f, y, bias=1.0).predict(q)
        pair = _errors(f, y, q, exact, bias=1.0)
        ours.append(pair[0])
        theirs.append(pair[1])
    assert not more_than_twice(torch.tensor(ours), torch.tensor(theirs), 1e-7)


@pytest.mark.parametrize("columns", [20, 40])
def test_a_generator_may_reuse_its_memory(columns: int) -> None:
    f, y, w, q = drawn(30, columns)

    def reused() -> Iterator[tuple[Tensor, ...]]:
        memory = [torch.empty_like(x[:10]) for x in (f, y, w)]
        for first in range(0, 30, 10):
            yield tuple(a.copy_(b[first : first + 10]) for a, b in zip(memory, (f, y, w)))

    assert_equal(krr_fit(reused()).predict(q), krr_fit(f, y, weights=w).predict(q), 1e-9)
