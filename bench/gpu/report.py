"""The results as a page, as a short table for the terminal, and as published files.

python -m bench.gpu.report --out FOLDER [--publish]
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.gpu import table
from bench.gpu.results import STAGES, Results, Row, measured_with, write, wrong
from bench.gpu.table import RELEASED
from bench.markdown import cells, digits, head, rewrite, scientific
from krrst_fast.errors import DataError, KrrstError

ROOT = Path(__file__).resolve().parents[2]
BEGIN = "<!-- bench.gpu: from here to the end mark is written by a program -->"
END = "<!-- bench.gpu: end -->"
GOALS = {(1000, 512): 5.0, (1000, 10): 6.5, (2000, 512): 4.8, (10000, 512): 10.0}
"""How many times as fast as the released formulation a shape (M, P) is to be."""
PRECISIONS = ("float32", "fast")
LONGEST = 3000
"""Characters of the short table."""

# An absolute path, also behind a flag of a compiler; its last part.
_PATH = re.compile(r"((?:^|(?<=[\s`'\"(=]))(?:-[LI])?)(?:/[\w.+@-]+)+/([\w.+@-]+)", re.MULTILINE)

Lines = Iterator[str]


class Way(NamedTuple):
    """A variant of `krr_mse` at one shape: its results as plain calls and as a CUDA graph."""

    name: str
    eager: Row
    graph: Row

    @property
    def ms(self) -> float:
        """Milliseconds of the graph, or of a call where there is no graph."""
        return self.graph.get("ms", self.eager["ms"])

    def times(self, ms: float | None) -> float | None:
        """Return the ratio of the released formulation's time to `ms`."""
        return self.eager["released_ms"] / ms if ms else None


class Shape(NamedTuple):
    """All rows of one shape."""

    about: Mapping[str, Any]
    released: Row
    ways: Sequence[Way]

    @property
    def best(self) -> Way | None:
        """The fastest way that is right. One that cannot be captured is; its calls have a time."""
        return self.best_in("")

    def best_in(self, precision: str) -> Way | None:
        """Return the fastest way that is right in a precision, or "" for any."""
        right = [w for w in self.ways if not wrong(w.eager) and "wrong" not in w.graph]
        right = [way for way in right if way.name.endswith(precision)]
        return min(right, key=lambda way: way.ms, default=None)

    @property
    def verdict(self) -> tuple[str, str]:
        """The goal, and whether the best way meets it: by its graph, where it has one."""
        goal = GOALS.get((self.about["m"], self.about["p"]))
        if goal is None or self.best is None:
            return "-", "-"
        times = self.best.times(self.best.ms) or 0.0
        how = "" if "ms" in self.best.graph else " (no graph)"
        return f"{goal:g}x", ("met" if times >= goal else "missed") + how


def shapes(found: Results) -> list[Shape]:
    """Return the KRR rows by shape."""
    by_shape: dict[str, dict[str, Row]] = {}
    for name, row in found.rows("krr").items():
        label, _, what = name.partition(": ")
        by_shape.setdefault(label, {})[what] = row
    made = []
    for rows in by_shape.values():
        released = rows.get(RELEASED, {})
        if "shape" in released:
            ways = {name: row for name, row in rows.items() if "released_ms" in row}
            graphs = {name: rows.get(f"{name}, as a graph", {}) for name in ways}
            # A graph of other code than the call says nothing of this way.
            same = {
                name for name, row in ways.items() if graphs[name].get("sources") == row["sources"]
            }
            ways = [
                Way(name, row, graphs[name] if name in same else {}) for name, row in ways.items()
            ]
            made.append(Shape(released["shape"], released, ways))
    return made


def spread(row: Row) -> str:
    """Format a median with its 10th and 90th percentile."""
    if "ms" not in row:
        return row.get("failed") or row.get("refused") or "-"
    if "p10" not in row:
        return digits(row["ms"])
    return f"{digits(row['ms'])} ({digits(row['p10'])}-{digits(row['p90'])})"


def number(value: float | None, count: int = 3) -> str:
    return "-" if not value else digits(value, count)


def error(row: Row, name: str = "error") -> str:
    """Format the largest error of a row."""
    values = row.get(name)
    return scientific(max(values.values())) if values else "-"


def line(found: Results, stage: str) -> str:
    """Format a stage in a line, with a line for each of its first faults."""
    one, complaints = found.stages[stage], list(found.complaints(stage))
    state = "finished" if one["finished"] else "NOT FINISHED"
    lines = [f"{stage:9} {state}, {len(one['rows'])} rows, {one['seconds']:.0f} s {one['why']}"]
    lines += [f"  WRONG {x}"[:200] for x in complaints[:5]]
    return "\n".join([*lines, *([f"  and {len(complaints) - 5} more"] if complaints[5:] else [])])


def readme_table(found: Results) -> Lines:
    """Yield the table of shapes, a line each."""
    ours = ("ms", "times as fast", "error")
    yield from head(
        *("M", "P", "released formulation ms", "its error"),
        *(f"{precision}: {column}" for precision in PRECISIONS for column in ours),
        "goal",
    )
    for shape in shapes(found):
        row = [shape.about["m"], shape.about["p"], spread(shape.released), error(shape.released)]
        for precision in PRECISIONS:
            way = shape.best_in(precision)
            if way is None:
                row += "---"
                continue
            graph, call = number(way.graph.get("ms")), number(way.eager["ms"])
            times, of_call = (number(way.times(ms)) for ms in (way.ms, way.eager["ms"]))
            row += [f"{graph} ({call})", f"**{times}** ({of_call})", error(way.eager)]
        yield cells(*row, " ".join(shape.verdict))
    yield ""
    yield (
        "The loss with both gradients (D = 8192, B = 1024) by the fastest implementation in each "
        "precision: medians in a CUDA graph, and in brackets of a plain call, which takes turns "
        "with the released formulation (10th-90th percentile). That one makes its identity on the "
        "CPU in every call, as it was published. Errors are the largest of loss and gradients "
        "against float64."
    )


HIDDEN = ("sources", "date", "part", "precision", "size", "shape", "largest", "calls", "choices")


def flat(row: Row) -> dict[str, str]:
    """Return the cells of a row by column: the largest error, medians with their spread."""
    row_cells: dict[str, str] = {}
    for name, value in row.items():
        if name in ("p10", "p90", *HIDDEN):
            continue
        if name == "ms":
            row_cells[name] = spread(row)
        elif name.startswith("error") and isinstance(value, dict):
            row_cells[name] = error(row, name)
        elif isinstance(value, dict):
            row_cells |= {name: spread(value)} if "ms" in value else flat(value)
        elif isinstance(value, list):
            row_cells[name] = "; ".join(map(str, value))
        else:
            row_cells[name] = digits(value) if type(value) in (int, float) else str(value)
    return row_cells


def grid(rows: Mapping[str, Row]) -> Lines:
    """Format a line a row, a column a number, and the largest kernels of a profile below."""
    flattened = {name: flat(row) for name, row in rows.items()}
    columns = list(dict.fromkeys(column for row in flattened.values() for column in row))
    yield from head("", *columns)
    for name, row in flattened.items():
        yield cells(name, *(row.get(column, "-") for column in columns))
    for name, row in rows.items():
        if "largest" in row:
            yield from ("", f"{name}:", "", *head("kernel", "launches", "ms"))
            for kernel in row["largest"]:
                yield cells(f"`{kernel['name']}`", f"{kernel['launches']:g}", digits(kernel["ms"]))


def page(found: Results) -> Lines:
    """Yield the page with all results."""
    yield f"# {found.machine['gpu'] or 'Dry run on the CPU: no figure here means anything'}"
    yield from ("", under(found), "", *readme_table(found), "", newest(found), "")
    yield from head("stage", "state", "rows", "seconds", "measured with sources", "wrong")
    for name, one in found.stages.items():
        state = "finished" if one["finished"] else "not finished"
        of = Counter(row["sources"] for row in one["rows"].values())
        code = ", ".join(f"{digest} ({count})" for digest, count in of.items())
        complaints = "; ".join(found.complaints(name)) or "-"
        yield cells(name, state, len(one["rows"]), one["seconds"], code, complaints[:1000])
    yield ""
    for name in STAGES:
        if found.rows(name):
            rows = found.rows(name)
            yield from (f"## {name}", "", f"Measured with {measured_with(rows.values())}.", "")
            yield from (*grid(rows), "")


def shown(found: Results) -> list[Row]:
    """Return the rows that the table of shapes has numbers of."""
    rows = []
    for shape in shapes(found):
        ways = [way for precision in PRECISIONS if (way := shape.best_in(precision))]
        rows += [
            shape.released,
            *(row for way in ways for row in (way.eager, way.graph) if "ms" in row),
        ]
    return rows


def under(found: Results) -> str:
    """Return what the table of shapes was measured on and with: what its rows have in common."""
    versions, rows = found.machine["versions"], shown(found)
    words = [
        *(found.machine["gpu"] or "CPU", f"torch {versions['torch']}"),
        f"triton {versions['triton']}",
        *([measured_with(rows)] if rows else []),
    ]
    return f"{', '.join(words)}: `bench/gpu.sh`."


def newest(found: Results) -> str:
    """Return the driver, the compiler and the code of the stage that was measured last.

    Those of earlier rows may have been others: see `measured_with`.
    """
    machine, about = found.machine, found.machine["about"]
    driver = f"driver {about['driver']}, CUDA {about['cuda']}" if about else "no GPU"
    code = f"nvcc {machine['versions']['nvcc']}, sources {machine['sources']}"
    return f"The newest rows: {driver}, {code}."


def short(found: Results) -> str:
    """Return what matters most in at most LONGEST characters, for the end of a long output."""
    lines = [under(found), *readme_table(found)][:-2]
    whole = found.rows("step").get("whole steps", {})
    if "times_released" in whole:
        released = whole["released"]["ms"]
        ways = {
            name: one["ms"] for name, one in whole.items() if isinstance(one, dict) and "ms" in one
        }
        each = [f"{ms:.3g} {name} (x {released / ms:.2g})" for name, ms in ways.items()]
        lines.append(f"outer step, ms: {', '.join(each)}")
    outcomes = found.rows("tests").get("tests", {}).get("outcomes", {})
    lines.append(f"tests: {', '.join(f'{n} {what}' for what, n in outcomes.items()) or '-'}")
    stages = [line(found, stage).splitlines() for stage in found.stages]
    lines += [first for first, *_ in stages]
    lines += [f"{name}:{x}" for name, (_, *rest) in zip(found.stages, stages) for x in rest]
    text = "\n".join(x[:400] for x in lines)
    end = f"\nfiles: {found.path}, {found.path.with_name('gpu.md')}\n"
    return text[: LONGEST - len(end)] + end


def write_page(found: Results) -> None:
    """Write `gpu.md` beside the results."""
    write(found.path.with_name("gpu.md"), _text(found))


def _text(found: Results) -> str:
    """Return the page, with the names of files in place of where they lie on that machine."""
    return _PATH.sub(r"\1\2", "\n".join(page(found)) + "\n")


def publish(found: Results, root: Path = ROOT) -> list[Path]:
    """Write docs/results/<gpu>.md, krrst_fast/backends/tuned.json and the README's table.

    Raises:
        DataError: It was a dry run, or nothing that can be published was measured.
    """
    if found.machine["sizes"] != "full" or found.machine["gpu"] is None:
        raise DataError("bench/gpu.sh: a dry run on the CPU is not published")
    if not any(shape.best for shape in shapes(found)):
        raise DataError("bench/gpu.sh: nothing to publish: no row of the KRR table is right")
    name = found.machine["gpu"].lower().replace(" ", "-").removeprefix("nvidia-")
    written = [root / "README.md", root / "docs" / "results" / f"{name}.md"]
    rewrite(written[0], [*readme_table(found), "", under(found)], BEGIN, END)
    written[1].parent.mkdir(parents=True, exist_ok=True)
    write(written[1], _text(found))
    tables = table.dispatch(found)
    if any(one["rows"] for one in tables.values()):
        written.append(root / table.FILE)
        write(written[2], table.merged(written[2], tables))
    return written


def main(argv: list[str] | None = None) -> int:
    """Print the short table, or publish; return 1 for wrong or missing rows, 2 on an error."""
    parser = argparse.ArgumentParser(prog="bench/gpu.sh")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--publish", action="store_true")
    asked = parser.parse_args(argv)
    try:
        found = Results(asked.out)
        if asked.publish:
            print(*publish(found), sep="\n")
            return 0
        write_page(found)
        print(short(found), end="")
    except (KrrstError, OSError, json.JSONDecodeError) as failure:
        print(str(failure).partition("\n")[0], file=sys.stderr)
        return 2
    bad = any(True for stage in found.stages for _ in found.complaints(stage))
    return int(bad or not all(one["finished"] for one in found.stages.values()))


if __name__ == "__main__":
    sys.exit(main())
