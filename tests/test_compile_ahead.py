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

from krrst_fast import Solver, krr_mse  # noqa: E402
from krrst_fast.backends import triton as triton_backend  # noqa: E402
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
    named = [(f"call {i}", call) for i, call in enumerate(calls)]
    return list(compile_ahead.specialisations(named, 90))


def test_a_specialisation_is_found_once() -> None:
    assert found(product(64, 16), product(64, 16)) == ["product 0 of call 0"]
    # The number of blocks, and of rows in the last block, makes no other binary.
    assert found(product(64, 16), product(6400, 16)) == ["product 0 of call 0"]
    assert len(found(product(64, 16), product(64, 17))) == 2


def test_a_call_that_fails_is_named_and_the_others_are_made(capsys) -> None:
    assert found(lambda: 1 / 0, product(64, 16)) == ["product 0 of call 1"]
    assert capsys.readouterr().out == "not called: call 0: ZeroDivisionError: division by zero\n"


def test_a_new_size_needs_few_new_binaries() -> None:
    """Forward and backward of the loss at sizes that nothing was compiled for."""

    def loss(m: int, b: int) -> Callable[[], Any]:
        sizes = ((m, 2048), (m, 100), (b, 2048), (b, 100))
        leaves = [torch.empty(*size, device="meta", requires_grad=True) for size in sizes]
        solver = Solver(backend="triton", check="flag", precision="fast")
        return lambda: torch.autograd.grad(krr_mse(*leaves, ridge=1e-6, solver=solver), leaves)

    first = found(loss(1000, 1024))
    assert len(first) >= 8
    assert len(found(loss(1000, 1024), loss(1400, 3072))) == len(first)


@pytest.mark.parametrize("toy", [True, False])
def test_the_calls_of_all_stages_reach_every_kernel(toy: bool, capsys) -> None:
    names = list(compile_ahead.specialisations(played.calls(toy), 90))
    assert capsys.readouterr().out == "", "no call fails"
    kernels = {name.split()[0] for name in names}
    assert {"parts", "finish", "product", "residual", "mean", "closing", "views"} <= kernels
    groups = {name.split(" of ")[1].split()[0] for name in names}
    assert "krr" in groups and (toy or {"gram", "test"} <= groups)


def test_a_launch_finds_what_was_compiled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    call = product(64, 10)
    monkeypatch.setattr(compile_ahead, "calls", lambda toy: [("a product", call)])
    assert compile_ahead.main(["--toy", "--jobs", "2"]) == 0
    assert "1 compiled, 0 failed" in capsys.readouterr().out

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
    listener = mock.Mock(side_effect=lambda **event: hits.append(event["cache_hit"]))
    monkeypatch.setattr(triton.knobs.compilation, "listener", listener)
    before = sorted(tmp_path.iterdir())
    # Through `run`, as on a GPU.
    call()
    assert hits == [True] and ran == [(1, 1, 1)]
    assert sorted(tmp_path.iterdir()) == before


def test_the_command(tmp_path: Path) -> None:
    """Compile all kernels of the toy sizes, on a machine that may have no GPU."""
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "bench.gpu.compile_ahead", "--toy"]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    counts = re.search(r"(\d+) compiled, 0 failed", done.stdout)
    assert done.returncode == 0 and counts, done.stdout + done.stderr
    assert int(counts[1]) >= 15 and "not called" not in done.stdout
    # One folder a binary, at least.
    assert len(list(tmp_path.glob("*/*.cubin"))) >= 15


def test_the_played_gpu_is_put_back() -> None:
    run, places = thin_matmul.run, triton_backend.refuses_device
    with played.played_gpu(80, lambda launch: None):
        assert thin_matmul.architecture(torch.empty(0)) == 80
        assert thin_matmul.run is not run
    assert thin_matmul.run is run and triton_backend.refuses_device is places


def test_a_kernel_that_does_not_compile_is_named(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def broken(launch: Any) -> None:
        raise ValueError("no such instruction\nmore")

    monkeypatch.setattr(compile_ahead, "specialisations", lambda calls, arch: {"a": 1, "b": 2})
    monkeypatch.setattr(compile_ahead, "compile_launch", broken)
    assert compile_ahead.main(["--jobs", "2"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "FAILED a: ValueError: no such instruction" and "2 failed" in lines[-1]
