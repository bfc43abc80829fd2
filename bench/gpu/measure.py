"""The rows of a stage that measures: python -m bench.gpu.measure STAGE --out FOLDER --seconds N

Rows come in units, each made by a child of this process: what takes its process with it, or spoils
it, costs the row that was tried, and the next child goes on behind it. A row that the time limit
cut is not blamed: the next call makes it. This process imports torch once, for all children, and
must never start CUDA or compute anything: a child that is forked then could do neither.
"""

import argparse
import ctypes
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from bench.gpu.clock import Clock, DeviceLost, reason
from bench.gpu.results import Results, wrong
from krrst_fast.errors import KrrstError

DONE, GO_ON = 0, 75
"""Exit codes of a child: all rows are made; the process is spoilt, another one goes on."""
SILENCE = 90.0
"""Seconds that one row may take."""

Rows = Iterable[tuple[str, Callable[[], dict[str, Any]]]]


class Run(NamedTuple):
    """The context in which the rows of a stage are measured.

    Attributes:
        stage: Name of the stage.
        device: "cuda", or "cpu" in a dry run.
        toy: Sizes that take no time.
        images: A prepared store, if there is one.
        clock: Timer for the device.
        row: The row of this stage that has a name, if it is there already.
    """

    stage: str
    device: str
    toy: bool
    images: Path | None
    clock: Clock
    row: Callable[[str], dict[str, Any] | None]


class Unit(NamedTuple):
    """The rows that one process measures, in order; rows that have a valid result are skipped."""

    name: str
    rows: Callable[[Run], Rows]


def child(send: Connection, unit: Unit, make_run: Callable[[], Run], kept: Results) -> None:
    """Measure the unsettled rows of a unit; send ("try", name), then ("row", name, row)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with its parent
    try:
        made = make_run()
        for name, make in unit.rows(made):
            if kept.settled(made.stage, name):
                continue
            send.send(("try", name))
            row, lost = attempt(made.clock, make)
            send.send(("row", name, row))
            # In this process alone, where later rows ask for it; the parent writes it.
            kept.rows(made.stage)[name] = row
            print(f"{name}: {'; '.join(wrong(row)) or 'done'}", flush=True)
            if lost or made.clock.spoilt:
                os._exit(GO_ON)
            made.clock.free()
    except BaseException:
        traceback.print_exc(file=sys.stdout)
        sys.stdout.flush()
        os._exit(1)
    os._exit(DONE)


def attempt(clock: Clock, make: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], bool]:
    """Measure a row or say why it failed; return also whether the device is lost."""
    try:
        row = make()
        clock.wait()
        return row, False
    except DeviceLost as error:
        return {"failed": reason(error)}, True
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        try:
            clock.require_device(error)
        except DeviceLost:
            return {"failed": reason(error)}, True
        return {"failed": reason(error)}, False


def carry_out(
    stage: str, unit: Unit, make_run: Callable[[], Run], kept: Results, end: float
) -> bool:
    """Measure the rows of a unit in successive children; return False if the time ran out."""
    fork = multiprocessing.get_context("fork")
    while True:
        if time.monotonic() > end:
            return False
        receive, send = fork.Pipe(duplex=False)
        process = fork.Process(target=child, args=(send, unit, make_run, kept))
        process.start()
        send.close()
        tried, why = None, None
        try:
            while why is None:
                left = end - time.monotonic()
                if not receive.poll(max(0.0, min(left, SILENCE))):
                    if time.monotonic() >= end:
                        return False
                    why = f"took longer than {SILENCE:g} s"
                    continue
                kind, name, *row = receive.recv()
                tried = name if kind == "try" else None
                if row:
                    kept.add(stage, name, row[0])
        except EOFError:
            pass
        finally:
            if why is not None or time.monotonic() >= end:
                process.kill()
            process.join()
        code = process.exitcode
        if code == DONE and tried is None:
            kept.drop(stage, unit.name)  # that an earlier process of it ended before its first row
            return True
        if code == GO_ON and tried is None:
            continue
        if why is None:
            ended = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            why = f"its process ended by {ended}"
        kept.add(stage, tried or unit.name, {"failed": why})
        print(f"{tried or unit.name}: {why}", flush=True)
        if tried is None:
            return True


def main(argv: list[str] | None = None) -> int:
    """Measure a stage; return 0 if all rows are there, right or wrong, 75 if the time ran out."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.measure")
    parser.add_argument("stage", choices=("krr", "step", "steps", "parts"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--images", type=Path)
    asked = parser.parse_args(argv)
    end = time.monotonic() + asked.seconds
    try:
        kept = Results(asked.out)
    except KrrstError as error:
        print(error, file=sys.stderr)
        return 2
    toy = kept.machine["sizes"] == "toy"
    device = "cpu" if toy else "cuda"
    kept.begin_stage(asked.stage)

    def make_run() -> Run:
        clock, row = Clock(device, quick=toy), kept.rows(asked.stage).get
        return Run(asked.stage, device, toy, asked.images, clock, row)

    whole = True
    for unit in import_module(f"bench.gpu.{asked.stage}").units(toy):
        whole = carry_out(asked.stage, unit, make_run, kept, end) and whole
    return 0 if whole else GO_ON


if __name__ == "__main__":
    sys.exit(main())
