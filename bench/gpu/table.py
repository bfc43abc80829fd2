"""From measured rows to what the library reads: which implementation is fastest at which size."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.gpu.results import Results, wrong

RELEASED, KEPT_EYE = "released", "released, identity on the device"
FILE = Path("krrst_fast") / "measured.json"
FLOORS = {"float64": 1e-13}
FLOOR = 1e-6
"""An error that every implementation has: some roundings of float32."""


def dispatch(found: Results) -> dict[str, Any]:
    """The table of one architecture from the rows of "parts": {"sm_90": {..., "rows": [...]}}.

    A size has a row if torch has a time there; what is wrong has none.
    """
    rows: dict[tuple, dict[str, Any]] = {}
    last = ""
    for name, row in found.rows("parts").items():
        if "ms" not in row or wrong(row):
            continue
        key = row["part"], row["precision"], tuple(row["size"])
        about = {"part": key[0], "precision": key[1], "size": list(key[2]), "ms": {}}
        rows.setdefault(key, about)["ms"][name.partition(": ")[2]] = row["ms"]
        last = max(last, row["date"])
    machine = found.machine
    gpu = machine["about"] or {"name": "none", "architecture": "cpu"}
    about = {"gpu": gpu["name"], "date": last[:10], "command": "bench/gpu.sh"}
    about |= {name: machine["versions"][name] for name in ("torch", "triton")}
    kept = [row for row in rows.values() if "torch" in row["ms"]]
    return {gpu["architecture"]: {**about, "cuda": gpu.get("cuda"), "rows": kept}}


def merged(path: Path, tables: Mapping[str, Any]) -> str:
    """The text of a file of tables with these in it; those of other architectures stay."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    parts = []
    for name, one in sorted({**found, **tables}.items()):
        about = {key: value for key, value in one.items() if key != "rows"}
        rows = ",\n".join(f"   {json.dumps(row)}" for row in one["rows"])
        parts.append(f' {json.dumps(name)}: {json.dumps(about)[:-1]}, "rows": [\n{rows}\n ]}}')
    return "{\n" + ",\n".join(parts) + "\n}\n" if parts else "{}\n"
