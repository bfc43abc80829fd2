"""Collapse diagnostics against a plain singular value decomposition and known cases."""

import math

import pytest
import torch

from krrst_fast.targets.diagnose import collapse_metrics


def _random(batch: int, dim: int) -> torch.Tensor:
    source = torch.Generator().manual_seed(0)
    return torch.randn(batch, dim, generator=source) + 3


@pytest.mark.parametrize("batch, dim", [(12, 5), (5, 12), (7, 7), (2, 1)])
def test_numbers_are_those_of_the_plain_formulas(batch, dim):
    x = _random(batch, dim).double()
    centred = x - x.mean(0)
    p = torch.linalg.svdvals(centred)
    p = (p / p.sum())[p > 1e-9 * p.sum()]
    rows = torch.stack([row / row.norm() for row in x]) * math.sqrt(dim)
    got = collapse_metrics(x)
    assert got["output_variance"] == pytest.approx((centred**2).sum().item() / batch / dim)
    assert got["embedding_std"] == pytest.approx(rows.std(0, correction=0).mean().item())
    expected = math.exp(-sum(v * math.log(v) for v in p.tolist()))
    assert got["effective_rank"] == pytest.approx(expected, rel=1e-5)


def test_a_collapsed_representation_shows():
    constant = torch.full((8, 4), 0.3)
    assert collapse_metrics(constant) == pytest.approx(
        {"output_variance": 0.0, "embedding_std": 0.0, "effective_rank": 0.0}, abs=1e-12
    )
    assert collapse_metrics(torch.zeros(8, 4))["effective_rank"] == 0.0
    line = torch.linspace(1, 2, 8)[:, None] * torch.tensor([[1.0, -2.0, 0.5, 1.0]])
    got = collapse_metrics(line)
    assert got["effective_rank"] == pytest.approx(1.0, abs=1e-5)
    assert got["embedding_std"] < 1e-6 and got["output_variance"] > 0.1


def test_a_healthy_representation_has_full_rank():
    orthogonal = torch.linalg.qr(_random(64, 16) - 3).Q
    orthogonal = orthogonal - orthogonal.mean(0)
    got = collapse_metrics(orthogonal * 10)
    assert got["effective_rank"] == pytest.approx(16, abs=0.1)
    assert got["embedding_std"] == pytest.approx(1.0, abs=0.1)
