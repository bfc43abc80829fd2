"""What was measured on GPUs: which implementation of a part is fastest, by size and precision.

`measured.json` is written by `bench/gpu.sh`. It is a table by architecture ("sm_90"), whose rows
have a part, a precision, a size, and the milliseconds of each implementation. Where a size lies
further than a factor of two from every row, nothing was measured, and torch computes.

| part | size | implementations |
|---|---|---|
| gram | N, D | torch, triton |
| matmul, matmul_t | a [N, K], stored by rows or by columns, times [K, P]: N, K, P | torch, triton |
| mse | B, D, P | torch, triton |
| closing | M, D, P | torch, triton |
| solve | M, P: a factor and two solves | torch, torch inverse, cuda, cuda inverse |
| solve_many | N, M, P: the same of N problems | the same |
| views | B, pixels of an image | torch, triton |
"""

import functools
import json
import math
from collections.abc import Mapping
from importlib import resources
from typing import Any, NamedTuple

FILE = "measured.json"

# How far a size may be from what was measured, in powers of two.
_REACH = 1.0
# What torch does nearly as fast, torch does.
_MARGIN = 0.97


class Choice(NamedTuple):
    """Who computes a part, and why."""

    name: str
    why: str


@functools.cache
def tables() -> Mapping[str, Any]:
    """What there is, by architecture."""
    text = resources.files("krrst_fast").joinpath(FILE).read_text(encoding="utf-8")
    return json.loads(text)


@functools.lru_cache(maxsize=4096)
def choice(arch: str, part: str, precision: str, size: tuple[int, ...]) -> Choice:
    """The implementation that was fastest at the size nearest to this one, or torch."""
    table = tables().get(arch)
    if table is None:
        return Choice("torch", f"nothing was measured on {arch}")
    rows = [x for x in table["rows"] if (x["part"], x["precision"]) == (part, precision)]
    near = min(rows, key=lambda row: distance(row["size"], size), default=None)
    if near is None or distance(near["size"], size) > _REACH:
        return Choice("torch", f"nothing was measured near this size on {arch}")
    ms = near["ms"]
    name = min(ms, key=lambda one: ms[one] * (1.0 if one == "torch" else 1 / _MARGIN))
    times = ", ".join(f"{one} {ms[one]:.3g}" for one in sorted(ms, key=ms.__getitem__))
    return Choice(name, f"ms at {near['size']} on {table['gpu']}, {table['date']}: {times}")


def distance(measured: list[int], size: tuple[int, ...]) -> float:
    """The largest ratio of two sizes, as a power of two."""
    pairs = zip(measured, size, strict=True)
    return max(abs(math.log2(max(a, 1) / max(b, 1))) for a, b in pairs)
