"""Drawn calls of the KRR ops: each gives the numbers of the float64 formula, or a named error.

A call is a good one in which a few things are then changed. Nothing may be silently NaN, and an
error must be one of those that are raised on purpose and begin with the name of the op.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from krrst_fast import (
    NotPositiveDefiniteError,
    gram,
    krr_fit,
    krr_mse,
    krr_path,
    krr_predict,
    krr_predict_from_gram,
    ridge_solve,
)
from tests.helpers import keywords
from tests.krr_calls import FLOATS, Call, calls, exact

NAMED = (ValueError, TypeError, NotPositiveDefiniteError)


def fuzz(examples: int) -> Callable[[Callable], Callable]:
    """The same calls in every run: they are drawn from the name of the test."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )


def attempt(op: str, call: Call, compute: Callable[[], Any]) -> Any:
    """The result, or None for an error that is as it should be."""
    try:
        return compute()
    except NAMED as error:
        text = str(error)
        assert text.startswith(
            (op, f"{op[:-2]}() got an unexpected", "Solver: ", "ridge_factor: ", "ridge must have")
        ), repr(error)
        assert not (call.good and call.tame) or isinstance(error, NotPositiveDefiniteError), text
        return None


def _split(call: Call, *names: str) -> tuple[list[Any], dict[str, Any]]:
    """Positional arguments and keywords."""
    keywords = {k: v for k, v in call.tensors.items() if k == "weights"}
    return [call.tensors[name] for name in names], {**keywords, **call.options}


def _result_dtype(call: Call, *names: str) -> torch.dtype:
    double = any(call.tensors[name].dtype == torch.float64 for name in names)
    return torch.float64 if double else torch.float32


def _single(call: Call) -> bool:
    """Whether a result has only the digits of float32."""
    wide = call.options.get("precision") == "float64"
    tensors = [x for x in call.tensors.values() if isinstance(x, Tensor)]
    half = any(x.dtype != torch.float64 for x in tensors)
    return half or not wide and call.options.get("precision") is not None


def _is_meta(call: Call) -> bool:
    x = call.tensors["f_syn"]
    return isinstance(x, Tensor) and x.device.type == "meta"


def _flags(call: Call) -> bool:
    return call.options.get("check") == "flag"


def check_nan(call: Call, result: Tensor, failed: Tensor | None) -> None:
    """What is not finite says so; with huge numbers an overflow may be all there is to say."""
    if result.device.type == "meta" or result.numel() == 0:
        return
    if not _flags(call):
        assert result.isfinite().all()
    elif call.tame:
        assert failed is not None
        bad = result.isnan()
        lead = failed.reshape((*failed.shape, *[1] * (bad.ndim - failed.ndim)))
        assert torch.equal(bad, lead.expand(bad.shape))


def check_prediction(call: Call, got: Tensor, failed: Tensor | None = None) -> None:
    """Near the formula in every problem that was solved."""
    if not call.tame or _is_meta(call) or failed is not None and failed.any():
        return
    known = exact(call, _single(call))
    if known is None:
        return
    assert got.shape == known.prediction.shape
    error = (got.double() - known.prediction).norm(dim=(-2, -1))
    assert (error <= known.allowed).all(), f"{error} > {known.allowed}"


SOLVE = ("ridge_of", "precision", "max_retries", "check", "ridge")
FIT = (*SOLVE, "bias", "scale", "kernel", "form", "backend", "weights")
PREDICT = (*FIT, "detach_ridge")
GRAM = (*SOLVE, "detach_ridge", "weights")
PATH = ("ridge_of", "bias", "scale", "weights")
DATA = ("f_syn", "y_syn", "f_real", "y_real")


@fuzz(1000)
@given(calls(PREDICT))
def test_krr_predict(call: Call) -> None:
    tensors, options = _split(call, *DATA[:3])
    both = attempt(
        "krr_predict: ",
        call,
        lambda: krr_predict(*tensors, return_info=True, **keywords(**options)),
    )
    if both is None:
        return
    got, info = both
    assert got.dtype == _result_dtype(call, *DATA[:3])
    assert got.shape[-2:] == (tensors[2].shape[-2], tensors[1].shape[-1])
    assert info.failed.shape == got.shape[:-2]
    check_nan(call, got, info.failed)
    check_prediction(call, got, info.failed)


@fuzz(1000)
@given(calls(PREDICT))
def test_krr_mse_and_its_gradients(call: Call) -> None:
    def leaf(x: Any) -> Any:
        floating = isinstance(x, Tensor) and x.is_floating_point() and x.layout == torch.strided
        return x.detach().requires_grad_() if floating else x

    call = call._replace(tensors={name: leaf(x) for name, x in call.tensors.items()})
    tensors, options = _split(call, *DATA)
    both = attempt(
        "krr_mse: ", call, lambda: krr_mse(*tensors, return_info=True, **keywords(**options))
    )
    if both is None:
        return
    loss, info = both
    assert loss.dtype == _result_dtype(call, *DATA) and loss.shape == info.failed.shape
    check_nan(call, loss, info.failed)
    leaves = [x for x in call.tensors.values() if isinstance(x, Tensor)]
    for x, grad in zip(leaves, torch.autograd.grad(loss.sum(), leaves)):
        assert grad.shape == x.shape and grad.dtype == x.dtype and grad.device == x.device
        if call.tame and not _is_meta(call) and not info.failed.any():
            # Float16 ends at 65504.
            assert grad.isfinite().all() or x.dtype == torch.float16
    if call.tame and not _is_meta(call) and not info.failed.any():
        known = exact(call, _single(call))
        if known is not None:
            error = known.prediction - call.tensors["y_real"].double()
            count = error.shape[-2] * error.shape[-1]
            value, delta = error.square().mean((-2, -1)), known.allowed / math.sqrt(count)
            allowed = 2 * value.sqrt() * delta + delta**2 + 2.0**-20 * value
            assert ((loss.double() - value).abs() <= allowed).all()


@fuzz(500)
@given(calls(FIT))
def test_krr_fit(call: Call) -> None:
    tensors, options = _split(call, "f_syn", "y_syn")
    if _is_meta(call) and not _flags(call):
        return  # a fit looks at its values
    fit = attempt("krr_fit: ", call, lambda: krr_fit(*tensors, **keywords(**options)))
    if fit is None:
        return
    dtype = _result_dtype(call, "f_syn", "y_syn")
    failed = fit.info.failed
    assert fit.alpha.dtype == dtype and fit.alpha.shape[:-2] == failed.shape
    check_nan(call, fit.alpha, failed)
    f = call.tensors["f_real"]
    got = attempt("KRRFit.predict: ", call, lambda: fit.predict(f))
    if got is not None:
        assert got.dtype == _result_dtype(call, "f_real")
        without = {k: v for k, v in call.tensors.items() if k != "y_real"}
        check_prediction(call._replace(tensors=without), got, failed)
    if not call.tame or _is_meta(call) or failed.any():
        return
    assert (fit.condition > 0).all()
    known = None if got is None else exact(call, _single(call))
    if known is not None and call.options.get("form") != "primal" and fit.info.form != "primal":
        left_out, near = fit.loo_residuals.double(), known.left_out
        if near.shape == left_out.shape:
            allowed = 8 * known.allowed[..., None, None] + 1e-3 * near.abs()
            assert ((left_out - near).abs() <= allowed).all()


@fuzz(700)
@given(calls(GRAM))
def test_krr_predict_from_gram(call: Call) -> None:
    f_syn, y_syn, f_real = (call.tensors[name] for name in DATA[:3])
    k_syn, k_real = f_syn, f_real
    dense = [isinstance(x, Tensor) and x.layout == torch.strided for x in (f_syn, f_real)]
    # torch multiplies a matrix on meta by one that is not, and gives numbers of no meaning.
    if all(dense) and f_syn.ndim > 1 and f_real.ndim > 1 and f_syn.device == f_real.device:
        try:
            k_syn, k_real = f_syn @ f_syn.mT, f_real @ f_syn.mT
        except RuntimeError:
            call = call._replace(good=False)  # of no use as features, and given as they are
    _, options = _split(call)
    op = "krr_predict_from_gram"
    call = call._replace(good=call.good and options.get("precision") != "fast")
    both = attempt(
        f"{op}: ",
        call,
        lambda: krr_predict_from_gram(
            k_syn, k_real, y_syn, return_info=True, **keywords(**options)
        ),
    )
    if both is None:
        return
    got, info = both
    assert got.shape[-2:] == (k_real.shape[-2], y_syn.shape[-1])
    assert got.shape[:-2] == info.failed.shape
    check_nan(call, got, info.failed)
    if k_syn.dtype in FLOATS[:2] and k_real.dtype in FLOATS[:2] and k_syn is not f_syn:
        check_prediction(call, got, info.failed)


@fuzz(500)
@given(calls(SOLVE))
def test_ridge_solve(call: Call) -> None:
    f_syn, y_syn = call.tensors["f_syn"], call.tensors["y_syn"]
    square = isinstance(f_syn, Tensor) and f_syn.layout == torch.strided and f_syn.ndim > 1
    k = f_syn.double() @ f_syn.double().mT if square and f_syn.dtype in FLOATS else f_syn
    k = k.to(f_syn.dtype) if square and f_syn.dtype in FLOATS else k
    _, options = _split(call)
    call = call._replace(good=call.good and options.get("precision") != "fast")
    alpha = attempt("ridge_solve: ", call, lambda: ridge_solve(k, y_syn, **keywords(**options)))
    if alpha is None:
        return
    assert alpha.dtype == _result_dtype(call, "f_syn", "y_syn")
    assert alpha.shape[-2:] == y_syn.shape[-2:]
    if not _flags(call):
        check_nan(call, alpha, None)
    if not call.tame or _is_meta(call) or alpha.isnan().any() or alpha.numel() == 0:
        return
    lam = torch.as_tensor(options["ridge"], dtype=torch.float64)
    trace = k.double().diagonal(dim1=-2, dim2=-1).sum(-1)
    base = {"trace": trace, "mean_diagonal": trace / k.shape[-1]}
    lam = lam * base.get(options.get("ridge_of", "trace"), torch.ones_like(trace))
    ridged = k.double() + lam[..., None, None] * torch.eye(k.shape[-1]).double()
    eps = 2.0**-23 if _single(call) else 2.0**-52
    if bool(((trace + lam) / lam * eps < 1e-3).all()) and k.dtype in FLOATS[:2]:
        # Backward stable: the residual is small beside |A| |alpha|.
        residual = torch.linalg.matrix_norm(ridged @ alpha.double() - y_syn.double())
        size = torch.linalg.matrix_norm(ridged) * torch.linalg.matrix_norm(alpha.double())
        assert (residual <= 64 * eps * (size + torch.linalg.matrix_norm(y_syn.double()))).all()


@fuzz(500)
@given(calls(("bias", "scale", "precision", "backend")))
def test_gram(call: Call) -> None:
    x, options = call.tensors["f_syn"], {**call.options}
    options.pop("ridge")
    unknown = set(options) - {"bias", "scale", "precision", "backend"}
    k = attempt("gram: ", call, lambda: gram(x, **keywords(**options)))
    if k is None or unknown:
        return
    assert k.shape == (*x.shape[:-1], x.shape[-2]) and k.dtype == _result_dtype(call, "f_syn")
    if k.device.type == "meta":
        return
    assert k.isfinite().all()
    wide = x.detach().double()
    scale, bias = options.get("scale", 1.0), options.get("bias", 0.0)
    plain = scale * (wide @ wide.mT) + bias
    size = scale * (wide.abs() @ wide.abs().mT) + bias
    eps = 2.0**-10 if options.get("precision") == "fast" else 2.0**-23 if _single(call) else 2e-16
    assert ((k.double() - plain).abs() <= 16 * eps * size + 1e-37).all()


@fuzz(500)
@given(calls(PATH), st.sampled_from(((1e-3,), (1e-6, 0.1, 10), [1.0, 2.0], torch.ones(2))))
def test_krr_path(call: Call, ridges: Any) -> None:
    tensors, options = _split(call, "f_syn", "y_syn")
    options.pop("ridge")
    if _is_meta(call):
        return  # a decomposition has values
    path = attempt("krr_path: ", call, lambda: krr_path(*tensors, ridges, **options))
    if path is None:
        return
    assert path.weights.dtype == _result_dtype(call, "f_syn", "y_syn")
    if call.tame:
        for result in (path.weights, path.intercept, path.loo_residuals, path.loo_mse):
            assert result.isfinite().all()
    f = call.tensors["f_real"]
    if isinstance(f, Tensor) and f.ndim - 2 > path.weights.ndim - 3:
        return
    got = attempt("KRRPath.predict: ", call, lambda: path.predict(f))
    if got is None:
        return
    assert got.shape[0] == len(ridges) and got.dtype == _result_dtype(call, "f_real")
    for i, ridge in enumerate(ridges):
        check_prediction(call._replace(options={**options, "ridge": float(ridge)}), got[i])


BAD_RIDGES = ((), (0.0,), (-1.0,), (math.nan,), (math.inf,), 3.0, torch.tensor(1.0))


@pytest.mark.parametrize("ridges", BAD_RIDGES)
def test_ridges_of_a_path(ridges: Any) -> None:
    with pytest.raises(ValueError, match="krr_path: ridges must be"):
        krr_path(torch.eye(2), torch.ones(2, 1), ridges)
