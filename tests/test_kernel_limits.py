"""What kernels must hold in: near rows, many problems, fits that are kept, and bounded memory."""

import copy
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, vmap

from krrst_fast import Kernel, Solver, krr_fit, krr_mse, krr_predict
from krrst_fast.ops import kernel_blocks
from krrst_fast.reference.kernels import OF_PRODUCTS
from tests.helpers import assert_equal
from tests.test_kernel_krr import evaluate, loss, problem

sys.path.append(str(Path(__file__).resolve().parent.parent))
peak_bytes = import_module("bench.common").peak_bytes


@pytest.mark.parametrize("offset", [100.0, 1e4])
def test_clusters_far_from_each_other(offset: float) -> None:
    """In float32, by every way to a first derivative: near rows of far clusters keep digits."""
    tensors = problem(20, 6, 12, 2)
    for f in (tensors[0], tensors[2]):
        f[::2] += offset
    tensors = [x.float() for x in tensors]

    def compute(*given: Tensor) -> Tensor:
        return krr_mse(*given, kernel=Kernel("rbf", gamma=0.1), ridge=0.1, ridge_of="absolute")

    exact = evaluate(compute, [x.double() for x in tensors], torch.float64)
    leaves = [x.clone().requires_grad_() for x in tensors]
    value = compute(*leaves)
    one = torch.ones(2, dtype=value.dtype)
    ways = {
        "backward": torch.autograd.grad(value, leaves, retain_graph=True),
        "batched": [
            x[1] for x in torch.autograd.grad(value, leaves, one, True, is_grads_batched=True)
        ],
        "again": torch.autograd.grad(compute(*leaves), leaves, create_graph=True),
        "grad": grad(compute, argnums=(0, 1, 2, 3))(*tensors),
    }
    for way, found in ways.items():
        for a, b in zip(found, exact[1:], strict=True):
            assert_equal(a.detach().double() / b.norm(), b / b.norm(), 3e-6, way)


def test_many_problems_are_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_blocks, "_BLOCK", 300)
    tensors = [torch.stack(x) for x in zip(*(problem(12, 3, 20, 2, seed=s) for s in range(7)))]
    gammas = torch.linspace(0.1, 1, 7).double()
    for name in OF_PRODUCTS:
        together = evaluate(lambda *t: loss(name)(*t).sum(), [*tensors, gammas], torch.float64)  # noqa: B023
        for i in range(7):
            alone = [x[i] for x in (*tensors, gammas)]
            for a, b in zip(together[1:], evaluate(loss(name), alone, torch.float64)[1:]):
                assert_equal(a[i], b, 1e-12, name)


def test_a_fit_keeps_no_graph_and_nothing_of_a_transform() -> None:
    f_syn, y_syn, f_real, _ = problem(6, 4, 5, 2)
    scale = torch.ones(4, dtype=torch.float64, requires_grad=True)
    gamma = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    fit = krr_fit(f_syn * scale, y_syn, kernel=Kernel("rbf", gamma=2 * gamma))
    assert torch.equal(copy.deepcopy(fit).predict(f_real), fit.predict(f_real))
    for number in ("gamma", "ridge"):
        with pytest.raises(RuntimeError, match="krr_fit: keeps what it fits"):
            vmap(lambda x: krr_fit(f_syn, y_syn, **_with(number, x)).alpha)(torch.ones(3))  # noqa: B023


def _with(number: str, x: Tensor) -> dict[str, Any]:
    return (
        {"kernel": Kernel("rbf", gamma=x)} if number == "gamma" else {"ridge": x, "kernel": "rbf"}
    )


def test_an_infinite_row_is_no_number_where_nothing_is_raised() -> None:
    f_syn, y_syn, f_real, y_real = problem(6, 4, 5, 2)
    f_real[2, 1] = float("inf")
    solver = Solver(check="flag")
    prediction = krr_predict(f_syn, y_syn, f_real, kernel="rbf", solver=solver)
    fit = krr_fit(f_syn, y_syn, kernel="rbf", solver=solver)
    for found in (prediction, fit.predict(f_real)):
        assert found[2].isnan().all() and found[[0, 1, 3, 4]].isfinite().all()
    assert krr_mse(f_syn, y_syn, f_real, y_real, kernel="rbf", solver=solver).isnan()


def test_the_matrix_of_all_rows_is_never_made() -> None:
    m, b, d = 400, 80_000, 8
    tensors = [x.float().requires_grad_() for x in problem(m, d, b, 2)]

    def both() -> None:
        torch.autograd.grad(krr_mse(*tensors, kernel="rbf", ridge=1e-3), tensors)

    both()
    assert peak_bytes(both) < b * m * 4 / 2


@pytest.mark.parametrize("name", OF_PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_without_values(name: str, dtype: torch.dtype) -> None:
    """Of float32 the backward pass counts near rows: not those of fake tensors."""
    shapes = (7, 5), (7, 3), (9, 5), (9, 3)
    with FakeTensorMode():
        fake = [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]
        krr_mse(*fake, kernel=name, solver=Solver(check="flag")).backward()
    meta = [torch.randn(s, dtype=dtype, device="meta", requires_grad=True) for s in shapes]
    krr_mse(*meta, kernel=name, solver=Solver(check="flag")).backward()
    assert all(x.grad is not None and x.grad.shape == x.shape for x in (*fake, *meta))


@pytest.mark.parametrize("name", OF_PRODUCTS)
def test_a_gradient_to_the_targets_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_blocks, "_BLOCK", 150)
    for d in (3, 60):  # products that are not kept, and kept ones
        tensors = [*problem(20, d, 30, 2), torch.tensor(0.3).double()]
        every = evaluate(loss(name), tensors, torch.float64)
        f_syn, y_syn, *rest = tensors
        leaf = y_syn.clone().requires_grad_()
        (alone,) = torch.autograd.grad(loss(name)(f_syn, leaf, *rest), leaf)
        assert_equal(alone, every[2], 1e-12)
