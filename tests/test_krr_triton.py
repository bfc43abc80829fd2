"""The backend "triton" from the operators down to its kernels, which Triton's interpreter runs."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from krrst_fast import backends, krr_mse
from tests.helpers import problem

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
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


def test_values_and_every_gradient(told: dict[str, Any]) -> None:
    assert len(told["compared"]) == 18
    for row in told["compared"]:
        assert len(row["got"]) == len(row["allowed"])
        pairs = zip(row["got"], row["allowed"])
        assert all(a <= b for a, b in pairs), f"{row['call']}: {row['got']} > {row['allowed']}"


def test_fast_keeps_the_features_in_float16(told: dict[str, Any]) -> None:
    assert told["halves"] == 2


def test_the_rest_is_as_with_every_backend(told: dict[str, Any]) -> None:
    assert told["info"] == ["triton", 0, False]
    assert "differentiable once" in told["second"]
    assert told["same bits"]
    assert told["batch"] < 1e-5 and told["fit"] < 5e-3


def test_vmap_and_batched_gradients(told: dict[str, Any]) -> None:
    assert len(told["mapped"]) == 8
    for name, error in told["mapped"].items():
        assert error < 5e-5, name  # two ways to round; one problem's unit in another is all wrong


def test_a_bias_of_any_size(told: dict[str, Any]) -> None:
    assert max(told["far bias"]) < 1e-5


def test_it_refuses_what_it_cannot_compute(told: dict[str, Any]) -> None:
    assert told["refusals"]["triton"] is None
    assert told["refusals"]["fake"] == "the tensors have no values"
    assert "nothing was measured" in told["refusals"]["tuned"]
    assert "CUDA extension is not loaded" in told["refusals"]["cuda"]
    assert "'triton' cannot compute this: it has no kernels for float64" in told["float64"]


@pytest.mark.parametrize("name", ["triton", "tuned"])
def test_a_named_backend_never_falls_back(name: str) -> None:
    tensors = [x.float() for x in problem(7, 13, 5, 2)]
    with pytest.raises(ValueError, match=f"backend '{name}' cannot compute this: "):
        krr_mse(*tensors, backend=name)
    # Nor is it taken where nobody asked.
    assert backends.choose("auto", tensors[0], "test").name in ("cpp", "torch")


def test_what_cannot_be_traced_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    able = dataclasses.replace(backends.BACKENDS[-1], name="triton")
    monkeypatch.setattr(backends, "BACKENDS", (able,))
    monkeypatch.setattr(backends, "_TRACED", {})
    with pytest.raises(ValueError, match="torch.compile cannot trace it"):
        backends.choose("triton", torch.empty(1, 1), "test")


def test_a_trace_asks_only_those_that_it_can_take(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(x: torch.Tensor) -> None:
        pytest.fail("what is installed and measured has no trace")

    changed = [dataclasses.replace(one, refuses=asked) for one in backends.BACKENDS[1:-1]]
    monkeypatch.setattr(backends, "BACKENDS", (*changed, backends.BACKENDS[-1]))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert backends.choose("auto", torch.empty(1, 1), "test").name == "torch"
    # As compiled autograd does after a call that was not traced.
    assert backends.going_back("tuned", torch.empty(1, 1)) == "torch"
