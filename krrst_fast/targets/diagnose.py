"""Has a representation collapsed? Numbers that say whether a target is worth distilling."""

import torch
from torch import Tensor

from krrst_fast.runs.environment import solving_device


def collapse_metrics(outputs: Tensor) -> dict[str, float]:
    """Measure the spread of a batch of representations [B, P], B >= 2.

    Returns:
        output_variance: Mean over the dimensions of the variance over the batch: the loss that
            predicting the mean would have, which a distillation loss is to be read against.
        embedding_std: Mean over the dimensions of the standard deviation of the rows scaled to
            length sqrt(P): near 1 when directions differ, near 0 when all rows agree.
        effective_rank: Exp of the entropy of the normalised singular values of the centred batch:
            between 0 (every row the same) and min(B - 1, P).
    """
    x = outputs.detach().to(solving_device(outputs.device)).double()
    centred = x - x.mean(dim=0)
    directions = x * (x.shape[1] ** 0.5 / x.norm(dim=1, keepdim=True).clamp(min=1e-12))
    # The smaller of the two Grams has the squares of the singular values.
    gram = centred @ centred.T if len(x) <= x.shape[1] else centred.T @ centred
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    total = float(singular.sum())
    # A constant batch is centred to rounding errors, which have a rank of their own.
    constant = float(centred.norm()) <= 1e-12 * float(x.norm())
    p = singular / max(total, 1e-300)
    return {
        "output_variance": float(centred.square().mean()),
        "embedding_std": float(directions.std(dim=0, correction=0).mean()),
        "effective_rank": 0.0 if constant else float(torch.special.entr(p).sum().exp()),
    }
