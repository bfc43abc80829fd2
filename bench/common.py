"""Interleaved times, error and memory of calls; random inputs."""

import gc
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from krrst_fast.backends import choose
from krrst_fast.ops.solver import BackendName, Solver
from krrst_fast.runs.seeding import generator

THREADS = 2
LATENT = 64

Call = Callable[[], Sequence[Tensor]]


def medians(
    *calls: Call,
    seconds: float,
    at_least: int = 5,
    at_most: int = 1000,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Time calls interleaved, so that a disturbance of the machine affects all of them.

    Every second round is in reverse order. Garbage is not collected meanwhile.

    Args:
        *calls: Each is called once before.
        seconds: Total duration of the rounds.
        at_least: Smallest number of rounds.
        at_most: Largest number of rounds.
        clock: Returns the current time in seconds.

    Returns:
        The median time of each call in seconds.
    """
    taken: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    collects = gc.isenabled()
    gc.disable()
    try:
        end = time.monotonic() + seconds
        order, rounds = list(range(len(calls))), 0
        while rounds < at_least or (rounds < at_most and time.monotonic() < end):
            order.reverse()
            for which in order:
                start = clock()
                calls[which]()
                taken[which].append(clock() - start)
            rounds += 1
    finally:
        if collects:
            gc.enable()
    return [median(times) for times in taken]


def relative_error(got: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Return the largest |got - exact| / |exact| of the pairs, in the Frobenius norm.

    Raises:
        FloatingPointError: A tensor of either side is not finite.
    """
    errors = [
        (a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-300)
        for a, b in zip(got, exact, strict=True)
    ]
    # Python's max would lose a NaN.
    worst = max(error.item() if error.isfinite() else math.inf for error in errors)
    if worst == math.inf:
        raise FloatingPointError("the result, or the exact one, holds NaN or infinity")
    return worst


def waiting(call: Call, device: str) -> Call:
    """Make a call on a GPU wait until its work there is done."""
    if device == "cpu":
        return call

    def wait() -> Sequence[Tensor]:
        result = call()
        torch.cuda.synchronize()
        return result

    return wait


def peak_mb(call: Call, device: str) -> float:
    """Measure the peak of memory in tensors during a call, less that before, in 10^6 bytes."""
    if device == "cpu":
        return peak_bytes(call) / 1e6
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call()
    torch.cuda.synchronize()
    del kept
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def peak_bytes(call: Callable[[], Any]) -> int:
    """Measure the peak of memory in CPU tensors during a call, less that before, in bytes.

    All allocations by torch count, those of C++ operators included; scratch memory of libraries
    (MKL, packed panels) does not.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        kept = call()
    del kept
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    memory = [event for event in events if event.get("name") == "[memory]"]
    alive = peak = 0
    for event in sorted(memory, key=lambda event: event["ts"]):
        alive += event["args"]["Bytes"]
        peak = max(peak, alive)
    return peak


def solving(backend: BackendName = "auto", **options: Any) -> dict[str, Any]:
    """Return the keywords that select how an operation solves its system.

    Args:
        backend: The implementation.
        **options: Other fields of `krrst_fast.Solver` that differ from the defaults.
    """
    return {"solver": Solver(backend=backend, **options)}


def refusal(backend: str, x: Tensor) -> str | None:
    """Return why a backend cannot compute on tensors like x, or None."""
    try:
        choose(backend, x, "bench")
    except ValueError as error:
        return str(error)
    return None


def features(*rows: int, columns: int, seed: int = 0) -> list[Tensor]:
    """Draw matrices like a network's last activations: half zeros, correlated, not negative.

    Args:
        *rows: Number of rows of each matrix.
        columns: Number of columns of all of them; they share one random layer.
        seed: Seed of the draw.
    """
    draw = generator(seed, "features")
    layer = torch.randn(LATENT, columns, generator=draw) / LATENT**0.5
    return [(torch.randn(n, LATENT, generator=draw) @ layer).relu_() for n in rows]


def targets(*size: int, seed: int = 0) -> Tensor:
    """Draw a tensor of normally distributed numbers."""
    return torch.randn(size, generator=generator(seed, "targets"))
