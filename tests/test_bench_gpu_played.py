"""The rows of a GPU run on a GPU that is played: what mixes devices there fails here already."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.played_gpu import played_gpu

sys.path.append(str(Path(__file__).resolve().parent.parent))
clock = import_module("bench.gpu.clock")
measure = import_module("bench.gpu.measure")
results = import_module("bench.gpu.results")


class Clock(clock.Clock):
    """The times are the processor's; graphs and profiles are made by calls."""

    def peak_mb(self, call: Any) -> float:
        call()
        return 1.0

    def graph(self, call: Any, *, seconds: float) -> dict[str, Any]:
        return {**self.alone(call, seconds=seconds), "same_bits": True}

    def profile(self, call: Any, **_: Any) -> dict[str, Any]:
        call()
        return {"kernel_ms": 1.0}


@pytest.mark.parametrize("stage", ["krr", "step", "steps", "parts"])
def test_every_row_of_a_stage_is_made_on_a_gpu(stage: str) -> None:
    rows: dict[str, dict[str, Any]] = {}
    with played_gpu():
        run = measure.Run(stage, "cuda", True, None, Clock("cpu", quick=True), rows.get)
        for unit in import_module(f"bench.gpu.{stage}").units(True):
            for name, make in unit.rows(run):
                rows[name], _ = measure.attempt(run.clock, make)
    wrong = {name: results.wrong(row) for name, row in rows.items() if results.wrong(row)}
    assert wrong == {} and len(rows) >= 2
    of_torch = [row for name, row in rows.items() if "torch" in name and "refused" not in row]
    assert stage not in ("krr", "parts") or len(of_torch) >= 2
