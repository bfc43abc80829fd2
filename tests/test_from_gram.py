"""krr_predict_from_gram: kernels of the caller's own against the formula."""

import pytest
import torch
from torch import Tensor

from krrst_fast import (
    NonFiniteError,
    NotPositiveDefiniteError,
    Solver,
    krr_predict,
    krr_predict_from_gram,
    reference,
)
from krrst_fast.backends import choose
from tests.helpers import assert_equal, loss_and_gradients


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    """An RBF kernel: no features, and a diagonal that is no trace of any."""
    return torch.exp(-(x[..., :, None, :] - y[..., None, :, :]).square().sum(-1) / x.shape[-1])


def _points(*batch: int, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = ((9, 4), (6, 4), (9, 3))
    return [torch.randn(*batch, *s, dtype=torch.float64, generator=draw) for s in shapes]


@pytest.mark.parametrize("ridge_of", ["trace", "mean_diagonal", "absolute"])
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("batch", [(), (2,), (2, 2)])
def test_equals_the_formula_through_any_kernel(batch: tuple, detach: bool, ridge_of: str) -> None:
    x_syn, x_real, y_syn = _points(*batch)
    ridge = torch.tensor(1e-2, dtype=torch.float64)

    def ours(x_syn: Tensor, x_real: Tensor, y_syn: Tensor, ridge: Tensor) -> Tensor:
        k_ss, k_rs = _kernel(x_syn, x_syn), _kernel(x_real, x_syn)
        options = {"ridge": ridge, "ridge_of": ridge_of, "detach_ridge": detach}
        return krr_predict_from_gram(k_ss, k_rs, y_syn, **options).square().mean()

    def formula(x_syn: Tensor, x_real: Tensor, y_syn: Tensor, ridge: Tensor) -> Tensor:
        k_ss, k_rs = _kernel(x_syn, x_syn), _kernel(x_real, x_syn)
        alpha = reference.ridge_solve(k_ss, y_syn, ridge, ridge_of, detach)
        return (k_rs @ alpha).square().mean()

    tensors = [x_syn, x_real, y_syn, ridge]
    for a, b in zip(loss_and_gradients(ours, tensors), loss_and_gradients(formula, tensors)):
        assert_equal(a, b, 1e-11)


@pytest.mark.parametrize("ridge_of", ["trace", "mean_diagonal", "absolute"])
def test_weights_and_precision_as_with_features(ridge_of: str) -> None:
    f_syn, f_real, y_syn = _points(3)
    tensors = [f_syn, f_real, y_syn, torch.rand(9).double() + 0.2]

    def options(t: tuple[Tensor, ...]) -> dict:
        return {"ridge": 0.1, "ridge_of": ridge_of, "detach_ridge": False, "weights": t[3]}

    def given(*t: Tensor) -> Tensor:
        prediction = krr_predict_from_gram(t[0] @ t[0].mT, t[1] @ t[0].mT, t[2], **options(t))
        return prediction.square().mean()

    def features(*t: Tensor) -> Tensor:
        return krr_predict(t[0], t[2], t[1], **options(t)).square().mean()

    exact = loss_and_gradients(features, tensors)
    for a, b in zip(loss_and_gradients(given, tensors), exact):
        assert_equal(a, b, 1e-11)
    single = [x.float() for x in tensors]
    k_ss, k_rs = single[0] @ single[0].mT, single[1] @ single[0].mT
    wide = krr_predict_from_gram(
        k_ss, k_rs, single[2], ridge=1e-6, solver=Solver(precision="float64")
    )
    alone = krr_predict_from_gram(k_ss.double(), k_rs.double(), single[2].double(), ridge=1e-6)
    assert wide.dtype == torch.float32 and torch.equal(wide, alone.float())


def test_info() -> None:
    x_syn, x_real, y_syn = _points()
    k_ss, k_rs = _kernel(x_syn, x_syn), _kernel(x_real, x_syn)
    got, info = krr_predict_from_gram(k_ss, k_rs, y_syn, ridge=1e-2, return_info=True)
    assert info.backend == choose("auto", k_ss, "test").NAME
    assert info.form == "gram" and info.retries == 0 and not info.failed
    assert_equal(info.ridge, 1e-2 * k_ss.trace(), 1e-14)
    ridged = k_ss + info.ridge * torch.eye(9).double()
    assert_equal(info.factor @ info.factor.mT, ridged, 1e-12)
    assert_equal(got, k_rs @ torch.linalg.solve(ridged, y_syn), 1e-12)


def test_failure() -> None:
    _, _, y = _points()
    with pytest.raises(NotPositiveDefiniteError, match="or the trace of K, is negative"):
        krr_predict_from_gram(-torch.eye(9).double(), torch.ones(2, 9).double(), y, ridge=1e-9)
    prediction, info = krr_predict_from_gram(
        torch.stack((torch.eye(9), -torch.eye(9))).double(),
        torch.ones(2, 9).double(),
        y,
        ridge=1e-3,
        ridge_of="absolute",
        solver=Solver(check="flag"),
        return_info=True,
    )
    assert info.failed.tolist() == [False, True]
    assert prediction[0].isfinite().all() and prediction[1].isnan().all()


BAD = [
    ({"k_syn": torch.ones(3, 2)}, ValueError, r"k_syn must be square, got shape \(3, 2\)"),
    ({"k_real_syn": torch.ones(4, 2)}, ValueError, "k_syn and k_real_syn .* columns"),
    ({"y_syn": torch.ones(2, 2)}, ValueError, "k_syn and y_syn .* rows"),
    (
        {"solver": Solver(precision="fast")},
        ValueError,
        "'fast' rounds features, and a gram has none",
    ),
    ({"solver": Solver(backend="reference")}, ValueError, "'reference' does not factor a given"),
    ({"solver": "cpp"}, TypeError, "krr_predict_from_gram: solver must be a Solver, got 'cpp'"),
    ({"k_syn": torch.eye(3) * float("nan")}, NonFiniteError, "the ridge is nan|k_syn holds NaN"),
    ({"k_real_syn": torch.full((4, 3), float("inf"))}, NonFiniteError, "k_real_syn holds NaN"),
    ({"y_syn": torch.full((3, 2), float("inf"))}, NonFiniteError, "y_syn holds NaN"),
    ({"weights": torch.ones(4)}, ValueError, r"weights must be \[..., 3\], got shape \(4,\)"),
]


@pytest.mark.parametrize("change,error,message", BAD)
def test_bad_input_is_named(change: dict, error: type[Exception], message: str) -> None:
    good = {"k_syn": torch.eye(3), "k_real_syn": torch.ones(4, 3), "y_syn": torch.ones(3, 2)}
    with pytest.raises(error, match=message):
        krr_predict_from_gram(**{**good, **change})


def test_half_precision_is_not_rounded_on_the_way() -> None:
    x_syn, x_real, y_syn = _points()
    k_ss, k_rs = _kernel(x_syn, x_syn), _kernel(x_real, x_syn)
    half = [x.bfloat16() for x in (k_ss, k_rs, y_syn)]
    got = krr_predict_from_gram(*half, ridge=0.1)
    exact = krr_predict_from_gram(*(x.float() for x in half), ridge=0.1)
    assert got.dtype == torch.float32 and torch.equal(got, exact)
