"""Compiles ahead what the later stages launch, with all cores and without a GPU.

The stages' own calls are made on a simulated GPU (`played.py`). Each specialisation that
they launch is compiled by Triton's launcher itself, so that the stages find it in TRITON_CACHE_DIR.
Exits 1 if one does not compile; the others are compiled all the same.

    python -m bench.gpu.compile_ahead [--jobs N] [--arch 90] [--toy]
"""

import argparse
import contextlib
import functools
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from multiprocessing import connection, get_context
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

from torch import Tensor

from bench.gpu.played import GROUPS, Call, played_gpu


class Job(NamedTuple):
    """Something to compile: what asks for it, and how it is done.

    `compile` says whether it was in the cache already.
    """

    name: str
    compile: Callable[[], bool]


class Done(NamedTuple):
    """What came of a job.

    Attributes:
        cached: it was in the cache before.
        failed: why it did, or "".
        seconds: of CPU, those of the compilers it ran included.
    """

    name: str
    cached: bool
    failed: str
    seconds: float


class PlayedDriver:
    """What Triton's launcher asks of a driver before it compiles."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        """A number of its own for each architecture: the launcher keeps things by it."""
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


@contextlib.contextmanager
def played_driver(arch: int) -> Iterator[None]:
    """Triton takes a GPU of this architecture for the active one."""
    from triton.runtime import driver

    with mock.patch.object(driver, "_active", PlayedDriver(arch)):
        yield


def asked(launch: Any) -> Any:
    """What the launcher has for a launch: a compiled kernel, compiled if need be."""
    return launch.kernel.warmup(
        **launch.arguments,
        grid=(launch.programs,),
        num_warps=launch.tile.warps,
        num_stages=launch.tile.stages,
        enable_fp_fusion=True,
    )


def calls(toy: bool, missed: list[str]) -> Iterator[tuple[str, Call]]:
    """The calls of all stages; `missed` tells of a stage that cannot tell its own."""
    for group in GROUPS:
        try:
            yield from group(toy)
        except Exception as error:
            missed.append(f"{group.__name__}: {_line(error)}")


def jobs(calls: Iterable[tuple[str, Call]], arch: int, missed: list[str]) -> Iterator[Job]:
    """What the calls launch, each specialisation once; `missed` tells of calls that fail."""
    from triton import knobs

    found: list[Job] = []
    seen: set[Any] = set()
    name, launched = "", SimpleNamespace()

    def note(launch: Any) -> None:
        nonlocal launched
        launched = launch
        # Most launches are made more than once: the launcher is not asked about the same again.
        if (told := _told(launch)) not in seen:
            seen.add(told)
            asked(launch)

    def hook(*, fn: Any, compile: Mapping[str, Any], **told: Any) -> bool:
        kernel, types = launched.kernel.__name__, tuple(compile["signature"].values())
        if (key := (fn.module, kernel, compile["key"])) not in seen:
            what = kernel.strip("_").removesuffix("_kernel")
            found.append(Job(f"{what} of {name}", partial(_kernel, launched)))
        if types not in seen:
            found.extend(host_jobs(types))
        seen.update((key, types))
        # What is found here is compiled later, and elsewhere.
        return True

    hooked = mock.patch.object(knobs.runtime, "jit_cache_hook", hook)
    with played_driver(arch), hooked, played_gpu(arch, note):
        for name, call in calls:
            try:
                call()
            except Exception as error:
                missed.append(f"{name}: {_line(error)}")
            yield from found
            found.clear()


def _told(launch: Any) -> tuple[Any, ...]:
    """All that a launcher could see in a launch."""
    values = tuple(
        (x.dtype, x.data_ptr() % 16) if isinstance(x, Tensor) else (type(x), x)
        for x in launch.arguments.values()
    )
    return launch.kernel, launch.tile, values


def _kernel(launch: Any) -> bool:
    from triton import knobs

    hits = []

    def listener(*, cache_hit: bool, **told: Any) -> None:
        hits.append(cache_hit)

    with mock.patch.object(knobs.compilation, "listener", listener):
        asked(launch)
    return all(hits)


def host_jobs(types: tuple[Any, ...]) -> list[Job]:
    """What the C compiler builds for arguments of these types.

    A launcher for each list of types is Triton 3.6; later ones have one for all.
    """
    from triton.backends.nvidia import driver as nvidia

    if not hasattr(nvidia, "make_launcher") or not linked():
        return []
    source = nvidia.make_launcher({}, dict(enumerate(types)), None)
    build = partial(
        *(nvidia.compile_module_from_src, source, "__triton_launcher", nvidia.library_dirs()),
        *(nvidia.include_dirs, nvidia.libraries),
    )
    return [Job(f"launcher of {len(types)} arguments", partial(_host, build))]


def driver_jobs() -> list[Job]:
    """The module through which Triton asks the driver."""
    from triton.backends.nvidia import driver as nvidia

    return [Job("the driver's module", partial(_host, nvidia.CudaUtils))] if linked() else []


@functools.cache
def linked() -> bool:
    """Whether there is a libcuda that what the C compiler builds is linked with."""
    from triton.backends.nvidia import driver as nvidia

    try:
        return bool(nvidia.library_dirs())
    except (AssertionError, OSError):
        return False


def _host(build: Callable[[], Any]) -> bool:
    """Build a module as Triton does, but not load it: that would ask for a GPU."""
    from triton.runtime import build as builder

    built = []

    def compiler(*arguments: Any) -> str:
        built.append(arguments)
        return original(*arguments)

    original = builder._build
    loaded = mock.MagicMock()
    with mock.patch.multiple(builder, _build=compiler, _load_module_from_path=loaded):
        build()
    return not built


def _line(error: BaseException) -> str:
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[-1] if said else ''}"[:300]


def _child(job: Job, pipe: connection.Connection, arch: int) -> None:
    from triton import knobs

    # The parent process only looks for what to compile: here it is compiled.
    with mock.patch.object(knobs.runtime, "jit_cache_hook", None), played_driver(arch):
        try:
            cached, failed = job.compile(), ""
        except Exception as error:
            cached, failed = False, _line(error)
    whose = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    pipe.send((cached, failed, sum(sum(resource.getrusage(who)[:2]) for who in whose)))


def compiled(todo: Iterable[Job], arch: int, at_once: int) -> Iterator[Done]:
    """Do the jobs, each in a process of its own: a compiler that crashes takes no other with it.

    `todo` is asked for the next one whenever fewer than `at_once` are being done.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend
    from triton.runtime.cache import triton_key

    # Both read large files: once, before the processes part.
    triton_key()
    make_backend(GPUTarget("cuda", arch, 32)).hash()
    context, waiting = get_context("fork"), iter(todo)
    running: dict[Any, tuple[Job, Any, Any]] = {}
    more = True
    while more or running:
        while more and len(running) < at_once:
            job = next(waiting, None)
            more = job is not None
            if job is not None:
                ours, theirs = context.Pipe(duplex=False)
                child = context.Process(target=_child, args=(job, theirs, arch))
                child.start()
                theirs.close()
                running[child.sentinel] = job, child, ours
        # Waiting for none would never end.
        for sentinel in connection.wait(list(running)) if running else ():
            job, child, pipe = running.pop(sentinel)
            child.join()
            try:
                yield Done(job.name, *pipe.recv())
            except EOFError:
                yield Done(job.name, False, f"its process ended with {child.exitcode}", 0.0)
            pipe.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Compile; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--arch", type=int, default=90, help="compute capability, as 90 for 9.0")
    parser.add_argument("--toy", action="store_true", help="the toy sizes of a dry run alone")
    parser.add_argument("--most", type=int, metavar="N", help="compile no more than so many")
    arguments = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    start, missed, done = time.monotonic(), [], []
    todo = chain(driver_jobs(), jobs(calls(arguments.toy, missed), arguments.arch, missed))
    todo = islice(todo, arguments.most)
    # Nothing here is to wake the GPU: a process that has cannot be forked.
    with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):
        for one in compiled(todo, arguments.arch, arguments.jobs):
            done.append(one)
            if one.failed:
                print(f"FAILED {one.name}: {one.failed}", flush=True)
    for call in missed:
        print(f"not called: {call}")
    failed, cached = sum(bool(one.failed) for one in done), sum(one.cached for one in done)
    print(
        f"{len(done) - failed - cached} compiled, {cached} there before, {failed} failed;"
        f" {time.monotonic() - start:.1f} s, {sum(one.seconds for one in done):.1f} s of CPU,"
        f" {arguments.jobs} processes"
    )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
