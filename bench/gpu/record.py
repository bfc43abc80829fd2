"""What becomes of a command that ended: python -m bench.gpu.record STAGE CODE SECONDS --out --work

A stage that measures has its rows already; of the others they are read from what was printed. Both
files are written anew each time, so that a run which is cut loses nothing that was measured.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from bench.gpu import report
from bench.gpu.results import CHECKS, STAGES, Results, Row
from krrst_fast.errors import KrrstError

CUT = (75, 124, 137)
"""Exit codes of a command that has more to do: its own, that of `timeout`, that of a kill."""

# pytest's own words for an outcome, and those of its plugin for several processes.
_OUTCOME = r"(PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)"
_ALONE = re.compile(rf"^(\S+::.+?) {_OUTCOME}\b", re.MULTILINE)
_BY_WORKERS = re.compile(rf"^\[gw\d+\] \[ *\d+%\] {_OUTCOME} (\S+::.+?) *$", re.MULTILINE)


def build(code: int, work: Path, log: str) -> dict[str, Row]:
    """The modules that were built, and the kernels that were compiled beside them."""
    modules = sorted(path.name for path in (work / "site" / "krrst_fast").glob("*.so"))
    warnings = [line for line in log.splitlines() if "warning" in line.lower()]
    row: Row = {"modules": modules, "warnings": warnings[:20]}
    return {"build": row | ({"wrong": [f"exit code {code}: it does not build"]} if code else {})}


def kernels(code: int, work: Path, log: str) -> dict[str, Row]:
    """The Triton kernels that were compiled ahead: the last line says how many."""
    row: Row = {"said": (log.splitlines() or [""])[-1]}
    return {"kernels": row | ({"wrong": [f"exit code {code}: {row['said']}"]} if code else {})}


def selftest(code: int, work: Path, log: str) -> dict[str, Row]:
    """The checks of the self-test, as far as it came."""
    try:
        found = json.loads((work / "selftest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"selftest": {} if code in CUT else {"wrong": [f"exit code {code}: no result"]}}
    wrong = [f"{x['check']}, {x['backend']}" for x in found["checks"] if not x["ok"]]
    if code not in CUT and not found["finished"]:
        wrong.append(f"it ended before its last check, with exit code {code}")
    row = {"checks": len(found["checks"]), "choices": found["choices"], "wrong": wrong}
    return {"selftest": row | {"machine": found["machine"]}}


def tests(code: int, work: Path, log: str) -> dict[str, Row]:
    """The outcomes of pytest, counted line by line: a run that was cut counts as far as it came."""
    found = dict(_ALONE.findall(log)) | {name: said for said, name in _BY_WORKERS.findall(log)}
    wrong = [name for name, said in found.items() if said in ("FAILED", "ERROR")]
    wrong += re.findall(r"^ERROR (\S+\.py)\b", log, re.MULTILINE)
    if code not in (0, 1, *CUT) or (code == 1 and not wrong):
        wrong.append(f"pytest ended with exit code {code}")
    outcomes = dict(Counter(said.lower() for said in found.values()))
    return {"tests": {"outcomes": outcomes, "wrong": list(dict.fromkeys(wrong))}}


def tool(name: str) -> Callable[[int, Path, str], dict[str, Row]]:
    """What a tool of compute-sanitizer found."""

    def rows(code: int, work: Path, log: str) -> dict[str, Row]:
        refused = re.search(r"^refused: (.+)$", log, re.MULTILINE)
        if refused:
            return {name: {"refused": refused[1]}}
        errors = re.findall(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (.+)$", log, re.MULTILINE)
        row: Row = {"said": errors[-1] if errors else "", "calls": "calls" in log}
        if code in CUT:
            return {name: row | {"said": "its time was over"}}
        return {name: row | ({"wrong": [f"exit code {code}"]} if code else {})}

    return rows


READ = {
    **{"build": build, "kernels": kernels, "selftest": selftest, "tests": tests},
    **{name: tool(name) for name in ("racecheck", "memcheck")},
}


def main(argv: list[str] | None = None) -> int:
    """Note a stage, write both files, print a line; 1 if something is wrong in it, 75 if cut."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.record")
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("code", type=int)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--part", help="of the stage, with a log of its own")
    asked = parser.parse_args(argv)
    stage, part = asked.stage, asked.part or asked.stage
    try:
        kept = Results(asked.out)
    except KrrstError as error:
        print(error, file=sys.stderr)
        return 2
    if stage in CHECKS:
        if (
            kept.begin_stage(stage).get("sources", kept.machine["sources"])
            != (kept.machine["sources"])
        ):
            kept.forget(stage)  # a verdict on other code
        path = asked.work / f"{part}.log"
        log = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        for name, row in READ[part](asked.code, asked.work, log).items():
            kept.add(stage, name, row | ({"cut": True} if asked.code in CUT else {}))
        why = log.splitlines()[-1:] if asked.code else []
    else:
        why = []
        kept.drop(stage, "the stage")
        if asked.code not in (0, *CUT):
            kept.add(stage, "the stage", {"failed": f"exit code {asked.code}"})
    finished = asked.code not in CUT and not any(x.get("cut") for x in kept.rows(stage).values())
    kept.end(stage, finished=finished, seconds=asked.seconds, why=" ".join(why)[:300])
    report.write_page(kept)
    print(report.line(kept, stage), flush=True)
    return (1 if any(kept.complaints(stage)) else 0) if finished else 75


if __name__ == "__main__":
    sys.exit(main())
