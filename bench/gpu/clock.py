"""Times of calls that take turns, by the device's own clock, and what a call that fails says."""

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.common import peak_mb, relative_error
from bench.gpu.notes import Notes

# More than the L2 cache of any GPU: written before each call, so that no call finds its inputs
# there. In a step they come from memory as well: convolutions ran before.
FLUSH_BYTES = 256 << 20
_STABLE = 0.1
_FEWEST, _MOST = 15, 200

Calls = Mapping[str, Callable[[], Any]]


class DeviceLost(Exception):
    """The device computes nothing any more: this process is of no use."""


class Sample(NamedTuple):
    """Milliseconds: the median, the 10th and 90th percentile, and of how many calls."""

    ms: float
    p10: float
    p90: float
    calls: int


def sample(taken: Sequence[float]) -> Sample:
    """Statistics of milliseconds."""
    points = torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64)
    ms, p10, p90 = torch.tensor(list(taken), dtype=torch.float64).quantile(points).tolist()
    return Sample(ms, p10, p90, len(taken))


class Clock:
    """Measures calls on one device.

    Args:
        device: "cuda", timed by events, or "cpu", by the process's clock.
        notes: where it is noted what is being tried.
        quick: as few calls as possible: nobody will read the times.
    """

    def __init__(self, device: str, notes: Notes, *, quick: bool = False) -> None:
        self.device, self.notes, self.quick = device, notes, quick
        self.fewest, self.most = (2, 2) if quick else (_FEWEST, _MOST)
        self._flush = torch.empty(FLUSH_BYTES if device == "cuda" else 0, dtype=torch.uint8)
        self._flush = self._flush.to(device)

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def free(self) -> None:
        """Give memory that nothing uses back to the device."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def once(self, call: Callable[[], Any]) -> float:
        """Milliseconds of one call, with a cold cache."""
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

    def tried(self, call: Callable[[], Any], name: str | None = None) -> tuple[Any, str | None]:
        """(result, None), or (None, why there is none).

        Args:
            call: what is tried.
            name: what is left out from now on if it takes the process with it, or never ends.

        Raises:
            DeviceLost: after this call the device is of no use.
        """
        if name in self.notes.broken:
            return None, self.notes.broken[name]
        with self.notes.attempt(name) if name else nullcontext():
            try:
                result = call()
                self.wait()
                return result, None
            except Exception as error:
                self.require_device(error)
                return None, reason(error)

    def require_device(self, error: Exception) -> None:
        """Raise DeviceLost if nothing can be computed after this error."""
        try:
            self.wait()
        except Exception as lost:
            raise DeviceLost(reason(error)) from lost

    def in_turn(
        self, calls: Calls, *, seconds: float, names: Mapping[str, str] | None = None
    ) -> dict[str, Sample | str]:
        """Time calls in turn; a call that fails has its reason instead.

        Each is first called until its time is stable. Rounds are made for `seconds`, at least 15
        unless they take three times as long, at most 200; who goes first changes.

        Args:
            calls: by name.
            seconds: for all rounds.
            names: what is left out if a call takes the process with it (see `tried`).
        """
        found: dict[str, Sample | str] = {}
        for name, call in calls.items():
            _, why = self.tried(partial(self._warm, call), (names or {}).get(name))
            if why is not None:
                found[name] = why
        alive = [name for name in calls if name not in found]
        taken: dict[str, list[float]] = {name: [] for name in alive}
        gc.collect()
        gc.disable()
        try:
            begin = time.monotonic()
            seconds = math.inf if self.quick else seconds
            for turn in range(self.most if alive else 0):
                spent = time.monotonic() - begin
                if turn and spent > (seconds if turn >= self.fewest else 3 * seconds):
                    break
                first = turn % len(alive)
                for name in alive[first:] + alive[:first]:
                    taken[name].append(self.once(calls[name]))
        finally:
            gc.enable()
        return found | {name: sample(times) for name, times in taken.items()}

    def _warm(self, call: Callable[[], Any]) -> None:
        """Call until two times in a row are alike; the first compiles, and is never counted."""
        times = [self.once(call) for _ in range(2)]
        while len(times) < min(8, self.most) and abs(times[-1] - times[-2]) > _STABLE * times[-2]:
            times.append(self.once(call))

    def peak_mb(self, call: Callable[[], Sequence[Tensor]]) -> float:
        """The most memory alive in a call beyond that before it."""
        return peak_mb(call, self.device)


def error_of(got: Tensor, exact: Tensor) -> float | str:
    """|got - exact| / |exact|, or that it is not finite."""
    try:
        return relative_error([got], [exact])
    except FloatingPointError as error:
        return str(error)


def reason(error: BaseException) -> str:
    """An exception in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
