"""Compiles the Triton kernels of the later stages on all cores, without a GPU.

The calls of the stages are made on a simulated GPU (`played.py`), and every specialisation that
they launch is compiled by Triton's own launcher, so that the stages find it in TRITON_CACHE_DIR.
Exits with 1 if one does not compile; the others are compiled all the same.

    python -m bench.gpu.compile_ahead [--jobs N] [--arch 90] [--toy] [--most N]
"""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from typing import Any
from unittest import mock

from bench.gpu.clock import reason
from bench.gpu.played import Call, calls, played_gpu


class PlayedDriver:
    """The part of a driver that Triton's launcher reads before it compiles."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        """Return a number for each architecture, by which the launcher keeps its kernels."""
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


@contextlib.contextmanager
def played_driver(arch: int) -> Iterator[None]:
    """Make Triton take a GPU of this architecture for the active one."""
    from triton.runtime import driver

    with mock.patch.object(driver, "_active", PlayedDriver(arch)):
        yield


def compile_launch(launch: Any) -> None:
    """Compile the specialisation of a launch, or find it in the cache."""
    launch.kernel.warmup(
        **launch.arguments,
        grid=(launch.programs,),
        num_warps=launch.tile.warps,
        num_stages=launch.tile.stages,
        enable_fp_fusion=True,
    )


def specialisations(named: Iterable[tuple[str, Call]], arch: int) -> dict[str, Any]:
    """Return a launch for each specialisation that the calls launch, by a name for people."""
    from triton import knobs

    found: dict[str, Any] = {}
    seen, name, launched = set(), "", None

    def note(launch: Any) -> None:
        nonlocal launched
        launched = launch
        compile_launch(launch)

    def hook(*, fn: Any, compile: Any, **_: Any) -> bool:
        assert launched is not None
        kernel = launched.kernel.__name__
        if (key := (fn.module, kernel, compile["key"])) not in seen:
            seen.add(key)
            found[f"{kernel.strip('_').removesuffix('_kernel')} {len(found)} of {name}"] = launched
        return True  # do not compile in this process

    hooked = mock.patch.object(knobs.runtime, "jit_cache_hook", hook)
    with played_driver(arch), hooked, played_gpu(arch, note):
        for name, call in named:
            try:
                call()
            except Exception as error:
                print(f"not called: {name}: {reason(error)}")
    return found


_launches: dict[str, Any] = {}
_arch = 0


def _start(launches: dict[str, Any], arch: int) -> None:
    """Keep what a forked child has from its parent: launches cannot be pickled."""
    global _launches, _arch
    _launches, _arch = launches, arch


def _failure(name: str) -> str:
    """Compile a launch in a child process; return why it failed, or an empty string."""
    try:
        with played_driver(_arch):
            compile_launch(_launches[name])
    except Exception as error:
        return reason(error)
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    """Compile everything; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--arch", type=int, default=90, help="compute capability: 90 for 9.0")
    parser.add_argument("--toy", action="store_true", help="only the sizes of a dry run")
    parser.add_argument("--most", type=int, metavar="N", help="compile at most N kernels")
    options = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    start = time.monotonic()
    launches = specialisations(calls(options.toy), options.arch)
    names = list(islice(launches, options.most))
    fork = get_context("fork")
    with (
        mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""),  # CUDA does not survive a fork
        ProcessPoolExecutor(options.jobs, fork, _start, (launches, options.arch)) as pool,
    ):
        failed = {name: why for name, why in zip(names, pool.map(_failure, names)) if why}
    for name, why in failed.items():
        print(f"FAILED {name}: {why}")
    seconds = time.monotonic() - start
    print(f"{len(names) - len(failed)} compiled, {len(failed)} failed; {seconds:.1f} s")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
