"""Compiles every CUDA source for every architecture, without a GPU or a CUDA build of torch.

All warnings are errors; registers, stack, spills and shared memory of each kernel are held against
BOUNDS. The glue is checked for syntax against the headers of the torch that is installed. Prints a
table; exits 1 if something does not compile or breaks a bound, or if there is no compiler.

    python tools/check_cuda.py [--csrc FOLDER] [--allow-missing]
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("80", "90", "90a")
FLAGS = ["-O3", "-std=c++17", "-Xptxas", "-v", "-Werror", "all-warnings"]
TORCH_ABI = "0x020a000000000000"


class Bound(NamedTuple):
    """Limits of a kernel: registers per thread, bytes of shared memory per block."""

    registers: int
    shared: int


# A multiprocessor has 65,536 registers, so a kernel with 256 threads and 128 of them runs twice on
# it; more than 48 KiB of static shared memory do not load.
BOUNDS = {
    "first_kernel": Bound(128, 37_000),
    "panel_kernel": Bound(128, 37_000),
    "update_kernel": Bound(128, 37_000),
    "solve_kernel": Bound(224, 37_000),
}


class Kernel(NamedTuple):
    """One kernel of one binary, as ptxas reports it."""

    name: str
    registers: int
    stack: int
    spilled: int
    shared: int


def _find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    for home in homes:
        if home and (Path(home) / "bin" / "nvcc").exists():
            return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def kernels_of(log: str) -> Iterator[Kernel]:
    """Return the kernels in the output of `ptxas -v`."""
    for part in log.split("Compiling entry function '")[1:]:
        number = {
            what: sum(int(n) for n in re.findall(rf"(\d+) bytes {what}", part))
            for what in ("stack frame", "spill stores", "spill loads", "smem")
        }
        registers = re.search(r"Used (\d+) registers", part)
        if registers is None:
            raise SystemExit(f"check_cuda: ptxas says nothing about registers in:\n{part}")
        yield Kernel(
            _readable(part.partition("'")[0]),
            int(registers[1]),
            number["stack frame"],
            number["spill stores"] + number["spill loads"],
            number["smem"],
        )


def _readable(symbol: str) -> str:
    """Return the name and the template arguments of a kernel from its mangled symbol."""
    done = subprocess.run(["c++filt", "-p", symbol], capture_output=True, text=True, check=True)
    name = re.sub(r"\(anonymous namespace\)::|krrst::cuda::|^void ", "", done.stdout.strip())
    return name.partition("(")[0]


def _faults(kernel: Kernel) -> list[str]:
    bound = BOUNDS.get(kernel.name.partition("<")[0])
    faults = {
        "not in BOUNDS": bound is None,
        f"{kernel.spilled} bytes spilled": kernel.spilled > 0,
        f"{kernel.stack} bytes of stack": kernel.stack > 0,
        "too many registers": bound is not None and kernel.registers > bound.registers,
        "too much shared memory": bound is not None and kernel.shared > bound.shared,
    }
    return [what for what, wrong in faults.items() if wrong]


def check_kernels(nvcc: str, source: Path, architecture: str) -> bool:
    """Compile one source, print a line for each of its kernels; whether all is well."""
    start = time.monotonic()
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *FLAGS, target, "-cubin", "-o", f"{folder}/k.cubin", str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
    head = f"{source.name} sm_{architecture}"
    if done.returncode:
        print(f"{head}: does not compile\n{done.stdout}{done.stderr}")
        return False
    kernels = list(kernels_of(done.stdout + done.stderr))
    print(f"{head}: {len(kernels)} kernels in {time.monotonic() - start:.1f} s")
    for kernel in kernels:
        resources = f"{kernel.registers:4} registers {kernel.shared:6} bytes shared"
        fault = ", ".join(_faults(kernel))
        print(f"  {kernel.name:40}{resources}{'  FAULT: ' + fault if fault else ''}")
    return bool(kernels) and not any(_faults(kernel) for kernel in kernels)


def check_glue(nvcc: str, source: Path, csrc: Path) -> bool:
    """Return whether the C++ compiler accepts the source as part of the CUDA module."""
    import torch

    include = Path(torch.__file__).parent / "include"
    cuda = [Path(nvcc).resolve().parents[1] / "include", Path("/usr/local/cuda/include")]
    headers = next((p for p in cuda if (p / "cuda_runtime_api.h").exists()), None)
    if headers is None:
        print(f"{source.name}: no cuda_runtime_api.h in {[str(p) for p in cuda]}")
        return False
    command = ["c++", "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-DUSE_CUDA"]
    command += [f"-DTORCH_TARGET_VERSION={TORCH_ABI}", "-DPy_LIMITED_API=0x030a0000"]
    command += ["-DTORCH_EXTENSION_NAME=_C_cuda", f"-I{csrc}"]
    for folder in (include, headers, sysconfig.get_paths()["include"]):
        command += ["-isystem", str(folder)]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    print(f"{source.name}: {'does not compile' if done.returncode else 'compiles'}")
    print(done.stderr, end="")
    return done.returncode == 0


def main() -> int:
    """Check everything below the folder; 0 if all is well."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--csrc", type=Path, default=ROOT / "csrc")
    parser.add_argument("--allow-missing", action="store_true", help="pass without nvcc")
    args = parser.parse_args()
    nvcc = _find_nvcc()
    if nvcc is None:
        print("check_cuda: no nvcc: nothing was compiled; set CUDA_HOME, or pass --allow-missing")
        return 0 if args.allow_missing else 1
    folder = args.csrc.resolve() / "cuda"
    kernels, glue = sorted(folder.glob("*.cu")), sorted(folder.glob("*.cpp"))
    if not kernels or not glue:
        print(f"check_cuda: no sources in {folder}")
        return 1
    results = [check_glue(nvcc, source, args.csrc.resolve()) for source in glue]
    for source in kernels:
        results += [check_kernels(nvcc, source, architecture) for architecture in ARCHITECTURES]
    print(f"check_cuda: {results.count(False)} of {len(results)} compilations failed")
    return int(not all(results))


if __name__ == "__main__":
    sys.exit(main())
