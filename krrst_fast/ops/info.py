"""The record of how a call was computed."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SolveInfo:
    """A record of how a call was computed; `...` are the leading dimensions of the call.

    Attributes:
        form: Closed form, "k" | "w" | "primal"; "gram" where the Gram was given or is that of a
            non-linear kernel.
        backend: Implementation: "cpp", "triton" or "torch"; "tuned" for a mixture of the last two.
        ridge: The number that was added to the diagonal [...].
        retries: How often the ridge was multiplied by 10 after a failed factorisation [...] int64.
        pivot: 0, or the number, from 1, of the pivot that failed [...] int32. Always 0 for
            check="raise".
        factor: Lower Cholesky factor of the ridged system [..., M, M], or in primal form D (+ 1)
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
        """Whether the factorisation failed, so that the result is NaN [...] bool, on the device."""
        return self.pivot != 0

    @property
    def condition(self) -> Tensor:
        """Lower estimate of the 2-norm condition number of the system that was solved [...].

        Six steps of power iteration on the system and on its inverse, computed on access: the work
        of a dozen triangular solves with one right-hand side.
        """
        *batch, n, _ = self.factor.shape
        # In units of the largest pivot, whose square may lie outside of the range of numbers.
        largest = self.factor.diagonal(dim1=-2, dim2=-1).amax(-1) if n else self.ridge
        factor = self.factor / largest[..., None, None]
        number = torch.arange(1, n + 1, dtype=torch.float64, device=factor.device)
        # Not constant: centred features have no component along a constant vector.
        high = torch.sin(number.square()).to(factor)
        high = high[:, None].expand(*batch, n, 1)
        low = (1 + (number - 1) / max(n - 1, 1)).to(factor)[:, None]
        low = low.expand_as(high).clone()
        low[..., 1::2, :] *= -1
        largest = smallest = factor.new_ones((*batch, 1, 1))
        for _ in range(6 if n else 0):
            high, low = high / _norm(high), low / _norm(low)
            high = factor @ (factor.mT @ high)
            low = torch.cholesky_solve(low, factor)
            largest, smallest = _norm(high), 1 / _norm(low)
        return (largest / smallest).clamp(min=1)[..., 0, 0]


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
