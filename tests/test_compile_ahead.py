"""What is compiled ahead is what is launched: a launch finds it in the cache."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

from krrst_fast import gpu, krr_mse  # noqa: E402
from krrst_fast.kernels import thin_matmul  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
# Last: what is installed under test comes first.
sys.path.append(str(ROOT))
compile_ahead = import_module("bench.gpu.compile_ahead")
played = import_module("bench.gpu.played")


def product(rows: int, columns: int, depth: int = 64) -> Callable[[], Any]:
    """F W on the played GPU."""
    f, w = (torch.empty(*size, device="meta") for size in ((rows, depth), (depth, columns)))
    return partial(thin_matmul.thin_matmul, f, w)


def found(*calls: Callable[[], Any]) -> list[str]:
    missed: list[str] = []
    named = ((f"call {i}", call) for i, call in enumerate(calls))
    names = [job.name for job in compile_ahead.jobs(named, 90, missed)]
    assert missed == []
    return [name for name in names if not name.startswith("launcher")]


def test_a_specialisation_is_found_once() -> None:
    assert found(product(64, 16), product(64, 16)) == ["product of call 0"]
    # How many blocks there are, and how many rows are in the last one, makes no other binary.
    assert found(product(64, 16), product(6400, 16)) == ["product of call 0"]
    assert found(product(64, 16), product(64, 17)) == ["product of call 0", "product of call 1"]


@pytest.mark.parametrize("at_once", [1, 2])
def test_every_job_is_done_by_as_many_processes_as_there_are(at_once: int) -> None:
    todo = [compile_ahead.Job(str(i), lambda: True) for i in range(3)]
    done = list(compile_ahead.compiled(todo, 90, at_once))
    assert sorted(one.name for one in done) == ["0", "1", "2"]
    assert all(one.cached and not one.failed for one in done)


def test_calls_that_fail_are_told_and_the_others_made() -> None:
    missed: list[str] = []
    calls = [("bad", lambda: 1 / 0), ("good", product(64, 16))]
    names = [job.name for job in compile_ahead.jobs(calls, 90, missed)]
    assert "product of good" in names
    assert missed == ["bad: ZeroDivisionError: division by zero"]


def test_a_new_size_needs_few_new_binaries() -> None:
    """Forward and backward of the loss at sizes that nothing was compiled for."""

    def loss(m: int, b: int) -> Callable[[], Any]:
        sizes = ((m, 2048), (m, 100), (b, 2048), (b, 100))
        leaves = [torch.empty(*size, device="meta", requires_grad=True) for size in sizes]
        how: dict[str, Any] = {"backend": "triton", "ridge": 1e-6, "check": "flag"}
        return lambda: torch.autograd.grad(krr_mse(*leaves, precision="fast", **how), leaves)

    first = found(loss(1000, 1024))
    assert len(first) >= 8
    assert len(found(loss(1000, 1024), loss(1400, 3072))) == len(first)


@pytest.mark.parametrize("toy", [True, False])
def test_every_stage_tells_its_calls(toy: bool) -> None:
    """Nothing is compiled: that no call fails, and what they launch."""
    missed: list[str] = []
    names = [job.name for job in compile_ahead.jobs(compile_ahead.calls(toy, missed), 90, missed)]
    assert missed == []
    kernels = {name.split(" of ")[0] for name in names}
    assert {"parts", "finish", "product", "residual", "mean", "closing", "views"} <= kernels
    groups = {name.split(" of ")[1].split()[0] for name in names if " of " in name}
    assert "krr" in groups and (toy or {"gram", "selftest", "test"} <= groups)


def _fails() -> bool:
    raise ValueError("first line\nno such instruction")


def test_a_job_that_fails_or_dies_takes_no_other_with_it() -> None:
    work: list[Callable[[], bool]] = [_fails, lambda: os._exit(3), lambda: True, lambda: False]
    todo = [compile_ahead.Job(str(i), job) for i, job in enumerate(work)]
    done = {one.name: one for one in compile_ahead.compiled(todo, 90, 2)}
    assert len(done) == 4
    assert done["0"].failed == "ValueError: no such instruction"
    assert done["1"].failed == "its process ended with 3"
    assert (done["2"].cached, done["3"].cached) == (True, False)
    assert not done["2"].failed and not done["3"].failed


def test_a_launch_finds_what_was_compiled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    call = product(64, 10)

    def stage(toy: bool) -> Any:
        yield "a product", call
        if not toy:
            raise KeyError("what is this")

    monkeypatch.setattr(compile_ahead, "GROUPS", (stage,))
    monkeypatch.setattr(compile_ahead, "linked", lambda: False)
    assert compile_ahead.main(["--toy", "--jobs", "2"]) == 0
    assert "1 compiled, 0 there before, 0 failed" in capsys.readouterr().out
    assert compile_ahead.main(["--jobs", "2"]) == 0
    told = capsys.readouterr().out
    assert "0 compiled, 1 there before, 0 failed" in told and "not called: stage: KeyError" in told

    hits, ran = [], []
    launcher = SimpleNamespace(
        utils=SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 227 << 10},
            load_binary=lambda name, kernel, shared, device: (1, 2, 64, 0, 1024),
            unload_module=lambda module: None,
        ),
        launcher_cls=lambda source, metadata: lambda *arguments: ran.append(arguments[:3]),
        get_current_target=compile_ahead.PlayedDriver(90).get_current_target,
        # Not the number that compiling ahead has: this process has nothing of it in memory.
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", launcher)
    listener = mock.Mock(side_effect=lambda **told: hits.append(told["cache_hit"]))
    monkeypatch.setattr(triton.knobs.compilation, "listener", listener)
    before = sorted(tmp_path.iterdir())
    # Through `run`, as on a GPU.
    call()
    assert hits == [True] and ran == [(1, 1, 1)]
    assert sorted(tmp_path.iterdir()) == before


def test_the_command(tmp_path: Path) -> None:
    """Toy sizes with all their kernels, on a machine that may have no GPU."""
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "bench.gpu.compile_ahead", "--toy"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    counts = re.search(r"(\d+) compiled, (\d+) there before, (\d+) failed", done.stdout)
    assert done.returncode == 0 and counts, done.stdout + done.stderr
    assert int(counts[1]) >= 15 and counts[2] == counts[3] == "0"
    assert "not called" not in done.stdout
    # One folder a binary, at least.
    assert len(list(tmp_path.glob("*/*.cubin"))) >= 15


def test_the_played_gpu_is_put_back() -> None:
    run, places = thin_matmul.run, gpu._place_refuses
    with played.played_gpu(80, lambda launch: None):
        assert thin_matmul.architecture(torch.empty(0)) == 80
        assert thin_matmul.run is not run
    assert thin_matmul.run is run and gpu._place_refuses is places
