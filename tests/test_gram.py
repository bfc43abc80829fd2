"""gram: the values, the symmetry, the gradient, the errors."""

import pytest
import torch

from krrst_fast import NonFiniteError, Solver, gram, reference
from tests.helpers import (
    BACKEND_NAMES,
    assert_equal,
    assert_within,
    features,
    loss_and_gradients,
    more_than_twice,
    rounding_of_sums,
)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("n,d", [(0, 3), (3, 0), (1, 1), (13, 7), (49, 130), (101, 61)])
def test_equals_the_reference(n: int, d: int, backend: str) -> None:
    x = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for layout in (x, x.mT, x.mT.contiguous().mT, x[::2, ::3]):
        got = gram(layout, scale=2.0, bias=0.25, solver=Solver(backend=backend))
        assert_equal(got, reference.gram(layout, 2.0, 0.25), 1e-13)
        if backend == "cpp" and len(got) >= 48:
            assert torch.equal(got, got.mT)


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_float32_is_at_most_twice_as_wrong_as_torch(backend: str) -> None:
    errors, plain = [], []
    for seed in range(8):
        x = features(150, 700, 1e4, torch.Generator().manual_seed(seed)).float()
        k = x.double() @ x.double().mT
        got = gram(x, solver=Solver(backend=backend))
        assert_within(got, k, rounding_of_sums(x, x.mT, torch.float32))
        for found, one in ((errors, got), (plain, reference.gram(x, 1.0, 0.0))):
            found.append((one.double() - k).norm() / k.norm())
    found = more_than_twice(torch.stack(errors)[:, None], torch.stack(plain)[:, None], 2.0**-24)
    assert not found, found


@pytest.mark.parametrize("backend", BACKEND_NAMES)
def test_gradient(backend: str) -> None:
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: gram(x, scale=1.5, bias=1.0, solver=Solver(backend=backend)), x
    )
    weight = torch.randn(6, 6, dtype=torch.float64)  # a gradient that is not symmetric
    got = loss_and_gradients(
        lambda x: (weight * gram(x, solver=Solver(backend=backend))).sum(), [x.detach()]
    )
    exact = loss_and_gradients(lambda x: (weight * (x @ x.mT)).sum(), [x.detach()])
    assert_equal(got[1], exact[1], 1e-12)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"gram: x must be a matrix or a batch .* shape \(3,\)"):
        gram(torch.ones(3))
    with pytest.raises(NonFiniteError, match="gram: x holds NaN or infinity, first in row 1"):
        gram(torch.tensor([[0.0], [float("inf")]]))
    with pytest.raises(TypeError, match="gram: x must be float32, .* got torch.bool"):
        gram(torch.ones(2, 3).bool())
    with pytest.raises(ValueError, match="gram: scale must be positive"):
        gram(torch.ones(2, 3), scale=float("inf"))
