"""The fit of ridges that were chosen from a path."""

from dataclasses import dataclass

import torch
from torch import Tensor

from krrst_fast.ops.autograd import product
from krrst_fast.ops.once import once
from krrst_fast.ops.problem import (
    batch_of,
    cast,
    check_matrices,
    finite,
    fold,
    restore,
    result_dtype,
)
from krrst_fast.precision import exact_arithmetic


@dataclass(frozen=True, eq=False)
class PathFit:
    """The fit of one ridge of a path, or of one for each target.

    Attributes:
        ridge: The ridges of the call [..., P].
        lam: The numbers added to the diagonal [..., P].
        alpha: Dual coefficients [..., M, P].
        intercept: [..., P].
    """

    ridge: Tensor
    lam: Tensor
    alpha: Tensor
    intercept: Tensor
    _scale: float | Tensor
    _solved: tuple[Tensor, Tensor] | None
    """Where M <= D the rows as they are solved [..., M, D], and their dual coefficients."""
    _weights: Tensor | None

    @once
    @torch.no_grad()
    def weights(self) -> Tensor:
        """Primal coefficients [..., D, P]; where M <= D made when they are asked for."""
        if self._weights is not None:
            return self._weights
        assert self._solved is not None
        rows, alpha = self._solved
        with exact_arithmetic(rows):
            return self._scale * (rows.mT @ alpha)

    def predict(self, f: Tensor) -> Tensor:
        """Predict [..., B, P] at features f [..., B, D], through the rows of the fit if M <= D.

        Differentiable in f.

        Raises:
            The errors of `KRRPath.predict`.
        """
        op = "PathFit.predict"
        basis = self._weights if self._solved is None else self._solved[0].mT
        assert basis is not None
        check_matrices(op, ("weights", "f"), (basis, f))
        if f.shape[-1] != basis.shape[-2]:
            need = f"f must be [..., B, {basis.shape[-2]}]"
            raise ValueError(f"{op}: {need}, got shape {tuple(f.shape)}")
        batch = batch_of(op, f=(f, 2), weights=(basis, 2))
        prediction = product(fold(cast(f, basis.dtype), batch, 2), fold(basis, batch, 2))
        if self._solved is not None:
            prediction = self._scale * product(prediction, fold(self._solved[1], batch, 2))
        prediction = prediction + fold(self.intercept[..., None, :], batch, 2)
        prediction = restore(prediction, batch, result_dtype(f))
        finite(op, prediction, f=f)
        return prediction
