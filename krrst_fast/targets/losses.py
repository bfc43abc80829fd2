"""Self-supervised losses of two views' embeddings, [B, P] each, row i of both from image i."""

import torch
import torch.nn.functional as F
from torch import Tensor


def barlow_twins(z1: Tensor, z2: Tensor, *, off_diagonal: float = 0.005) -> Tensor:
    """Compute the loss of Barlow Twins (arXiv 2103.03230) from the cross-correlation of two views.

    sum_i (1 - C_ii)^2 + off_diagonal * sum_{i != j} C_ij^2, with C = a^T b / B over the batch.
    """
    _check("barlow_twins", z1, z2)
    correlation = _standardised(z1).T @ _standardised(z2) / len(z1)  # [P, P]
    diagonal = correlation.diagonal()
    others = correlation.square().sum() - diagonal.square().sum()
    return (1 - diagonal).square().sum() + off_diagonal * others


def nt_xent(z1: Tensor, z2: Tensor, *, temperature: float = 0.5) -> Tensor:
    """Compute SimCLR's contrastive loss (arXiv 2002.05709) over 2B - 1 candidates.

    The mean over all 2B rows of -log softmax of cosine / temperature, a row itself left out.
    """
    _check("nt_xent", z1, z2)
    z = F.normalize(torch.cat([z1, z2]), dim=1)  # [2B, P]
    similarity = z @ z.T / temperature
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    partner = torch.arange(len(z), device=z.device).roll(len(z1))
    return F.cross_entropy(similarity.masked_fill(itself, -torch.inf), partner)


def vicreg(
    z1: Tensor,
    z2: Tensor,
    *,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
) -> Tensor:
    """Compute VICReg's variance, invariance and covariance terms (arXiv 2105.04906, algorithm 1).

    The invariance is the mean over all B * P entries, as in the algorithm: the weights 25, 25, 1
    belong to that convention (the paper's equation sums over the P dimensions).
    """
    _check("vicreg", z1, z2)
    loss = invariance * F.mse_loss(z1, z2)
    for z in (z1, z2):
        spread = torch.sqrt(z.var(dim=0) + 1e-4)
        centred = z - z.mean(dim=0)
        c = centred.T @ centred / (len(z) - 1)  # [P, P]
        others = c.square().sum() - c.diagonal().square().sum()
        loss = loss + variance * F.relu(1 - spread).mean() + covariance * others / z.shape[1]
    return loss


def _standardised(z: Tensor) -> Tensor:
    """Scale each column to mean 0 and variance 1 over the batch."""
    var, mean = torch.var_mean(z, dim=0, correction=0)
    return (z - mean) * torch.rsqrt(var + 1e-5)


def _check(name: str, z1: Tensor, z2: Tensor) -> None:
    if z1.dim() != 2 or z1.shape != z2.shape or len(z1) < 2:
        raise ValueError(
            f"{name}: z1 and z2 must both be [B, P] with B >= 2, "
            f"got {tuple(z1.shape)} and {tuple(z2.shape)}"
        )
