"""Bad arrays and chunks are named: the function, the chunk, what is needed and what came."""

from typing import Any

import numpy as np
import pytest
import torch

from krrst_fast import KRRFit, NonFiniteError, Solver, krr_fit
from tests.test_stream import chunks, drawn

F, Y, ONE = np.ones((4, 3)), np.ones((4, 2)), np.ones(4)
BAD: list[tuple[Any, Any, dict[str, Any], type[Exception], str]] = [
    (F, None, {}, TypeError, "f_syn and y_syn must both be arrays, got NoneType"),
    (F, torch.ones(4, 2), {}, TypeError, "f_syn and y_syn must both be arrays, got Tensor"),
    (F, Y.astype("f"), {}, TypeError, "f_syn and y_syn must have one dtype, got float64 and float"),
    (F.astype(int), Y, {}, TypeError, "f_syn must be float16, float32 or float64, got int64"),
    (F[0], Y, {}, ValueError, r"f_syn must be a matrix, got shape \(3,\)"),
    (F, ONE, {}, ValueError, r"y_syn must be a matrix, got shape \(4,\)"),
    (F[:3], Y, {}, ValueError, r"the same number of rows, got shapes \(3, 3\) and \(4, 2\)"),
    (F[:0], Y[:0], {}, ValueError, r"f_syn must have at least one row, got \(0, 3\)"),
    (np.ma.masked_array(F), Y, {}, TypeError, "f_syn must be a tensor or an array, got Mask"),
    (F, Y, {"weights": ONE[:3]}, ValueError, r"weights must be \[4\] on cpu, got shape \(3,\)"),
    (F, Y, {"weights": -ONE}, ValueError, "weights must be zero or more, got -1"),
    (F, Y, {"weights": ONE * np.inf}, NonFiniteError, "weights holds NaN or infinity"),
    (F, Y, {"weights": 0 * ONE}, ValueError, "weights must not all be zero"),
    (F, Y, {"weights": [1.0] * 4}, TypeError, "weights must be a tensor, got list"),
    (F, Y, {"ridge": torch.ones(2)}, ValueError, r"ridge must be a number or a tensor \[\], got"),
    (F, Y, {"ridge": 0}, ValueError, "ridge must be positive"),
    (F, Y, {"bias": 1, "intercept": True}, ValueError, "bias must be 0 with intercept=True"),
    (F, Y, {"solver": Solver(backend="reference")}, ValueError, "'reference' keeps no fit"),
    (F, Y, {"solver": Solver(backend="triton")}, ValueError, "backend 'triton' cannot compute"),
    (F, Y, {"solver": Solver(precision="fast")}, ValueError, "precision 'fast' scales by the larg"),
    (F, Y, {"solver": None}, TypeError, "solver must be a Solver"),
    (7, None, {}, TypeError, r"f_syn must be a tensor, an array, or an iterable .*, got int"),
    ([(F, Y)], Y, {}, ValueError, "y_syn must be in the chunks, got ndarray beside"),
    ([(F, Y)], None, {"weights": ONE}, ValueError, "weights must be in the chunks, got ndarray"),
    ([(F, Y)], None, {"solver": Solver(form="w")}, ValueError, "form must be 'auto' or 'primal' f"),
    ([], None, {}, ValueError, "needs at least one row, got 0 chunks without any"),
    ([(F[:0], Y[:0])], None, {}, ValueError, "needs at least one row, got 1 chunks without any"),
    ([(F, Y), F], None, {}, TypeError, r"chunk 1 must be \(F, Y\) or .*, got ndarray"),
    ([(F,)], None, {}, TypeError, r"chunk 0 must be \(F, Y\) or .*, got tuple of 1"),
    ([(F, [1])], None, {}, TypeError, "chunk 0: Y must be a tensor or an array, got list"),
    ([(F, Y), (F[:, :2], Y)], None, {}, ValueError, "chunk 1: F must have 3 columns like"),
    ([(F, Y), (F, Y[:, :1])], None, {}, ValueError, "chunk 1: Y must have 2 columns like"),
    ([(F, Y), (F.astype("f"), Y.astype("f"))], None, {}, TypeError, "chunk 1: F must be torch.f"),
    ([(F, Y), (F, Y, ONE[:1])], None, {}, ValueError, r"chunk 1: weights must be \[4\] on cpu"),
    ([(F, Y, 0 * ONE)], None, {}, ValueError, "weights must not all be zero"),
]  # fmt: skip


@pytest.mark.parametrize("f, y, options, error, match", BAD)
def test_bad_input_is_named(
    f: Any, y: Any, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match="krr_fit: .*" + match if ":" not in match[:9] else match):
        krr_fit(f, y, **options)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)])
def test_nan_is_found_in_its_row(shape: tuple[int, int]) -> None:
    f, y, _, _ = drawn(*shape)
    f[23, 5] = torch.nan
    with pytest.raises(NonFiniteError, match="krr_fit: f_syn holds NaN or infinity, .* row 23"):
        krr_fit(f.numpy(), y.numpy())
    with pytest.raises(NonFiniteError, match="krr_fit: chunk 2: F holds NaN .* row 3"):
        krr_fit(chunks(f, y, sizes=10))
    f[23, 5], y[7, 0] = 0, torch.inf
    with pytest.raises(NonFiniteError, match="krr_fit: y_syn holds NaN or infinity, .* row 7"):
        krr_fit(f.numpy(), y.numpy())
    fit: KRRFit = krr_fit(f, y.nan_to_num(posinf=0))
    f[11, 3] = torch.inf
    with pytest.raises(NonFiniteError, match="KRRFit.predict: f holds NaN or infinity, .* row 11"):
        fit.predict(f.numpy())
    assert fit.predict(f.numpy()[:0]).shape == (0, 3)
    with pytest.raises(TypeError, match="KRRFit.predict: weights and f must have one dtype"):
        fit.predict(f.float().numpy())
    with pytest.raises(ValueError, match=r"f must be \[..., B, "):
        fit.predict(f.numpy()[:, :2])
