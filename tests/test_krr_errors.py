"""krr_mse and krr_predict: what they say of input they cannot use."""

import pytest
import torch

from krrst_fast import (
    NonFiniteError,
    NotPositiveDefiniteError,
    Solver,
    krr_mse,
    krr_predict,
    operators,
)
from tests.helpers import NAMES, keywords, problem


def test_what_cannot_be_factored_says_so() -> None:
    f_syn = torch.zeros(3, 4)
    rest = torch.ones(3, 1), torch.ones(2, 4), torch.ones(2, 1)
    with pytest.raises(NotPositiveDefiniteError, match="features are zero.*ridge_of='absolute'"):
        krr_mse(f_syn, *rest)
    with pytest.raises(NotPositiveDefiniteError, match="features are zero"):
        krr_mse(f_syn[:, :0], rest[0], rest[1][:, :0], rest[2])
    f_syn = torch.ones(600, 4)
    f_syn[0] = 1e4
    with pytest.raises(NotPositiveDefiniteError, match=r"\[600, 600\].*after raising the ridge 0"):
        krr_mse(
            f_syn,
            torch.ones(600, 1),
            *rest[1:],
            ridge=1e-20,
            solver=Solver(form="w", max_retries=0),
        )


@pytest.mark.parametrize("position", range(4))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_input_is_named(position: int, value: float) -> None:
    tensors = problem(5, 4, 6, 2)
    tensors[position][2, 1] = value
    with pytest.raises(NonFiniteError, match=rf"krr_mse: {NAMES[position]} holds .* row 2"):
        krr_mse(*tensors)


def test_overflow_is_not_silent() -> None:
    tensors = [x.float() * 1e30 for x in problem(5, 4, 6, 2)]
    with pytest.raises(NonFiniteError, match="krr_mse: finite inputs gave a result that is not"):
        krr_mse(*tensors)


def test_a_large_result_is_no_overflow() -> None:
    f_syn, y_syn, f_real, _ = (x.float() for x in problem(5, 4, 60, 3))
    prediction = krr_predict(f_syn, 1e37 * y_syn.sign(), f_real)
    assert prediction.isfinite().all() and prediction.abs().max() > 1e36


BAD = [
    (
        {"f_syn": torch.ones(3)},
        ValueError,
        r"krr_mse: f_syn must be a matrix or a batch of them, got shape \(3,\)",
    ),
    ({"f_syn": [[1.0]]}, TypeError, "krr_mse: f_syn must be a tensor, got list"),
    ({"y_syn": torch.ones(2, 2)}, ValueError, r"f_syn and y_syn .* rows, got .*\(3, 4\).*\(2, 2\)"),
    ({"f_real": torch.ones(5, 3)}, ValueError, "f_syn and f_real .* columns"),
    ({"y_real": torch.ones(5, 1)}, ValueError, "y_syn and y_real .* columns"),
    ({"y_real": torch.ones(4, 2)}, ValueError, "f_real and y_real .* rows"),
    (
        {"y_syn": torch.ones(3, 2).double()},
        TypeError,
        "one dtype, got torch.float32 and torch.float64",
    ),
    (
        {"f_real": torch.ones(5, 4).long()},
        TypeError,
        "f_real must be float32, float64, float16 or bfloat16, got torch.int64",
    ),
    ({"f_syn": torch.ones(3, 4) * 1j}, TypeError, "f_syn must be float32, .* got torch.complex64"),
    (
        {"f_syn": torch.ones(2, 3, 4), "y_syn": torch.ones(5, 3, 2)},
        ValueError,
        r"leading dimensions must broadcast, got f_syn \(2,\), y_syn \(5,\)",
    ),
    ({"ridge": torch.ones(2, dtype=torch.int64)}, TypeError, "ridge tensor must be floating"),
    ({"ridge": torch.tensor(0.0)}, ValueError, "ridge must be positive, got 0"),
    ({"ridge": 0.0}, ValueError, "ridge must be positive and finite, got 0.0"),
    ({"rigde": 1.0}, TypeError, "krr_mse.. got an unexpected keyword argument 'rigde'"),
    ({"solver": "fast"}, TypeError, "krr_mse: solver must be a Solver, got 'fast'"),
    ({"return_info": 1}, TypeError, "krr_mse: return_info must be True or False, got 1"),
    ({"weights": torch.ones(4)}, ValueError, r"weights must be \[..., 3\], got shape \(4,\)"),
    ({"weights": -torch.ones(3)}, ValueError, "weights must be zero or more, got -1"),
    ({"weights": torch.full((3,), float("nan"))}, NonFiniteError, "weights holds NaN"),
    ({"weights": [1.0, 1.0, 1.0]}, TypeError, "weights must be a tensor, got list"),
    (
        {"weights": torch.zeros(3, requires_grad=True)},
        ValueError,
        "weights must be positive where they ask for a gradient, got 0",
    ),
    ({"precision": "tf32"}, ValueError, "precision must be one of .* got 'tf32'"),
    ({"check": "never"}, ValueError, "check must be one of .* got 'never'"),
    ({"detach_ridge": 1}, TypeError, "detach_ridge must be True or False, got 1"),
    ({"backend": "reference", "return_info": True}, ValueError, "has no info to return"),
    ({"backend": "reference", "check": "flag"}, ValueError, "has no failure to flag"),
    ({"y_real": torch.ones(5, 2, device="meta")}, ValueError, "one device, got cpu and meta"),
    ({"ridge": 0.0}, ValueError, "ridge must be positive and finite, got 0.0"),
    ({"ridge": -1.0}, ValueError, "ridge must be positive and finite, got -1.0"),
    ({"ridge": float("nan")}, ValueError, "ridge must be positive and finite, got nan"),
    ({"ridge": "1e-6"}, TypeError, "ridge must be a number or a tensor, got '1e-6'"),
    ({"ridge_of": "norm"}, ValueError, "ridge_of must be one of .* got 'norm'"),
    ({"scale": 0.0}, ValueError, "scale must be positive"),
    ({"bias": -1.0}, ValueError, "bias must be zero or more"),
    ({"ridge": torch.tensor(-0.5)}, ValueError, "ridge must be positive, got -"),
    ({"ridge": torch.tensor(float("nan"))}, ValueError, "krr_mse: ridge must be positive, got nan"),
    ({"max_retries": -1}, ValueError, "Solver: max_retries must be from 0 to 700, got -1"),
    ({"max_retries": 2.5}, TypeError, "max_retries must be a whole number or None, got 2.5"),
    ({"scale": torch.tensor(2.0)}, TypeError, "krr_mse: scale must be a number, got tensor"),
    ({"bias": "a"}, TypeError, "krr_mse: bias must be a number, got 'a'"),
    ({"form": "z"}, ValueError, "form must be one of .* got 'z'"),
    ({"backend": "cuda9"}, ValueError, "backend must be one of .* got 'cuda9'"),
]


@pytest.mark.parametrize("change,error,message", BAD)
def test_bad_input_is_named(change: dict, error: type[Exception], message: str) -> None:
    good = {
        "f_syn": torch.ones(3, 4),
        "y_syn": torch.ones(3, 2),
        "f_real": torch.ones(5, 4),
        "y_real": torch.ones(5, 2),
    }
    arguments = {**good, **change}
    positional = [arguments.pop(name) for name in NAMES]
    with pytest.raises(error, match=message):
        krr_mse(*positional, **keywords(**arguments))


def test_a_sparse_tensor_is_named() -> None:
    with pytest.raises(ValueError, match="krr_predict: f_syn must be a dense .*sparse_coo"):
        krr_predict(torch.ones(3, 4).to_sparse(), torch.ones(3, 2), torch.ones(5, 4))


def test_nothing_to_average() -> None:
    with pytest.raises(ValueError, match=r"the mean is over y_real, got shape \(0, 2\)"):
        krr_mse(torch.ones(3, 4), torch.ones(3, 2), torch.ones(0, 4), torch.ones(0, 2))


def test_a_named_backend_that_cannot_compute_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "EXTENSION", "not loaded: no such file")
    monkeypatch.setattr(operators, "HAS_EXTENSION", False)
    tensors = problem(4, 3, 2, 2)
    with pytest.raises(ValueError, match="'cpp' cannot compute this: the extension is not loaded"):
        krr_mse(*tensors, solver=Solver(backend="cpp"))
    assert krr_mse(*tensors, return_info=True)[1].backend == "torch"
