"""The table that the library reads: the time of each implementation at each size."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.gpu.results import Results, days, wrong

RELEASED, KEPT_EYE = "released", "released, identity on the device"
FILE = Path("krrst_fast/backends/tuned.json")
FLOORS = {"float64": 1e-13}
FLOOR = 1e-6
"""An error that every implementation has: some roundings of float32."""


def dispatch(found: Results) -> dict[str, Any]:
    """Return the table of one architecture from the rows of "parts": {"sm_90": {...}}.

    A size has a row if torch has a time there; what is wrong has none.
    """
    by_size: dict[tuple, dict[str, Any]] = {}
    for name, row in found.rows("parts").items():
        if "part" in row and "ms" in row and not wrong(row):
            key = row["part"], row["precision"], tuple(row["size"])
            by_size.setdefault(key, {})[name.partition(": ")[2]] = row
    rows = []
    for (part, precision, size), by_name in by_size.items():
        # A graph leaves out what Python takes: where one has none, calls are compared with calls.
        which = "eager_ms" if any("no_graph" in row for row in by_name.values()) else "ms"
        ms = {name: float(f"{row.get(which, row['ms']):.4g}") for name, row in by_name.items()}
        rows.append({"part": part, "precision": precision, "size": list(size), "ms": ms})
    date = days(row for by_name in by_size.values() for row in by_name.values())
    machine = found.machine
    gpu = machine["about"] or {"name": "none", "architecture": "cpu"}
    about = {"gpu": gpu["name"], "date": date, "command": "bench/gpu.sh"}
    about |= {name: machine["versions"][name] for name in ("torch", "triton")}
    kept = [row for row in rows if "torch" in row["ms"]]
    return {gpu["architecture"]: {**about, "cuda": gpu.get("cuda"), "rows": kept}}


def merged(path: Path, tables: Mapping[str, Any]) -> str:
    """Return the text of a file of tables, in which these replace those of their architectures."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    parts = []
    for name, one in sorted({**found, **tables}.items()):
        about = {key: value for key, value in one.items() if key != "rows"}
        rows = ",\n".join(f"   {json.dumps(row)}" for row in one["rows"])
        parts.append(f' {json.dumps(name)}: {json.dumps(about)[:-1]}, "rows": [\n{rows}\n ]}}')
    return "{\n" + ",\n".join(parts) + "\n}\n" if parts else "{}\n"
