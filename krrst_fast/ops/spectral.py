"""A system that is solved for a ridge of each target, or without a ridge, by its eigenvalues."""

import torch
from torch import Tensor

from krrst_fast.errors import NotPositiveDefiniteError
from krrst_fast.ops.in_place import mirror_

_EPSILON = 2.0**-52


def solve_targets(
    op: str, gram: Tensor, right: Tensor, lam: Tensor, rooted: bool = False
) -> Tensor:
    """Solve (gram + lam[p] I) x[:, p] = right[:, p] in float64; of a lam of 0 by minimum norm.

    Args:
        op: The name in errors.
        gram: Its lower triangle [N, N], which is overwritten.
        right: [N, P].
        lam: [] or [P], zero or more.
        rooted: Gram and right are R [K, N] and z [K, P], of the system R^T R, R^T z.

    Returns:
        x [N, P] in the dtype of right. Eigenvalues that are rounding count as 0.

    Raises:
        NotPositiveDefiniteError: A positive lam is below the rounding of the eigenvalues.
    """
    if rooted:
        left, roots, across = torch.linalg.svd(gram.double(), full_matrices=False)
        values, vectors = roots.square(), across.mT
        rotated = roots[:, None] * (left.mT @ right.double())
    else:
        values, vectors = torch.linalg.eigh(mirror_(gram.double()))
        values = values.clamp(min=0)
        rotated = vectors.mT @ right.double()
    if not len(values):
        return torch.zeros_like(right)
    floor = gram.shape[-1] * _EPSILON * values.max()
    if not rooted and ((lam > 0) & (lam <= floor)).any():
        raise NotPositiveDefiniteError(
            f"{op}: a ridge of {lam.min().item():.3g} is below the rounding of the gram "
            f"({floor.item():.3g}); pass a larger one"
        )
    total = values[:, None] + lam.double()
    shrunk = torch.where((total > floor) | (lam > 0), 1 / total, 0)
    return (vectors @ rotated.mul_(shrunk)).to(right.dtype)
