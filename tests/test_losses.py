"""Self-supervised losses against slow loops written from the papers' formulas, in float64."""

import math

import pytest
import torch

from krrst_fast.targets.losses import barlow_twins, nt_xent, vicreg

LOSSES = [barlow_twins, nt_xent, vicreg]


def _views(batch: int = 5, dim: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    z = torch.randn(2, batch, dim, generator=source, dtype=torch.float64)
    return 2 * z[0] + 1, z[1] - z[0]


def _slow_barlow_twins(z1, z2, off_diagonal):
    """Equations 1 and 2 of arXiv 2103.03230, with the code's batch norm (epsilon 1e-5) before."""
    batch, dim = z1.shape

    def standard(z, b, i):
        column = [float(z[k, i]) for k in range(batch)]
        mean = sum(column) / batch
        variance = sum((v - mean) ** 2 for v in column) / batch
        return (column[b] - mean) / math.sqrt(variance + 1e-5)

    loss = 0.0
    for i in range(dim):
        for j in range(dim):
            c = sum(standard(z1, b, i) * standard(z2, b, j) for b in range(batch)) / batch
            loss += (1 - c) ** 2 if i == j else off_diagonal * c**2
    return loss


def _slow_nt_xent(z1, z2, temperature):
    """Equation 1 of arXiv 2002.05709, averaged over both directions of all pairs."""
    rows = [row.tolist() for row in torch.cat([z1, z2])]
    batch = len(z1)

    def similarity(a, b):
        dot = sum(x * y for x, y in zip(a, b))
        return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))

    loss = 0.0
    for i, row in enumerate(rows):
        others = [math.exp(similarity(row, r) / temperature) for k, r in enumerate(rows) if k != i]
        positive = math.exp(similarity(row, rows[(i + batch) % (2 * batch)]) / temperature)
        loss -= math.log(positive / sum(others))
    return loss / (2 * batch)


def _slow_vicreg(z1, z2, invariance, variance, covariance):
    """Algorithm 1 of arXiv 2105.04906."""
    batch, dim = z1.shape
    loss = 0.0
    for b in range(batch):
        for i in range(dim):
            loss += invariance * float(z1[b, i] - z2[b, i]) ** 2 / (batch * dim)
    for z in (z1.tolist(), z2.tolist()):
        mean = [sum(row[i] for row in z) / batch for i in range(dim)]
        for i in range(dim):
            for j in range(dim):
                products = [(row[i] - mean[i]) * (row[j] - mean[j]) for row in z]
                c = sum(products) / (batch - 1)
                if i == j:
                    loss += variance * max(0.0, 1 - math.sqrt(c + 1e-4)) / dim
                else:
                    loss += covariance * c**2 / dim
    return loss


@pytest.mark.parametrize("batch, dim", [(5, 4), (2, 7), (11, 1)])
def test_losses_are_those_of_the_papers(batch, dim):
    z1, z2 = _views(batch, dim)
    for ours, slow in [
        (barlow_twins(z1, z2), _slow_barlow_twins(z1, z2, 0.005)),
        (barlow_twins(z1, z2, off_diagonal=0.3), _slow_barlow_twins(z1, z2, 0.3)),
        (nt_xent(z1, z2), _slow_nt_xent(z1, z2, 0.5)),
        (nt_xent(z1, z2, temperature=0.1), _slow_nt_xent(z1, z2, 0.1)),
        (vicreg(z1, z2), _slow_vicreg(z1, z2, 25, 25, 1)),
        (
            vicreg(0.3 * z1, z2, invariance=2, variance=3, covariance=5),
            _slow_vicreg(0.3 * z1, z2, 2, 3, 5),
        ),
    ]:
        assert ours.item() == pytest.approx(slow, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients(loss):
    z1, z2 = (z.requires_grad_() for z in _views())
    assert torch.autograd.gradcheck(loss, (z1, z2))


@pytest.mark.parametrize("loss", LOSSES)
def test_float32_is_as_good_as_float32_can_be(loss):
    z1, z2 = _views(64, 16)
    assert loss(z1.float(), z2.float()).item() == pytest.approx(loss(z1, z2).item(), rel=1e-5)


def test_perfect_representations_have_the_least_loss():
    """Orthonormal columns of mean zero: identity correlation, no variance or covariance term."""
    signs = torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
    assert barlow_twins(signs, signs).item() < 1e-8
    assert vicreg(signs, signs).item() == 0.0


@pytest.mark.parametrize("loss", LOSSES)
def test_a_collapsed_batch_has_a_finite_loss_and_gradient(loss):
    z = torch.ones(4, 3, requires_grad=True)
    value = loss(z, z)
    value.backward()
    assert value.isfinite() and z.grad.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_shapes_that_are_no_two_views_are_refused(loss):
    name = loss.__name__
    with pytest.raises(ValueError, match=rf"{name}: z1 and z2 must both be \[B, P\]"):
        loss(torch.zeros(4, 3), torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"got \(4,\) and \(4,\)"):
        loss(torch.zeros(4), torch.zeros(4))
    with pytest.raises(ValueError, match="with B >= 2"):
        loss(torch.zeros(1, 3), torch.zeros(1, 3))
