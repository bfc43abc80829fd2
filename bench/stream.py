"""A fit of a memory-mapped file: seconds, peak memory, and what the solution leaves of its system.

    python -m bench.stream --rows 22000 --features 100000 --targets 2000 [--folder DIR]

The file, rows x features of random float32, is written first, and deleted at the end. The residual
of the system is computed in float64 for some rows (where there are more rows than features, for
some features), which reads the file once more.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from bench.common import THREADS
from krrst_fast import KRRFit, krr_fit
from krrst_fast.ops.arrays import row_blocks

CHECKED = 16
_BLOCK = 2**24


def write(path: Path, rows: int, features: int) -> np.memmap:
    """Write random numbers, and map them."""
    draw, many = np.random.default_rng(0), max(1, _BLOCK // features)
    with path.open("wb") as file:
        for first in range(0, rows, many):
            count = min(many, rows - first)
            draw.standard_normal((count, features), dtype=np.float32).tofile(file)
    return np.memmap(path, np.float32, "r", shape=(rows, features))


def peak_mb() -> float:
    """Return the largest resident memory of this process since `reset_peak`."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+)", status)
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def reset_peak() -> None:
    """Forget the peak so far."""
    Path("/proc/self/clear_refs").write_text("5")


def dual_error(fit: KRRFit, x: np.ndarray, y: np.ndarray) -> float:
    """Return |(K + lam I) alpha - y| / |y| for some rows, in float64."""
    rows = np.linspace(0, len(x) - 1, CHECKED).astype(int)
    some = torch.from_numpy(np.array(x[rows])).double()
    found = float(fit.info.ridge) * fit.alpha[rows].double()
    for first, last, block in row_blocks(x):
        found += (some @ block.double().mT) @ fit.alpha[first:last].double()
    exact = torch.from_numpy(np.array(y[rows])).double()
    return float((found - exact).norm() / exact.norm())


def primal_error(fit: KRRFit, x: np.ndarray, y: np.ndarray) -> float:
    """Return |(X^T X + lam I) W - X^T y| / |X^T y| for some features, in float64."""
    features = np.linspace(0, x.shape[1] - 1, CHECKED).astype(int)
    found, weights = float(fit.info.ridge) * fit.weights[features].double(), fit.weights.double()
    exact = torch.zeros_like(found)
    for first, last, block in row_blocks(x):
        rows = block.double()
        found += rows[:, features].mT @ (rows @ weights)
        exact += rows[:, features].mT @ torch.from_numpy(np.array(y[first:last])).double()
    return float((found - exact).norm() / exact.norm())


def measure(path: Path, rows: int, features: int, targets: int) -> dict[str, float | str]:
    """Fit, and measure."""
    x = write(path, rows, features)
    y = np.random.default_rng(1).standard_normal((rows, targets), dtype=np.float32)
    krr_fit(np.ones((4, 8), np.float32), np.ones((4, 1), np.float32))  # starts the threads
    reset_peak()
    before, begin = peak_mb(), time.perf_counter()
    fit = krr_fit(x, y)
    seconds, peak = time.perf_counter() - begin, peak_mb()
    check = primal_error if fit.info.form == "primal" else dual_error
    return {
        "form": fit.info.form,
        "seconds": round(seconds, 2),
        "peak_mb": round(peak),
        "before_mb": round(before),
        "file_mb": round(x.nbytes / 1e6),
        "error": check(fit, x, y),
    }


def main(argv: list[str] | None = None) -> int:
    """Print one line."""
    parser = argparse.ArgumentParser(prog="python -m bench.stream")
    for name, value in (("rows", 4000), ("features", 20_000), ("targets", 200)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--folder", type=Path, help="where the file is written")
    asked = parser.parse_args(argv)
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        sizes = asked.rows, asked.features, asked.targets
        found = measure(Path(folder) / "rows.f32", *sizes)
    print(json.dumps({"rows": asked.rows, "features": asked.features, **found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
