"""Gradients are stored by rows, as the backward pass of a network reads them.

Run as a program with TRITON_INTERPRET=1 it prints the strides that the Triton kernels give.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from krrst_fast import Solver, krr_mse, krr_predict
from krrst_fast.planner import FORMS
from tests.helpers import BACKEND_NAMES, NAMES, problem

ROOT = Path(__file__).parent.parent
SHAPE = (21, 9, 13, 3)  # M > D, as every form can take it
PRECISIONS = (None, "float64", "fast")


def strides(backend: str) -> dict[str, Any]:
    """For each call and tensor: the strides of the gradient, if it is not stored by rows."""
    found = {}
    tensors = [x.float() for x in problem(*SHAPE)]
    for precision in PRECISIONS:
        if backend == "triton" and precision == "float64":
            continue
        for form in FORMS:
            for op, count in ((krr_mse, 4), (krr_predict, 3)):
                for many in (False, True) if precision is None else (False,):
                    leaves = [torch.stack((x, x)) if many else x for x in tensors[:count]]
                    leaves = [x.clone().requires_grad_() for x in leaves]
                    solver = Solver(form=form, precision=precision, backend=backend)
                    value = op(*leaves, ridge=0.01, bias=1.0, detach_ridge=False, solver=solver)
                    grads = torch.autograd.grad(value.square().sum(), leaves)
                    for name, x in zip(NAMES, grads):
                        if name == "y_syn":
                            continue  # as the solver left it: small, and where it ends
                        what = f"{op.__name__} {form} {precision} {many}: {name}"
                        found[what] = None if x.is_contiguous() else x.stride()
    return found


def check(found: dict[str, Any]) -> None:
    assert len(found) > 40
    wrong = [f"{what} {got}" for what, got in found.items() if got is not None]
    assert wrong == []


@pytest.mark.parametrize("backend", [name for name in BACKEND_NAMES if name != "reference"])
def test_on_the_cpu(backend: str) -> None:
    check(strides(backend))


def test_by_the_triton_kernels() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.test_gradient_strides"],
        env={**env, "PYTHONPATH": os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    check(json.loads(done.stdout))


if __name__ == "__main__":
    json.dump(strides("triton"), sys.stdout)
