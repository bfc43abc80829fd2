"""How a call was computed."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SolveInfo:
    """How a call was computed; `...` are the leading dimensions of the call.

    Attributes:
        form: the closed form, "k" | "w" | "primal"; "gram" where the Gram was given.
        backend: who computed.
        ridge: the number that was added to the diagonal [...].
        retries: how many times the ridge was raised by 10 because there was no factor [...] int64.
        pivot: 0, or the number, from 1, of the pivot that failed [...] int32. Under check="raise"
            always 0.
        factor: lower Cholesky factor of the ridged system [..., M, M], or in primal form D (+ 1)
            square.
    """

    form: str
    backend: str
    ridge: Tensor
    retries: Tensor
    pivot: Tensor
    factor: Tensor

    @property
    def failed(self) -> Tensor:
        """Whether there was no factor, and so the result is NaN [...] bool, on the device."""
        return self.pivot != 0

    @property
    def condition(self) -> Tensor:
        """Estimate from below of the 2-norm condition number of the system that was solved [...].

        Six steps of power iteration on the system and on its inverse: the work of a dozen
        triangular solves with one right-hand side, done when asked for.
        """
        *batch, n, _ = self.factor.shape
        # No direction that centred features have nothing in.
        high = torch.sin(torch.arange(1, n + 1, device=self.factor.device) ** 2).to(self.factor)
        high = high[:, None].expand(*batch, n, 1)
        low = torch.linspace(1, 2, n, device=self.factor.device).to(self.factor)[:, None]
        low = low.expand_as(high).clone()
        low[..., 1::2, :] *= -1
        largest = smallest = self.factor.new_ones((*batch, 1, 1))
        for _ in range(6 if n else 0):
            high, low = high / _norm(high), low / _norm(low)
            high = self.factor @ (self.factor.mT @ high)
            low = torch.cholesky_solve(low, self.factor)
            largest, smallest = _norm(high), 1 / _norm(low)
        return (largest / smallest).clamp(min=1)[..., 0, 0]


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
