"""Outputs of mean 0 and variance 1, by the weights of the head."""

import torch
from torch import Tensor, nn

_DEAD = 1e-4
"""An output that spreads less than this part of the widest is left as narrow as it is."""


@torch.no_grad()
def standardize_head(head: nn.Linear, outputs: Tensor) -> None:
    """Change `head` in place so that `outputs` [N, P], which it gave, would be standardised.

    An output that is constant over the images is shifted and not scaled: it would be noise.
    """
    variance, mean = torch.var_mean(outputs.cpu().double(), dim=0, correction=0)
    std = variance.sqrt()
    std = torch.where(std > _DEAD * std.max(), std, 1.0).to(head.weight)
    head.weight.div_(std[:, None])
    head.bias.sub_(mean.to(head.bias)).div_(std)
