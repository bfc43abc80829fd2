"""krr_mse keeps at most three M x M matrices (in primal form D x D) alive at once, backward too."""

import os
import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor

from krrst_fast import Solver, operators
from krrst_fast.cholesky import FLOAT64_UP_TO
from krrst_fast.ops.krr import krr_mse
from tests.helpers import BACKEND_NAMES

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
peak_bytes = import_module("bench.common").peak_bytes

P, B = 5, 16
CASES = [  # form, M, D, and the size of the matrix that is factored
    ("k", 600, 24, 600),
    ("w", 600, 24, 600),
    ("primal", 24, 600, 601),
    ("primal", 600, 24, 25),
]


def _tensors(m: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = ((m, d), (m, P), (B, d), (B, P))
    drawn = [torch.randn(shape, generator=draw, dtype=dtype).relu_() for shape in shapes]
    return [x.requires_grad_() for x in drawn]


def _small(m: int, d: int) -> int:
    """Numbers in what is no matrix of the solve: the inputs four times over, and K_rs twice."""
    return 4 * (m * d + m * P + B * d + B * P) + 2 * B * m + 8 * (m + d)


def _loss_and_gradients(
    tensors: list[Tensor],
    form: str,
    backend: str,
    ridge: float = 1e-4,
    bias: float = 0.0,
    max_retries: int | None = None,
) -> object:
    learnt = torch.tensor(ridge, requires_grad=True)
    loss, info = krr_mse(
        *tensors,
        ridge=learnt,
        bias=bias,
        detach_ridge=False,
        solver=Solver(form=form, backend=backend, max_retries=max_retries),
        return_info=True,
    )
    return info, torch.autograd.grad(loss, [*tensors, learnt])


@pytest.fixture(params=BACKEND_NAMES)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "cpp" and not operators.HAS_EXTENSION:
        pytest.skip(operators.EXTENSION)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [0.0, 1.0])
@pytest.mark.parametrize("form,m,d,rows", CASES)
def test_three_matrices_at_most(
    form: str, m: int, d: int, rows: int, bias: float, dtype: torch.dtype, backend: str
) -> None:
    tensors, small = _tensors(m, d, dtype), _small(m, d)
    assert small < max(m, d) ** 2 / 2, "one matrix more would not show"
    numbers = peak_bytes(partial(_loss_and_gradients, tensors, form, backend, bias=bias))
    numbers /= dtype.itemsize
    # Small ones are factored in float64.
    factor = max(1, 8 // dtype.itemsize) if rows <= FLOAT64_UP_TO else 1
    allowed = (1 + 2 * factor) * rows**2 + small
    assert numbers <= allowed, f"{(numbers - small) / rows**2:.2f} matrices and the small ones"
    assert numbers > (2 * rows**2 if rows > 100 else m * d), "something is not counted"


def test_no_more_when_the_ridge_is_raised(backend: str) -> None:
    tensors = _tensors(600, 24, torch.float32)  # rank 24: no factor without a ridge that counts
    infos = []

    def call() -> object:
        info, gradients = _loss_and_gradients(tensors, "k", backend, ridge=1e-12, max_retries=9)
        infos.append(info)
        return gradients

    numbers = peak_bytes(call) / 4
    assert int(infos[0].retries) > 0
    assert numbers <= 3 * 600**2 + _small(600, 24)


def test_the_float64_factor_of_a_small_gram(backend: str) -> None:
    """M = 256: the gram in float32, its factor and the solver's copy of that in float64."""
    tensors = _tensors(256, 8, torch.float32)
    size = peak_bytes(partial(_loss_and_gradients, tensors, "w", backend))
    assert size <= (4 + 8 + 8) * 256**2 + 8 * _small(256, 8)


PROCESS = """
import re
from pathlib import Path
import torch
from krrst_fast import Solver, krr_mse

def high_water():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

torch.set_num_threads(1)
m, d, p, b = 1600, 32, 4, 16
f_syn, y_syn = torch.randn(m, d).relu().requires_grad_(), torch.randn(m, p).requires_grad_()
f_real, y_real = torch.randn(b, d).relu(), torch.randn(b, p)
for form in ("k", "w"):
    def call():
        solver = Solver(form=form)
        loss = krr_mse(f_syn, y_syn, f_real, y_real, ridge=1e-4, bias=1.0, solver=solver)
        return torch.autograd.grad(loss, (f_syn, y_syn))
    call()  # what libraries keep for ever, they have now
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water()
    call()
    print((high_water() - before) / (m * m * 4))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks Linux")
def test_the_process_needs_no_more_than_the_tensors() -> None:
    """Scratch memory of the C++ operators and of LAPACK, which no allocator of torch sees."""
    # glibc gives freed blocks of this size back at once, so that the peak is one of live memory.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROCESS],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    matrices = [float(line) for line in done.stdout.split()]
    # Beside the three: inputs' size a few times, panels [M, D], blocks of LAPACK [M, 64].
    assert len(matrices) == 2 and all(2 < count < 3.4 for count in matrices), matrices
