"""Solves by blocks against triangular solves."""

import pytest
import torch

from krrst_fast import triangular


@pytest.mark.parametrize("batch", [(), (3,), (0,)], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 5, 63, 64, 65, 128, 200, 512, 513, 1100])
def test_solve_twice(rows: int, batch: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(*batch, rows, rows + 9, dtype=torch.float64, generator=generator)
    system = x @ x.mT + rows * torch.eye(rows, dtype=torch.float64)
    factor = torch.linalg.cholesky(system)
    y = torch.randn(*batch, rows, 3, dtype=torch.float64, generator=generator)
    inverse = triangular.inverses(factor)
    assert inverse.shape == (*batch, *triangular.inverse_shape(rows, False))
    for stored in (factor, factor.mT.contiguous().mT):
        before = y.clone()
        got = triangular.solve_twice(y, stored, inverse)
        torch.testing.assert_close(system @ got, y, rtol=0, atol=1e-10)
        assert torch.equal(y, before)


@pytest.mark.parametrize(
    "rows,whole,shape", [(600, True, (1, 600, 600)), (600, False, (2, 512, 512))]
)
def test_inverse_shape(rows: int, whole: bool, shape: tuple[int, int, int]) -> None:
    assert triangular.inverse_shape(rows, whole) == shape


def test_the_error_is_that_of_substitution() -> None:
    """In float32, over draws with condition numbers of 1e6: at most twice as large."""
    errors = []
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        q = torch.linalg.qr(torch.randn(700, 700, dtype=torch.float64, generator=generator))[0]
        system = (q * torch.logspace(0, -6, 700, dtype=torch.float64)) @ q.mT
        factor = torch.linalg.cholesky(system).float()
        y = torch.randn(700, 8, generator=generator)
        exact = torch.cholesky_solve(y.double(), factor.double())
        ours = triangular.solve_twice(y, factor, triangular.inverses(factor))
        plain = torch.cholesky_solve(y, factor)
        errors.append([float((x - exact).norm() / exact.norm()) for x in (ours, plain)])
    mine, usual = torch.tensor(errors).median(0).values
    assert mine <= 2 * usual, errors
