"""Every backend has the functions of the reference, and a backend that refuses says why."""

import inspect
from types import ModuleType

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from krrst_fast import (
    Solver,
    backends,
    krr_fit,
    krr_mse,
    operators,
    reference,
    ridge_solve,
)
from krrst_fast.backends import cpp, traced, triton, tuned
from krrst_fast.backends import torch as torch_backend
from krrst_fast.cholesky import CPP, CUDA_METHODS, FLOAT64_UP_TO, LAPACK
from tests.helpers import problem

MODULES = (cpp, torch_backend, traced, triton, tuned)


def names(function: object) -> list[str]:
    """Return the names of the required parameters."""
    parameters = inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    return [p.name for p in parameters if p.default is p.empty]


@pytest.mark.parametrize("backend", MODULES, ids=lambda module: module.__name__)
def test_the_functions_are_those_of_the_reference(backend: ModuleType) -> None:
    for name in ("gram", "predicted_residual_mse", "closing_matmul"):
        assert names(getattr(backend, name)) == names(getattr(reference, name)), name
    assert names(backend.matmul) == ["a", "b"] == names(reference.thin_matmul)
    assert names(backend.refuses) == ["x"]
    assert names(backend.cholesky_method) == ["k", "columns"]
    assert names(backend.as_operands) == ["f_syn", "f_real"]
    assert isinstance(backend.NAME, str)


def test_the_names_are_those_of_a_solver() -> None:
    for name in backends.BACKENDS:
        assert Solver(backend=name).backend == name  # type: ignore[arg-type]
    assert Solver().backend == "auto"


@pytest.mark.parametrize("name", backends.BACKENDS)
def test_a_named_backend_that_refuses_says_why(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.BACKENDS[name], "refuses", lambda x: "the reason")
    with pytest.raises(ValueError, match=f"krr_mse: backend '{name}' cannot .*: the reason"):
        krr_mse(*problem(4, 3, 2, 2), solver=Solver(backend=name))  # type: ignore[arg-type]


def test_what_cannot_be_traced_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def called(x: torch.Tensor) -> None:
        pytest.fail("what is installed and measured has no trace")

    monkeypatch.setattr(backends, "is_compiling", lambda: True)
    for backend in (triton, tuned):
        monkeypatch.setattr(backend, "refuses", called)
    x = torch.empty(1, 1)
    with pytest.raises(ValueError, match="'triton' cannot compute this: torch.compile cannot"):
        backends.choose("triton", x, "test")
    monkeypatch.setattr(cpp, "refuses", lambda x: "it is not built")
    assert backends.choose("auto", x, "test") is torch_backend
    monkeypatch.setattr(cpp, "refuses", lambda x: None)
    assert backends.choose("auto", x, "test") is traced


def test_a_backward_pass_of_a_call_that_was_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    grad = torch.empty(1, 1)
    for backend in (cpp, torch_backend, triton, tuned):
        assert backends.for_backward(backend, grad) is backend
    monkeypatch.setattr(backends, "is_compiling", lambda: True)  # as under compiled autograd
    assert backends.for_backward(tuned, grad) is torch_backend
    assert backends.for_backward(cpp, grad) is traced


@pytest.mark.parametrize(
    "shape,expected",
    [
        ((FLOAT64_UP_TO + 1,) * 2, "cuda inverse"),
        ((2, FLOAT64_UP_TO + 1, FLOAT64_UP_TO + 1), "cuda"),
        ((FLOAT64_UP_TO,) * 2, "cuda"),
        ((2, 30, 30), "cuda"),
    ],
    ids=str,
)
def test_triton_takes_our_cuda_cholesky_where_it_is_built(
    shape: tuple[int, ...], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large Gram is inverted in the same steps; a batch has no such kernel."""
    with FakeTensorMode():
        k = torch.empty(shape, device="cuda")
    monkeypatch.setattr(operators, "HAS_CUDA_EXTENSION", True)
    assert triton.cholesky_method(k, 3) == CUDA_METHODS[expected]
    assert triton.cholesky_method(torch.empty(shape), 3) == CUDA_METHODS["torch"]
    monkeypatch.setattr(operators, "HAS_CUDA_EXTENSION", False)
    assert triton.cholesky_method(k, 3) == CUDA_METHODS["torch"]
    assert torch_backend.cholesky_method(k, 3) == CUDA_METHODS["torch"]


def test_the_cholesky_methods_on_the_cpu() -> None:
    k = torch.empty(5, 5)
    assert torch_backend.cholesky_method(k, 3) == LAPACK
    assert cpp.cholesky_method(k, 3) == traced.cholesky_method(k, 3) == CPP


def test_tensors_on_mps_are_refused_by_name() -> None:
    """Without a GPU of Apple's: fake tensors are on it, and reach the same choice."""
    with FakeTensorMode():
        f, y, k = (torch.empty(4, n, device="mps") for n in (3, 2, 4))
        calls = (
            lambda: krr_mse(f, y, f, y),
            lambda: krr_mse(f, y, f, y, solver=Solver(backend="torch")),
            lambda: krr_fit(f, y),
            lambda: ridge_solve(k, y, ridge=1.0),
        )
        for call in calls:
            with pytest.raises(ValueError, match="MPS has no float64; move the tensors to the CPU"):
                call()
