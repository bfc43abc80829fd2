"""Is it right on this machine? `python -m krrst_fast.selftest [--device cpu|cuda] [--json FILE]`.

Prints what the machine has, which implementation takes which size and why, and one line for each
check of each public operator, forward and backward, against the formula in float64. The exit code
is 1 if a check failed. Takes some seconds and needs torch alone.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from krrst_fast import environment, files, library, reference
from krrst_fast.selftest_checks import FLOAT32, FLOAT64, Precision, Result, checks, run
from krrst_fast.selftest_choices import choices

ISA_NAMES = ("baseline", "avx2", "avx512")
ISA_FLAGS = {
    "avx2": ("avx2", "fma"),
    "avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
}
"""What `csrc/cpu/dispatch.cpp` asks of the processor."""

CHILD_SECONDS = 60


def machine() -> dict[str, str]:
    """What there is, ready to print."""
    told = environment.describe()
    rows = {name: str(told[name]) for name in ("krrst_fast", "python", "torch", "platform", "cpu")}
    rows["instruction set"] = f"{chosen_isa()}, of {', '.join(instruction_sets())}"
    rows["threads"] = str(torch.get_num_threads())
    rows["extension"] = library.EXTENSION
    rows["CUDA extension"] = library.CUDA_EXTENSION
    rows["gpu"] = _gpus()
    rows["float32 products"] = _product_switches()
    return rows


def _gpus() -> str:
    if not torch.cuda.is_available():
        built = (
            f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        )
        return f"none that torch sees (torch is {built})"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{', '.join(names)} (CUDA {torch.version.cuda})"


def _product_switches() -> str:
    """torch's switches that round the operands of its own float32 products."""
    cuda, cpu = torch.backends.cuda, torch.backends.mkldnn
    switches = {
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cuda": _precision_of(cuda),
        "cpu": _precision_of(cpu),
    }
    return ", ".join(f"{name} {value}" for name, value in switches.items())


def _precision_of(backend: object) -> str:
    return str(getattr(getattr(backend, "matmul", None), "fp32_precision", "unknown"))


def instruction_sets() -> list[str]:
    """The sets the compiled operators can be run with here, narrowest first."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ["baseline"]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return [isa for isa in ISA_NAMES if all(flag in flags for flag in ISA_FLAGS.get(isa, ()))]


def chosen_isa() -> str:
    """The widest set, or what KRRST_FAST_ISA lowers it to."""
    here = instruction_sets()
    cap = os.environ.get("KRRST_FAST_ISA", "")
    return cap if cap in here else here[-1]


def operators(isa: str) -> Iterator[Result]:
    """The compiled operators themselves, with the instruction set of this process."""
    ops = torch.ops.krrst_fast
    cases: list[tuple[str, Callable[..., Any], Callable[..., Any]]] = [
        ("gram", lambda a: ops.gram(a, 2.0, 0.5), lambda a: reference.gram(a, 2.0, 0.5)),
        ("thin_matmul", lambda a: ops.thin_matmul(a, a[:9].mT), lambda a: a @ a[:9].mT),
        ("thin_matmul, by columns", lambda a: ops.thin_matmul(a.mT, a[:, :5]), _by_columns),
    ]
    many: list[tuple[str, Callable[..., Any], Callable[..., Any]]] = [
        ("batched_matmul", lambda a: ops.batched_matmul(a, a.mT), lambda a: a @ a.mT),
        (
            "batched_cholesky",
            _cholesky(ops.batched_cholesky),
            _cholesky(reference.batched_cholesky),
        ),
        ("batched_cholesky_solve", _solve(ops), _solve(reference)),
    ]
    shapes: Sequence[tuple[int, ...]] = ((1, 1), (11, 13), (49, 257), (97, 513))
    for table, sizes in ((cases, shapes), (many, [(3, *shape) for shape in shapes])):
        for name, got, exact in table:
            for precision in (FLOAT32, FLOAT64):
                yield _operator(f"operator {name}", f"cpp {isa}", got, exact, sizes, precision)


def _by_columns(a: Tensor) -> Tensor:
    return a.mT @ a[:, :5]


def _cholesky(factor: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
    def call(a: Tensor) -> Tensor:
        lower, pivot = factor(a @ a.mT / a.shape[-1], a.new_ones(len(a)))
        return torch.where(pivot[:, None, None] == 0, lower, torch.nan)

    return call


def _solve(ops: Any) -> Callable[[Tensor], Tensor]:
    def call(a: Tensor) -> Tensor:
        # The same factor for both sides: what differs is the solve.
        k = a.double() @ a.double().mT / a.shape[-1]
        factor, _ = reference.batched_cholesky(k, k.new_ones(len(k)))
        return ops.batched_cholesky_solve(a[..., :7].contiguous(), factor)

    return call


def _operator(
    name: str,
    backend: str,
    got: Callable[..., Any],
    exact: Callable[..., Any],
    sizes: Sequence[tuple[int, ...]],
    precision: Precision,
) -> Result:
    generator = torch.Generator().manual_seed(0)
    problems = [{"a": torch.randn(*size, generator=generator).double()} for size in sizes]

    @torch.no_grad()
    def forward(a: Tensor) -> Any:
        return got(a)

    @torch.no_grad()
    def formula(a: Tensor) -> Any:
        return exact(a)

    return run(name, backend, forward, formula, problems, precision)


def every_operator() -> Iterator[Result]:
    """The compiled operators under each instruction set of this processor.

    The set is chosen once a process, so each but this one's gets a process of its own.
    """
    if not library.has_extension():
        return
    yield from operators(chosen_isa())
    for isa in instruction_sets():
        if isa != chosen_isa():
            yield from _in_a_child(isa)


def _in_a_child(isa: str) -> Iterator[Result]:
    command = [sys.executable, "-m", "krrst_fast.selftest", "--operators"]
    start, some = time.perf_counter(), False
    try:
        for text in _printed(command, {**os.environ, "KRRST_FAST_ISA": isa}):
            yield Result(**json.loads(text))
            some = True
        if some:
            return
        problem = "it printed nothing"
    except (OSError, ValueError, TypeError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        problem = said[-1] if said else type(error).__name__
    seconds = time.perf_counter() - start
    yield Result("operators", f"cpp {isa}", "", math.nan, math.nan, seconds, problem)


def _printed(command: Sequence[str], env: dict[str, str]) -> Iterator[str]:
    """The lines of a process as it prints them, so that one that is killed has told what it knew.

    Raises:
        subprocess.SubprocessError: it took too long, or its exit code is not 0.
    """
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        late = threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(CHILD_SECONDS, stop)
        timer.start()
        try:
            assert process.stdout is not None
            yield from process.stdout
            code = process.wait()
        finally:  # here too if nobody asks for the next line
            timer.cancel()
            if process.poll() is None:
                process.kill()
        if late.is_set():
            raise subprocess.TimeoutExpired(command, CHILD_SECONDS)
        if code:
            errors.seek(0)
            raise subprocess.CalledProcessError(code, command, stderr=errors.read())


def line(result: Result) -> str:
    """One check as a line."""
    verdict = "ok" if result.ok else "FAILED"
    told = f"error {result.error:8.1e}  allowed {result.allowed:8.1e}"
    text = (
        f"{verdict:6}  {result.check:40} {result.backend:13} {result.precision:19} {told}"
        f"  {result.seconds:5.2f} s"
    )
    return f"{text}  {result.problem}" if result.problem else text


def _as_json(result: Result) -> dict[str, Any]:
    """JSON has no NaN: an error that is not a number is null."""
    row = {**asdict(result), "ok": result.ok}
    numbers = ("error", "allowed")
    return row | {name: row[name] if math.isfinite(row[name]) else None for name in numbers}


@dataclass
class _Told:
    """What is known by now, which is written after each check: a run that is killed keeps it."""

    file: Path | None
    machine: dict[str, str]
    choices: list[str]
    start: float
    results: list[Result] = field(default_factory=list)

    @property
    def failed(self) -> int:
        return sum(not result.ok for result in self.results)

    def write(self, finished: bool) -> None:
        """Put it in the place of what was written before, if there is a file to write."""
        if self.file is None:
            return
        told = {
            "machine": self.machine,
            "choices": self.choices,
            "checks": [_as_json(result) for result in self.results],
            "failed": self.failed,
            "seconds": time.perf_counter() - self.start,
            "finished": finished,
        }
        files.write_json(self.file, told)


def main(argv: Sequence[str] | None = None) -> int:
    """Run everything, print it, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m krrst_fast.selftest", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--json", metavar="FILE", type=Path, help="write the same as JSON, row by row"
    )
    parser.add_argument("--operators", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.operators:
        for result in operators(chosen_isa()):
            print(json.dumps(asdict(result)), flush=True)
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: {_gpus()}")
    start = time.perf_counter()
    about = machine()
    for name, value in about.items():
        print(f"{name:17} {value}")
    chosen = choices(args.device)
    print("", *chosen, "", sep="\n")
    told = _Told(args.json, about, chosen, start)
    told.write(finished=False)
    for source in (checks(args.device), every_operator() if args.device == "cpu" else ()):
        for result in source:
            told.results.append(result)
            print(line(result), flush=True)
            told.write(finished=False)
    told.write(finished=True)
    count, failed, seconds = len(told.results), told.failed, time.perf_counter() - start
    print(f"\n{count} checks on {args.device}, {failed} FAILED, {seconds:.1f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
