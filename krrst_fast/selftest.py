"""Check every operator on this machine: `python -m krrst_fast.selftest [--device cpu|cuda]`.

Prints the machine, the implementation chosen for several sizes with the reason, and one line for
each check of a public operator, forward and backward, against the reference in float64.
`--json FILE` writes the same, row by row. Exits with 1 if a check failed. Needs torch alone.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from krrst_fast import operators
from krrst_fast.backends import choose, tuned
from krrst_fast.planner import plan
from krrst_fast.runs import environment, files
from krrst_fast.selftest_checks import BACKENDS, Result, checks, refusal

CHILD_SECONDS = 60

# M, B, D, P of the problems for which the chosen implementation is printed.
PROBLEMS = (
    *((10, 256, 25088, 2048), (100, 256, 2048, 64), (1000, 1024, 8192, 10)),
    *((1000, 1024, 8192, 512), (5000, 1024, 512, 512)),
)


def machine() -> dict[str, str]:
    """Return what the machine has, as text."""
    isas = torch.ops.krrst_fast.isas()
    rows = {name: str(value) for name, value in environment.describe().items()}
    rows["instruction set"] = f"{torch.ops.krrst_fast.isa()}, of {', '.join(isas) or 'none'}"
    rows["extension"] = operators.EXTENSION
    rows["CUDA extension"] = operators.CUDA_EXTENSION
    rows["gpu"] = _gpus()
    # torch's switches that round the operands of its own float32 products.
    rows["float32 products"] = torch.get_float32_matmul_precision()
    for name, module in (("cuda", torch.backends.cuda), ("cpu", torch.backends.mkldnn)):
        switch = getattr(getattr(module, "matmul", None), "fp32_precision", "unknown")
        rows["float32 products"] += f", {name} {switch}"
    return rows


def _gpus() -> str:
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{', '.join(names) or 'none that torch sees'} (torch is built with {cuda})"


def choices(device: str) -> list[str]:
    """Return a line for each backend and representative size: the choice and its reason."""
    x = torch.empty(1, 1, device=device)
    lines = [f"backend on {device}: {choose('auto', x, 'selftest').NAME}"]
    lines += [f"  {name}: {refusal(name, x) or 'can compute'}" for name in BACKENDS]
    for m, b, d, p in PROBLEMS:
        planned = plan(m=m, b=b, d=d, p=p)
        lines.append(f"krr_mse M {m}, B {b}, D {d}, P {p}: form {planned.form}; {planned.reason}")
    return lines + (measured(x) if device == "cuda" else [])


def measured(x: Tensor) -> list[str]:
    """Return which implementation computes each part of a problem on a GPU, and its time."""
    found = {}
    for m, b, d, p in PROBLEMS:
        for what, part, *size in (
            (f"gram [{m}, {d}]", "gram", m, d),
            (f"[{b}, {d}] by rows times [{d}, {p}]", "matmul", b, d, p),
            (f"[{d}, {m}] by columns times [{m}, {p}]", "matmul_t", d, m, p),
            (f"prediction and MSE [{b}, {p}]", "mse", b, d, p),
            (f"last product of the gradient [{m}, {d}]", "closing", m, d, p),
        ):
            found[f"{what}, float32"] = tuned.choice(part, x, *size)
            if part != "closing":
                found[f"{what}, fast"] = tuned.choice(part, x.half(), *size)
        name = f"factor and solves [{m}, {m}], {p} columns"
        found[name] = tuned.cholesky_choice(x, m, p)
    for count, m in ((16, 25), (64, 100)):
        found[f"{count} of them [{m}, {m}], 5 columns"] = tuned.cholesky_choice(x, count, m, 5)
    return [f"{what}: {choice.name}; {choice.why}" for what, choice in found.items()]


def in_a_child(isa: str) -> Iterator[Result]:
    """Yield the checks of the backend "cpp" with another instruction set, chosen per process."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "krrst_fast.selftest", "--backend", "cpp", "--json"]
        try:
            done = subprocess.run(
                [*command, str(file)],
                env={**os.environ, "KRRST_FAST_ISA": isa},
                capture_output=True,
                text=True,
                timeout=CHILD_SECONDS,
            )
            ended = (done.stderr.splitlines() or [f"it ended with exit code {done.returncode}"])[-1]
        except (OSError, subprocess.SubprocessError) as error:
            ended = str(error)
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    yield from (Result(**row) for row in found.get("checks", ()))
    if not found.get("finished"):
        seconds = time.perf_counter() - start
        yield Result("every check", f"cpp {isa}", "", False, None, None, seconds, ended)


def results(device: str, backend: str | None) -> Iterator[Result]:
    """Yield the result of every check, with the instruction set in the name of its backend."""
    isa = torch.ops.krrst_fast.isa()
    for result in checks(device, [backend] if backend else ()):
        yield result._replace(backend=f"cpp {isa}") if result.backend == "cpp" else result
    if device == "cpu" and backend is None:
        for other in torch.ops.krrst_fast.isas():
            if other != isa:
                yield from in_a_child(other)


def main(argv: Sequence[str] | None = None) -> int:
    """Run everything, print it, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m krrst_fast.selftest", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--backend", choices=BACKENDS, help="check only its operators")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the same, row by row")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: {_gpus()}")
    start = time.perf_counter()
    rows: list[dict[str, Any]] = []
    report: dict[str, Any] = {"machine": machine(), "choices": choices(args.device)}
    report |= {"checks": rows, "failed": 0, "finished": False}
    for name, value in report["machine"].items():
        print(f"{name:17} {value}")
    print("", *report["choices"], "", sep="\n")

    def write() -> None:
        report["seconds"] = time.perf_counter() - start
        if args.json is not None:
            files.write_json(args.json, report)

    write()
    for result in results(args.device, args.backend):
        print(result.line(), flush=True)
        rows.append(result._asdict())
        report["failed"] += not result.ok
        write()  # a run that is killed keeps its rows
    report["finished"] = True
    write()
    failed = f"{report['failed']} FAILED, {report['seconds']:.1f} s"
    print(f"\n{len(rows)} checks on {args.device}, {failed}")
    return 1 if report["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
