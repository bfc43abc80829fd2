"""Adds a command that ended to the results: python -m bench.gpu.record STAGE CODE SECONDS ...

A stage that measures has written its rows itself; those of the others are read from their logs. The
results and the page are written after each command, so that a run which is cut loses no row.
"""

import argparse
import json
import re
import sys
from collections import Counter
from pathlib import Path

from bench.gpu import report
from bench.gpu.results import CHECKS, STAGES, Results, Row
from krrst_fast.errors import KrrstError

CUT = (75, 124, 137)
"""Exit codes of a command with rows left to do: its own, that of `timeout`, that of a kill."""

# pytest's own words for an outcome, and those of its plugin for several processes.
_OUTCOME = r"(PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)"
_ALONE = re.compile(rf"^(\S+::.+?) {_OUTCOME}\b", re.MULTILINE)
_BY_WORKERS = re.compile(rf"^\[gw\d+\] \[ *\d+%\] {_OUTCOME} (\S+::.+?) *$", re.MULTILINE)


def command(name: str, code: int, log: str) -> dict[str, Row]:
    """Return the row of a plain command: its last line, which says why if it refused or failed."""
    lines = log.splitlines() or [""]
    refused = re.search(r"^refused: (.+)$", log, re.MULTILINE)
    if refused:
        return {name: {"refused": refused[1]}}
    row: Row = {"last line": lines[-1]}
    failed = code and code not in CUT
    return {name: row | ({"wrong": [f"exit code {code}: {lines[-1]}"]} if failed else {})}


def selftest(code: int, work: Path) -> dict[str, Row]:
    """Return the checks of the self-test, which writes its file after each of them."""
    try:
        found = json.loads((work / "selftest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"selftest": {} if code in CUT else {"wrong": [f"exit code {code}: no result"]}}
    wrong = [f"{x['check']}, {x['backend']}" for x in found["checks"] if not x["ok"]]
    if code not in CUT and not found["finished"]:
        wrong.append(f"it ended before its last check, with exit code {code}")
    row = {"checks": len(found["checks"]), "choices": found["choices"], "wrong": wrong}
    return {"selftest": row | {"machine": found["machine"]}}


def tests(code: int, log: str) -> dict[str, Row]:
    """Count the outcomes of pytest line by line, so that a run that was cut counts as well."""
    found = dict(_ALONE.findall(log)) | {name: word for word, name in _BY_WORKERS.findall(log)}
    wrong = [name for name, word in found.items() if word in ("FAILED", "ERROR")]
    wrong += re.findall(r"^ERROR (\S+\.py)\b", log, re.MULTILINE)
    if code not in (0, 1, *CUT) or (code == 1 and not wrong):
        wrong.append(f"pytest ended with exit code {code}")
    outcomes = dict(Counter(word.lower() for word in found.values()))
    return {"tests": {"outcomes": outcomes, "wrong": list(dict.fromkeys(wrong))}}


def main(argv: list[str] | None = None) -> int:
    """Add a stage, write both files, print a line; return 1 if something is wrong, 75 if cut."""
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
        if stage == "selftest":
            rows = selftest(asked.code, asked.work)
        else:
            rows = tests(asked.code, log) if stage == "tests" else command(part, asked.code, log)
        for name, row in rows.items():
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
