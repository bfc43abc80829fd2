"""The backend "triton" from the operators down to its kernels, which Triton's interpreter runs."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from krrst_fast import Solver, backends, krr_mse
from tests.helpers import problem

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.triton_krr"],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_values_and_every_gradient(report: dict[str, Any]) -> None:
    assert len(report["compared"]) == 18
    for row in report["compared"]:
        assert len(row["got"]) == len(row["allowed"])
        pairs = zip(row["got"], row["allowed"])
        assert all(a <= b for a, b in pairs), f"{row['call']}: {row['got']} > {row['allowed']}"


def test_fast_keeps_the_features_in_float16(report: dict[str, Any]) -> None:
    assert report["halves"] == 2


def test_the_rest_is_as_with_every_backend(report: dict[str, Any]) -> None:
    assert report["info"] == ["triton", 0, False]
    assert report["second"] < 5e-3
    assert report["same bits"]
    assert report["batch"] < 1e-5 and report["fit"] < 5e-3


def test_vmap_and_batched_gradients(report: dict[str, Any]) -> None:
    assert len(report["mapped"]) == 8
    for name, error in report["mapped"].items():
        assert error < 5e-5, name  # two ways to round; one problem's unit in another is all wrong


def test_a_bias_of_any_size(report: dict[str, Any]) -> None:
    assert max(report["far bias"]) < 1e-5


def test_it_refuses_what_it_cannot_compute(report: dict[str, Any]) -> None:
    assert report["refusals"]["triton"] is None
    assert report["refusals"]["fake"] == "the tensors have no values"
    assert "nothing was measured" in report["refusals"]["tuned"]
    assert "'triton' cannot compute this: it has no kernels for float64" in report["float64"]


def test_a_named_backend_never_falls_back() -> None:
    tensors = [x.float() for x in problem(7, 13, 5, 2)]
    with pytest.raises(ValueError, match="backend 'triton' cannot compute this: "):
        krr_mse(*tensors, solver=Solver(backend="triton"))
    # "auto" does not take it either.
    assert backends.choose("auto", tensors[0], "test").NAME in ("cpp", "torch")
