"""What tests on a GPU leave behind when they fail: nothing, on a played `torch.cuda`."""

import ast
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.on_device import captured, let_it_wait, no_waits

ROOT = Path(__file__).parent.parent


class Cuda:
    """What of torch.cuda a capture and its failure change, as torch 2.11 changes it."""

    def __init__(self) -> None:
        self.mode, self.streams, self.notes = 0, ["default"], []
        self.pools: set[int] = set()
        self.capturing = self.broken = False
        self.generators = [self]

    # The mode, of which is warned once it is set.
    def set_sync_debug_mode(self, mode: str) -> None:
        self.mode = {"default": 0, "error": 2}[mode]
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)

    def Stream(self) -> "Cuda":
        return self

    def wait_stream(self, other: object) -> None:
        self.notes.append("waits for the other stream")

    @contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        self.streams.append("side")
        yield_to = len(self.streams)
        try:
            yield
        finally:
            assert len(self.streams) == yield_to, "left in another order"
            self.streams.pop()

    def synchronize(self) -> None:
        assert not self.capturing

    def empty_cache(self) -> None:
        assert not self.pools, "captures_underway is not empty"

    # A graph.
    def capture_begin(self, pool: int) -> None:
        assert self.streams[-1] == "side"
        self.capturing = True
        self.pools.add(pool)
        self.notes.append("begin")

    def capture_end(self) -> None:
        if not self.capturing:
            raise RuntimeError("capture has not begun")
        self.capturing = False
        if self.broken:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.drawing = "as ever"
        self.pools.clear()

    def end_allocate(self, device: int, pool: int) -> None:
        if pool not in self.pools:
            raise RuntimeError("not currently recording to it")
        self.pools.remove(pool)

    # The generator, which counts its numbers for a graph while it is captured.
    drawing = "as ever"

    def clone_state(self) -> str:
        return self.drawing

    def graphsafe_set_state(self, state: str) -> None:
        self.drawing = state

    def work(self, fails: bool) -> int:
        if self.capturing:
            self.drawing = "into a graph"
            self.broken = fails
            if fails:
                raise ValueError("cuSOLVER cannot be captured")
        self.notes.append(f"work on {self.streams[-1]}")
        return 7


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    played = Cuda()
    names = ("set_sync_debug_mode", "Stream", "stream", "synchronize", "empty_cache")
    changed: dict[str, Any] = {name: getattr(played, name) for name in names}
    changed |= {"current_stream": lambda: played, "CUDAGraph": lambda: played}
    changed |= {"current_device": lambda: 0, "graph_pool_handle": lambda: 3}
    changed |= {"default_generators": played.generators, "is_initialized": lambda: True}
    changed |= {"get_sync_debug_mode": lambda: played.mode}
    for name, value in changed.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", played.end_allocate, raising=False)
    return played


def test_the_warning_does_not_leave_the_mode_set(cuda: Cuda) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with no_waits():
            assert cuda.mode == 2
        assert cuda.mode == 0
        with pytest.raises(ValueError, match="a test"), no_waits():
            raise ValueError("a test")
    assert cuda.mode == 0


def test_every_test_ends_with_waits_allowed(cuda: Cuda, request: pytest.FixtureRequest) -> None:
    assert "_waits_are_allowed" in request.fixturenames
    cuda.mode = 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        let_it_wait()
    assert cuda.mode == 0


def test_the_tests_do_not_fail_for_the_warning() -> None:
    """The filters of pyproject.toml, in a process that starts as the tests do."""
    warnings.warn("Synchronization debug mode is a prototype feature and does not", stacklevel=1)
    with pytest.raises(UserWarning):
        warnings.warn("anything else", stacklevel=1)


def test_a_capture_warms_up_aside_and_both_streams_wait(cuda: Cuda) -> None:
    graph, results = captured(lambda: cuda.work(fails=False), warm_up=2)
    assert graph is cuda and results == 7
    wait, aside = "waits for the other stream", "work on side"
    assert cuda.notes == [wait, aside, aside, wait, "begin", aside]
    assert (cuda.streams, cuda.pools, cuda.capturing) == (["default"], set(), False)


def test_a_capture_that_fails_leaves_nothing_behind(cuda: Cuda) -> None:
    with pytest.raises(ValueError, match="cuSOLVER cannot be captured"):
        captured(lambda: cuda.work(fails=True))
    assert cuda.streams == ["default"] and not cuda.capturing
    assert cuda.drawing == "as ever"
    torch.cuda.empty_cache()  # which raises while memory belongs to a capture
    cuda.broken = False
    assert captured(lambda: cuda.work(fails=False))[1] == 7


# What raises on CUDA under deterministic algorithms, which all tests run under (see the page of
# torch.use_deterministic_algorithms), and what leaves a process unfit for the next test.
REFUSED = {
    *("median", "nanmedian", "kthvalue", "histc", "bincount", "cumsum", "put_", "scatter_reduce"),
    *("scatter_reduce_", "resize_", "grid_sample", "interpolate", "ReflectionPad2d", "NLLLoss"),
    *("nll_loss", "AdaptiveAvgPool2d", "AvgPool3d", "MaxUnpool2d", "CTCLoss", "EmbeddingBag"),
    *("set_sync_debug_mode", "CUDAGraph", "graph", "make_graphed_callables"),
}


def on_a_gpu() -> list[Path]:
    """The files of tests with the mark, and of those that have it from the fixture `kernels`."""
    folder = Path(__file__).parent
    words = ("mark.gpu", "kernels: Callable")
    files = [path for path in folder.glob("test_*.py") if path != Path(__file__)]
    return [path for path in files if any(word in path.read_text("utf-8") for word in words)]


def refused(source: str) -> list[str]:
    """The calls of a file that no test on a GPU may make, with their lines."""
    called = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    names = [(getattr(x.func, "attr", getattr(x.func, "id", "")), x.lineno) for x in called]
    wrong = sorted((line, name) for name, line in names if name in REFUSED)
    return [f"{name}, line {line}" for line, name in wrong]


def test_no_test_on_a_gpu_calls_what_raises_there() -> None:
    files = on_a_gpu()
    assert {"test_gpu_krr.py", "test_gpu_cholesky.py"} <= {path.name for path in files}
    assert len(files) > 5
    for path in files:
        assert refused(path.read_text(encoding="utf-8")) == [], path.name
    old = "ours = torch.stack(mine).median(0).values\ntorch.cuda.set_sync_debug_mode('error')"
    assert refused(old) == ["median, line 1", "set_sync_debug_mode, line 2"]


def test_the_tests_are_ours_whatever_is_installed(tmp_path: Path) -> None:
    """Another distribution has installed a package that is called `tests` too."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "__init__.py").write_text("raise ImportError('not ours')")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    script = Path(sys.executable).with_name("pytest")
    pytests = [str(script)] if script.exists() else [sys.executable, "-m", "pytest"]
    for command in (
        [sys.executable, "-c", "import tests.helpers"],  # as `python -m tests.triton_krr` does
        [*pytests, "-q", "-p", "no:cacheprovider", "tests/test_seeding.py"],
    ):
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
