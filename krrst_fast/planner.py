"""Which closed form a call takes: counted work, no measurement, no state."""

from dataclasses import dataclass
from typing import Literal

Form = Literal["k", "w", "primal"]
FORMS: tuple[Form, ...] = ("k", "w", "primal")


@dataclass(frozen=True)
class Plan:
    """The form that is chosen for a shape, and what each form would cost.

    Attributes:
        form: "k" | "w" | "primal".
        flops: floating-point operations of forward + backward, by form.
        reason: one sentence.
    """

    form: Form
    flops: dict[Form, float]
    reason: str


def plan(*, m: int, b: int, d: int, p: int) -> Plan:
    """Choose the closed form for M synthetic and B real images, D features and P target features.

    Counted are one forward pass and the gradients to `f_syn` and `y_syn`; a Gram counts half of the
    full product, a multiply-add counts two. "k" keeps K_rs [B, M]; "w" goes through W = F_s^T alpha
    [D, P] and never multiplies M x M by D; "primal" solves in D x D and is taken only when M > D.

    Raises:
        ValueError: a size is negative.
    """
    for name, size in (("m", m), ("b", b), ("d", d), ("p", p)):
        if size < 0:
            raise ValueError(f"plan: {name} must not be negative, got {size}")
    flops = _flops(m, b, d, p)
    form = cheapest(m, b, d, p)
    reasons: dict[Form, str] = {
        "primal": f"M = {m} > D = {d}: the D x D system is the smaller one",
        "w": f"P = {p}: products with W [D, P] cost less than K_rs [B, M]",
        "k": f"P = {p} is large: products with W [D, P] cost more than K_rs [B, M]",
    }
    return Plan(form, flops, reasons[form])


def cheapest(m: int, b: int, d: int, p: int) -> Form:
    """The form `plan` chooses, by comparisons alone: the sizes may be symbolic."""
    if m == 0 or d == 0:
        return "w"  # nothing to solve, or nothing to solve it with
    flops = _flops(m, b, d, p)
    if m > d and flops["primal"] < flops["k"] and flops["primal"] < flops["w"]:
        return "primal"
    return "w" if flops["w"] <= flops["k"] else "k"


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
