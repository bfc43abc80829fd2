"""What would fail, round or wait on a GPU, on one that is played: see `tests.played_gpu`."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from krrst_fast import Solver, krr_fit, krr_mse, krr_path, krr_predict, reference, ridge_solve
from krrst_fast import gram as gram_of
from krrst_fast.backends import cpp
from krrst_fast.ops.views import views
from krrst_fast.planner import FORMS
from krrst_fast.selftest_checks import checks
from tests import test_gpu_krr
from tests.helpers import NAMES, assert_equal, problem
from tests.played_gpu import Gpu, Played, played_gpu

OPTIONS: dict[str, Any] = {"bias": 1.0, "ridge": 1e-2, "ridge_of": "mean_diagonal"}
SMALL = {
    "SHAPES": ((1, 1, 1, 1), (7, 13, 5, 3), (9, 7, 5, 2), (7, 13, 5, 3, 2, 3)),
    "TALL": ((1, 1, 1, 1), (9, 5, 4, 2), (9, 5, 4, 2, 2, 3)),
}


@pytest.fixture
def on() -> Iterator[Gpu]:
    with played_gpu() as gpu:
        yield gpu


def placed(shape: tuple[int, ...] = (17, 9, 13, 3)) -> list[Tensor]:
    return [x.float().to("cuda") for x in problem(*shape)]


def results(loss: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in tensors]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]


def test_every_check_of_the_self_test(on: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, shapes in SMALL.items():
        monkeypatch.setattr(f"krrst_fast.selftest_checks.{name}", shapes)
    found = list(checks("cuda"))
    assert len(found) > 40 and {"torch"} <= {result.backend for result in found}
    wrong = [f"{x.check}, {x.precision}: {x.error} {x.problem}" for x in found if not x.ok]
    assert wrong == []


@pytest.mark.parametrize("precision", [None, "float64", "fast"])
@pytest.mark.parametrize("form", FORMS)
def test_a_flagged_call_waits_for_nothing(on: Gpu, form: str, precision: str | None) -> None:
    solver, tensors = Solver(form=form, precision=precision), placed()
    with cpp.by_steps():  # as a GPU computes
        exact = results(
            lambda *x: krr_mse(*x, **OPTIONS, solver=solver), [x.cpu() for x in tensors]
        )
    on.waits.clear()
    flagged = replace(solver, check="flag")
    got = results(lambda *x: krr_mse(*x, **OPTIONS, solver=flagged), tensors)
    assert on.waits == [] and all(isinstance(x, Played) for x in got)
    for name, a, b in zip(("loss", *NAMES), got, exact):
        assert_equal(a.cpu(), b, 1e-5, name)


def test_no_operator_waits_where_failures_are_flagged(on: Gpu) -> None:
    f_syn, y_syn, f_real, _ = placed()
    many, ridge = torch.stack((f_syn, 2 * f_syn)), torch.full((2,), 0.1, device="cuda")
    k, flag = f_syn @ f_syn.mT, {"solver": Solver(check="flag")}
    calls: dict[str, Callable[..., Tensor]] = {
        "gram": lambda x: gram_of(x, bias=1.0),
        "predict": lambda x: krr_predict(x, y_syn, f_real, **OPTIONS, **flag),
        "of many": lambda x: krr_predict(many * x[0, 0], y_syn, f_real, ridge=ridge, **flag),
        "retries": lambda x: krr_predict(
            x, y_syn, f_real, **OPTIONS, solver=Solver(check="flag", max_retries=2)
        ),
        "solve": lambda x: ridge_solve(k * x[0, 0], y_syn, ridge=0.1, **flag),
        "weighted": lambda x: krr_predict(x, y_syn, f_real, weights=x[:, 0] ** 2 + 1, **flag),
    }
    on.waits.clear()
    for name, call in calls.items():
        results(call, [f_syn])
        assert on.waits == [], name


def test_a_call_that_raises_waits_once(on: Gpu) -> None:
    """What was to be looked at is read in one piece."""
    for shape in ((17, 9, 13, 3), (520, 7, 5, 2)):
        tensors = placed(shape)
        for form in FORMS:
            on.waits.clear()
            results(lambda *x, form=form: krr_mse(*x, **OPTIONS, solver=Solver(form=form)), tensors)
            assert len(on.waits) == 1, (shape, form)


def test_fits_and_paths_mix_no_devices(on: Gpu) -> None:
    f_syn, y_syn, f_real, _ = placed()
    fit, found = krr_fit(f_syn, y_syn, **OPTIONS), krr_path(f_syn, y_syn, (0.1, 1.0), bias=1.0)
    cpu = krr_fit(f_syn.cpu(), y_syn.cpu(), **OPTIONS)
    assert_equal(fit.predict(f_real).cpu(), cpu.predict(f_real.cpu()), 1e-5)
    assert_equal(fit.loo_residuals.cpu(), cpu.loo_residuals, 1e-5)
    path = krr_path(f_syn.cpu(), y_syn.cpu(), (0.1, 1.0), bias=1.0)
    assert_equal(found.predict(f_real).cpu(), path.predict(f_real.cpu()), 1e-5)


@pytest.mark.parametrize("shape", [(17, 9, 13, 3), (5, 9, 13, 3), (620, 530, 5, 2)])
def test_chunks_stay_on_their_device(on: Gpu, shape: tuple[int, int, int, int]) -> None:
    f_syn, y_syn, f_real, _ = placed(shape)
    kernel = {"ridge": torch.tensor(1.0, device="cuda"), "ridge_of": "absolute"}
    for options in ({"intercept": True}, {"bias": 1.0}):
        if "bias" in options and shape[0] > shape[1]:  # the root of a Gram is kept
            f_syn[0] *= 1e6
        fit = krr_fit(zip(f_syn.split(4), y_syn.split(4)), **kernel, **options)
        assert isinstance(fit.weights, Played) and isinstance(fit.info.factor, Played)
        pairs = zip(f_syn.cpu().split(4), y_syn.cpu().split(4))
        cpu = krr_fit(pairs, ridge=1.0, ridge_of="absolute", **options)
        assert_equal(fit.predict(f_real).cpu(), cpu.predict(f_real.cpu()), 1e-4)
        assert_equal(fit.predict(f_real.cpu().numpy()).cpu(), fit.predict(f_real).cpu(), 1e-6)
    with pytest.raises(ValueError, match="chunk 1: F must be on cuda:0 like the first chunk, got"):
        krr_fit([(f_syn, y_syn), (f_syn.cpu(), y_syn.cpu())])


def test_views_have_the_bits_of_the_cpu_and_wait_for_nothing(on: Gpu) -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    index, offset = torch.tensor([1, 0]), torch.tensor([[0, 3], [2, 1]])
    flip = torch.tensor([True, False])
    how = {"padding": 2, "mean": (0.5071, 0.4866, 0.4409), "std": (0.2673, 0.2564, 0.2762)}
    expected = reference.views(images, index, offset, flip, *how.values())
    on_gpu = [x.to("cuda") for x in (images, index, offset, flip)]
    on.waits.clear()
    got = views(*on_gpu, **how)
    assert on.waits == []
    assert torch.equal(got.cpu(), expected)


@pytest.fixture
def ours(on: Gpu, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tests of krr_mse on a GPU, as functions, without what is kept of other devices."""
    for name in ("_placed", "judged"):
        monkeypatch.setattr(test_gpu_krr, name, getattr(test_gpu_krr, name).__wrapped__)
    monkeypatch.setattr(test_gpu_krr, "FLOAT64_UP_TO", 16)
    return test_gpu_krr


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (7, 13, 11, 3), (17, 9, 11, 3)], ids=str)
@pytest.mark.parametrize("precision", [None, "fast"])
def test_the_test_of_gradients(ours: ModuleType, shape: tuple[int, ...], precision: str) -> None:
    for form in FORMS if shape[0] > shape[1] else FORMS[:2]:
        ours.test_against_float64(shape, form, precision, "torch")


@pytest.mark.parametrize(
    "name",
    [
        *("test_a_batch_and_a_learnt_ridge", "test_a_failure_is_flagged_or_raised"),
        *("test_half_precision_and_strides", "test_fit_and_solve"),
    ],
)
def test_the_other_tests_of_a_gpu(ours: ModuleType, name: str) -> None:
    getattr(ours, name)("torch")


def test_float64(ours: ModuleType) -> None:
    ours.test_float64()


def test_it_is_played_as_a_gpu_would(on: Gpu) -> None:
    """The pretence itself: or the tests above would say nothing."""
    x, levels = torch.ones(3, 3, device="cuda"), torch.arange(256)
    with pytest.raises(RuntimeError, match="cuda:0 and cpu"):
        x * torch.ones(3)
    with pytest.raises(RuntimeError, match="cuda:0 and cpu"):
        x @ torch.ones(3, 3)
    with pytest.raises(RuntimeError, match="deterministic"):
        x.median(0)
    with pytest.raises(RuntimeError, match="'cuda' generator"):
        torch.randn(3, device="cuda", generator=torch.Generator())
    with pytest.raises(TypeError, match="convert"):
        x.numpy()
    assert (x * torch.tensor(2.0)).device.type == "cuda"
    # 126 of the quotients lose a bit: CUDA multiplies by 1 / 255.
    quotients = [levels.to(device).float() / 255 for device in ("cpu", "cuda")]
    assert (quotients[0] != quotients[1].cpu()).sum() == 126
    waits = {
        "a number": lambda: x.sum().item(),
        "a truth": lambda: bool((x > 0).all()),
        "a list": lambda: x.tolist(),
        "a mask": lambda: x[x > 0],
        "a copy": lambda: x.new_tensor([1.0]),
        "a copy of a number": lambda: torch.tensor(1.0, device="cuda"),
        "equality": lambda: torch.equal(x, x),
        "an inverse": lambda: torch.linalg.inv(x + torch.eye(3, device="cuda")),
    }
    for name, call in waits.items():
        on.waits.clear()
        call()
        assert len(on.waits) == 1, name


def test_it_leaves_nothing_behind() -> None:
    before = torch.Tensor.to, torch.tensor, torch.cuda.is_available()
    with played_gpu():
        assert torch.cuda.is_available() and torch.Tensor.to is not before[0]
    assert (torch.Tensor.to, torch.tensor, torch.cuda.is_available()) == before
    assert torch.ones(2).to(torch.float64).device.type == "cpu"
