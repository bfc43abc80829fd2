"""What every test runs under: deterministic algorithms, and uninitialised memory full of NaN."""

import importlib.util
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.lost_device import pytest_runtest_makereport  # noqa: F401
from tests.on_device import let_it_wait

# cuBLAS refuses to compute under torch's deterministic algorithms without it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


# Files of `make test-slow`: kernels under Triton's interpreter, simulated GPUs, whole command lines
# of the benchmarks, compile gates. Single slow tests have the mark themselves.
SLOW = (
    *(
        "test_bench",
        "test_check_",
        "test_compile_ahead",
        "test_cuda_model",
        "test_gradient_strides",
    ),
    *("test_kernels_", "test_krr_triton", "test_lost_device", "test_on_device", "test_played_gpu"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of the slow files."""
    for item in items:
        if item.path.name.startswith(SLOW):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _nan_poisoned_memory() -> Iterator[None]:
    """Deterministic algorithms make torch fill fresh memory with NaN: a missed element shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _waits_are_allowed() -> Iterator[None]:
    """A test that ends while waits raise would fail all others of its process."""
    yield
    let_it_wait()


@pytest.fixture
def default_signals() -> Iterator[None]:
    """Pytest runs some of its processes with SIGINT ignored, nohup all of them with SIGHUP."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, default)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def _interpreter() -> Iterator[Callable]:
    from tests.interpreted import Interpreter

    with Interpreter() as interpreter:
        yield interpreter


@pytest.fixture(params=["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
def kernels(request: pytest.FixtureRequest) -> Callable:
    """kernels("gram.gram", x, 1.0, 0.0) calls a Triton kernel, from and to CPU tensors."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if request.param == "interpreter":
        return request.getfixturevalue("_interpreter")
    if not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use")
    from tests.interpreted import call_on_gpu

    return call_on_gpu


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 40 random 8x8 images with labels of three classes; nothing may write to it."""
    from krrst_fast.data import PrepareConfig, prepare

    folder = tmp_path_factory.mktemp("store")
    draw = np.random.default_rng(0)
    images, labels = draw.integers(0, 256, (40, 8, 8, 3), np.uint8), draw.integers(0, 3, 40)
    np.savez(folder / "train.npz", images=images, labels=labels)
    prepare(PrepareConfig(source=str(folder / "train.npz"), out=folder / "store", size=8))
    return folder / "store"


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a target of five outputs for the images of `tiny_store`."""
    from krrst_fast.models import ModelConfig, build
    from krrst_fast.targets import FrozenTarget

    config = ModelConfig(widths=(4, 8))
    target = FrozenTarget(
        model=build(config, image_size=8, num_outputs=5, seed=0),
        config=config,
        num_outputs=5,
        mean=(0.5, 0.5, 0.5),
        std=(0.3, 0.3, 0.3),
        image_size=8,
    )
    path = tmp_path_factory.mktemp("target") / "target.safetensors"
    target.save(path)
    return path


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The graphs that are compiled, by a backend that runs them as they are traced, on any CPU."""
    graphs: list[int] = []
    compiler = torch.compile

    def count(graph, inputs):
        graphs.append(len(graph.graph.nodes))
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def compile_(function, *, options, **asked):
        return compiler(function, backend=count, **asked)

    monkeypatch.setattr(torch, "compile", compile_)
    torch._dynamo.reset()
    yield graphs
    torch._dynamo.reset()
