"""Nothing rounds the products of a solve: no global switch, no autocast, no compiled graph."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from krrst_fast import Solver, gram, krr_fit, krr_mse, krr_path, krr_predict_from_gram, ridge_solve
from krrst_fast.precision import exact_arithmetic, full_precision
from tests.helpers import problem

SIZES = (150, 200, 90, 70)  # large enough for the libraries to round


@contextmanager
def _reduced(how: str) -> Iterator[None]:
    """Torch's switches for less precise float32 products, each by the way that sets it."""
    try:
        if how == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                yield
        elif how == "legacy":
            torch.set_float32_matmul_precision("medium")
            yield
        else:
            place = torch.backends if how == "everything" else torch.backends.mkldnn.matmul
            place.fp32_precision = "tf32" if how == "everything" else "bf16"
            torch.backends.cuda.matmul.fp32_precision = "tf32"
            yield
    finally:
        torch.backends.fp32_precision = "none"
        torch.backends.mkldnn.matmul.fp32_precision = "none"
        torch.backends.cuda.matmul.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        torch.backends.mkldnn.matmul.fp32_precision = "none"
        torch.backends.cuda.matmul.fp32_precision = "none"


def _results(backend: str, form: str) -> list[Tensor]:
    f_syn, y_syn, f_real, y_real = (x.float() for x in problem(*SIZES, condition=1e4))
    leaves = [x.requires_grad_() for x in (f_syn, y_syn, f_real, y_real)]
    solver = Solver(backend=backend, form=form)
    loss = krr_mse(*leaves, solver=solver)
    k = gram(f_syn, solver=Solver(backend=backend))
    alpha = ridge_solve(k, y_syn, ridge=1e-3)
    k_rs = (f_real.detach().double() @ f_syn.detach().double().T).float()
    given = krr_predict_from_gram(k, k_rs, y_syn, ridge=1e-3)
    fit = krr_fit(f_syn, y_syn, solver=solver)
    losses = krr_mse(*(torch.stack((x, x)) for x in leaves), solver=solver)
    outputs = [loss, k, alpha, given, losses, fit.predict(f_real)]
    total = sum(x.square().mean() for x in outputs)
    path = krr_path(f_syn, y_syn, [1e-3, 1.0])
    fitted = [fit.loo_residuals, path.predict(f_real.detach()), path.loo_mse]
    return [*(x.detach() for x in outputs), *fitted, *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("how", ["legacy", "mkldnn", "everything", "autocast"])
@pytest.mark.parametrize("form", ["k", "w", "primal"])
def test_no_switch_reaches_a_solve(form: str, how: str) -> None:
    for backend in ("cpp", "torch"):
        plain = _results(backend, form)
        with _reduced(how):
            reduced = _results(backend, form)
        for i, (a, b) in enumerate(zip(plain, reduced)):
            assert torch.equal(a, b), f"{backend}: result {i} changed"


def test_the_switch_does_round_what_is_not_protected() -> None:
    """Or the test above would show nothing."""
    x = problem(*SIZES)[0].float()
    plain = x @ x.T
    with _reduced("autocast"):
        assert not torch.equal((x @ x.T).float(), plain)


def test_switches_are_turned_back() -> None:
    with _reduced("legacy"):
        with full_precision():
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cuda.matmul.allow_tf32
        with pytest.raises(ZeroDivisionError), full_precision():
            1 / 0  # noqa: B018
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    with _reduced("everything"):
        with full_precision():
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        torch.backends.fp32_precision = "ieee"  # what follows it, follows it still
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"


def test_nothing_to_turn_costs_nothing() -> None:
    x = torch.ones(1)
    assert type(exact_arithmetic(x)).__name__ == "nullcontext"


def test_threads_share_the_switches() -> None:
    """The one that leaves first must not turn them back under the other."""
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with full_precision():
            inside.set()
            leave.wait(10)

    with _reduced("legacy"):
        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(10)
        with exact_arithmetic(torch.ones(1)):
            leave.set()
            thread.join()
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("form", ["k", "w", "primal"])
def test_a_switch_turned_after_compiling_does_not_reach_the_graph(form: str) -> None:
    tensors = [x.float().requires_grad_() for x in problem(*SIZES, condition=1e4)]

    def loss(*t: Tensor) -> Tensor:
        return krr_mse(*t, solver=Solver(form=form), bias=1.0)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    plain = torch.autograd.grad(compiled(*tensors), tensors)
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        with torch.compiler.set_stance("fail_on_recompile"):
            reduced = torch.autograd.grad(compiled(*tensors), tensors)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "none"
    for a, b in zip(plain, reduced):
        assert torch.equal(a, b)
