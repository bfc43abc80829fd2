"""A process of its own that calls krr_mse: `python -m tests.memory_calls WHAT`, as JSON.

Its standard input is a list of calls [m, b, d, p, itemsize, bias, form, more], its output what
came of each.
"""

import ctypes
import json
import os
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from krrst_fast import Solver, krr_mse, plan


def _status(field: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(rf"{field}:\s+(\d+)", text)
    assert found is not None
    return int(found[1]) * 1024


def _drawn(rows: int, d: int, p: int, itemsize: int) -> list[Tensor]:
    dtype = {2: torch.float16, 4: torch.float32, 8: torch.float64}[itemsize]
    f = torch.randn(rows, d, dtype=dtype)
    # Rows of one norm: others would make the primal form compute in float64.
    return [f.div_(f.norm(dim=1, keepdim=True)), torch.randn(rows, p, dtype=dtype)]


def _call(leaves: list[Tensor], real: list[Tensor], bias: float, form: str) -> Tensor:
    return krr_mse(*leaves, *real, ridge=1e-2, bias=bias, solver=Solver(form=form))


def _gradients(call: list[Any]) -> Callable[[], object]:
    m, b, d, p, itemsize, bias, form = call[:7]
    leaves = [x.requires_grad_() for x in _drawn(m, d, p, itemsize)]
    real = _drawn(b, d, p, itemsize)
    return lambda: torch.autograd.grad(_call(leaves, real, bias, form), leaves)


def allocated(call: list[Any]) -> int:
    """Peak of the heap during a call, less that before, in bytes; with malloc_peak.c."""
    counter, compute = ctypes.CDLL(os.environ["LD_PRELOAD"]), _gradients(call)
    counter.malloc_peak.restype = counter.malloc_peak_start.restype = ctypes.c_long
    compute()  # what libraries take for good, they have now
    before = counter.malloc_peak_start()
    compute()
    return counter.malloc_peak() - before


def resident(call: list[Any]) -> int:
    """Peak of the memory that Linux has given to the process, less that before, in bytes."""
    compute = _gradients(call)
    compute()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = _status("VmHWM")
    compute()
    return _status("VmHWM") - before


def limited(call: list[Any]) -> dict[str, Any]:
    """Plan and compute in an address space of `more` bytes more than there are now."""
    m, b, d, p, itemsize, bias, form, more = call
    _gradients(call)()
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + more, resource.RLIM_INFINITY))
    planned = plan(m=m, b=b, d=d, p=p, itemsize=itemsize, memory="auto")
    found: dict[str, Any] = {name: getattr(planned, name) for name in ("fits", "chunk", "memory")}
    found |= {"form": planned.form, "at once": "computed", "chunks": 0}
    if planned.chunk:
        leaves = [x.requires_grad_() for x in _drawn(m, d, p, itemsize)]
        for first in range(0, b, planned.chunk):
            rows = min(planned.chunk, b - first)
            loss = _call(leaves, _drawn(rows, d, p, itemsize), bias, planned.form)
            (loss * (rows / b)).backward()
            del loss
            found["chunks"] += 1
        del leaves
    try:
        _gradients([*call[:6], planned.form])()
    except (RuntimeError, MemoryError) as error:
        found["at once"] = str(error)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    function = {"allocated": allocated, "resident": resident, "limited": limited}[sys.argv[1]]
    json.dump([function(call) for call in json.load(sys.stdin)], sys.stdout)
