"""The closed form for a shape, from counted operations and memory; nothing is measured."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Form = Literal["k", "w", "primal"]
FORMS: tuple[Form, ...] = ("k", "w", "primal")

# As krrst_fast.cholesky, which imports torch: grams of up to so many rows are factored in float64.
_FLOAT64_UP_TO = 512


@dataclass(frozen=True)
class Plan:
    """The form that is chosen for a shape, and the cost of each form.

    Attributes:
        form: "k" | "w" | "primal".
        flops: Floating-point operations of forward and backward pass, by form.
        bytes: Peak memory of forward and backward pass beyond the inputs, by form: saved tensors,
            temporaries and gradients. Right to within 15 % (measured on the CPU for sizes in the
            hundreds).
        reason: One sentence.
    """

    form: Form
    flops: dict[Form, float]
    bytes: dict[Form, float]
    reason: str


def plan(*, m: int, b: int, d: int, p: int, problems: int = 1, itemsize: int = 4) -> Plan:
    """Choose the closed form for M synthetic and B real images, D features and P target features.

    Counted are one forward pass and the gradients to `f_syn` and `y_syn`; a Gram counts half of the
    full product, a multiply-add counts two. "k" keeps K_rs [B, M]; "w" goes through W = F_s^T alpha
    [D, P] and never multiplies M x M by D; "primal" solves in D x D and is taken only when M > D.

    Args:
        m, b, d, p: The sizes.
        problems: The number of problems in the batch (leading dimensions).
        itemsize: Bytes of a number, 4 for float32.

    Raises:
        ValueError: A size is negative.
    """
    sizes = {"m": m, "b": b, "d": d, "p": p, "problems": problems, "itemsize": itemsize}
    for name, size in sizes.items():
        if size < 0:
            raise ValueError(f"plan: {name} must not be negative, got {size}")
    form = cheapest(m, b, d, p)
    reasons: dict[Form, str] = {
        "primal": f"M = {m} > D = {d}: the D x D system is the smaller one",
        "w": f"P = {p}: products with W [D, P] cost less than K_rs [B, M]",
        "k": f"P = {p} is large: products with W [D, P] cost more than K_rs [B, M]",
    }
    return Plan(
        form=form,
        flops={name: problems * count for name, count in _flops(m, b, d, p).items()},
        bytes={name: problems * _bytes(name, m, b, d, p, itemsize) for name in FORMS},
        reason=reasons[form],
    )


def cheapest(m: int, b: int, d: int, p: int) -> Form:
    """Return the form that `plan` chooses; it only compares, so that sizes may be symbolic."""
    if m == 0 or d == 0:
        return "w"  # nothing to solve, or nothing to solve it with
    flops = _flops(m, b, d, p)
    if m > d and flops["primal"] < flops["k"] and flops["primal"] < flops["w"]:
        return "primal"
    return "w" if flops["w"] <= flops["k"] else "k"


cached_cheapest = lru_cache(maxsize=4096)(cheapest)
"""`cheapest` for sizes that are numbers."""


def _flops(m: int, b: int, d: int, p: int) -> dict[Form, float]:
    return {"k": _k(m, b, d, p), "w": _w(m, b, d, p), "primal": _primal(m, b, d, p)}


def _dual_solve(m: int, p: int) -> float:
    return m**3 / 3 + 4 * m * m * p


def _k(m: int, b: int, d: int, p: int) -> float:
    predict = m * m * d + 2 * b * m * d + 2 * b * m * p
    backward = 4 * b * m * p + 2 * m * m * p + 2 * m * (b + m) * d
    return _dual_solve(m, p) + predict + backward


def _w(m: int, b: int, d: int, p: int) -> float:
    predict = m * m * d + 2 * m * d * p + 2 * b * d * p
    backward = 2 * b * d * p + 4 * m * d * p + 4 * m * p * d
    return _dual_solve(m, p) + predict + backward


def _primal(m: int, b: int, d: int, p: int) -> float:
    predict = m * d * d + d**3 / 3 + 2 * m * d * p + 2 * d * d * p + 2 * b * d * p
    backward = 2 * b * d * p + 2 * d * d * p + 4 * m * d * p + 4 * m * p * d
    return predict + backward


def _bytes(form: Form, m: int, b: int, d: int, p: int, itemsize: int) -> float:
    """Return the largest of the peak memory of factoring, predicting and the backward pass."""
    n = d if form == "primal" else m
    wide = 8 if n <= _FLOAT64_UP_TO else itemsize  # a number of the factor
    factor = n * n * wide
    # LAPACK solves in a copy of the factor; right-hand sides are taken to its precision and back.
    solve = n * n * wide + n * p * (itemsize + (2 * wide if wide > itemsize else 0))
    factoring = n * n * itemsize + factor + solve
    saved, back = _numbers(form, m, b, d, p)
    predicting = factor + (saved + b * p) * itemsize
    adjoint = b * p + {"k": m, "w": m + d, "primal": d}[form] * p  # R and what is solved for
    solving = factor + solve + (saved + adjoint) * itemsize
    return max(factoring, predicting, solving, factor + (saved + back) * itemsize)


def _numbers(form: Form, m: int, b: int, d: int, p: int) -> tuple[float, float]:
    """Return the numbers that are kept beside the factor, and the peak of the backward pass."""
    if form == "k":
        # error, alpha, K_sr | R, beta, outer and its symmetric part, then the gradient
        alpha_r, symmetric = m * b, m * m
        return b * p + m * p + m * b, b * p + m * p + max(2 * m * m, symmetric + alpha_r + m * d)
    columns = 2 * p * (m + d)  # the two factors of the last product, beside their four parts
    if form == "w":
        # error, alpha, W | R, dW, beta, -beta
        return b * p + m * p + d * p, b * p + d * p + 2 * m * p + columns + m * d
    # error, W | R, V, dY, residual, -dY
    return b * p + d * p, b * p + d * p + 3 * m * p + columns + m * d
