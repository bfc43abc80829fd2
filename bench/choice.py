"""The choice of a ridge for each target, as encoding models of the brain need it.

    python -m bench.choice [--rows 2000] [--features 20000] [--targets 10000] [--rank 200]
                           [--page FILE]

Ten ridges, float32, by exact leave-one-out errors; himalaya by five folds, its default, which costs
it about as much. Each library runs in a process of its own, in turn, and fits, chooses and predicts
256 rows: seconds, and the peak of the resident memory beyond that of the inputs.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.common import THREADS
from bench.markdown import between, cells, digits, head, rewrite
from krrst_fast import KernelRidgeCV
from krrst_fast.errors import KrrstError

BEGIN = "<!-- bench.choice: from here to the end mark is written by a program -->"
END = "<!-- bench.choice: end -->"
RIDGES = np.logspace(0, 9, 10)
QUERIES = 256
NAMES = ("rows", "features", "targets", "rank")


def inputs(
    rows: int, features: int, targets: int, rank: int = 200
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw X of a rank, Y and queries; each target has noise of its own size."""
    draw = np.random.default_rng(0)

    def features_of(count: int, latent: np.ndarray) -> np.ndarray:
        return draw.standard_normal((count, len(latent)), dtype=np.float32) @ latent

    latent = draw.standard_normal((rank, features), dtype=np.float32)
    x, queries = features_of(rows, latent), features_of(QUERIES, latent)
    some = x[:, :: max(1, features // 200)]
    y = some @ draw.standard_normal((some.shape[1], targets), dtype=np.float32)
    y += np.geomspace(1, 1e3, targets, dtype=np.float32) * draw.standard_normal(
        y.shape, dtype=np.float32
    )
    return x, y, queries


def ours(x: np.ndarray, y: np.ndarray, queries: np.ndarray) -> tuple[Any, Any]:
    """Choose by leave-one-out errors, and predict."""
    model = KernelRidgeCV(RIDGES, per_target=True).fit(x, y)
    return model.ridge_, model.predict(queries)


def himalaya(x: np.ndarray, y: np.ndarray, queries: np.ndarray) -> tuple[Any, Any]:
    """Choose by five folds."""
    from himalaya.kernel_ridge import KernelRidgeCV as Theirs

    model = Theirs(alphas=RIDGES, cv=5).fit(x, y)
    return model.best_alphas_, model.predict(queries)


def scikit_learn(x: np.ndarray, y: np.ndarray, queries: np.ndarray) -> tuple[Any, Any]:
    """Choose by leave-one-out errors."""
    from sklearn.linear_model import RidgeCV

    model = RidgeCV(RIDGES, fit_intercept=False, alpha_per_target=True).fit(x, y)
    return model.alpha_, model.predict(queries)


LIBRARIES: dict[str, Callable[..., tuple[Any, Any]]] = {
    "krrst_fast.KernelRidgeCV": ours,
    "himalaya.kernel_ridge.KernelRidgeCV": himalaya,
    "sklearn.linear_model.RidgeCV": scikit_learn,
}


def resident_mb() -> float:
    """Return the resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


class Peak(threading.Thread):
    """Watch the resident memory from the start on."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.most = resident_mb()
        self.ended = threading.Event()

    def run(self) -> None:
        """Look every five milliseconds."""
        while not self.ended.wait(0.005):
            self.most = max(self.most, resident_mb())


def child(name: str, sizes: list[int]) -> dict[str, Any]:
    """Measure one library in this process."""
    torch.set_num_threads(THREADS)
    small = inputs(50, 60, 7)
    LIBRARIES[name](*small)  # imports, and starts its threads
    given = inputs(*sizes)
    peak = Peak()
    peak.start()
    begin = time.perf_counter()
    ridges, prediction = LIBRARIES[name](*given)
    seconds = time.perf_counter() - begin
    peak.ended.set()
    return {
        "seconds": seconds,
        "peak_mb": peak.most - peak.before,
        "ridges": np.log10(np.asarray(ridges, dtype=np.float64)).mean(),
        "prediction": float(np.linalg.norm(prediction)),
    }


def main(argv: list[str] | None = None) -> int:
    """Print a line for each library."""
    parser = argparse.ArgumentParser(prog="python -m bench.choice")
    for name, value in (("rows", 2000), ("features", 20_000), ("targets", 10_000), ("rank", 200)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the table there, too")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", choices=LIBRARIES, help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    sizes = [asked.rows, asked.features, asked.targets, asked.rank]
    if asked.child:
        print(json.dumps(child(asked.child, sizes)))
        return 0
    try:
        if asked.page:
            between(asked.page, BEGIN, END)
    except KrrstError as error:
        print(error, file=sys.stderr)
        return 2
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in LIBRARIES}
    options = [f"--{name}={size}" for name, size in zip(NAMES, sizes)]
    for _ in range(asked.repeats):
        for name, rows in found.items():
            command = [sys.executable, "-m", "bench.choice", "--child", name, *options]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                rows.append(json.loads(done.stdout.splitlines()[-1]))
            else:
                print(f"{name}: n/a: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
    command = " ".join(["python -m bench.choice", *(sys.argv[1:] if argv is None else argv)])
    lines = list(table(found, sizes, command))
    print(*lines, sep="\n")
    if asked.page:
        rewrite(asked.page, lines, BEGIN, END)
    return 0


def table(found: dict[str, list[dict[str, Any]]], sizes: list[int], command: str) -> Any:
    """Yield the lines of the table: medians over the repeats."""
    yield from head("choice of ten ridges for each target", "s", "peak MB", "mean log10 ridge")
    for name, rows in found.items():
        if rows:
            numbers = [np.median([row[key] for row in rows]) for key in ("seconds", "peak_mb")]
            chosen = digits(float(rows[-1]["ridges"]))
            yield cells(f"`{name}`", *map(digits, map(float, numbers)), chosen)
    rows, features, targets, rank = sizes
    yield ""
    yield (
        f"{rows:,} rows of rank {rank}, {features:,} features, {targets:,} targets, float32, "
        f"{THREADS} threads, medians: `{command}`."
    )


if __name__ == "__main__":
    sys.exit(main())
