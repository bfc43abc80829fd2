"""ridge_solve: the values, the gradients, the ridge, the errors."""

import pytest
import torch

from krrst_fast import NonFiniteError, NotPositiveDefiniteError, reference, ridge_solve
from tests.helpers import assert_equal, features, loss_and_gradients


@pytest.mark.parametrize("ridge_of", ["trace", "mean_diagonal", "absolute"])
@pytest.mark.parametrize("m,p", [(1, 1), (2, 5), (31, 3), (300, 7)])
def test_equals_the_reference(m: int, p: int, ridge_of: str) -> None:
    generator = torch.Generator().manual_seed(0)
    f = features(m, m + 3, 1e4, generator)
    k, y = f @ f.mT, torch.randn(m, p, dtype=torch.float64, generator=generator)
    weight = torch.randn(m, p, dtype=torch.float64, generator=generator)
    ridge = torch.tensor(1e-3, dtype=torch.float64)

    def loss(solve):
        # Through a symmetric k, as every gram is: the gradient to k is taken to be symmetric.
        return lambda f, y, ridge: (weight * solve(f @ f.mT, y, ridge)).sum()

    got = loss_and_gradients(
        loss(lambda k, y, r: ridge_solve(k, y, ridge=r, ridge_of=ridge_of)), [f, y, ridge]
    )
    exact = loss_and_gradients(
        loss(lambda k, y, r: reference.ridge_solve(k, y, r, ridge_of)), [f, y, ridge]
    )
    for a, b in zip(got, exact):
        assert_equal(a, b, 1e-9)
    assert_equal(
        k @ ridge_solve(k, y, ridge=0.5, ridge_of="absolute"),
        y - 0.5 * ridge_solve(k, y, ridge=0.5, ridge_of="absolute"),
        1e-10,
    )


def test_nothing_to_solve() -> None:
    assert ridge_solve(torch.ones(0, 0), torch.ones(0, 3)).shape == (0, 3)
    assert ridge_solve(torch.eye(3), torch.ones(3, 0)).shape == (3, 0)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"ridge_solve: k must be square, got shape \(2, 3\)"):
        ridge_solve(torch.ones(2, 3), torch.ones(2, 1))
    with pytest.raises(ValueError, match="ridge_solve: k and y .* rows"):
        ridge_solve(torch.eye(2), torch.ones(3, 1))
    with pytest.raises(NotPositiveDefiniteError, match="ridge 3 times"):
        ridge_solve(-torch.eye(3), torch.ones(3, 1), ridge=1e-9, ridge_of="absolute")
    with pytest.raises(NonFiniteError, match="the ridge is nan"):
        ridge_solve(torch.full((2, 2), float("nan")), torch.ones(2, 1))
    with pytest.raises(NonFiniteError, match="y holds NaN"):
        ridge_solve(torch.eye(2), torch.full((2, 1), float("nan")))
