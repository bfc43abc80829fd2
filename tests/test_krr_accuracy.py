"""krr_mse in float32 is at most twice as wrong as plain PyTorch, whatever computes it, and how.

Errors are relative (Frobenius norms) against the formula in float64 on the same numbers, of the
loss and of all five gradients. What is compared are medians and 90th percentiles over draws: the
error of a single draw is luck on both sides.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from krrst_fast import Solver, cholesky, krr_mse, reference
from tests.helpers import BACKEND_NAMES, features, keywords

# As many as make the 90th percentile of a loss, one number a draw, stand still at condition 1e7.
DRAWS, SINGLE_DRAWS = 256, 128
NAMES = ("loss", "f_syn", "y_syn", "f_real", "y_real", "ridge")
SHAPES = [(24, 40, 17, 5), (40, 24, 17, 5)]  # M, D, B, P: D > M, and M > D
CONDITIONS = [1e2, 1e3, 1e4, 1e5, 1e6, 1e7]
# To store the exact result in float32 costs half a unit in the last place.
ROUNDING = 2.0**-24


class Draws(NamedTuple):
    """Problems [N, ...] whose ridged gram has a stated condition number, exact in float32."""

    f_syn: Tensor
    y_syn: Tensor
    f_real: Tensor
    y_real: Tensor
    ridge: Tensor


def draws(
    shape: tuple[int, ...],
    condition: float,
    count: int,
    size: float = 1.0,
    twins: bool = False,
    seed: int = 0,
) -> Draws:
    """`size` times features whose gram decays far below the ridge; `twins`: half the rows twice."""
    m, d, b, p = shape
    generator = torch.Generator().manual_seed(seed)
    f_syn = torch.stack([features(m, d, 1e10, generator) for _ in range(count)])
    if twins:
        f_syn[:, (m + 1) // 2 :] = f_syn[:, : m // 2].clone()
    f_real = torch.stack([features(b, d, 1e2, generator) for _ in range(count)])
    y_syn, y_real = (torch.randn(count, n, p, generator=generator) for n in (m, b))
    f_syn, f_real = (size * f_syn).float().double(), (size * f_real).float().double()
    eigenvalues = torch.linalg.eigvalsh(f_syn @ f_syn.mT)
    # (largest + ridge) / (smallest + ridge) is the condition number.
    ridge = (eigenvalues[:, -1] - condition * eigenvalues[:, 0]) / (condition - 1)
    return Draws(f_syn, y_syn.double(), f_real, y_real.double(), ridge.float().double())


def rounded(problem: Draws) -> Draws:
    """The problem that precision="fast" solves."""
    f_syn, f_real = reference.round_features(problem.f_syn, problem.f_real)
    return problem._replace(f_syn=f_syn, f_real=f_real)


def formula(f_syn: Tensor, y_syn: Tensor, f_real: Tensor, y_real: Tensor, ridge: Tensor) -> Tensor:
    """The losses [N]: grams, LU and autograd."""
    eye = torch.eye(f_syn.shape[-2], dtype=f_syn.dtype)
    system = f_syn @ f_syn.mT + ridge[..., None, None] * eye
    prediction = f_real @ f_syn.mT @ _lu_solve(system, y_syn)
    return (prediction - y_real).square().mean((-2, -1))


def _lu_solve(system: Tensor, y: Tensor) -> Tensor:
    """Large ones one by one: MKL's batched LU fails once torch.set_num_threads has been called."""
    if system.shape[-1] < 256:
        return torch.linalg.solve(system, y)
    return torch.stack([torch.linalg.solve(a, b) for a, b in zip(system, y)])


def fused(
    f_syn: Tensor, y_syn: Tensor, f_real: Tensor, y_real: Tensor, ridge: Tensor, **how: Any
) -> Tensor:
    tensors = (f_syn, y_syn, f_real, y_real)
    return krr_mse(*tensors, ridge=ridge, ridge_of="absolute", **how)


def one_by_one(*problem: Tensor, **how: Any) -> Tensor:
    """The losses [N] by N calls."""
    return torch.stack([fused(*tensors, **how) for tensors in zip(*problem)])


def evaluate(function: Any, problem: Draws, dtype: torch.dtype) -> list[Tensor]:
    """Losses [N] and gradients [N, ...]."""
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in problem]
    losses = function(*leaves)
    return [losses.detach(), *torch.autograd.grad(losses.sum(), leaves)]


def errors(got: list[Tensor], exact: list[Tensor]) -> Tensor:
    """Relative errors [N, loss and gradients]."""

    def norms(x: Tensor) -> Tensor:
        return x.double().reshape(len(x), -1).norm(dim=1)

    return torch.stack([norms(a.double() - b) / norms(b) for a, b in zip(got, exact)], 1)


def ways(shape: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Backend and form; primal is as exact as the others only where M > D."""
    for backend in BACKEND_NAMES:
        for form in ("k", "w", "primal") if shape[0] > shape[1] else ("k", "w"):
            yield {"backend": backend, "form": form}


def violations(name: str, mine: Tensor, plain: Tensor) -> list[str]:
    """Where a quantile of errors [N, 6] is more than twice that of plain PyTorch."""
    found = []
    for quantile in (0.5, 0.9):
        ours, theirs = mine.quantile(quantile, dim=0), plain.quantile(quantile, dim=0)
        for what, a, b in zip(NAMES, ours.tolist(), theirs.tolist()):
            if not a <= 2 * (b + ROUNDING):
                found.append(f"{name}, {what}, {quantile}: {a:.2e} > 2 * {b:.2e}")
    return found


# How: None is float32 with a float64 factor.
EVERY_HOW: tuple[dict[str, Any], ...] = (
    {},
    {"precision": "float32"},
    {"precision": "float64"},
    {"precision": "fast"},
)


def judge(
    problem: Draws, shape: tuple[int, ...], function: Any, hows: tuple[dict[str, Any], ...]
) -> list[str]:
    """All violations of one set of draws, by every backend and form."""
    found = []
    coarse = rounded(problem)
    exact, exact_fast = (evaluate(formula, x, torch.float64) for x in (problem, coarse))
    plain = errors(evaluate(formula, problem, torch.float32), exact)
    plain_fast = errors(evaluate(formula, coarse, torch.float32), exact_fast)
    in_float64 = errors([x.float() for x in exact], exact)
    for way in ways(shape):
        for how in hows:
            truth, allowed = {
                "fast": (exact_fast, plain_fast),
                "float64": (exact, in_float64),
            }.get(how.get("precision", ""), (exact, plain))
            got = evaluate(partial(function, **keywords(**way, **how)), problem, torch.float32)
            found += violations(f"{way} {how}", errors(got, truth), allowed)
    return found


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_at_every_condition_number(shape: tuple[int, ...], condition: float) -> None:
    problem = draws(shape, condition, SINGLE_DRAWS)
    found = judge(problem, shape, one_by_one, ({},))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("condition", [1e3, 1e6])
@pytest.mark.parametrize("shape", SHAPES)
def test_with_every_row_twice(shape: tuple[int, ...], condition: float) -> None:
    found = judge(draws(shape, condition, DRAWS, twins=True), shape, fused, EVERY_HOW)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("size", [1e-4, 1e4])
@pytest.mark.parametrize("shape", SHAPES)
def test_features_of_any_size(shape: tuple[int, ...], size: float) -> None:
    found = judge(draws(shape, 1e4, DRAWS, size=size), shape, fused, EVERY_HOW)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_batches_of_problems(shape: tuple[int, ...], condition: float) -> None:
    found = judge(draws(shape, condition, DRAWS), shape, fused, EVERY_HOW)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("shape", SHAPES)
def test_factored_in_float32(
    shape: tuple[int, ...], condition: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As grams of more than 512 rows are, at a size that takes no minutes.
    monkeypatch.setattr(cholesky, "FLOAT64_UP_TO", 0)
    found = judge(draws(shape, condition, DRAWS), shape, fused, ({},))
    found += judge(draws(shape, condition, SINGLE_DRAWS), shape, one_by_one, ({},))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("condition", [1e3, 1e5])
def test_more_rows_than_are_factored_in_float64(condition: float) -> None:
    shape = (520, 64, 20, 2)
    problem = draws(shape, condition, 16)
    exact = evaluate(formula, problem, torch.float64)
    plain = errors(evaluate(formula, problem, torch.float32), exact)
    found = []
    for form in ("k", "w", "primal"):
        got = evaluate(partial(one_by_one, solver=Solver(form=form)), problem, torch.float32)
        found += violations(form, errors(got, exact), plain)
    assert not found, "\n".join(found)


def test_what_is_judged_would_be_seen() -> None:
    """A relative error of 1e-5 in one gradient is a violation at a condition number of 100."""
    problem = draws(SHAPES[0], 1e2, DRAWS)
    exact = evaluate(formula, problem, torch.float64)
    plain = errors(evaluate(formula, problem, torch.float32), exact)
    got = [x.float() for x in exact]
    assert not violations("exact", errors(got, exact), plain)
    got[1] *= 1 + 1e-5
    found = violations("off", errors(got, exact), plain)
    assert [text.split(", ")[1] for text in found] == ["f_syn", "f_syn"]
