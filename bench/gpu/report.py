"""The results of all stages as one JSON file and one page of Markdown; what of it is published.

python -m bench.gpu report [--out FOLDER] [--publish]
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.charts import digits
from bench.gpu import machine, table
from bench.gpu.run import NAMES
from bench.gpu.table import KEPT_EYE, RELEASED
from bench.report import rewrite
from krrst_fast.errors import DataError
from krrst_fast.files import read_json, write_json, write_text

BEGIN = "<!-- bench.gpu: from here to the end mark is written by a program -->"
END = "<!-- bench.gpu: end -->"
TARGETS = {(1000, 512): 5.0, (1000, 10): 6.5, (2000, 512): 4.8, (10000, 512): 10.0}
"""How many times as fast as the released formulation a shape (M, P) is to be."""

Result = Mapping[str, Any]
Lines = Iterator[str]


def collect(out: Path) -> dict[str, Any]:
    """All results in a folder.

    Raises:
        DataError: there are none, or they were not measured on the same.
    """
    stages = {name: read_json(out / f"{name}.json") for name in NAMES if _there(out, name)}
    if not stages:
        raise DataError(f"bench/gpu.sh report: {out} holds no results")
    keys = [{k: v for k, v in one["key"].items() if k != "images"} for one in stages.values()]
    for name, key in zip(stages, keys):
        if key != keys[0]:
            other = next(iter(stages))
            raise DataError(
                f"bench/gpu.sh report: {out}: {name} and {other} were not measured on the same: "
                f"{_difference(key, keys[0])}"
            )
    last = list(stages.values())[-1]
    commit = last["commit"]
    if commit is None and keys[0]["sources"] == machine.sources():
        # Measured on a copy without its history; what is here is the same.
        commit = machine.commit()
    shared = {"commit": commit, "key": keys[0], "gpu": last["gpu"], "versions": last["versions"]}
    return shared | {"date": max(one["date"] for one in stages.values()), "stages": stages}


def _there(out: Path, name: str) -> bool:
    return (out / f"{name}.json").is_file()


def _difference(one: Result, other: Result) -> str:
    names = [name for name in {*one, *other} if one.get(name) != other.get(name)]
    return ", ".join(f"{name} {one.get(name)} and {other.get(name)}" for name in sorted(names))


def write(out: Path) -> str:
    """Write `gpu.json` and `gpu.md` into the folder; the latter's text."""
    found = collect(out)
    write_json(out / "gpu.json", found)
    text = "\n".join(page(found)) + "\n"
    write_text(out / "gpu.md", text)
    return text


def publish(out: Path, root: Path = machine.ROOT) -> list[Path]:
    """Write docs/results/<gpu>.md, krrst_fast/measured.json and the README's table.

    Raises:
        DataError: it was a dry run, or nothing that can be published was measured, or it was other
            code than that which is here.
    """
    found = collect(out)
    if found["key"]["sizes"] != "full" or found["gpu"] is None:
        raise DataError("bench/gpu.sh report: a dry run on the CPU is not published")
    missing = [name for name in ("parts", "krr") if not _whole(found, name)]
    if missing:
        raise DataError(f"bench/gpu.sh report: nothing to publish without {', '.join(missing)}")
    name = found["gpu"]["name"].lower().replace(" ", "-").removeprefix("nvidia-")
    page_path, measured = root / "docs" / "results" / f"{name}.md", root / table.FILE
    lines = [*readme_table(found), "", _under(found)]
    rewrite(root / "README.md", lines, marks=(BEGIN, END))
    page_path.parent.mkdir(parents=True, exist_ok=True)
    write_text(page_path, "\n".join(page(found)) + "\n")
    write_text(measured, table.merged(measured, table.dispatch(found["stages"]["parts"])))
    return [root / "README.md", page_path, measured]


def _whole(found: Result, name: str) -> bool:
    return name in found["stages"] and found["stages"][name]["finished"]


def page(found: Result) -> Lines:
    """Everything, for people."""
    gpu = found["gpu"]
    yield f"# {gpu['name'] if gpu else 'Dry run on the CPU: no figure here means anything'}"
    yield ""
    yield _under(found)
    yield ""
    yield from _stages(found)
    for title, name, lines in (
        ("The KRR loss with its gradients", "krr", krr_tables),
        ("Where an outer step's time goes", "step", step_table),
        ("Outer steps on images", "steps", steps_table),
        ("Parts", "parts", parts_table),
        ("Ceilings", "ceilings", ceilings_table),
    ):
        if name in found["stages"]:
            yield from ("", f"## {title}", "")
            yield from lines(found)


def _under(found: Result) -> str:
    gpu, versions, key = found["gpu"] or {}, found["versions"], found["key"]
    words = [
        gpu.get("name", "CPU"),
        f"driver {gpu.get('driver')}, CUDA {gpu.get('cuda')}" if gpu else "no GPU",
        f"torch {versions['torch']}, triton {versions['triton']}, nvcc {versions['nvcc']}",
        f"commit {(found['commit'] or 'unknown')[:8]}, sources {key['sources']}",
        found["date"][:10],
    ]
    return f"{', '.join(words)}: `bench/gpu.sh`."


def _row(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _head(*names: str) -> Lines:
    yield _row(names)
    yield "|---" * len(names) + "|"


def _ms(one: Result | None) -> str:
    """A median and its spread."""
    if not one or "ms" not in one:
        return "-"
    return f"{digits(one['ms'])} ({digits(one['p10'])}-{digits(one['p90'])})"


def _times(value: float | None) -> str:
    return "-" if not value else digits(value, 2)


def _error(one: Result | None) -> str:
    value = table.worst((one or {}).get("error"))
    return "-" if value is None else f"{value:.1e}".replace("e-0", "e-")


def _stages(found: Result) -> Lines:
    yield from _head("stage", "state", "rows", "seconds", "wrong")
    for name, one in found["stages"].items():
        state = "finished" if one["finished"] else "not finished"
        wrong = "; ".join(one["wrong"][:5]) or "-"
        wrong += f"; and {len(one['wrong']) - 5} more" if len(one["wrong"]) > 5 else ""
        yield _row([name, state, len(one["rows"]), one["seconds"], wrong.replace("|", "/")])


def _shapes(found: Result) -> Iterator[Result]:
    return (row for row in found["stages"]["krr"]["rows"].values() if "shape" in row)


def verdict(row: Result) -> tuple[str, str]:
    """The target of a shape, and whether the best of ours meets it."""
    shape, best = row["shape"], table.best(row)
    target = TARGETS.get((shape["m"], shape["p"]))
    if target is None:
        return "-", "-"
    times = row["ours"][best].get("times_released", 0.0) if best else 0.0
    return f"{target:g}", "met" if times >= target else "missed"


def readme_table(found: Result) -> Lines:
    """A line a shape, in short."""
    yield from _head(
        *("M", "P", "released formulation ms", "krrst_fast ms", "times as fast", "as a graph"),
        *("error of the released", "of krrst_fast"),
    )
    for row in _shapes(found):
        best, base, shape = table.best(row), row["released"][RELEASED], row["shape"]
        ours = row["ours"].get(best, {})
        cells = [shape["m"], shape["p"], _ms(base), _ms(ours), _times(ours.get("times_released"))]
        yield _row([*cells, _times(_replayed(row, best)), _error(base), _error(ours)])
    yield from ("", _caption(found))


def krr_table(found: Result) -> Lines:
    """A line a shape: the best of ours against the released formulation."""
    columns = ["M", "P", "released ms", "krrst_fast ms", "who", "times as fast", "as a graph"]
    columns += ["error of the released", "of krrst_fast", "peak MB", "target", ""]
    yield from _head(*columns)
    for row in _shapes(found):
        best, released = table.best(row), row["released"]
        ours = row["ours"].get(best, {})
        base, shape = released[RELEASED], row["shape"]
        times = f"**{_times(ours.get('times_released'))}** ({_times(ours.get('times_kept_eye'))})"
        memory = f"{ours['peak_mb']:.0f}, {base.get('peak_mb', 0):.0f}" if ours else "-"
        cells = [shape["m"], shape["p"], _ms(base), _ms(ours), best or "nobody", times]
        cells += [_times(_replayed(row, best)), _error(base), _error(ours), memory, *verdict(row)]
        yield _row(cells)
    yield from ("", _caption(found))


def _caption(found: Result) -> str:
    one = next(_shapes(found), None)
    sizes = f", D = {one['shape']['d']}, B = {one['shape']['b']}" if one else ""
    return (
        f"The loss with both gradients{sizes}: medians (10th to 90th percentile) of calls in turn. "
        "The released formulation makes its identity on the CPU in every call (in brackets, where "
        "there are brackets: kept on the device). Errors are the largest relative ones of the loss "
        "and the gradients against float64; peak memory is ours, theirs."
    )


def _replayed(row: Result, best: str | None) -> float | None:
    """How many times as fast a graph is, of this way or its twin that reads nothing back."""
    twin = (best or "").replace(", raise", ", flag")
    graph, base = row["ours"].get(twin, {}).get("graph", {}), row["released"][RELEASED]
    return base["ms"] / graph["ms"] if "ms" in graph and "ms" in base else None


def krr_tables(found: Result) -> Lines:
    """The summary, then everybody at each shape."""
    yield from krr_table(found)
    for row in _shapes(found):
        shape = row["shape"]
        about = f"form {row['form']}, {row['gflop']:.0f} GFLOP, condition {row['condition']:.0e}"
        yield from ("", f"### M = {shape['m']}, P = {shape['p']}", "", f"{about}.", "")
        names = ("way", "ms", "times as fast", "identity kept", "error", "rounded", "peak MB")
        yield from _head(*names, "graph ms", "same bits")
        for name in (RELEASED, KEPT_EYE):
            yield _row([name, *_line(row["released"][name])])
        for name, one in row["ours"].items():
            if "refused" not in one:
                yield _row([name, *_line(one)])
        refused = {one["refused"] for one in row["ours"].values() if "refused" in one}
        yield from (f"\nRefused: {one}" for one in sorted(refused))
        if isinstance(row.get("profile", {}).get("kernels"), list):
            yield from ("", f"Kernels of `{row['profile']['of']}`:", "")
            yield from _head("kernel", "launches", "ms")
            for one in row["profile"]["kernels"]:
                name = one["name"].replace("|", "/")
                yield _row([f"`{name}`", f"{one['launches']:g}", digits(one["ms"])])


def _line(one: Result) -> list[str]:
    graph = one.get("graph", {})
    memory = f"{one['peak_mb']:.0f}" if "peak_mb" in one else "-"
    return [
        one.get("failed") or _ms(one),
        _times(one.get("times_released")),
        _times(one.get("times_kept_eye")),
        _error(one),
        _error({"error": one.get("error_rounded")}),
        memory,
        graph.get("failed") or _ms(graph),
        str(graph.get("same_bits", "-")),
    ]


def step_table(found: Result) -> Lines:
    """The parts of a step side by side, and the totals."""
    rows = found["stages"]["step"]["rows"]
    ours, theirs = (rows.get(name, {}).get("parts", {}) for name in ("krrst_fast", "released"))
    yield from _head("part", "released ms", "krrst_fast ms")
    for name in ours or theirs:
        yield _row([name, *(digits(x[name]) if name in x else "-" for x in (theirs, ours))])
    total = rows.get("totals", {})
    yield _row(["whole step", _ms(total.get("released")), _ms(total.get("krrst_fast"))])
    yield f"\nTimes as fast: {_times(total.get('times_released'))}."


def steps_table(found: Result) -> Lines:
    """A line a distillation."""
    names = ("", "images", "steps/s", "loss at the start", "at the end", "peak MB")
    yield from _head(*names)
    for name, one in found["stages"]["steps"]["rows"].items():
        if "failed" in one:
            yield _row([name, one["failed"], *"----"])
            continue
        losses = (f"{one[f'loss_at_the_{end}']:.4g}" for end in ("start", "end"))
        speed, memory = digits(one["steps_per_second"]), f"{one['peak_mb']:.0f}"
        yield _row([name, f"{one['images']}, {one['count']}", speed, *losses, memory])


def parts_table(found: Result) -> Lines:
    """A line a part, precision and size: milliseconds and error of each."""
    rows = [row for row in found["stages"]["parts"]["rows"].values() if "part" in row]
    yield from _head("part", "precision", "size", "ms (error) of each", "fastest")
    for row in rows:
        told = []
        for name, one in row["told"].items():
            if "ms" in one:
                told.append(f"{name} {digits(one['ms'])} ({one['error']:.0e})")
            elif "failed" in one:
                told.append(f"{name}: {one['failed']}")
        times = table.usable(row)[0]
        size = "x".join(map(str, row["size"]))
        best = min(times, key=times.__getitem__, default="-")
        yield _row([row["part"], row["precision"], size, ", ".join(told), best])


def ceilings_table(found: Result) -> Lines:
    """A line a measurement."""
    yield from _head("what", "ms", "rate")
    for name, one in found["stages"]["ceilings"]["rows"].items():
        parts = {f"{name} {k}": v for k, v in one.items() if isinstance(v, dict)} or {name: one}
        for what, taken in parts.items():
            rate = taken.get("gb_per_s"), taken.get("tflops")
            told = f"{rate[0]:.0f} GB/s" if rate[0] else f"{rate[1] or 0:.1f} TFLOP/s"
            yield _row([what, taken.get("failed") or _ms(taken), told if "ms" in taken else "-"])
