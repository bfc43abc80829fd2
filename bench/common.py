"""What the benchmarks share: ratio of two calls, error of a result, memory of a call."""

import gc
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from krrst_fast.seeding import generator

THREADS = 2
LATENT = 64

Call = Callable[[], Sequence[Tensor]]


class Timing(NamedTuple):
    """Medians of calls that took turns.

    Attributes:
        ours: seconds.
        reference: seconds.
        pairs: how many calls of each.
    """

    ours: float
    reference: float
    pairs: int

    @property
    def ratio(self) -> float:
        """How many times as fast ours is."""
        return self.reference / self.ours


def interleaved(
    ours: Call,
    reference: Call,
    *,
    seconds: float,
    at_least: int = 5,
    at_most: int = 1000,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Time two calls in turn, so that whatever disturbs this machine disturbs both.

    Each is called once before. Pairs are taken for `seconds`, at least `at_least` and at most
    `at_most` of them; who goes first alternates.
    """
    calls = (ours, reference)
    taken: tuple[list[float], list[float]] = ([], [])
    ours()
    reference()
    collects = gc.isenabled()
    gc.disable()
    try:
        end = time.monotonic() + seconds
        pair = 0
        while pair < at_least or (pair < at_most and time.monotonic() < end):
            for which in (0, 1) if pair % 2 else (1, 0):
                start = clock()
                calls[which]()
                taken[which].append(clock() - start)
            pair += 1
    finally:
        if collects:
            gc.enable()
    return Timing(median(taken[0]), median(taken[1]), pair)


def median_seconds(call: Call, *, seconds: float, at_least: int = 3, at_most: int = 300) -> float:
    """Median time of a call that was called before."""
    taken: list[float] = []
    end = time.monotonic() + seconds
    while len(taken) < at_least or (len(taken) < at_most and time.monotonic() < end):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return median(taken)


def relative_error(got: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest |got - exact| / |exact| of the pairs, in the Frobenius norm.

    Raises:
        FloatingPointError: a result, or what it is compared with, is not finite.
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
    """The call, which on a GPU waits for what it started."""
    if device == "cpu":
        return call

    def wait() -> Sequence[Tensor]:
        result = call()
        torch.cuda.synchronize()
        return result

    return wait


def peak_mb(call: Call, device: str) -> float:
    """The most memory (10^6 bytes) of tensors alive at once in a call, beyond that before it."""
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
    """The most bytes of CPU tensors that were alive at once in a call, beyond those before it.

    Whoever asks torch's allocator is counted, C++ operators too; scratch memory of a library
    (MKL's, a packed panel) is not.
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


def features(*rows: int, columns: int, seed: int = 0) -> list[Tensor]:
    """Matrices that look like a network's last activations: half zeros, correlated, none negative.

    Args:
        rows: of each matrix.
        columns: of all of them; they share one random layer.
    """
    draw = generator(seed, "features")
    layer = torch.randn(LATENT, columns, generator=draw) / LATENT**0.5
    return [(torch.randn(n, LATENT, generator=draw) @ layer).relu_() for n in rows]
