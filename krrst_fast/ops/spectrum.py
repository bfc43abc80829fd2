"""One eigendecomposition of a problem, from which every ridge follows.

K_ss = V S V^T, and where M > D Phi^T Phi = V S V^T, in float64; `basis` is V [M, M] or Phi V.
For a ridge lam the dual coefficients are V (S + lam)^-1 V^T Y, the primal ones scale V (S + lam)^-1
(Phi V)^T Y. Letters: M rows, D features, P targets, N problems, R ridges, K eigenvalues.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from krrst_fast.errors import NotPositiveDefiniteError
from krrst_fast.ops.closed_forms import ridge_base
from krrst_fast.ops.in_place import add_gram_, mirror_
from krrst_fast.ops.problem import Problem, readable
from krrst_fast.ops.weights import constant_feature

_EPSILON = 2.0**-52
# Of the largest eigenvalue: what the smallest ones are wrong by.
_DECOMPOSED = 16 * _EPSILON
# In units of the rounding of results: what an eigenvalue may be beside a ridge to be nothing.
_SMALL = 8
# Numbers of a block of residuals. Larger ones leave the cache; smaller ones make thin products.
_BLOCK = 2**20


@dataclass(frozen=True, eq=False)
class Spectrum:
    """A decomposition with its ridges.

    Attributes:
        phi: Rows as they are solved: weighted, centred, with the constant feature [N?, M, D], in
            the precision of the inputs.
        y: Their targets [N?, M, P].
        scale: Factor of the inner products.
        primal: Whether Phi^T Phi was decomposed.
        values: [N?, K].
        vectors: V [N?, M, M] or [N?, D, D].
        basis: [N?, M, K].
        lam: The numbers added to the diagonal [R, N?].
        share: The part of each centred row in the mean [N?, M], if the rows were centred.
        some: The number of eigenvalues that are not nothing beside the smallest lam, if they are
            few: the others, as 1 / lam, need no eigenvectors. None where all are computed with.
        ridged: Whether there is a ridge. Without one the fit is least squares of minimum norm.
    """

    phi: Tensor
    y: Tensor
    scale: float | Tensor
    primal: bool
    values: Tensor
    vectors: Tensor
    basis: Tensor
    lam: Tensor
    share: Tensor | None
    ridged: bool
    some: int | None

    def shrunk(self, lam: Tensor) -> Tensor:
        """Return 1 / (S + lam) [..., K] for lam [...]."""
        return 1 / (self.values.clamp(min=0) + lam[..., None])

    def coefficients(self, lam: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return alpha [N?, M, P], or if primal W [N?, D, P], for a lam of each target [N?, P].

        Computed in float64, in blocks of targets; of a lam of 0 those of minimum norm.
        """
        *many, _, p = self.y.shape
        out = self.y.new_empty((*many, self.vectors.shape[-2], p), dtype=dtype)
        floor, basis = _floor(self.values)[..., None, None], self._leading(self.basis)
        vectors, values = self._leading(self.vectors), self._leading(self.values).clamp(min=0)
        for block in self._blocks():
            added, y = lam[..., None, block], self.y[..., block].double()
            total = values[..., None] + added
            # With a ridge of 0 what is rounding is left out: least squares of minimum norm.
            shrunk = torch.where(total > floor, 1 / total, 0)
            rotated = basis.mT @ y
            if self.some is not None:
                y = y - vectors @ rotated  # not in place: in float64 it is what was given
            shrunk *= rotated
            solved = vectors @ (shrunk.mul_(self.scale) if self.primal else shrunk)
            out[..., block] = solved if self.some is None else solved.add_(y.div_(added))
        return out

    def _leading(self, x: Tensor) -> Tensor:
        """Return the columns of x [N?, ., K] for the eigenvalues that are computed with."""
        return x if self.some is None else x[..., x.shape[-1] - self.some :]

    def duals(self, solved: Tensor, lam: Tensor) -> Tensor:
        """Return alpha [N?, M, P] from W [N?, D, P] as `coefficients` solves it in primal form."""
        if not self.ridged:
            inverse = torch.where(self.values > _floor(self.values)[..., None], 1 / self.values, 0)
            rotated = inverse.square()[..., None] * (self.basis.mT @ self.y.double())
            return self.scale * (self.basis @ rotated)
        return (self.y - self.phi.double() @ solved) / lam[..., None, :]

    def _blocks(self) -> list[slice]:
        """Return the targets in blocks."""
        *many, m, p = self.y.shape
        wide = max(1, _BLOCK // max(math.prod(many) * m, 1))
        return [slice(first, min(first + wide, p)) for first in range(0, p, wide)]

    def left_out(self, dtype: torch.dtype) -> Iterator[tuple[int, slice, Tensor]]:
        """Yield leave-one-out residuals of the rows as solved, block by block.

        Yields the number of the ridge, the targets of the block, and [N?, M, targets].
        """
        basis = self._leading(self.basis).to(dtype)
        m, blocks = self.y.shape[-2], self._blocks()
        *many, p = self.y.shape[:-2] + self.y.shape[-1:]
        rotated = basis.new_empty((*many, basis.shape[-1], p))
        rest = None if self.some is None else torch.empty_like(self.y, dtype=dtype)
        for block in blocks:
            y = self.y[..., block].to(dtype)
            rotated[..., block] = basis.mT @ y
            if rest is not None:
                rest[..., block] = y - basis @ rotated[..., block]
        for number, lam in enumerate(self.lam):
            shrunk, own = self._leading(self.shrunk(lam)), self._own(lam)
            # The diagonal of the inverse has the unit of 1 / lam, and is never rounding.
            plain = not self.primal and self.share is None
            nothing = own <= (0.0 if plain else m * _EPSILON)
            divided = torch.where(nothing, math.inf, 1 / own)[..., None]
            by_row = self.scale * divided if self.primal else divided * self._factor(lam)
            left = basis * by_row.to(dtype)
            for block in blocks:
                found = left @ (shrunk.to(dtype)[..., None] * rotated[..., block])
                if rest is not None:
                    of_rest = (by_row / lam[..., None, None]).to(dtype)
                    found.addcmul_(of_rest, rest[..., block])
                if self.primal:
                    found = divided.to(dtype) * self.y[..., block].to(dtype) - found
                yield number, block, found.masked_fill_(nothing[..., None], math.inf)

    def _factor(self, lam: Tensor) -> Tensor | float:
        """Return what turns dual coefficients into the residuals that `_own` divides."""
        return 1.0 if self.share is None else lam[..., None, None]

    def _own(self, lam: Tensor) -> Tensor:
        """Return 1 - h_i [N?, M], the part of a residual that stays; in dual form over lam."""
        own = (self.basis.square() @ self.shrunk(lam)[..., None])[..., 0]
        if self.primal:
            own = 1 - self.scale * own
            return own if self.share is None else own - self.share
        return own if self.share is None else lam[..., None] * own - self.share


def spectrum_of(
    problem: Problem, ridges: Tensor, share: Tensor | None, ridged: bool = True
) -> Spectrum:
    """Decompose a problem in float64 for ridges [R], or without a ridge for one that is 0.

    Raises:
        NotPositiveDefiniteError: A ridge is below the rounding of the decomposition.
    """
    phi, y, scale = problem.f_syn, problem.y_syn, problem.scale
    if problem.has_bias:
        column = constant_feature(scale, problem.bias) * phi.new_ones((*phi.shape[:-1], 1))
        phi = torch.cat((phi, column), -1)
    *_, m, d = phi.shape
    primal = m > d
    gram = _gram(phi.mT if primal else phi, scale)
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)  # [N?]
    base = ridge_base(problem.ridge_of, trace, m)
    ridge = problem.ridge
    ridge = ridge.double() if isinstance(ridge, Tensor) else ridge
    lam = ridges.reshape(-1, *[1] * trace.ndim) * (ridge * base)  # [R, N?]
    values, vectors = torch.linalg.eigh(gram)
    if ridged:
        _above_rounding(values, lam)
    basis = phi.double() @ vectors if primal else vectors
    some = None if primal or not ridged else _some(values, lam, torch.finfo(y.dtype).eps)
    return Spectrum(phi, y, scale, primal, values, vectors, basis, lam, share, ridged, some)


def _some(values: Tensor, lam: Tensor, rounding: float) -> int | None:
    """Return how many eigenvalues [N?, K] matter beside lam [R, N?], if it is less than half."""
    if not readable(values) or not values.numel() or not lam.numel():
        return None
    # Below the second of these an eigenvalue is the rounding of the decomposition.
    least = torch.maximum(_SMALL * rounding * lam.amin(0), _DECOMPOSED * values.amax(-1))
    matter = int((values > least[..., None]).sum(-1).amax())
    return matter if 2 * matter < values.shape[-1] else None


def _gram(x: Tensor, scale: float | Tensor) -> Tensor:
    """Compute scale x x^T [N?, I, I] in float64, of x [N?, I, J] in blocks of columns."""
    total = x.new_zeros((*x.shape[:-1], x.shape[-2]), dtype=torch.float64)
    wide = max(1, _BLOCK // max(math.prod(x.shape[:-1]), 1))
    for first in range(0, x.shape[-1], wide):
        block = x[..., first : first + wide].double()
        if x.ndim == 2 and readable(x):
            add_gram_(total, block)
        else:
            total = (total.addmm_ if x.ndim == 2 else total.baddbmm_)(block, block.mT)
    return (mirror_(total) if x.ndim == 2 and readable(x) else total).mul_(scale)


def _floor(values: Tensor) -> Tensor:
    """Return the rounding of eigenvalues [N?, K]; 0 where there are none."""
    if values.shape[-1] == 0:
        return values.sum(-1)
    return values.shape[-1] * _EPSILON * values[..., -1:].clamp(min=0).amax(-1)


def _above_rounding(values: Tensor, lam: Tensor) -> None:
    """Raise for a ridge below the rounding of the decomposition, which regularises nothing."""
    floor = _floor(values)  # [N?]
    if readable(lam) and not (lam > floor).all():
        raise NotPositiveDefiniteError(
            f"krr_path: a ridge of {lam.min().item():.3g} is below the rounding of the gram "
            f"({floor.max().item():.3g}): the features are zero, or the ridge is too small"
        )
