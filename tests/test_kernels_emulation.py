"""What the arithmetic of the kernels does to a gradient, emulated with plain PyTorch on the CPU.

Triton's interpreter multiplies in full precision whatever a GPU would do. Here the algorithm of
each kernel is written out: features rounded once to float16, operands in two terms, tf32 in three
products, sums that tensor cores truncate and that are flushed after each run. A thousand features
with the spectrum of a ConvNet's (40 % of the trace in the first direction, then a power law) give a
condition number of 3e5, at which real images lost the digits of the TABLE.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from krrst_fast import reference

M, D, B, P = 1000, 2048, 1000, 16
Product = Callable[[Tensor, Tensor], Tensor]

# Relative errors of dF_s and dY_s on CIFAR images; a range where forms differ.
TABLE = {
    "float64 factor": ((4.7e-4, 4.7e-4), (7.7e-4, 7.7e-4)),
    "gram in tf32": ((4.5e-2, 4.5e-2), (4e-2, 4e-2)),
    "all but the gram in tf32": ((0.18, 0.66), (0.7, 1.3)),
    "features once in float16": ((3.2e-3, 3.2e-3), (3e-3, 3e-3)),
}


class Step(NamedTuple):
    """How the parts of a step in the form "w" are computed."""

    gram: Callable[[Tensor], Tensor] = lambda f: f @ f.mT
    product: Product = torch.matmul
    closing: Product = torch.matmul
    factor: torch.dtype | None = None

    def __call__(
        self, f_syn: Tensor, y_syn: Tensor, f_real: Tensor, y_real: Tensor
    ) -> list[Tensor]:
        """dF_s and dY_s."""
        k = self.gram(f_syn) + 1
        wide = k.to(self.factor or k.dtype)
        factor = torch.linalg.cholesky(wide + 1e-6 * wide.trace() * torch.eye(M, dtype=wide.dtype))

        def solve(y: Tensor) -> Tensor:
            return torch.cholesky_solve(y.to(factor.dtype), factor).to(k.dtype)

        alpha = solve(y_syn)
        w = self.product(f_syn.mT, alpha)
        residual = self.product(f_real, w) + alpha.sum(0) - y_real
        r = residual * (2 / residual.numel())
        dw = self.product(f_real.mT, r)
        beta = solve(self.product(f_syn, dw) + r.sum(0))
        v = dw - self.product(f_syn.mT, beta)
        return [self.closing(alpha, v.mT) - self.closing(beta, w.mT), beta]


def tf32(x: Tensor) -> Tensor:
    """To 10 bits behind the point, to nearest."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def half(x: Tensor, unit: Tensor) -> Tensor:
    return (x * unit).half().float()


def unit_of(x: Tensor, dim: tuple[int, ...] = (0, 1)) -> Tensor:
    return torch.exp2(15 - x.abs().amax(dim, keepdim=True).log2().ceil())


def in_tf32(a: Tensor, b: Tensor) -> Tensor:
    return tf32(a) @ tf32(b)


def in_tf32x3(a: Tensor, b: Tensor) -> Tensor:
    """As tl.dot(..., input_precision="tf32x3") does it."""
    a_lo, b_lo = tf32(a - tf32(a)), tf32(b - tf32(b))
    return tf32(a) @ b_lo + a_lo @ tf32(b) + tf32(a) @ tf32(b)


def in_two_terms(a: Tensor, b: Tensor) -> Tensor:
    """`kernels.thin_matmul` of float16 features: a unit for each column of b."""
    unit = unit_of(b, (0,))
    hi = half(b, unit)
    return (a @ (unit * b - hi).half().float() + a @ hi) / unit


def in_fp16x3(a: Tensor, b: Tensor) -> Tensor:
    """`kernels.closing_matmul`: a unit for each matrix, three of four products."""
    a_unit, b_unit = unit_of(a), unit_of(b)
    a_hi, b_hi = half(a, a_unit), half(b, b_unit)
    a_lo, b_lo = (a_unit * a - a_hi).half().float(), (b_unit * b - b_hi).half().float()
    return (a_lo @ b_hi + a_hi @ b_lo + a_hi @ b_hi) / a_unit / b_unit


def gram_in_runs(f: Tensor, run: int) -> Tensor:
    """Each 16 products added exactly to a float32 that is truncated; runs are added to nearest."""
    total = torch.zeros(len(f), len(f))
    for first in range(0, f.shape[1], run):
        part = torch.zeros(len(f), len(f), dtype=torch.float64)
        for k in range(first, min(first + run, f.shape[1]), 16):
            piece = f[:, k : k + 16].double()
            part.addmm_(piece, piece.mT)
            # The 24 bits of a float32 are what is left of 53: towards zero.
            part.view(torch.int64).bitwise_and_(-(1 << 29))
        total += part.float()
    return total


@functools.cache
def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """F_s, Y_s, F_r, Y_r in float32."""
    generator = torch.Generator().manual_seed(0)

    def basis(rows: int) -> Tensor:
        random = torch.randn(rows, M, generator=generator, dtype=torch.float64)
        random[:, 0] = 1
        q = torch.linalg.qr(random)[0]
        return q * q[0, 0].sign()

    decay = torch.arange(1, M + 1, dtype=torch.float64) ** -1.8
    decay[0] = 0
    eigenvalues = 0.6 * decay / decay.sum()
    eigenvalues[0] = 0.4
    right = basis(D) * (30 * eigenvalues.sqrt())
    f_syn = basis(M) @ right.mT
    other = torch.randn(B, M, generator=generator, dtype=torch.float64)
    other[:, 0] = 1
    f_real = other @ right.mT / M**0.5
    signal = torch.randn(D, P, generator=generator, dtype=torch.float64)
    y_syn, y_real = f_syn @ signal, f_real @ signal
    y_syn, y_real = (
        y / y.std() + 0.1 * torch.randn(y.shape, generator=generator) for y in (y_syn, y_real)
    )
    return f_syn.float(), y_syn.float(), f_real.float(), y_real.float()


@functools.cache
def rounded_problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    f_syn, y_syn, f_real, y_real = problem()
    f_syn, rounded_real = reference.round_features(f_syn, f_real)
    assert rounded_real is not None
    return f_syn, y_syn, rounded_real, y_real


@functools.cache
def exact(rounded: bool) -> list[Tensor]:
    return Step()(*(x.double() for x in (rounded_problem() if rounded else problem())))


def errors(got: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [((g.double() - e).norm() / e.norm()).item() for g, e in zip(got, exact)]


STEPS = {
    "float64 factor": Step(factor=torch.float64),
    "gram in tf32": Step(gram=lambda f: in_tf32(f, f.mT)),
    "all but the gram in tf32": Step(product=in_tf32),
    # Its own rounding: the float64 factor leaves nothing else.
    "features once in float16": Step(factor=torch.float64),
}


def test_the_condition_number() -> None:
    f = problem()[0].double()
    k = f @ f.mT + 1
    eigenvalues = torch.linalg.eigvalsh(k + 1e-6 * k.trace() * torch.eye(M))
    assert 2e5 < eigenvalues[-1] / eigenvalues[0] < 4e5


@pytest.mark.parametrize("name", TABLE)
def test_errors_are_those_of_real_images_within_a_factor_of_two(name: str) -> None:
    # What only float32 rounds is rounded in the order of this processor's sums.
    factor = 3 if name == "float64 factor" else 2
    tensors = rounded_problem() if "float16" in name else problem()
    found = errors(STEPS[name](*tensors), exact(rounded=False))
    for error, (low, high), what in zip(found, TABLE[name], ("dF_s", "dY_s")):
        near = low / factor <= error <= factor * high
        assert near, f"{what}: {error:.2e} is not {low:.1e} .. {high:.1e}"


@pytest.mark.parametrize("factor", [torch.float32, torch.float64], ids=str)
def test_fast_mode_is_as_good_as_float32_on_the_rounded_features(factor: torch.dtype) -> None:
    """One float16 pass for the gram, two for the skinny products, three for the last one."""
    kernels = Step(
        gram=lambda f: gram_in_runs(f, 1280),
        product=in_two_terms,
        closing=in_fp16x3,
        factor=factor,
    )
    plain = errors(Step(factor=factor)(*rounded_problem()), exact(rounded=True))
    found = errors(kernels(*rounded_problem()), exact(rounded=True))
    assert all(f <= 2 * p for f, p in zip(found, plain)), f"{found} > 2 * {plain}"


@pytest.mark.parametrize("factor", [torch.float32, torch.float64], ids=str)
def test_three_products_in_tf32_are_as_good_as_float32(factor: torch.dtype) -> None:
    kernels = Step(lambda f: in_tf32x3(f, f.mT), in_tf32x3, in_fp16x3, factor)
    plain = errors(Step(factor=factor)(*problem()), exact(rounded=False))
    found = errors(kernels(*problem()), exact(rounded=False))
    assert all(f <= 2 * p for f, p in zip(found, plain)), f"{found} > 2 * {plain}"


def test_runs_keep_truncation_small() -> None:
    """Features that are all positive, as after a ReLU: truncation adds up over the whole sum."""
    f = torch.rand(48, 8192, generator=torch.Generator().manual_seed(0)).half().float()
    right = f.double() @ f.double().mT

    def error(k: Tensor) -> float:
        return ((k.double() - right).abs().max() / right.max()).item()

    one, runs = error(gram_in_runs(f, 8192)), error(gram_in_runs(f, 1280))
    assert one > 4 * runs, f"one run {one:.1e}, runs of 1280 {runs:.1e}"
    assert runs < 2**-18
