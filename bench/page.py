"""What the page says: asv's results as tables, figures and sentences."""

import ast
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from importlib import import_module
from statistics import median
from typing import Any

from bench import charts
from bench.results import Key, Series, is_number, shape_of

DEFAULT = ("cpp", "torch", "torch-cuda")
"""Whose float32 row stands for a shape: the first that was measured."""
TONES = {"cpp": "accent", "torch": "rival", "torch-cuda": "ink"}
TWICE = 2.0


@dataclass(frozen=True, kw_only=True)
class Line:
    """A row of a suite.

    Attributes:
        key: suite, shape, backend, precision, as asv writes them.
        sizes: the shape by letter.
        seconds, times, error, reference_error, peak_mb, tflops: what was measured; None is n/a.
        failed: the measurements that ended in an error.
        history: (commit, times as fast) of every commit.
    """

    key: Key
    sizes: dict[str, Any]
    backend: str
    precision: str
    seconds: float | None
    times: float | None
    error: float | None
    reference_error: float | None
    peak_mb: float | None
    tflops: float | None
    failed: Sequence[str]
    history: Sequence[tuple[str, float]]

    @property
    def reference_seconds(self) -> float | None:
        if self.seconds is None or self.times is None:
            return None
        return self.seconds * self.times

    @property
    def compared(self) -> bool:
        """Whether both errors are known; the reference in float64 is what the error is against."""
        return bool(self.error and self.reference_error)

    @property
    def accurate(self) -> bool:
        return self.compared and self.error <= TWICE * self.reference_error  # type: ignore[operator]

    @property
    def name(self) -> str:
        return f"{self.size}; {self.backend}, {self.precision}"

    @property
    def size(self) -> str:
        """M 1000, P 10."""
        return ", ".join(f"{letter} {size}" for letter, size in self.sizes.items())

    @property
    def spark(self) -> str:
        return charts.sparkline(self.history)

    @property
    def bar(self) -> float:
        """Length of the bar of `times`, from -1 (a tenth) to 1 (a hundred times as fast)."""
        return 0.0 if not self.times else max(-1.0, min(1.0, math.log10(self.times) / 2))


@dataclass(frozen=True, kw_only=True)
class Suite:
    """One class of benchmarks.

    Attributes:
        name: of the class.
        title: its docstring's first line.
        against: what it is compared with.
        lines: the rows that were measured.
        absent: the other rows: how many, by backend.
    """

    name: str
    title: str
    against: str
    lines: Sequence[Line]
    absent: dict[str, int] = field(default_factory=dict)

    @cached_property
    def letters(self) -> list[str]:
        return list(self.lines[0].sizes)

    @property
    def history(self) -> bool:
        return any(len(line.history) > 1 for line in self.lines)

    def default(self, shape: str) -> Line | None:
        """The float32 row of a shape."""
        rows = {
            line.backend: line
            for line in self.lines
            if line.precision == "float32" and line.key[1] == shape and line.times is not None
        }
        return next((rows[backend] for backend in DEFAULT if backend in rows), None)


@dataclass(frozen=True, kw_only=True)
class Promise:
    """A row with a floor, of the README's table."""

    suite: Suite
    line: Line
    floor: float

    @property
    def kept(self) -> bool:
        return (self.line.times or 0.0) >= self.floor


@dataclass(frozen=True, kw_only=True)
class Part:
    """What is said of one machine."""

    series: Series
    suites: Sequence[Suite]
    promises: Sequence[Promise]

    @property
    def lines(self) -> list[Line]:
        return [line for suite in self.suites for line in suite.lines]

    @property
    def defaults(self) -> list[Line]:
        """One row a suite and shape: what a call without options gets."""
        found = []
        for suite in self.suites:
            shapes = dict.fromkeys(line.key[1] for line in suite.lines)
            found += [line for line in map(suite.default, shapes) if line is not None]
        return found

    @property
    def headline(self) -> tuple[str, str, str]:
        """A sentence in three pieces, the second of which is the figure."""
        rows = [line for line in self.defaults if line.times is not None]
        faster = sum((line.times or 0) > 1 for line in rows)
        if not rows:
            return "No ratio was measured", "", "."
        middle = median(line.times or 0 for line in rows)
        count = f"{faster} of {len(rows)} computations"
        before = f"Faster than what it replaces in {count}, by a median of "
        return before, f"{charts.digits(middle, 2)}×", "."

    @property
    def lede(self) -> str:
        single = [line for line in self.lines if line.precision == "float32" and line.compared]
        kept = sum(line.accurate for line in single)
        failed = sum(bool(line.failed) for line in self.lines)
        text = (
            f"In float32 the error is at most twice that of the reference in {kept} of "
            f"{len(single)} rows, both against float64."
        )
        many = "1 row" if failed == 1 else f"{failed} rows"
        return text + (f" {many} failed." if failed else "")

    @property
    def stats(self) -> list[tuple[str, str, str]]:
        """(label, value, note) of what was measured where."""
        latest, machine = self.series.latest, self.series.machine
        versions = latest.versions
        commits = len(self.series.runs)
        found = [
            ("Processor", machine.get("cpu", "?"), f"{machine.get('num_cpu', '?')} cores"),
            ("Threads", versions.get("threads", "?"), versions.get("instructions", "")),
            ("Graphics", versions.get("gpu", "not recorded"), ""),
            ("torch", versions.get("torch", "?"), f"Python {versions.get('python', '?')}"),
            ("Commit", latest.commit[:8], day(latest.date)),
            ("Rows", f"{len(self.lines):,}", f"{commits} commit{'s' * (commits > 1)}"),
        ]
        return found

    @property
    def speed(self) -> str:
        rows = [
            (
                suite.name,
                [
                    charts.Dot(
                        line.times,
                        f"{suite.name}, {line.name}: {charts.digits(line.times)}× as fast as "
                        f"{suite.against}",
                        TONES.get(line.backend, "muted"),
                    )
                    for line in suite.lines
                    if line.times
                ],
            )
            for suite in self.suites
        ]
        rows = [(name, dots) for name, dots in rows if dots]
        return charts.speed_strip(rows) if rows else ""

    @property
    def errors(self) -> str:
        points = [
            charts.Point(
                line.reference_error,
                line.error,
                f"{suite.name}, {line.name}: {charts.digits(line.error, 2)}, reference "
                f"{charts.digits(line.reference_error, 2)}",
                "accent" if line.precision == "float32" else "rival",
            )
            for suite in self.suites
            for line in suite.lines
            if line.error and line.reference_error
        ]
        return charts.error_scatter(points) if points else ""

    @property
    def record(self) -> list[tuple[str, str]]:
        """Everything that is known of the machine, the environment and the commits."""
        rows = [(f"machine: {name}", value) for name, value in self.series.machine.items()]
        rows += list(self.series.latest.versions.items())
        rows.append(("environment of asv", self.series.latest.environment))
        commits = [f"{run.commit[:8]} ({day(run.date)})" for run in self.series.runs]
        rows.append(("commits", ", ".join(commits)))
        return rows


def day(milliseconds: int) -> str:
    """2026-11-22."""
    return datetime.fromtimestamp(milliseconds / 1000, timezone.utc).date().isoformat()


def part(series: Series) -> Part:
    """What is said of one machine."""
    suites = list(_suites(series))
    return Part(series=series, suites=suites, promises=list(_promises(suites)))


def _suites(series: Series) -> Iterator[Suite]:
    names = dict.fromkeys(key[0] for key in series.latest.rows)
    for name in names:
        lines: list[Line] = []
        absent: dict[str, int] = {}
        for key in series.latest.rows:
            if key[0] == name:
                line = _line(series, key)
                if line.failed or line.seconds is not None or line.times is not None or line.error:
                    lines.append(line)
                else:
                    absent[line.backend] = absent.get(line.backend, 0) + 1
        if lines:
            title, against = _words(name)
            kind = name.rpartition(".")[2]
            yield Suite(name=kind, title=title, against=against, lines=lines, absent=absent)


def _line(series: Series, key: Key) -> Line:
    values = series.latest.rows[key]
    _, shape, backend, precision = key

    def value(measure: str) -> float | None:
        found = values.get(measure)
        return found if is_number(found) else None

    ratio = value("track_ratio_to_reference")
    history = series.history(key, "track_ratio_to_reference")
    return Line(
        key=key,
        sizes={_letter(name): size for name, size in shape_of(shape).items()},
        backend=ast.literal_eval(backend),
        precision=ast.literal_eval(precision),
        seconds=value("time_call"),
        times=1 / ratio if ratio else None,
        error=value("track_error"),
        reference_error=value("track_reference_error"),
        peak_mb=value("track_peak_mb"),
        tflops=value("track_tflops"),
        failed=[name for name, found in values.items() if found is None],
        history=[(commit, 1 / found) for commit, found in history if found],
    )


def _letter(name: str) -> str:
    return name.upper() if len(name) == 1 else name


def _words(name: str) -> tuple[str, str]:
    """What a suite measures and against what, in its own words; a suite may be gone by now."""
    module, _, kind = name.rpartition(".")
    try:
        suite = getattr(import_module(f"bench.{module}"), kind)
    except (ImportError, AttributeError):
        return "", "its reference"
    return (suite.__doc__ or "").strip().splitlines()[0].replace("`", ""), suite.against


def _promises(suites: Sequence[Suite]) -> Iterator[Promise]:
    from bench import bench_few_shot, bench_fit, bench_krr, bench_peers

    shots, fit = bench_few_shot.FIVE_SHOT, bench_fit.QUICK
    floors: list[tuple[str, Any, float]] = [
        *(("KRR", shape, floor) for shape, floor in bench_krr.FLOORS.items()),
        ("FewShot", shots, bench_few_shot.FLOORS[bench_few_shot.BATCHED]),
        ("FewShotLoop", shots, bench_few_shot.FLOORS[bench_few_shot.LOOP]),
        ("Reuse", fit, bench_fit.FLOORS[bench_fit.FORMULA_EACH]),
        *((peer.__name__, bench_peers.SHAPE, 1.0) for peer in bench_peers.PEERS),
    ]
    by_name = {suite.name: suite for suite in suites}
    for name, shape, floor in floors:
        line = by_name[name].default(repr(shape)) if name in by_name else None
        if line is not None:
            yield Promise(suite=by_name[name], line=line, floor=floor)
