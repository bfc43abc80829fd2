"""The dispatch table: the nearest measurement decides, and where there is none torch computes."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from krrst_fast import (
    backends,
    gpu,
    gram,
    krr_mse,
    library,
    measured,
    plain,
    reference,
    selftest_choices,
)
from krrst_fast.factor import FLOAT64_UP_TO, SOLVERS
from tests.helpers import NAMES, loss_and_gradients, problem


def row(part: str, precision: str, size: list[int], **ms: float) -> dict[str, Any]:
    return {"part": part, "precision": precision, "size": size, "ms": ms}


ROWS = [
    row("gram", "fast", [1000, 8192], torch=0.4, triton=0.1),
    row("gram", "float32", [1000, 8192], torch=0.4, triton=0.39),
    row("gram", "float32", [100, 8192], torch=0.2, triton=0.1),
    row("matmul", "float32", [1024, 8192, 10], torch=0.2, triton=0.1),
    row("matmul_t", "float32", [8192, 1000, 10], torch=0.1, triton=0.2),
    row("matmul_t", "float32", [40, 8192, 10], torch=0.2, triton=0.1),
    row("mse", "float32", [1024, 8192, 10], torch=0.2, triton=0.1),
    row("closing", "float32", [1000, 8192, 512], torch=0.2, triton=0.1),
    row("views", "float32", [1024, 1024], torch=0.2, triton=0.1),
    row("solve", "float32", [1000, 512], **{"torch": 3.0, "torch inverse": 2.0, "cuda": 1.0}),
    row("solve", "float64", [100, 10], **{"torch": 1.0, "torch inverse": 2.0}),
    row("solve_many", "float64", [4096, 25, 5], **{"torch": 3.0, "cuda": 1.0}),
]


@pytest.fixture(autouse=True)
def _table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Measurements of a machine whose "GPU" is the CPU, and kernels that only note their names."""
    about = {"gpu": "a GPU", "date": "2000-01-01"}
    monkeypatch.setattr(measured, "tables", lambda: {"cpu": {**about, "rows": ROWS}})
    measured.choice.cache_clear()
    yield
    measured.choice.cache_clear()


def name(part: str, precision: str, *size: int) -> str:
    return measured.choice("cpu", part, precision, size).name


def test_the_fastest_at_the_nearest_size_computes() -> None:
    assert name("gram", "fast", 1000, 8192) == "triton"
    assert name("gram", "fast", 600, 5000) == "triton"
    assert name("gram", "float32", 120, 8192) == "triton"
    assert name("matmul_t", "float32", 8192, 1000, 10) == "torch"
    assert name("solve", "float32", 1000, 512) == "cuda"


def test_torch_computes_what_it_does_nearly_as_fast() -> None:
    assert name("gram", "float32", 1000, 8192) == "torch"


def test_torch_computes_what_was_not_measured() -> None:
    far = measured.choice("cpu", "gram", "fast", (4000, 8192))
    assert far.name == "torch" and "nothing was measured near this size" in far.why
    other = measured.choice("sm_70", "gram", "fast", (1000, 8192))
    assert other.name == "torch" and "nothing was measured on sm_70" in other.why
    assert name("gram", "float64", 1000, 8192) == "torch"


def test_why_has_the_numbers() -> None:
    why = measured.choice("cpu", "gram", "fast", (1000, 8192)).why
    assert why == "ms at [1000, 8192] on a GPU, 2000-01-01: triton 0.1, torch 0.4"


def test_the_file_that_is_installed() -> None:
    path = Path(measured.__file__).parent / measured.FILE
    table = json.loads(path.read_text(encoding="utf-8"))
    for arch, about in table.items():
        assert arch.startswith("sm_") and {"gpu", "date", "torch", "command"} <= set(about)
        for one in about["rows"]:
            assert set(one) >= {"part", "precision", "size", "ms"} and "torch" in one["ms"]


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are called; plain PyTorch computes in their place."""
    names: list[str] = []

    def note(kernel: str, stand_in: Any) -> None:
        def call(*args: Any) -> Any:
            names.append(kernel)
            return stand_in(*args)

        monkeypatch.setattr(gpu, kernel, call)

    note("gram", plain.gram)
    note("matmul", plain.matmul)
    note("mse", lambda *args: plain.mse(plain.matmul, *args))
    note("closing", lambda *args: plain.closing(plain.matmul, *args))
    return names


def test_a_call_takes_part_by_part_what_won(called: list[str]) -> None:
    draw = torch.Generator().manual_seed(0)
    f, w = torch.randn(1024, 8192, generator=draw), torch.randn(8192, 10, generator=draw)
    y = f @ w
    gpu.tuned_gram(f[:1000], 1.0, 0.0)
    gpu.tuned_gram(f[:1000].half(), 1.0, 0.0)
    gpu.tuned_gram(f[:100], 1.0, 0.0)
    assert called == ["gram", "gram"]
    called.clear()
    out = gpu.tuned_matmul(f, w)
    assert torch.allclose(out, y, atol=1e-2) and called == ["matmul"]
    gpu.tuned_matmul(f[:1000].mT, y[:1000])
    gpu.tuned_matmul(w.mT, f.mT)
    assert called == ["matmul"]
    error, loss = gpu.tuned_mse(f, w, y, 1.0, None)
    assert called[1:] == ["mse"] and error.abs().max() < 1e-2 and loss < 1e-4
    thin = torch.randn(1000, 10), torch.randn(8192, 10), torch.randn(1000, 10), w
    gpu.tuned_closing(*thin, 1.0)
    assert called[2:] == []
    gpu.tuned_matmul(f[:, :40].mT, y)
    gpu.tuned_matmul(torch.randn(8192, 40, generator=draw).mT, w)
    assert called[2:] == ["matmul"]
    wide = torch.randn(8192, 512, generator=draw)
    out = gpu.tuned_closing(wide[:1000], wide, 2 * wide[:1000], wide, 3.0)
    assert called[3:] == ["closing"] and torch.allclose(out, -3 * wide[:1000] @ wide.mT, atol=1e-2)


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("precision", [None, "fast"])
@pytest.mark.parametrize("form", ["k", "w", "primal"])
def test_a_whole_call(
    form: str, precision: str, many: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "_place_refuses", lambda x: None)
    tensors = [x.float() for x in problem(31, 17, 20, 3)]
    tensors[2] *= 1e6  # features in float16 share a power of two
    if many:
        tensors = [torch.stack((x, 1e-3 * x)) for x in tensors]
    seen = list(tensors)
    if precision == "fast":
        seen[0], seen[2] = reference.round_features(seen[0], seen[2])
    options: dict[str, Any] = {"bias": 0.5, "scale": 2.0, "ridge": 0.01, "detach_ridge": False}

    def loss(*tensors: torch.Tensor, **how: Any) -> torch.Tensor:
        return krr_mse(*tensors, **options, **how).sum()

    exact = loss_and_gradients(partial(loss, backend="reference"), seen)
    mine = partial(loss, backend="tuned", precision=precision, form=form, check="flag")
    got = loss_and_gradients(mine, tensors, torch.float32)
    for name, a, b in zip(("loss", *NAMES), got, exact):
        assert (a.double() - b).norm() <= 1e-4 * b.norm(), name


def test_views_are_drawn_by_who_won(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    stand_in = torch.full((1,), 7.0)

    def drawn(batch: int) -> bool:
        index, offset = torch.zeros(batch, dtype=torch.int64), torch.zeros(batch, 2).long()
        flip, three = torch.zeros(batch, dtype=torch.bool), [0.5] * 3
        return torch.equal(gpu.views(images, index, offset, flip, 0, three, three), stand_in)

    monkeypatch.setattr(gpu, "_kernel", lambda name: lambda *arguments: stand_in)
    assert not drawn(1024)
    monkeypatch.setattr(gpu, "_place_refuses", lambda x: None)
    assert drawn(1024) and not drawn(8)


def test_the_gram_of_a_named_backend(called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_place_refuses", lambda x: None)
    x = torch.randn(100, 8192, generator=torch.Generator().manual_seed(0))
    k = gram(x, scale=2.0, bias=1.0, backend="tuned")
    assert called == ["gram"] and torch.allclose(k, 2 * x @ x.mT + 1, rtol=1e-4, atol=1e-2)


def test_a_batch_is_torchs(called: list[str]) -> None:
    x = torch.randn(2, 100, 8192, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(gpu.tuned_gram(x, 1.0, 0.0), x @ x.mT, rtol=1e-4, atol=1e-2)
    assert gpu.tuned_solver(x @ x.mT, 10) == SOLVERS["torch"] and not called


def test_the_solver_is_one_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    k = torch.empty(1000, 1000)
    monkeypatch.setattr(library, "has_cuda_extension", lambda: True)
    assert gpu.tuned_solver(k, 512) == SOLVERS["cuda"]
    assert gpu.tuned_solver(torch.empty(90, 90), 12) == SOLVERS["torch"]
    assert gpu.tuned_solver(torch.empty(3000, 30, 30), 5) == SOLVERS["cuda"]
    assert gpu.tuned_solver(torch.empty(30, 30, 30), 5) == SOLVERS["torch"]
    monkeypatch.setattr(library, "has_cuda_extension", lambda: False)
    assert gpu.tuned_solver(k, 512) == SOLVERS["torch"]
    why = gpu.solver_choice(k, 1000, 512).why
    assert "cuda 1" in why and "the CUDA extension is not loaded" in why


def test_cuda_inverts_what_is_large_and_alone() -> None:
    large = FLOAT64_UP_TO + 1
    assert gpu.cuda_solver(torch.empty(large, large), 3) == SOLVERS["cuda inverse"]
    assert gpu.cuda_solver(torch.empty(2, large, large), 3) == SOLVERS["cuda"]
    assert gpu.cuda_solver(torch.empty(30, 30), 3) == SOLVERS["cuda"]


def test_tuned_needs_a_gpu_and_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(1, 1)
    assert "it computes on CUDA devices" in str(gpu.tuned_refuses(x))
    monkeypatch.setattr(gpu, "_place_refuses", lambda x: None)
    assert gpu.tuned_refuses(x) is None and gpu.tuned_refuses(x.double()) is None
    assert backends.choose("tuned", x, "test").name == "tuned"
    # As on a GPU, where the kernels for the CPU refuse: what is on request is never taken unasked.
    monkeypatch.setattr(backends, "BACKENDS", backends.BACKENDS[1:])
    assert backends.choose("auto", x, "test").name == "tuned"
    monkeypatch.setattr(measured, "tables", dict)
    assert gpu.tuned_refuses(x) == "nothing was measured on cpu"
    assert backends.choose("triton", x, "test").name == "triton"
    assert backends.choose("auto", x, "test").name == "torch"


def test_the_selftest_prints_the_choices_and_why() -> None:
    told = selftest_choices._measured(torch.empty(1, 1))
    text = "\n".join(told)
    assert "gram [1000, 8192], fast: triton; ms at [1000, 8192] on a GPU" in text
    assert "gram [5000, 512], float32: torch; nothing was measured near this size" in text
    assert "factor and solves [1000, 1000], 512 columns: torch; ms at [1000, 512]" in text
