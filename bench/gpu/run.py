"""The stages one after the other: each into one file, with a time limit of its own."""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from bench.gpu import machine
from bench.gpu.commands import COMMANDS, Setting, site
from bench.gpu.notes import Key, Notes
from bench.gpu.process import Ended, last_lines, spawn
from bench.gpu.stage import LOST, UNFINISHED, notes_path
from krrst_fast.errors import DataError
from krrst_fast.files import read_json, write_json


class Stage(NamedTuple):
    """One stage: after so many seconds it begins no row, and a little later it is ended."""

    name: str
    seconds: float
    what: str


STAGES = (
    Stage("build", 150, "compile for this GPU"),
    Stage("selftest", 60, "every operator against float64"),
    Stage("tests", 150, "pytest -m gpu"),
    Stage("ceilings", 30, "copies, products, factors by the libraries"),
    Stage("parts", 110, "who is fastest at which part and size"),
    Stage("krr", 110, "the KRR loss with its gradients against the released formulation"),
    Stage("step", 40, "where an outer step's time goes"),
    Stage("steps", 60, "outer steps on images"),
    Stage("sanitizer", 90, "our kernels under compute-sanitizer"),
)
NAMES = tuple(stage.name for stage in STAGES)
GRACE = 20.0
"""Seconds beyond a stage's own until it is ended: its last row may take them."""
TOTAL = 500.0
"""Seconds after which no stage goes on: the next call does."""
QUIET = 90.0
"""Seconds without a word after which what is being tried will not come back."""
RESTARTS = 6


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for."""

    out: Path
    dry_run: bool = False
    images: Path | None = None
    again: bool = False
    stages: Sequence[str] = NAMES


class Place(NamedTuple):
    """The GPU, None in a dry run; what a result must have been made on; and with what."""

    gpu: Mapping[str, Any] | None
    key: Key
    versions: Mapping[str, Any]


def place(dry_run: bool) -> Place:
    """This machine.

    Raises:
        DataError: it has no GPU, and this is no dry run.
    """
    gpu = None if dry_run else machine.other_gpu()
    if gpu is None and not dry_run:
        raise DataError("bench/gpu.sh: torch sees no GPU here; --dry-run tries it all on the CPU")
    versions = machine.versions()
    key = {
        # Not the commit, which says less and more: it is noted beside.
        "sources": machine.sources(),
        "gpu": gpu["name"] if gpu else None,
        "torch": versions["torch"],
        "triton": versions["triton"],
        "sizes": "toy" if dry_run else "full",
    }
    return Place(gpu, key, versions)


def run(request: Request) -> int:
    """Run the stages that are not done yet; 1 if anything failed in those that were asked for."""
    request.out.mkdir(parents=True, exist_ok=True)
    here = place(request.dry_run)
    gpu = (
        here.gpu["name"] if here.gpu else "dry run on the CPU: toy sizes, no figure means anything"
    )
    print(f"{gpu}; torch {here.key['torch']}; into {request.out}", flush=True)
    wrong, end = 0, time.monotonic() + TOTAL
    for stage in STAGES:
        if stage.name not in request.stages:
            continue
        key = here.key | ({"images": str(request.images)} if stage.name == "steps" else {})
        done = finished(request.out, stage.name, key)
        if done is None or request.again or _lost_build(stage, request.out):
            left = end - time.monotonic()
            if left <= 0:
                print(f"{stage.name:9} NOT BEGUN: {TOTAL:g} s are over; call again to go on")
                wrong += 1
                continue
            seconds = min(stage.seconds, left)
            done = carry_out(stage._replace(seconds=seconds), request, here, key)
            print(summary(done), flush=True)
        else:
            print(f"{summary(done)}  (of {done['date']})", flush=True)
        wrong += bool(done["wrong"])
    return int(wrong > 0)


def _lost_build(stage: Stage, out: Path) -> bool:
    """Whether the results came from another machine, and what was built did not."""
    return stage.name == "build" and not site(out).is_dir()


def finished(out: Path, name: str, key: Key) -> dict[str, Any] | None:
    """The result of a stage, if it ran to its end on this."""
    try:
        found = read_json(out / f"{name}.json")
    except DataError:
        return None
    return found if found.get("key") == key and found.get("finished") else None


def carry_out(stage: Stage, request: Request, here: Place, key: Key) -> dict[str, Any]:
    """Run one stage and write its file."""
    begin, log = time.monotonic(), request.out / f"{stage.name}.log"
    log.unlink(missing_ok=True)
    if request.again:
        notes_path(request.out, stage.name).unlink(missing_ok=True)
    if stage.name in COMMANDS:
        command = COMMANDS[stage.name](Setting(request.out, environment(request.out), here.gpu))
        ended = spawn(
            command.arguments, log=log, cwd=command.cwd, env=command.env, seconds=stage.seconds
        )
        words = "\n".join(last_lines(log, 100_000))
        rows, whole = command.rows(ended.code, words), ended.code is not None
    else:
        rows, ended = measured(stage, request, here, key, log)
        whole = ended.code == 0
    wrong = list(complaints(rows))
    if not whole or (ended.code != 0 and not wrong):
        wrong.append(ended.why)
    result = {
        "stage": stage.name,
        "key": key,
        "commit": machine.commit(),
        "finished": whole,
        "wrong": wrong,
        "words": last_lines(log) if wrong else [],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - begin, 1),
        "gpu": here.gpu,
        "versions": dict(here.versions),
        "request": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(request).items()},
        "rows": rows,
    }
    write_json(request.out / f"{stage.name}.json", result)
    if whole:
        notes_path(request.out, stage.name).unlink(missing_ok=True)
    return result


def measured(
    stage: Stage, request: Request, here: Place, key: Key, log: Path
) -> tuple[dict[str, Any], Ended]:
    """The rows of a stage that measures; started again behind what ended its process."""
    path = notes_path(request.out, stage.name)
    end = time.monotonic() + stage.seconds
    for _ in range(RESTARTS):
        left = max(end - time.monotonic(), 1.0)
        settings = {
            **{"out": str(request.out), "key": key, "toy": request.dry_run, "seconds": left},
            "device": "cpu" if here.gpu is None else "cuda",
            "images": str(request.images.resolve()) if request.images else None,
        }
        ended = spawn(
            [sys.executable, "-m", "bench.gpu.stage", stage.name, json.dumps(settings)],
            log=log,
            cwd=request.out,
            env=environment(request.out),
            seconds=left + GRACE,
            ended=Silence(path),
        )
        notes, said = Notes(path, key), (last_lines(log, 1) or [ended.why])[0]
        if ended.code in (0, UNFINISHED):
            break
        why = said if ended.code == LOST else ended.why
        blamed = notes.blame(f"left out: {why}")
        print(f"  {stage.name}: {blamed or 'it'}: {why}", flush=True)
        if blamed is None or time.monotonic() > end:
            break
    if ended.code == UNFINISHED:
        ended = Ended(None, said, ended.seconds)
    return notes.rows, ended


class Silence:
    """Says when a stage has noted nothing for too long."""

    def __init__(self, notes: Path) -> None:
        self._notes, self._begin = notes, time.time()

    def __call__(self) -> str | None:
        try:
            last = max(self._notes.stat().st_mtime, self._begin)
        except OSError:
            last = self._begin
        return f"silent for {QUIET:.0f} s" if time.time() - last > QUIET else None


def environment(out: Path) -> dict[str, str]:
    """What stages run in: the package that was built, then the checkout."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(site(out)), str(machine.ROOT)))}
    # Kept: what Triton compiles in one stage the next one finds.
    env["TRITON_CACHE_DIR"] = str(out / "triton-cache")
    env["OMP_WAIT_POLICY"] = "PASSIVE"
    env["PYTHONSAFEPATH"] = env["PYTHONUNBUFFERED"] = "1"
    env.pop("TRITON_INTERPRET", None)
    if not list(site(out).glob("krrst_fast/*.so")):
        # Or every process would warn that there are none.
        env["KRRST_FAST_EXTENSION"] = "0"
    return env


def complaints(rows: Mapping[str, Any]) -> Iterator[str]:
    """What the rows of a stage say is wrong."""
    for name, row in rows.items():
        if "failed" in row:
            yield f"{name}: {row['failed']}"
        for one in row.get("wrong", ()):
            yield f"{name}: {one}"


def summary(done: Mapping[str, Any]) -> str:
    """A stage in a line, and a line for each thing that is wrong."""
    state = "finished" if done["finished"] else "NOT FINISHED"
    head = f"{done['stage']:9} {state}, {len(done['rows'])} rows, {done['seconds']:.0f} s"
    return "\n".join([head, *(f"  WRONG {one}" for one in done["wrong"])])
