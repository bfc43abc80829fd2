"""The metrics.jsonl of a run, and its totals: seconds and peak memory, across interruptions."""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from krrst_fast.runs import environment
from krrst_fast.runs.files import append_jsonl
from krrst_fast.runs.sinks import Sinks


class RunLog:
    """The log of a run that goes on from `step`.

    Args:
        path: The metrics.jsonl.
        step: Steps done before this process.
        batch_size: Images in a step, to log images a second; None logs steps a second.
        device: Device of the run.
        totals: Totals of the run so far; updated in place.
        sinks: Get every row after the file has it; none if left out.
    """

    def __init__(
        self,
        path: Path,
        *,
        step: int,
        batch_size: int | None,
        device: torch.device,
        totals: dict[str, float],
        sinks: Sinks | None = None,
    ) -> None:
        self._path, self._batch_size, self._device = path, batch_size, device
        self._totals, self._sinks = totals, sinks
        self._counted = time.perf_counter()
        self._row_step, self._row_seconds = step, totals["seconds"]

    def count_time(self) -> None:
        """Add the time since the last call to the totals, and update the peak memory."""
        now = time.perf_counter()
        self._totals["seconds"] += now - self._counted
        self._counted = now
        peak = environment.peak_memory_mb(self._device)
        self._totals["peak_memory_mb"] = max(self._totals["peak_memory_mb"], peak)

    def write(self, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Append the row of a step, with speed and totals beside its values. Returns the row.

        That of the step at which the log begins has no speed.
        """
        self.count_time()
        seconds = self._totals["seconds"]
        steps = step - self._row_step
        passed = max(seconds - self._row_seconds, 1e-9)
        row = {
            "step": step,
            **values,
            **(_speed(steps, passed, self._batch_size) if steps else {}),
            "seconds": seconds,
            "peak_memory_mb": self._totals["peak_memory_mb"],
        }
        append_jsonl(self._path, row)
        if self._sinks is not None:
            self._sinks.write(row)
        self._row_step, self._row_seconds = step, seconds
        return row


def _speed(steps: int, seconds: float, batch_size: int | None) -> dict[str, float]:
    if batch_size is None:
        return {"steps_per_second": steps / seconds}
    return {"images_per_second": steps * batch_size / seconds}


def due(step: int, every: int, last: int) -> bool:
    """Return whether something that happens `every` so many steps, and at the last, is due."""
    return step % every == 0 or step == last


def loss_at_end(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the mean loss of the last tenth of the logged steps (of 10 at least), None of none.

    One outer loss says little: it depends on the network that was drawn.
    """
    found = (row.get("loss") for row in rows)
    losses = [x for x in found if isinstance(x, int | float) and math.isfinite(x)]
    last = losses[-max(10, len(losses) // 10) :]
    return math.fsum(last) / len(last) if last else None


def summary(totals: Mapping[str, float], steps: int, batch_size: int | None) -> dict[str, float]:
    """Return the totals of a finished run, with its speed; `batch_size` as of `RunLog`."""
    return {
        "steps": steps,
        "seconds_per_step": totals["seconds"] / steps,
        **_speed(steps, totals["seconds"], batch_size),
        **totals,
    }
