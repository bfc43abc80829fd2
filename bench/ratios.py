"""The headline rows against what they replace: python -m bench.ratios [--peers] [--check]

Times are medians of calls that took turns. `error` is the largest relative error of what is
computed, gradients too, against the reference in float64.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from bench import bench_few_shot, bench_fit, bench_krr, bench_peers
from bench.common import THREADS, Timing, interleaved, relative_error
from bench.suite import Case, Setting
from krrst_fast.environment import describe

HEADER = (
    f"{'computation':50s} {'against':30s} {'reference ms':>13s} {'ours ms':>9s} {'ratio':>7s}"
    f" {'at least':>9s} {'pairs':>6s} {'error of reference':>19s} {'of ours':>8s}"
)
DRAWS = 3
"""Over how many draws of the inputs the error of a peer is compared: one draw is a toss."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table before it is measured.

    Attributes:
        name: what is computed, at which size.
        against: by whom else.
        case: makes the computation; ImportError where a peer is not installed.
        floor: how many times as fast ours has to be.
        at_least: pairs of calls.
        draws: more cases of other inputs, if ours may not be less accurate than the reference in
            the median over them.
    """

    name: str
    against: str
    case: Callable[[], Case]
    floor: float
    at_least: int = 5
    draws: Sequence[Callable[[], Case]] = ()


@dataclass(frozen=True)
class Measured:
    """A line of the table; errors are relative to float64."""

    row: Row
    timing: Timing
    reference_error: float
    error: float

    def failures(self) -> Iterator[str]:
        """What is asked for and not reached."""
        name = f"{self.row.name} against {self.row.against}"
        if not self.timing.ratio >= self.row.floor:
            yield f"{name}: {self.timing.ratio:.2f}, {self.row.floor:.1f} is needed"
        if self.row.draws and not self.error <= self.reference_error:
            yield f"{name}: error {self.error:.2e}, {self.reference_error:.2e} is allowed"

    def __str__(self) -> str:
        timing = self.timing
        return (
            f"{self.row.name:50s} {self.row.against:30s} {timing.reference * 1e3:13.2f}"
            f" {timing.ours * 1e3:9.2f} {timing.ratio:7.2f} {self.row.floor:9.1f}"
            f" {timing.pairs:6d} {self.reference_error:19.1e} {self.error:8.1e}"
        )


def errors(case: Case) -> tuple[float, float]:
    """Of the reference and of ours."""
    exact = case.exact()
    return relative_error(case.reference(), exact), relative_error(case.ours(), exact)


def measure(row: Row, *, seconds: float, clock: str = "wall") -> Measured:
    """Look at what a row computes, and time it.

    Raises:
        ImportError: what it is compared with is not installed.
    """
    case = row.case()
    found = [errors(case), *(errors(make()) for make in row.draws)]
    clocks = {"wall": time.perf_counter, "cpu": time.process_time}
    timing = interleaved(
        case.ours, case.reference, seconds=seconds, at_least=row.at_least, clock=clocks[clock]
    )
    reference, ours = (median(values) for values in zip(*found))
    return Measured(row, timing, reference, ours)


def krr_rows(shapes: Iterable[bench_krr.Shape], how: Setting) -> Iterator[Row]:
    """The loss of KRR-ST with its gradients."""
    for shape in shapes:
        yield Row(
            name=f"krr_mse {sizes(shape)}",
            against="LU and autograd",
            case=partial(bench_krr.krr_case, shape, how),
            floor=bench_krr.FLOORS.get(shape, 0.0),
        )


def other_rows(how: Setting) -> Iterator[Row]:
    """Few-shot episodes in one call, and a fit that is used again."""
    shape = bench_few_shot.FIVE_SHOT
    for reference, floor in bench_few_shot.FLOORS.items():
        yield Row(
            name=f"few-shot {shape.episodes} x {sizes(shape[1:])}",
            against=reference,
            case=partial(bench_few_shot.few_shot_case, shape, how, reference=reference),
            floor=floor,
            at_least=3,
        )
    fit = bench_fit.QUICK
    for reference, floor in bench_fit.FLOORS.items():
        yield Row(
            name=f"{fit.queries} queries of a fit {sizes(fit)}",
            against=reference,
            case=partial(bench_fit.reuse_case, fit, how, reference=reference),
            floor=floor,
            at_least=2,
        )


def peer_rows(shapes: Iterable[bench_peers.Shape], how: Setting) -> Iterator[Row]:
    """Fit and predict of other libraries."""
    for shape in shapes:
        for peer in bench_peers.PEERS:
            make = partial(
                bench_peers.peer_case, shape, how, module=peer.module, predict=peer.predict
            )
            yield Row(
                name=f"fit and predict {sizes(shape)}",
                against=peer.against,
                case=make,
                floor=1.0,
                draws=[partial(make, seed=seed) for seed in range(1, DRAWS)],
            )


def sizes(shape: Sequence[int], letters: str = "MPDB") -> str:
    """M=1000 P=512 D=8192 B=1024."""
    return " ".join(f"{letter}={size}" for letter, size in zip(letters, shape))


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; a shape is M,P,D or M,P,D,B."""
    parser = argparse.ArgumentParser(prog="python -m bench.ratios", description=__doc__)
    parser.add_argument(
        "shapes", nargs="*", type=_shape, help="M,P,D[,B] of the loss alone; every row if none"
    )
    parser.add_argument("--peers", action="store_true", help="other libraries' instead")
    parser.add_argument(
        "--check",
        action="store_true",
        help="exit 1 if a ratio is below its floor, or a peer is more accurate",
    )
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--seconds", type=float, default=6.0, help="how long to time each row")
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
    if options.peers and options.shapes:
        parser.error("shapes are of the loss: give them, or --peers")
    return options


def _shape(text: str) -> bench_krr.Shape:
    return bench_krr.Shape(*map(int, text.split(",")))


def chosen(options: argparse.Namespace) -> Iterator[Row]:
    """The rows that the options ask for."""
    how = Setting(backend=options.backend)
    if options.peers:
        yield from peer_rows([bench_peers.SHAPE], how)
        return
    yield from krr_rows(options.shapes or bench_krr.FLOORS, how)
    if not options.shapes:
        yield from other_rows(how)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a floor is asked for and not reached."""
    options = arguments(argv)
    torch.set_num_threads(options.threads)
    machine = describe()
    print(f"{machine['cpu']}, {options.threads} threads, {options.clock} clock")
    print(f"torch {machine['torch']}, krrst_fast {machine['krrst_fast']}, {machine['extension']}")
    print(f"load {os.getloadavg()[0]:.1f} before\n{HEADER}", flush=True)
    failures: list[str] = []
    for row in chosen(options):
        try:
            measured = measure(row, seconds=options.seconds, clock=options.clock)
        except ImportError as error:
            print(f"{row.name:50s} {row.against:30s} n/a: {error}", flush=True)
            continue
        print(measured, flush=True)
        failures += measured.failures()
    print(f"load {os.getloadavg()[0]:.1f} after")
    if options.check and failures:
        for failure in failures:
            print(f"bench.ratios: {failure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
