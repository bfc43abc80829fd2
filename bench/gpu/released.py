"""The released formulation, as research code writes it: the baseline of all measurements."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from krrst_fast import reference
from krrst_fast.models import Network

RIDGE = 1e-6


def with_one(f: Tensor) -> Tensor:
    """Append a column of ones to features [N, D], which makes rows of odd length."""
    return torch.cat([f, torch.ones(len(f), 1, dtype=f.dtype, device=f.device)], dim=1)


def released_mse(
    f_syn: Tensor, y_syn: Tensor, f_real: Tensor, y_real: Tensor, *, eye: Tensor | None = None
) -> Tensor:
    """Compute the outer loss of KRR-ST: ones column, full Gram, LU, backward by autograd.

    Args:
        f_syn, y_syn, f_real, y_real: [M, D], [M, P], [B, D], [B, P].
        eye: The identity [M, M] on the device; made on the CPU and moved there if left out, as the
            authors do in every step.
    """
    syn, real = with_one(f_syn), with_one(f_real)
    k_ss = syn @ syn.T  # [M, M]
    if eye is None:
        eye = torch.eye(len(k_ss), dtype=k_ss.dtype).to(k_ss.device)
    ridge = RIDGE * torch.trace(k_ss).detach()
    alpha = torch.linalg.solve(k_ss + ridge * eye, y_syn)  # [M, P]
    k_rs = real @ syn.T  # [B, M]
    return ((k_rs @ alpha - y_real) ** 2).mean()


class ReleasedStep:
    """One outer step in plain PyTorch, on the device: the target runs at every step.

    Args:
        network: Network of the pool, in evaluation mode.
        target: Normalised images [B, C, H, W] -> [B, P].
        x_syn, y_syn: Initial synthetic set.
        lr: Rate of AdamW on the set.
        sgd: The settings of the network's own optimizer.
    """

    def __init__(
        self,
        network: Network,
        target: nn.Module,
        x_syn: Tensor,
        y_syn: Tensor,
        lr: float,
        sgd: Mapping[str, Any],
    ) -> None:
        self.network, self.target = network, target
        self.x_syn = x_syn.detach().clone().requires_grad_()
        self.y_syn = y_syn.detach().clone().requires_grad_()
        self.outer = torch.optim.AdamW([self.x_syn, self.y_syn], lr=lr, weight_decay=0.0)
        self.inner = torch.optim.SGD(network.parameters(), **sgd)

    def views(self, draw: Mapping[str, Any]) -> Tensor:
        """Crop, flip and normalise the images of a draw in plain tensor operations."""
        return reference.views(**draw)

    def fit(self) -> None:
        """Make one full-batch SGD step of the network on the synthetic set."""
        self.network.train().requires_grad_(True)
        self.inner.zero_grad()
        loss = nn.functional.mse_loss(self.network(self.x_syn.detach()), self.y_syn.detach())
        loss.backward()
        self.inner.step()
        self.network.eval().requires_grad_(False)
