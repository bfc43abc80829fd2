"""Speeds beside the code that is replaced: python -m bench.ratios [--page FILE] [--readme FILE]

Each row times a computation and the code that it replaces, interleaved in one process, and compares
both with float64. Times are medians, with memory that the process keeps between the calls; an error
is the largest relative error of the result and of all gradients.
"""

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from bench import (
    bench_few_shot,
    bench_fit,
    bench_kernels,
    bench_krr,
    bench_network,
    bench_peers,
)
from bench.common import THREADS, medians, relative_error
from bench.markdown import between, cells, digits, head, rewrite, scientific
from bench.suite import Comparison, Setting
from krrst_fast.errors import KrrstError
from krrst_fast.runs.environment import describe

BEGIN = "<!-- bench.ratios: from here to the end mark is written by a program -->"
END = "<!-- bench.ratios: end -->"
# glibc then keeps freed memory. Otherwise both sides return large tensors to the system, and what
# is measured is how fast it hands out pages: in a virtual machine, 0.1 to 2 s for the same call.
KEPT_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
COLUMNS = (
    *("computation", "against", "reference ms", "krrst_fast ms", "times as fast"),
    *("error of the reference", "of krrst_fast"),
)


class Row(NamedTuple):
    """A computation that krrst_fast promises to be fast at.

    Attributes:
        title: The computation.
        suite: Suite that computes it and its reference.
        shape: Sizes of the computation.
        floor: Required speed, relative to the reference.
        draws: Number of inputs. If several, the median of the errors over them may not exceed that
            of the reference: the error of a single draw is chance.
        headline: Whether it is a row of the README's table, too.
    """

    title: str
    suite: type[Comparison]
    shape: Any
    floor: float
    draws: int = 1
    headline: bool = True

    @property
    def name(self) -> str:
        """The computation and its sizes."""
        sizes = self.shape._asdict().items()
        return f"{self.title}: " + ", ".join(
            f"{name.upper() if len(name) == 1 else name} {size}" for name, size in sizes
        )


_HEADLINES = ((1000, 512), (1000, 10), (5000, 512), (100, 64), (10, 8))
ROWS = (
    *(
        Row("KRR loss and gradients", bench_krr.KRR, shape, floor, 1, shape[:2] in _HEADLINES)
        for shape, floor in bench_krr.FLOORS.items()
    ),
    *(
        Row("few-shot heads and gradients", suite, bench_few_shot.FIVE_SHOT, floor, 1, floor < 2)
        for suite, floor in ((bench_few_shot.FewShot, 1.2), (bench_few_shot.FewShotLoop, 8.0))
    ),
    *(
        Row("KRR loss and gradients", bench_kernels.OfKernel, shape, 1.0, 1, shape.kernel == "rbf")
        for shape in bench_kernels.SHAPES[:3]
    ),
    *(
        Row(title, suite, shape, floor, 1, shape == bench_network.SHAPES[0] and floor > 1.2)
        for shape in bench_network.SHAPES
        for title, suite, floor in (
            ("features", bench_network.Features, 1.2),
            ("features and their gradient", bench_network.FeaturesWithGradient, 1.5),
            ("training step", bench_network.Training, 1.2),
        )
    ),
    Row("one fit, many queries", bench_fit.Reuse, bench_fit.QUICK, 20.0, headline=False),
    Row("one fit, many queries", bench_fit.ReusePredict, bench_fit.QUICK, 20.0),
)
PEERS = (
    *(
        Row(
            "fit and predict",
            peer,
            bench_peers.SHAPE,
            1.0,
            3,
            peer is bench_peers.ScikitLearn,
        )
        for peer in bench_peers.PEERS
    ),
    Row("fit and predict, rbf", bench_kernels.ScikitLearnRbf, bench_kernels.FIT, 2.0, 3),
)


class Measured(NamedTuple):
    """Median seconds of a row, and its errors relative to float64."""

    row: Row
    ours: float
    reference: float
    error: float
    reference_error: float

    @property
    def ratio(self) -> float:
        """The speed of krrst_fast, relative to the reference."""
        return self.reference / self.ours

    def failures(self) -> Iterator[str]:
        """Yield what is required and not reached."""
        name = f"{self.row.name} against {self.row.suite.against}"
        if not self.ratio >= self.row.floor:
            yield f"{name}: {self.ratio:.2f}, {self.row.floor:.1f} is needed"
        if self.row.draws > 1 and not self.error <= self.reference_error:
            yield f"{name}: error {self.error:.2e}, {self.reference_error:.2e} is allowed"

    def __str__(self) -> str:
        return cells(
            *(self.row.name, self.row.suite.against),
            *(digits(x * 1e3) for x in (self.reference, self.ours)),
            f"**{digits(self.ratio, 2)}**",
            *(scientific(x) for x in (self.reference_error, self.error)),
        )


def measure(row: Row, *, seconds: float) -> Measured:
    """Time a row on the CPU and compute its errors.

    Raises:
        ImportError: The reference is not installed.
    """
    suite, errors = row.suite(), []
    for seed in range(row.draws):
        suite.seed = seed
        case = suite.case(row.shape, Setting())
        exact = case.exact()
        errors.append([relative_error(call(), exact) for call in (case.ours, case.reference)])
    times = medians(case.ours, case.reference, seconds=seconds, at_least=suite.at_least)
    return Measured(row, *times, *map(median, zip(*errors)))


def measured(rows: Iterable[Row], *, seconds: float) -> Iterator[Measured]:
    """Measure rows; report on stderr those of which the reference is not installed."""
    torch.set_num_threads(THREADS)
    for row in rows:
        try:
            yield measure(row, seconds=seconds)
        except ImportError as error:
            print(f"{row.name} against {row.suite.against}: n/a: {error}", file=sys.stderr)


def table(found: Iterable[Measured], command: str) -> Iterator[str]:
    """Yield the lines of the table of some rows."""
    yield from head(*COLUMNS)
    yield from map(str, found)
    about, load = describe(), os.getloadavg()[0]
    yield from (
        "",
        f"{about['cpu'] or 'an unnamed processor'}, {THREADS} threads, torch {about['torch']}, "
        f"krrst_fast {about['krrst_fast']}, load {load:.1f}: `{command}`.",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print each row; return 1 if a floor is required and missed, 2 if a file has no marks."""
    parser = argparse.ArgumentParser(prog="python -m bench.ratios", description=__doc__)
    parser.add_argument("--peers", action="store_true", help="only the rows of other libraries")
    parser.add_argument("--networks", action="store_true", help="only the rows of networks")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the table there, too")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="write some rows there, too")
    parser.add_argument(
        "--check",
        action="store_true",
        help="exit with 1 if a ratio is below its floor, or another library more accurate",
    )
    parser.add_argument("--seconds", type=float, default=6.0, help="to time each row (default 6)")
    options = parser.parse_args(argv)
    command = " ".join(["python -m bench.ratios", *(sys.argv[1:] if argv is None else argv)])
    pages = [path for path in (options.page, options.readme) if path is not None]
    try:
        for path in pages:  # before anything is measured
            between(path, BEGIN, END)
    except KrrstError as error:
        print(error, file=sys.stderr)
        return 2
    print(*head(*COLUMNS), sep="\n", flush=True)
    found: list[Measured] = []
    networks = tuple(row for row in ROWS if row.suite.__module__ == bench_network.__name__)
    some = PEERS if options.peers else networks if options.networks else (*ROWS, *PEERS)
    for one in measured(some, seconds=options.seconds):
        found.append(one)
        print(one, flush=True)
    for path in pages:
        kept = [one for one in found if path is options.page or one.row.headline]
        rewrite(path, table(kept, command), BEGIN, END)
    failures = [failure for one in found for failure in one.failures()] if options.check else []
    for failure in failures:
        print(f"bench.ratios: {failure}", file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in KEPT_MEMORY.items()):
        command = [sys.executable, "-m", "bench.ratios", *sys.argv[1:]]
        os.execve(
            sys.executable, command, os.environ | KEPT_MEMORY
        )  # glibc reads them at its start
    sys.exit(main())
