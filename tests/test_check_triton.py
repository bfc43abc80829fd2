"""The compile gate of the Triton kernels fails when it should."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET"):
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)
import triton.language as tl  # noqa: E402

from krrst_fast.kernels.common import Launch, Tile  # noqa: E402

GATE = Path(__file__).resolve().parent.parent / "tools" / "check_triton.py"


@triton.jit
def _product_kernel(
    x_ptr, out_ptr, steps, BLOCK: tl.constexpr, DEPTH: tl.constexpr, WHAT: tl.constexpr
):
    down, inner = tl.arange(0, BLOCK), tl.arange(0, DEPTH)
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for step in range(steps):
        x = tl.load(x_ptr + down[:, None] * 1024 + inner[None, :] + step * DEPTH)
        if WHAT == "ordinary":
            total += tl.sum(x, 1)[:, None].to(tl.float32)
        elif WHAT == "wrong":
            total = tl.dot(x, down, total)
        else:
            total = tl.dot(x, tl.trans(x), total)
    tl.store(out_ptr + down[:, None] * BLOCK + down[None, :], total)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/check_triton.py, for one architecture."""
    spec = importlib.util.spec_from_file_location("check_triton", GATE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", sys.path[:])
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ARCHITECTURES", (90,))
    monkeypatch.setattr(sys, "argv", ["check_triton.py", "--jobs", "1"])
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    return module


def plant(monkeypatch: pytest.MonkeyPatch, missing: bool = False, **changes: Any) -> None:
    """One launch in place of the cases: a product of 64 x 64 blocks, but for `changes`."""
    given = {"block": 64, "warps": 4, "stages": 3, "what": "", "dtype": torch.float16, **changes}
    arguments = {
        "x_ptr": torch.empty(64, 1024, dtype=given["dtype"], device="meta"),
        "out_ptr": torch.empty(64, 64, device="meta"),
        "steps": 16,
        "BLOCK": given["block"],
        "DEPTH": 64,
        "WHAT": given["what"],
    }
    tile = Tile(given["block"], given["block"], 64, given["warps"], given["stages"])
    launch = Launch(_product_kernel, 1, arguments, tile)
    cases = SimpleNamespace(
        cases=lambda arch: [("planted", launch)],
        untested=lambda launched: ["a tile"] * missing,
    )
    monkeypatch.setitem(sys.modules, "triton_cases", cases)


@pytest.mark.parametrize(
    "changes,status,message",
    [
        ({}, 0, "1 of 1 passed"),
        ({"what": "wrong"}, 1, "does not compile"),
        ({"block": 256}, 1, "bytes of stack: it spills"),
        ({"what": "ordinary"}, 1, "no wgmma.mma_async in it"),
        ({"stages": 1}, 1, "no asynchronous copies"),
        ({"stages": 30}, 1, "bytes of shared memory > "),
    ],
)
def test_what_fails(
    gate: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    status: int,
    message: str,
) -> None:
    plant(monkeypatch, **changes)
    assert gate.main() == status
    assert message in capsys.readouterr().out


def test_a_configuration_that_no_case_reaches(
    gate: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, missing=True)
    with pytest.raises(SystemExit, match="no case reaches"):
        gate.main()


@triton.jit(do_not_specialize=["count", "one"], do_not_specialize_on_alignment=["row"])
def _scaled_kernel(x_ptr, scale, count, one, size, row, unit, BLOCK: tl.constexpr):
    offset = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offset * unit + row, mask=offset < size + count + one, other=0.0)
    tl.store(x_ptr + offset * unit + row, x * scale)


def test_the_gate_compiles_what_is_launched(
    gate: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher is asked in a launch, up to where it would compile."""
    compiled: list[dict[str, Any]] = []
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    driver = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: target,
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(
        triton.knobs.runtime,
        "jit_cache_hook",
        lambda **event: compiled.append(event["compile"]) or True,
    )
    x = torch.empty(64, device="meta")
    sizes: dict[str, Any] = {"count": 32, "one": 1, "size": 48, "row": 16, "unit": 1}
    arguments = {"x_ptr": x, "scale": 2.0, **sizes, "BLOCK": 16}
    found = gate.specialised(Launch(_scaled_kernel, 1, arguments, Tile(1, 16, 1, 4, 1)))
    _scaled_kernel[(1,)](**arguments, enable_fp_fusion=True)
    assert found["signature"] == compiled[0]["signature"]
    assert found["constexprs"] == compiled[0]["constants"]
    assert found["attrs"] == compiled[0]["configs"][0]
    # What the launcher is known to make of it: count, one, size, row and unit.
    assert list(found["signature"].values())[2:7] == ["i32"] * 4 + ["constexpr"]
    assert [i for i in range(8) if found["attrs"].get((i,))] == [0, 4]


def test_registers_and_waits(gate: ModuleType) -> None:
    launch = SimpleNamespace(kernel=SimpleNamespace(__name__="_sum_kernel"), arguments={})
    special = {"signature": {"x_ptr": "*fp32"}, "constexprs": {}, "attrs": {}}
    binary = gate.Binary(65, 0, 0, 0, 0, 0, serial=True)
    expected = ["65 registers > 64", "each wgmma.mma_async waits for the one before"]
    assert list(gate.faults(binary, launch, special, 90)) == expected


@pytest.mark.parametrize("row, faults", [(4096, 1), (10, 0)])
def test_copies_are_wide_where_rows_are_aligned(gate: ModuleType, row: int, faults: int) -> None:
    """What an integer that is not specialised, and is part of an address, would cost."""
    launch = SimpleNamespace(kernel=SimpleNamespace(__name__="_parts_kernel"), arguments={})
    special = {
        "signature": {"x_ptr": "*fp32", "stride_x_row": "i32", "stride_x_column": "constexpr"},
        "constexprs": {(2,): 1},
        "attrs": {(0,): [["tt.divisibility", 16]]} | ({(1,): [["d", 16]]} if row % 16 == 0 else {}),
    }
    binary = gate.Binary(200, 0, 0, 32, 48, 48, serial=False)
    found = list(gate.faults(binary, launch, special, 90))
    assert found == ["48 copies of fewer than 16 bytes: an address lost its alignment"] * faults
    wide = binary._replace(narrow=0)
    assert list(gate.faults(wide, launch, special, 90)) == []
