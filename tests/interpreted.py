"""Calls of the Triton kernels under Triton's interpreter, in a process of their own.

The interpreter is chosen by an environment variable when triton is first imported, for a whole
process: run as a program, this file is that process. It reads pickled calls and writes results.
"""

import importlib
import os
import pickle
import subprocess
import sys
import traceback
from types import TracebackType
from typing import Any
from unittest import mock

import torch


class Interpreter:
    """call("gram.gram", x, 1.0, 0.0) is krrst_fast.kernels.gram.gram(x, 1.0, 0.0)."""

    def __enter__(self) -> "Interpreter":
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        )
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()

    def __call__(self, name: str, *args: Any, **options: Any) -> Any:
        pickle.dump((name, args, options), self._process.stdin)
        self._process.stdin.flush()
        value, error = pickle.load(self._process.stdout)
        assert error is None, f"{name} in the interpreter: {error}"
        return value


def call(name: str, *args: Any, cut: tuple[int, int, int] | None = None, **options: Any) -> Any:
    """A function of krrst_fast.kernels, by the name of its module and its own.

    `cut` replaces the splits, their length and that of their runs, as only large products have it.
    """
    module, _, function = name.partition(".")
    called = getattr(importlib.import_module(f"krrst_fast.kernels.{module}"), function)
    if cut is None:
        return called(*args, **options)
    tiles = importlib.import_module("krrst_fast.kernels.tiles")
    with mock.patch.object(tiles, "cut", lambda *sizes: tiles.Depth(*cut)):
        return called(*args, **options)


def call_on_gpu(name: str, *args: Any, **options: Any) -> Any:
    """The same on the GPU: tensors go there as they lie in memory, results come back."""

    def moved(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        storage = value.untyped_storage().cuda()
        empty = torch.empty(0, dtype=value.dtype, device="cuda")
        return empty.set_(storage, value.storage_offset(), value.shape, value.stride())

    value = call(name, *map(moved, args), **{k: moved(v) for k, v in options.items()})
    return tuple(x.cpu() for x in value) if isinstance(value, tuple) else value.cpu()


def _serve() -> None:
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    torch.use_deterministic_algorithms(True)
    while True:
        try:
            name, args, options = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            reply = call(name, *args, **options), None
        except Exception:
            reply = None, traceback.format_exc()
        pickle.dump(reply, out)
        out.flush()


if __name__ == "__main__":
    _serve()
