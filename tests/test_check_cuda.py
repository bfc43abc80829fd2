"""The compile gate of the CUDA sources fails when it should."""

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
GOOD = "__global__ void panel_kernel(float* x) { x[threadIdx.x] += 1; }\n"
SPILLS = """
__global__ void __launch_bounds__(1024, 2) panel_kernel(float* x) {
  float kept[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) kept[i] = x[threadIdx.x + 1024 * i];
#pragma unroll
  for (int round = 0; round < 2; ++round) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 64; ++i) kept[i] = kept[i] * kept[(i + 7) % 64] + kept[(i + 31) % 64];
  }
#pragma unroll
  for (int i = 0; i < 64; ++i) x[threadIdx.x + 1024 * i] = kept[i];
}
"""


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names of tools/check_cuda.py, for one architecture."""
    names = runpy.run_path(str(ROOT / "tools" / "check_cuda.py"))
    monkeypatch.setitem(names["main"].__globals__, "ARCHITECTURES", ("90",))
    return names


def run(
    gate: dict[str, Any], folder: Path, kernel: str, glue: str, monkeypatch: pytest.MonkeyPatch
) -> int:
    """The exit status for a folder with these two sources."""
    if gate["_find_nvcc"]() is None:
        pytest.skip("no nvcc")
    (folder / "cuda").mkdir()
    (folder / "cuda" / "kernel.cu").write_text(kernel)
    (folder / "cuda" / "ops.cpp").write_text(glue)
    monkeypatch.setattr(sys, "argv", ["check_cuda.py", "--csrc", str(folder)])
    return gate["main"]()


@pytest.mark.parametrize(
    "kernel,glue,status,told",
    [
        (GOOD, "int main() {}\n", 0, "0 of 2 compilations failed"),
        (GOOD.replace("x[", "y["), "int main() {}\n", 1, "does not compile"),
        (GOOD.replace("{", "{ int unused;", 1), "int main() {}\n", 1, "does not compile"),
        (GOOD, "int main() { return y; }\n", 1, "ops.cpp: does not compile"),
        (GOOD.replace("panel", "other"), "int main() {}\n", 1, "FAULT: not in BOUNDS"),
        (SPILLS, "int main() {}\n", 1, "bytes spilled"),
        ("", "int main() {}\n", 1, "0 kernels"),
    ],
)
def test_what_fails(
    gate: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kernel: str,
    glue: str,
    status: int,
    told: str,
) -> None:
    assert run(gate, tmp_path, kernel, glue, monkeypatch) == status
    assert told in capsys.readouterr().out


@pytest.mark.parametrize("switch,status", [([], 1), (["--allow-missing"], 0)])
def test_a_missing_compiler_is_not_passed_over(
    gate: dict[str, Any], monkeypatch: pytest.MonkeyPatch, switch: list[str], status: int
) -> None:
    monkeypatch.setitem(gate["main"].__globals__, "_find_nvcc", lambda: None)
    monkeypatch.setattr(sys, "argv", ["check_cuda.py", *switch])
    assert gate["main"]() == status


def test_bounds(gate: dict[str, Any]) -> None:
    kernel = gate["Kernel"]("panel_kernel<float>", 129, 8, 0, 40_000)
    faults = ["8 bytes of stack", "too many registers", "too much shared memory"]
    assert gate["_faults"](kernel) == faults
