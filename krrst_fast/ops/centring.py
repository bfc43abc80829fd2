"""A constant that the ridge does not penalise: features and targets without their means."""

from typing import NamedTuple

import torch
from torch import Tensor

from krrst_fast.ops.problem import Problem, fold


class Means(NamedTuple):
    """Weighted means over the rows.

    Attributes:
        f, y: [N?, 1, D], [N?, 1, P].
        share: The share of each row in them [N?, M]: the diagonal of the fit of the constant.
    """

    f: Tensor
    y: Tensor
    share: Tensor

    def intercept(self, weights: Tensor) -> Tensor:
        """Return what is added to f W [..., P], for weights W [..., D, P] of centred rows.

        In float64, which no switch of torch rounds.
        """
        constant = self.y.double() - self.f.double() @ weights.double()
        return constant[..., 0, :].to(weights.dtype)


def check_intercept(op: str, intercept: bool, bias: float) -> None:
    """Check that a constant is not asked for twice."""
    if not isinstance(intercept, bool):
        raise TypeError(f"{op}: intercept must be True or False, got {intercept!r}")
    if intercept and bias != 0:
        raise ValueError(
            f"{op}: bias must be 0 with intercept=True, which is a constant without a penalty, "
            f"got {bias}"
        )


def centred(
    problem: Problem, weights: Tensor | None, batch: tuple[int, ...]
) -> tuple[Problem, Means]:
    """Return the problem less its means; row weights [..., M] are still to be applied."""
    f, y = problem.f_syn, problem.y_syn
    share = f.new_full(f.shape[:-1], 1 / f.shape[-2], dtype=torch.float64)
    if weights is not None:
        row = fold(weights.double(), batch, 1)
        share = row / row.sum(-1, keepdim=True)
    by_row = share[..., None, :]
    means = Means((by_row @ f.double()).to(f.dtype), (by_row @ y.double()).to(y.dtype), share)
    return problem._replace(f_syn=f - means.f, y_syn=y - means.y), means
