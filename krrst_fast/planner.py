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
    [D, P] and never multiplies M x M by D; "primal" solves in D x D and is taken only when M > D,
    where it is also the more accurate.

    Raises:
        ValueError: a size is negative.
    """
    for name, size in (("m", m), ("b", b), ("d", d), ("p", p)):
        if size < 0:
            raise ValueError(f"plan: {name} must not be negative, got {size}")
    sizes = (m, b, d, p)
    flops: dict[Form, float] = {"k": _k(*sizes), "w": _w(*sizes), "primal": _primal(*sizes)}
    if m > d and flops["primal"] < min(flops["k"], flops["w"]):
        return Plan("primal", flops, f"M = {m} > D = {d}: the D x D system is the smaller one")
    if flops["w"] <= flops["k"]:
        ratio = flops["w"] / flops["k"] if flops["k"] else 1.0
        return Plan("w", flops, f"P = {p}: the skinny products cost {ratio:.2f} of form k")
    return Plan("k", flops, f"P = {p} is large: products with [D, P] cost more than K_rs [B, M]")


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
