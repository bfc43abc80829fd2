"""Compiles every Triton kernel in every configuration that a launch may pick, without a GPU.

For sm_80 and sm_90: registers, stack (spills), shared memory, tensor-core instructions and
asynchronous copies of each binary against BOUNDS. Prints a table; exits 1 if something does not
compile or breaks a bound. The triton is the one that Python imports: PYTHONPATH chooses another.

    python tools/check_triton.py [--only TEXT] [--jobs N]
"""

import argparse
import contextlib
import io
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))

ARCHITECTURES = (80, 90)


class Bound(NamedTuple):
    """Limits of a kernel, and whether its products must use tensor cores."""

    registers: int
    tensor_cores: bool


# Of 65,536 registers and 163 or 227 KiB of shared memory that a multiprocessor has; no stack ever.
BOUNDS = {
    "_parts_kernel": Bound(255, True),
    "_finish_kernel": Bound(128, False),
    "_absmax_kernel": Bound(128, False),
    "_column_absmax_kernel": Bound(128, False),
    "_terms_kernel": Bound(128, False),
    "_product_kernel": Bound(255, True),
    "_closing_kernel": Bound(255, True),
    "_closing_terms_kernel": Bound(128, False),
    "_closing_product_kernel": Bound(255, True),
    "_views_kernel": Bound(64, False),
    "_sum_kernel": Bound(64, False),
    "_residual_kernel": Bound(96, False),
    "_mean_kernel": Bound(64, False),
    "_functions_kernel": Bound(160, False),
}
SHARED = {80: 163 << 10, 90: 227 << 10}
# The fastest instruction of an architecture; "ieee" products of float32 run on none.
INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async"}


class Binary(NamedTuple):
    """Resources of a compiled kernel, and counts of instructions in its PTX.

    Attributes:
        narrow: Those of the copies that take fewer than 16 bytes.
        serial: Each tensor-core instruction waits for the one before.
    """

    registers: int
    stack: int
    shared: int
    tensor_cores: int
    copies: int
    narrow: int
    serial: bool


class Result(NamedTuple):
    """A compiled variant: its resources and its faults."""

    name: str
    registers: int
    stack: int
    shared: int
    tensor_cores: int
    seconds: float
    faults: tuple[str, ...]


def variants(only: str) -> dict[str, tuple[Any, dict[str, Any], int]]:
    """Return launch, specialisation and architecture by name, equal specialisations once."""
    from triton_cases import cases, untested

    found: dict[Any, tuple[str, Any, dict[str, Any], int]] = {}
    launched = []
    for arch in ARCHITECTURES:
        for label, launch in cases(arch):
            launched.append((arch, launch))
            special = specialised(launch)
            key = arch, launch.kernel.__module__, launch.kernel.__name__, launch.tile, repr(special)
            found.setdefault(key, (f"sm_{arch} {label}", launch, special, arch))
    missing = untested(launched)
    if missing:
        raise SystemExit(f"configurations that no case reaches: {missing}")
    named: dict[str, tuple[Any, dict[str, Any], int]] = {}
    for name, launch, special, arch in found.values():
        name = f"{name} {launch.kernel.__name__.strip('_').removesuffix('_kernel')}"
        alike = sum(other.partition(" #")[0] == name for other in named)
        name += f" #{alike + 1}" if alike else ""
        named[name] = launch, special, arch
    return {name: value for name, value in named.items() if only in name}


def specialised(launch: Any) -> dict[str, Any]:
    """Return the specialisation that the launcher would compile for these arguments.

    Types, constants and alignments; of what a kernel does not specialise the type alone.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    # Which GPU it is has no part in it.
    backend = make_backend(GPUTarget("cuda", ARCHITECTURES[0], 32))
    kernel = launch.kernel
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, special, options = binder(**launch.arguments)
    # Else newer versions say that they will choose otherwise one day.
    packed = kernel._pack_args(backend, {"enable_fp_fusion": True}, bound, special, options)
    return dict(zip(("signature", "constexprs", "attrs"), packed[1:]))


def compiled(name: str) -> Result:
    """Compile one variant; a compile error is a fault of the result."""
    launch, special, arch = variants(name)[name]
    start = time.perf_counter()
    try:
        binary = build(launch, special, arch)
    except Exception:
        last = traceback.format_exc().strip().splitlines()[-6:]
        seconds = time.perf_counter() - start
        return Result(name, 0, 0, 0, 0, seconds, ("does not compile: " + "\n    ".join(last),))
    found = tuple(faults(binary, launch, special, arch))
    return Result(name, *binary[:4], time.perf_counter() - start, found)


def faults(binary: Binary, launch: Any, special: dict[str, Any], arch: int) -> Iterator[str]:
    """Yield the faults of a binary."""
    bound = BOUNDS[launch.kernel.__name__]
    if binary.registers > bound.registers:
        yield f"{binary.registers} registers > {bound.registers}"
    if binary.stack > 0:
        yield f"{binary.stack} bytes of stack: it spills"
    if binary.shared > SHARED[arch]:
        yield f"{binary.shared} bytes of shared memory > {SHARED[arch]}"
    halves = any(launch.arguments.get(name) for name in ("RUNS", "TERMS", "THREE_PRODUCTS"))
    ieee = launch.arguments.get("PRECISION") == "ieee" and not halves
    if bound.tensor_cores and not ieee and not binary.tensor_cores:
        yield f"no {INSTRUCTION[arch]} in it"
    if binary.serial:
        yield f"each {INSTRUCTION[arch]} waits for the one before"
    # Where 4 bytes at least can be copied at a time.
    pointers = [i for i, kind in enumerate(special["signature"].values()) if kind[0] == "*"]
    aligned = all(special["attrs"].get((i,)) for i in pointers)
    if bound.tensor_cores and aligned and not binary.copies:
        yield "no asynchronous copies: it waits for what it loads"
    # Where each row starts at a multiple of 16 bytes, too.
    kinds = special["signature"].items()
    strides = [i for i, (name, _) in enumerate(kinds) if name.startswith("stride_")]
    whole = all(special["constexprs"].get((i,)) == 1 or special["attrs"].get((i,)) for i in strides)
    if bound.tensor_cores and aligned and whole and binary.narrow:
        yield f"{binary.narrow} copies of fewer than 16 bytes: an address lost its alignment"


def build(launch: Any, special: dict[str, Any], arch: int) -> Binary:
    """Compile one variant as the launcher would."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    triton.knobs.nvidia.dump_ptxas_log = True
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        binary = triton.compile(
            ASTSource(launch.kernel, **special),
            target=GPUTarget("cuda", arch, 32),
            options={
                "num_warps": launch.tile.warps,
                "num_stages": launch.tile.stages,
                "enable_fp_fusion": True,
            },
        )
    log = printed.getvalue()
    registers = re.findall(r"Used (\d+) registers", log)
    stack = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", log)
    # Two functions would mean a call, none that nothing was compiled.
    assert len(registers) == 1 and len(stack) == 3, log
    ptx = binary.asm["ptx"]
    return Binary(
        int(registers[0]),
        max(map(int, stack)),
        binary.metadata.shared,
        ptx.count(f"{INSTRUCTION[arch]}."),
        ptx.count("cp.async.c"),
        len(re.findall(r"cp\.async\.c[^;]*?\], \[[^]]*\], (?!0x10\b)", ptx)),
        "serialized" in log,
    )


def results(names: list[str], jobs: int) -> Iterator[Result]:
    """Compile the variants in `jobs` processes, or for one job in this process."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        if jobs == 1:
            yield from map(compiled, names)
            return
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            yield from pool.map(compiled, names)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="", help="variants whose name has this in it")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 8))
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        raise SystemExit("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    import triton

    start = time.perf_counter()
    names = list(variants(arguments.only))
    if not names:
        raise SystemExit(f"no variant has {arguments.only!r} in its name")
    print(f"triton {triton.__version__}, {len(names)} variants, {arguments.jobs} processes")
    width = max(map(len, names))
    print(f"{'variant':{width}}  registers  stack  shared  tensor cores  seconds")
    failed = 0
    for result in results(names, arguments.jobs):
        _, registers, stack, shared, tensor_cores, seconds, faults = result
        print(
            f"{result.name:{width}}  {registers:9}  {stack:5}  {shared:6}  {tensor_cores:12}"
            f"  {seconds:7.1f}",
            flush=True,
        )
        for fault in faults:
            print(f"  FAILED {result.name}: {fault}")
        failed += bool(faults)
    print(f"{len(names) - failed} of {len(names)} passed in {time.perf_counter() - start:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
