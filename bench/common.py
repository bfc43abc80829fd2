"""What the benchmarks share: ratio of two calls, error of a result, memory of a call."""

import gc
import json
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from krrst_fast.backends import BACKENDS, BackendName
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
    seconds: float = 15.0,
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


def relative_error(got: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest |got - exact| / |exact| of the pairs, in the Frobenius norm."""
    errors = [
        (a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-300)
        for a, b in zip(got, exact, strict=True)
    ]
    return max(error.item() for error in errors)


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


class Case(NamedTuple):
    """One computation, three times: by a backend, by the reference, and by it in float64.

    Calls of `exact` give what the next call of `ours` should.
    """

    ours: Call
    reference: Call
    exact: Call


class Comparison(ABC):
    """What every suite measures. asv skips abstract classes, so this one it does not run."""

    param_names = ("shape", "backend")
    params: tuple[Sequence[Any], Sequence[str]]
    timeout = 1800
    rounds = 1
    repeat = (2, 10, 20.0)
    warmup_time = 0.0
    seconds = 15.0
    """How long the calls take turns."""

    @abstractmethod
    def case(self, shape: Any, backend: BackendName) -> Case:
        """The computation at this shape; `backend` can compute it here."""

    def setup(self, shape: Any, backend: BackendName) -> None:
        """Make the inputs, and call once."""
        torch.set_num_threads(THREADS)
        refuses = {one.name: one.refuses for one in BACKENDS}[backend]
        if refuses(torch.empty(0)) is not None:
            from asv_runner.benchmarks.mark import SkipNotImplemented

            raise SkipNotImplemented(refuses(torch.empty(0)))
        self._case = self.case(shape, backend)
        self._case.ours()

    def time_call(self, shape: Any, backend: str) -> None:
        self._case.ours()

    def track_ratio_to_reference(self, shape: Any, backend: str) -> float:
        return interleaved(self._case.ours, self._case.reference, seconds=self.seconds).ratio

    def track_error(self, shape: Any, backend: str) -> float:
        exact = self._case.exact()
        return relative_error(self._case.ours(), exact)

    def track_peak_mb(self, shape: Any, backend: str) -> float:
        return peak_bytes(self._case.ours) / 1e6

    track_ratio_to_reference.unit = "reference / ours"  # type: ignore[attr-defined]
    track_error.unit = "relative to float64"  # type: ignore[attr-defined]
    track_peak_mb.unit = "MB"  # type: ignore[attr-defined]
