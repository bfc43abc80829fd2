"""Table of the KRR loss and its gradients against the reference: python -m bench.ratios

Times are medians of calls that took turns. `error` is the largest relative error of the loss and
the two gradients against the reference in float64.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from bench.bench_krr import FLOORS, Shape, krr_case
from bench.common import THREADS, Timing, interleaved, relative_error
from krrst_fast.backends import BackendName
from krrst_fast.environment import describe
from krrst_fast.planner import plan

HEADER = (
    "    M     P      D     B  form    reference ms    ours ms  ratio  at least  pairs"
    "  error of reference  of ours"
)


class Row(NamedTuple):
    """One line of the table: seconds, and errors relative to float64."""

    shape: Shape
    timing: Timing
    error: float
    reference_error: float

    def below(self, floor: float) -> bool:
        return self.timing.ratio < floor

    def __str__(self) -> str:
        m, p, d, b = self.shape
        ours, reference, pairs = self.timing
        return (
            f"{m:5d} {p:5d} {d:6d} {b:5d}  {plan(m=m, b=b, d=d, p=p).form:6s}"
            f"{reference * 1e3:14.2f} {ours * 1e3:10.2f} {self.timing.ratio:6.2f}"
            f" {FLOORS.get(self.shape, 0.0):9.1f} {pairs:6d} {self.reference_error:19.1e}"
            f" {self.error:8.1e}"
        )


def measure(shape: Shape, *, backend: BackendName, seconds: float, clock: str) -> Row:
    """Time a shape and look at what it computes."""
    case = krr_case(shape, backend)
    exact = case.exact()
    errors = relative_error(case.ours(), exact), relative_error(case.reference(), exact)
    del exact
    clocks = {"wall": time.perf_counter, "cpu": time.process_time}
    timing = interleaved(case.ours, case.reference, seconds=seconds, clock=clocks[clock])
    return Row(shape, timing, *errors)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; a shape is M,P,D or M,P,D,B."""
    parser = argparse.ArgumentParser(prog="python -m bench.ratios", description=__doc__)
    parser.add_argument("shapes", nargs="*", type=_shape, help="M,P,D[,B]; all if none")
    parser.add_argument("--check", action="store_true", help="exit 1 if a ratio is below its floor")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--seconds", type=float, default=15.0, help="how long to time each shape")
    parser.add_argument("--backend", choices=("auto", "cpp", "torch"), default="auto")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: processor time, which busy neighbours disturb less; needs --threads 1",
    )
    options = parser.parse_args(argv)
    if options.clock == "cpu" and options.threads != 1:
        parser.error("--clock cpu adds up what all threads use, waiting too: give --threads 1")
    return options


def _shape(text: str) -> Shape:
    return Shape(*map(int, text.split(",")))


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a floor is asked for and not reached."""
    options = arguments(argv)
    torch.set_num_threads(options.threads)
    machine = describe()
    print(f"{machine['cpu']}, {options.threads} threads, {options.clock} clock")
    print(f"torch {machine['torch']}, krrst_fast {machine['krrst_fast']}, {machine['extension']}")
    print(f"load {os.getloadavg()[0]:.1f} before\n{HEADER}", flush=True)
    short = []
    for shape in options.shapes or FLOORS:
        row = measure(shape, backend=options.backend, seconds=options.seconds, clock=options.clock)
        print(row, flush=True)
        if row.below(FLOORS.get(shape, 0.0)):
            short.append(row)
    print(f"load {os.getloadavg()[0]:.1f} after")
    if options.check and short:
        for row in short:
            need = f"{FLOORS[row.shape]:.1f} is needed"
            print(f"bench.ratios: {row.shape}: {row.timing.ratio:.2f}, {need}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
