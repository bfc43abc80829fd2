"""From measured rows to what the library reads: who is right, who is fastest, at which size."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.gpu.machine import ROOT
from krrst_fast.errors import DataError
from krrst_fast.files import read_json, write_text

RELEASED, KEPT_EYE = "released", "released, identity on the device"
FILE = Path("krrst_fast") / "measured.json"
FLOORS = {"float64": 1e-13}
FLOOR = 1e-6
"""An error that is nobody's fault: some roundings of float32."""

Row = Mapping[str, Any]


def usable(row: Row) -> tuple[dict[str, float], list[str]]:
    """The milliseconds of the implementations that are right, and what is wrong with the others.

    Right is what is at most twice as wrong as torch, or `FLOOR`, if that is more.
    """
    told = row["told"]
    plain = told["torch"].get("error")
    times, wrong = {}, []
    for name, one in told.items():
        if "failed" in one:
            if one["failed"] != "out of memory":
                wrong.append(f"{name}: {one['failed']}")
        elif "ms" in one:
            allowed = None if plain is None else 2 * plain + FLOORS.get(row["precision"], FLOOR)
            if allowed is None or one["error"] <= allowed:
                times[name] = one["ms"]
            else:
                wrong.append(f"{name}: error {one['error']:.1e} > {allowed:.1e}")
    return times, wrong


def dispatch(stage: Mapping[str, Any]) -> dict[str, Any]:
    """The table of one architecture, of the result of the stage "parts": {"sm_90": {...}}."""
    rows = []
    for row in stage["rows"].values():
        if "part" not in row:
            continue
        times = usable(row)[0]
        if "torch" in times:
            rows.append({name: row[name] for name in ("part", "precision", "size")} | {"ms": times})
    gpu, versions = stage["gpu"] or {"name": "none", "architecture": "cpu"}, stage["versions"]
    about = {"gpu": gpu["name"], "date": stage["date"][:10], "command": "bench/gpu.sh"}
    about |= {"torch": versions["torch"], "triton": versions["triton"], "cuda": gpu.get("cuda")}
    return {gpu["architecture"]: about | {"rows": rows}}


def merged(path: Path, tables: Mapping[str, Any]) -> str:
    """The text of a file of tables with these in it; those of other architectures stay."""
    found = read_json(path) if path.exists() else {}
    told = dict(sorted({**found, **tables}.items()))
    parts = []
    for name, one in told.items():
        about = {key: value for key, value in one.items() if key != "rows"}
        rows = ",\n".join(f"   {json.dumps(row)}" for row in one["rows"])
        head = json.dumps(about)[:-1]
        parts.append(f' {json.dumps(name)}: {head}, "rows": [\n{rows}\n ]}}')
    return "{\n" + ",\n".join(parts) + "\n}\n" if parts else "{}\n"


def install(out: Path, key: Mapping[str, Any]) -> None:
    """Give the package that this run built the table that its stage "parts" measured.

    The checkout's own stays as it is until a report is published.

    Args:
        out: the folder of the results.
        key: what the table must have been measured on, or more.
    """
    goal = out / "site" / FILE
    try:
        found = read_json(out / "parts.json")
    except DataError:
        return
    if found["key"].items() <= key.items() and goal.parent.is_dir():
        write_text(goal, merged(ROOT / FILE, dispatch(found)))


def best(row: Row) -> str | None:
    """The fastest way of ours at a shape that is about as right as the released formulation."""
    allowed = worst(row["released"][RELEASED].get("error"))
    times = {}
    for name, one in row["ours"].items():
        # What rounds the features is judged on the rounded ones.
        error = worst(one.get("error_rounded") or one.get("error"))
        if "ms" in one and (allowed is None or error is None or error <= 2 * allowed + FLOOR):
            times[name] = one["ms"]
    return min(times, key=times.__getitem__, default=None)


def worst(errors: Mapping[str, float | str] | None) -> float | None:
    """The largest of some errors; infinity if one is not a number, None if there are none."""
    if not errors:
        return None
    return max(float("inf") if isinstance(one, str) else one for one in errors.values())
