"""The measured choices: the nearest measurement decides, and without one torch computes."""

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from krrst_fast import backends, gram, krr_mse, operators, reference, selftest
from krrst_fast.backends import torch as torch_backend
from krrst_fast.backends import triton, tuned
from krrst_fast.cholesky import CUDA_METHODS
from krrst_fast.reference.kernels import kernel_matrix
from tests.helpers import NAMES, keywords, loss_and_gradients, problem


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
    row("rbf_values", "float64", [40, 10], torch=0.2, triton=0.1),
    row("arccos_slopes", "float64", [40, 10], torch=0.2, triton=0.1),
    row("views", "float32", [1024, 1024], torch=0.2, triton=0.1),
    row("solve", "float32", [1000, 512], **{"torch": 3.0, "torch inverse": 2.0, "cuda": 1.0}),
    row("solve", "float64", [100, 10], **{"torch": 1.0, "torch inverse": 2.0}),
    row("solve_many", "float64", [4096, 25, 5], **{"torch": 3.0, "cuda": 1.0}),
]


@pytest.fixture(autouse=True)
def _table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Measurements of a machine whose "GPU" is the CPU."""
    about = {"gpu": "a GPU", "date": "2000-01-01"}
    monkeypatch.setattr(tuned, "tables", lambda: {"cpu": {**about, "rows": ROWS}})
    tuned.nearest.cache_clear()
    yield
    tuned.nearest.cache_clear()


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backends as on a GPU: "cpp" is not tried, and nothing about the device is refused."""
    monkeypatch.setattr(backends, "AUTO", (tuned, torch_backend))
    monkeypatch.setattr(triton, "refuses_device", lambda x: None)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the Triton functions that are called; plain PyTorch computes instead."""
    names: list[str] = []

    def note(name: str) -> None:
        def call(*args: Any) -> Any:
            names.append(name)
            return getattr(torch_backend, name)(*args)

        monkeypatch.setattr(triton, name, call)

    for name in (
        *("gram", "matmul", "predicted_residual_mse", "closing_matmul"),
        *("kernel_values", "kernel_slopes"),
    ):
        note(name)
    return names


def name(part: str, precision: str, *size: int) -> str:
    return tuned.nearest("cpu", part, precision, size).name


def test_the_fastest_at_the_nearest_size_computes() -> None:
    assert name("gram", "fast", 1000, 8192) == "triton"
    assert name("gram", "fast", 600, 5000) == "triton"
    assert name("gram", "float32", 120, 8192) == "triton"
    assert name("matmul_t", "float32", 8192, 1000, 10) == "torch"
    assert name("solve", "float32", 1000, 512) == "cuda"


def test_torch_is_preferred_where_it_is_nearly_as_fast() -> None:
    assert name("gram", "float32", 1000, 8192) == "torch"


def test_torch_computes_what_was_not_measured() -> None:
    far = tuned.nearest("cpu", "gram", "fast", (4000, 8192))
    assert far.name == "torch" and "nothing was measured near this size" in far.why
    other = tuned.nearest("sm_70", "gram", "fast", (1000, 8192))
    assert other.name == "torch" and "nothing was measured on sm_70" in other.why
    assert name("gram", "float64", 1000, 8192) == "torch"


def test_the_reason_has_the_measured_times() -> None:
    why = tuned.nearest("cpu", "gram", "fast", (1000, 8192)).why
    assert why == "ms at [1000, 8192] on a GPU, 2000-01-01: triton 0.1, torch 0.4"


@pytest.mark.parametrize(
    "dtype,expected",
    [(torch.float16, "triton"), (torch.float32, "torch"), (torch.float64, "torch")],
    ids=str,
)
def test_the_precision_is_that_of_the_matrix(dtype: torch.dtype, expected: str) -> None:
    assert tuned.choice("gram", torch.empty(1, 1, dtype=dtype), 1000, 8192).name == expected


def test_the_installed_file() -> None:
    path = Path(tuned.__file__).parent / tuned.FILE
    table = json.loads(path.read_text(encoding="utf-8"))
    for arch, about in table.items():
        assert arch.startswith("sm_") and {"gpu", "date", "torch", "command"} <= set(about)
        for measured in about["rows"]:
            assert set(measured) >= {"part", "precision", "size", "ms"}
            assert "torch" in measured["ms"]


def test_each_part_is_computed_by_the_fastest(called: list[str]) -> None:
    draw = torch.Generator().manual_seed(0)
    f, w = torch.randn(1024, 8192, generator=draw), torch.randn(8192, 10, generator=draw)
    y = f @ w
    tuned.gram(f[:1000], 1.0, 0.0)
    tuned.gram(f[:1000].half(), 1.0, 0.0)
    tuned.gram(f[:100], 1.0, 0.0)
    assert called == ["gram", "gram"]
    called.clear()
    out = tuned.matmul(f, w)
    assert torch.allclose(out, y, atol=1e-2) and called == ["matmul"]
    tuned.matmul(f[:1000].mT, y[:1000])
    tuned.matmul(w.mT, f.mT)
    assert called == ["matmul"]
    error, loss = tuned.predicted_residual_mse(f, w, y, 1.0, None)
    assert called[1:] == ["predicted_residual_mse"] and error.abs().max() < 1e-2 and loss < 1e-4
    thin = torch.randn(1000, 10), torch.randn(8192, 10), torch.randn(1000, 10), w
    tuned.closing_matmul(*thin, 1.0)
    assert called[2:] == []
    tuned.matmul(f[:, :40].mT, y)
    tuned.matmul(torch.randn(8192, 40, generator=draw).mT, w)
    assert called[2:] == ["matmul"]
    wide = torch.randn(8192, 512, generator=draw)
    out = tuned.closing_matmul(wide[:1000], wide, 2 * wide[:1000], wide, 3.0)
    assert called[3:] == ["closing_matmul"]
    assert torch.allclose(out, -3 * wide[:1000] @ wide.mT, atol=1e-2)


@pytest.mark.parametrize("many", [(), (4,)], ids=["one", "four problems"])
def test_kernels_of_products_are_computed_by_the_fastest(
    called: list[str], many: tuple[int, ...]
) -> None:
    rows = 40 // math.prod(many)
    x, y = torch.randn(*many, rows, 3).double(), torch.randn(*many, 10, 3).double()
    squares = x.square().sum(-1), y.square().sum(-1)
    of = x @ y.mT, x, y, *squares, torch.ones(many).double(), -1
    for kernel, by_triton in (("rbf", 1), ("arccos", 0), ("polynomial", 0)):
        called.clear()
        values = tuned.kernel_values(*of, kernel, 2, 1.0)
        expected = kernel_matrix(x, y, kernel, 1.0, 2, 1.0)
        assert called == ["kernel_values"] * by_triton
        assert torch.allclose(values, expected)
        called.clear()
        tuned.kernel_slopes(*of, torch.ones_like(values), kernel, 2, 1.0, True)
        assert called == ["kernel_slopes"] * (kernel == "arccos")


def test_the_product_of_an_mse_is_chosen_too(called: list[str]) -> None:
    """Where the fused kernel is not the fastest, its product alone may be."""
    draw = torch.Generator().manual_seed(0)
    f, w = torch.randn(1024, 8192, generator=draw), torch.randn(8192, 10, generator=draw)
    kept = [x for x in ROWS if x["part"] != "mse"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuned, "tables", lambda: {"cpu": {"gpu": "", "date": "", "rows": kept}})
        tuned.nearest.cache_clear()
        error, _ = tuned.predicted_residual_mse(f, w, f @ w, 1.0, None)
    assert called == ["matmul"] and error.abs().max() < 1e-2


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("precision", [None, "fast"])
@pytest.mark.parametrize("form", ["k", "w", "primal"])
def test_loss_and_gradients(on_gpu: None, form: str, precision: str | None, many: bool) -> None:
    tensors = [x.float() for x in problem(31, 17, 20, 3)]
    tensors[2] *= 1e6  # features in float16 share a power of two
    if many:
        tensors = [torch.stack((x, 1e-3 * x)) for x in tensors]
    rounded = list(tensors)
    if precision == "fast":
        rounded[0], rounded[2] = reference.round_features(rounded[0], rounded[2])
    options: dict[str, Any] = {"bias": 0.5, "scale": 2.0, "ridge": 0.01, "detach_ridge": False}

    def loss(*tensors: torch.Tensor, **how: Any) -> torch.Tensor:
        return krr_mse(*tensors, **options, **keywords(**how)).sum()

    exact = loss_and_gradients(partial(loss, backend="reference"), rounded)
    mine = partial(loss, precision=precision, form=form, check="flag")
    got = loss_and_gradients(mine, tensors, torch.float32)
    for name, a, b in zip(("loss", *NAMES), got, exact):
        assert (a.double() - b).norm() <= 1e-4 * b.norm(), name
    _, info = krr_mse(*tensors, **options, **keywords(check="flag"), return_info=True)
    assert info.backend == "tuned"


def test_views_are_drawn_by_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    stand_in = torch.full((1,), 7.0)

    def by_triton(batch: int) -> bool:
        index, offset = torch.zeros(batch, dtype=torch.int64), torch.zeros(batch, 2).long()
        flip, three = torch.zeros(batch, dtype=torch.bool), [0.5] * 3
        return torch.equal(tuned.views(images, index, offset, flip, 0, three, three), stand_in)

    monkeypatch.setattr(triton, "kernel", lambda name: lambda *arguments: stand_in)
    assert not by_triton(1024)
    monkeypatch.setattr(triton, "refuses_device", lambda x: None)
    assert by_triton(1024) and not by_triton(8)


def test_the_operator_gram(on_gpu: None, called: list[str]) -> None:
    x = torch.randn(100, 8192, generator=torch.Generator().manual_seed(0))
    k = gram(x, scale=2.0, bias=1.0)
    assert called == ["gram"] and torch.allclose(k, 2 * x @ x.mT + 1, rtol=1e-4, atol=1e-2)


def test_torch_computes_a_batch(called: list[str]) -> None:
    x = torch.randn(2, 100, 8192, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(tuned.gram(x, 1.0, 0.0), x @ x.mT, rtol=1e-4, atol=1e-2)
    assert tuned.cholesky_method(x @ x.mT, 10) == CUDA_METHODS["torch"] and not called


def test_the_cholesky_method_is_the_fastest_that_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    k = torch.empty(1000, 1000)
    monkeypatch.setattr(operators, "HAS_CUDA_EXTENSION", True)
    assert tuned.cholesky_method(k, 512) == CUDA_METHODS["cuda"]
    assert tuned.cholesky_method(torch.empty(90, 90), 12) == CUDA_METHODS["torch"]
    assert tuned.cholesky_method(torch.empty(3000, 30, 30), 5) == CUDA_METHODS["cuda"]
    assert tuned.cholesky_method(torch.empty(30, 30, 30), 5) == CUDA_METHODS["torch"]
    monkeypatch.setattr(operators, "HAS_CUDA_EXTENSION", False)
    monkeypatch.setattr(operators, "CUDA_EXTENSION", "not loaded: not built")
    assert tuned.cholesky_method(k, 512) == CUDA_METHODS["torch"]
    why = tuned.cholesky_choice(k, 1000, 512).why
    assert "cuda 1" in why and "the CUDA extension is not loaded" in why


def test_a_device_and_a_table_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(1, 1)
    assert "it computes on CUDA devices" in str(tuned.refuses(x))
    monkeypatch.setattr(triton, "refuses_device", lambda x: None)
    assert tuned.refuses(x) is None and tuned.refuses(x.double()) is None
    # As on a GPU, where "cpp" refuses.
    monkeypatch.setattr(backends, "AUTO", (tuned, torch_backend))
    assert backends.choose("auto", x, "test") is tuned
    monkeypatch.setattr(tuned, "tables", dict)
    assert tuned.refuses(x) == "nothing was measured on cpu"
    assert backends.choose("triton", x, "test") is triton
    # "auto" never takes the Triton kernels unmeasured.
    assert backends.choose("auto", x, "test") is torch_backend


def test_the_selftest_prints_the_choices_and_the_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned.operators, "HAS_CUDA_EXTENSION", False)
    text = "\n".join(selftest.measured(torch.empty(1, 1)))
    assert "gram [1000, 8192], fast: triton; ms at [1000, 8192] on a GPU" in text
    assert "gram [5000, 512], float32: torch; nothing was measured near this size" in text
    assert "factor and solves [1000, 1000], 512 columns: torch; ms at [1000, 512]" in text
