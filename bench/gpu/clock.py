"""Times on one device: of calls that take turns, of a graph that is replayed, kernel by kernel."""

import gc
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from bench.common import peak_mb, relative_error
from krrst_fast.runs.capture import capturing

# More than the L2 cache of any GPU: written before each call, so that no call finds its inputs
# there. In a step they come from memory as well: convolutions ran before.
FLUSH_BYTES = 256 << 20
DRIFT = 0.01
"""How far a graph may be from a call: some roundings, times the condition number."""
_STABLE = 0.1
_FEWEST, _MOST = 7, 200
# Before this version a capture that fails leaves torch's allocator in the middle of it
# (pytorch/pytorch#180395).
_RECOVERS = (2, 12)

T = TypeVar("T")
Calls = Mapping[str, Callable[[], Any]]


class DeviceLost(Exception):
    """The device computes nothing any more for this process."""


class Sample(NamedTuple):
    """Milliseconds: the median, the 10th and 90th percentile, and of how many calls."""

    ms: float
    p10: float
    p90: float
    calls: int


def sample(taken: Sequence[float]) -> Sample:
    """Compute the statistics of some milliseconds."""
    points = torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64)
    ms, p10, p90 = torch.tensor(list(taken), dtype=torch.float64).quantile(points).tolist()
    return Sample(ms, p10, p90, len(taken))


class Clock:
    """A timer of calls on one device.

    Args:
        device: "cuda", timed by events, or "cpu", by the process's clock.
        quick: Make as few calls as possible, for dry runs.

    Attributes:
        spoilt: This process can measure nothing more, though the device can.
    """

    def __init__(self, device: str, *, quick: bool = False) -> None:
        self.device, self.spoilt = device, False
        self.fewest, self.most = (2, 2) if quick else (_FEWEST, _MOST)
        self._flush = torch.empty(
            FLUSH_BYTES if device == "cuda" else 0, dtype=torch.uint8, device=device
        )

    def wait(self) -> None:
        """Wait until the device has done everything."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def free(self) -> None:
        """Give memory that nothing uses back to the device."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def once(self, call: Callable[[], Any]) -> float:
        """Time one call in milliseconds, with a cold cache."""
        if self.device != "cuda":
            begin = time.perf_counter()
            call()
            return (time.perf_counter() - begin) * 1e3
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def require_device(self, error: Exception) -> None:
        """Raise DeviceLost if nothing can be computed after this error."""
        try:
            self.wait()
        except Exception as lost:
            raise DeviceLost(reason(error)) from lost

    def in_turn(self, calls: Calls, *, seconds: float) -> dict[str, Sample]:
        """Time calls in turn for so many seconds, once each has been called until it is stable.

        At least 7 rounds are made, unless they take three times as long, at most 200; which call
        comes first changes from round to round.
        """
        for call in calls.values():
            self._warm(call)
        names, taken = list(calls), {name: [] for name in calls}
        gc.collect()
        gc.disable()
        try:
            begin = time.monotonic()
            for turn in range(self.most):
                spent = time.monotonic() - begin
                if turn and spent > (seconds if turn >= self.fewest else 3 * seconds):
                    break
                first = turn % len(names)
                for name in names[first:] + names[:first]:
                    taken[name].append(self.once(calls[name]))
        finally:
            gc.enable()
        return {name: sample(times) for name, times in taken.items()}

    def alone(self, call: Callable[[], Any], *, seconds: float = 0.2) -> dict[str, Any]:
        """Time one call."""
        return self.in_turn({"call": call}, seconds=seconds)["call"]._asdict()

    def _warm(self, call: Callable[[], Any]) -> None:
        """Call until two times in a row are alike; the first may compile, and is never counted."""
        times = [self.once(call) for _ in range(2)]
        while len(times) < min(8, self.most) and abs(times[-1] - times[-2]) > _STABLE * times[-2]:
            times.append(self.once(call))

    def peak_mb(self, call: Callable[[], Sequence[Tensor]]) -> float:
        """Measure the most memory alive in a call beyond that before it."""
        return peak_mb(call, self.device)

    def graph(self, call: Callable[[], Sequence[Tensor]], *, seconds: float) -> dict[str, Any]:
        """Capture a call in a CUDA graph; time its replay, and compare its bits with a plain call.

        A capture that fails is "failed", and the process may be spoilt by it.

        Raises:
            FloatingPointError: The graph left NaN.
        """
        if self.device != "cuda":
            return {"refused": "there are no graphs on a CPU"}
        plain = [x.clone() for x in call()]
        try:
            captured, result = capture(call)
        except Exception as error:
            self.spoilt = torch_version() < _RECOVERS
            self.require_device(error)
            return {"failed": reason(error)}
        for x in result:
            x.fill_(float("nan") if x.is_floating_point() else -1)
        captured.replay()
        self.wait()
        # Libraries may choose another algorithm on another stream; what is stale is NaN.
        same = all(torch.equal(a, b) for a, b in zip(result, plain, strict=True))
        drift = 0.0 if same else relative_error(result, plain)
        row = {**self.alone(captured.replay, seconds=seconds), "same_bits": same}
        return row if drift <= DRIFT else {**row, "wrong": [f"a call differs by {drift:.1e}"]}

    def profile(self, call: Callable[[], Any], *, calls: int = 3, top: int = 12) -> dict[str, Any]:
        """Sum up a call's kernels: their time beside the elapsed one, launches, the largest."""
        call()
        kind = torch.profiler.ProfilerActivity.CUDA if self.device == "cuda" else None
        self.wait()
        with torch.profiler.profile(
            activities=[kind or torch.profiler.ProfilerActivity.CPU]
        ) as found:
            begin = time.perf_counter()
            for _ in range(calls):
                call()
            self.wait()
            elapsed = (time.perf_counter() - begin) * 1e3 / calls
        return {"elapsed_ms": elapsed, **kernels(found.key_averages(), self.device, calls, top)}


def kernels(events: Any, device: str, calls: int, top: int) -> dict[str, Any]:
    """Sum up a profile's events, and list those with most time of their own, a call."""
    field = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    # Beside the kernels there are events of the CPU, which are given the time of theirs.
    gpu = torch.autograd.DeviceType.CUDA
    rows = [
        {"name": x.key[:100], "launches": x.count / calls, "ms": getattr(x, field) / calls / 1e3}
        for x in events
        if device != "cuda" or (x.device_type == gpu and not x.is_user_annotation)
    ]
    rows = sorted((row for row in rows if row["ms"] > 0), key=lambda row: -row["ms"])
    if not rows:
        return {"failed": "the profiler saw no kernel"}
    total, launches = (sum(row[name] for row in rows) for name in ("ms", "launches"))
    return {"kernel_ms": total, "launches": launches, "largest": rows[:top]}


def capture(call: Callable[[], T], warm_up: int = 3) -> tuple[Any, T]:
    """Capture a call in a CUDA graph, after some plain calls on the same stream.

    Returns:
        The graph, and the results that each replay writes to.

    Raises:
        Whatever `call` or the capture raises; stream, memory and random numbers are as before.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream), capturing(graph):
        results = call()
    return graph, results


def torch_version() -> tuple[int, ...]:
    """Return the major and minor version of torch."""
    return tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))


def reason(error: BaseException) -> str:
    """Return an exception in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
