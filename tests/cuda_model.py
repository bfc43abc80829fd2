"""The CUDA Cholesky played on the CPU: builds tests/cuda_model.cpp and calls it."""

import os
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
ORDERS = {"forward": 0, "backward": 1, "shuffled": 2}
SANITIZED = ["-fsanitize=address,bounds,alignment", "-fno-sanitize-recover=all"]


def build(folder: Path, csrc: Path = ROOT / "csrc") -> Path:
    """Compile the model with the headers of `csrc`; with the sanitizers, where there are any."""
    compiler = shutil.which("c++")
    assert compiler is not None, "the model of the CUDA kernels needs a C++ compiler"
    program = folder / "cuda_model"
    source = ROOT / "tests" / "cuda_model.cpp"
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{csrc}"]
    command += [str(source), "-o", str(program)]
    if subprocess.run([*command, *SANITIZED], capture_output=True).returncode:
        subprocess.run(command, check=True)
    return program


def _flat(x: NDArray) -> tuple[NDArray, list[int]]:
    """The memory from the first to the last entry of x, and its strides in entries."""
    if x.size == 0:
        return x.reshape(-1), [0] * x.ndim
    strides = [s // x.itemsize for s in x.strides]
    length = 1 + sum((n - 1) * s for n, s in zip(x.shape, strides))
    return np.lib.stride_tricks.as_strided(x, (length,), (x.itemsize,)), strides


@dataclass
class Model:
    """The built program; each call is a process of its own."""

    program: Path

    def _run(self, header: list[int], *arrays: NDArray) -> bytes:
        data = struct.pack(f"{len(header)}q", *header) + b"".join(a.tobytes() for a in arrays)
        # Leaks are not what is looked for, and to look for them needs rights that CI may not give.
        env = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
        done = subprocess.run([self.program], input=data, capture_output=True, env=env)
        assert done.returncode == 0, done.stderr.decode()[-3000:]
        return done.stdout

    def cholesky(
        self,
        k: NDArray,
        ridge: NDArray,
        y: NDArray | None = None,
        *,
        result: type = np.float64,
        order: str = "forward",
    ) -> tuple[NDArray, NDArray, NDArray]:
        """Factors of k [N, M, M] + ridge [N] I, L^-1 y [M, P] and pivots [N]."""
        n, m, _ = k.shape
        y = np.zeros((m, 0), k.dtype) if y is None else y
        p = y.shape[1]
        k_flat, (k_problem, k_row, k_column) = _flat(k)
        y_flat, (y_row, y_column) = _flat(y)
        header = [0, k.dtype == np.float64, result == np.float64, n, m, p, ORDERS[order]]
        header += [k_flat.size, k_row, k_column, k_problem, y_flat.size, y_row, y_column, 0]
        header += [ridge.dtype == np.float64, 1]
        out = self._run([int(x) for x in header], k_flat, y_flat, ridge)
        size = np.dtype(result).itemsize
        assert len(out) == size * (n * m * m + m * p) + 4 * n
        factor = np.frombuffer(out, result, n * m * m).reshape(n, m, m).transpose(0, 2, 1)
        half = np.frombuffer(out, result, m * p, size * n * m * m).reshape(m, p)
        return factor, half, np.frombuffer(out, np.int32, n, len(out) - 4 * n)

    def solve(self, y: NDArray, factor: NDArray, order: str = "forward") -> NDArray:
        """(L L^T)^-1 y [N, M, P] for float64 factors [N, M, M]."""
        n, m, p = y.shape
        f_flat, (f_problem, f_row, f_column) = _flat(factor)
        y_flat, (y_problem, y_row, y_column) = _flat(y)
        header = [1, y.dtype == np.float64, 1, n, m, p, ORDERS[order]]
        header += [f_flat.size, f_row, f_column, f_problem]
        header += [y_flat.size, y_row, y_column, y_problem, 0, 0]
        out = self._run([int(x) for x in header], f_flat, y_flat)
        assert len(out) == y.itemsize * n * m * p
        return np.frombuffer(out, y.dtype).reshape(n, p, m).transpose(0, 2, 1)
