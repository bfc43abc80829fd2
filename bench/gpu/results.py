"""The file of all results: one row after the other, each on disk as soon as it is there.

A row carries a digest of the code it was measured with, so that repaired code throws nothing away.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from krrst_fast.errors import DataError

FILE = "gpu.json"
STAGES = ("build", "krr", "step", "steps", "selftest", "tests", "parts", "sanitizer")
"""In their order; docs/gpu.md says what each gives."""
CHECKS = ("build", "selftest", "tests", "sanitizer")
"""Stages that say whether the code is right: of other code they say nothing."""

Row = dict[str, Any]


def write(path: Path, text: str) -> None:
    """Write a file that is whole or not there. (`runs.files` would import torch: seconds.)"""
    temporary = path.with_name(f".{path.name}.new")  # one process writes at a time
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def now() -> str:
    """Return the current UTC time in ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class Results:
    """Rows by stage, and the machine they were made on.

    Args:
        out: The folder that holds the file.

    Raises:
        DataError: The file is not one of results.
    """

    def __init__(self, out: Path) -> None:
        self.path = out / FILE
        try:
            self.all = json.loads(self.path.read_text(encoding="utf-8"))
            self.machine, self.stages = self.all["machine"], self.all["stages"]
        except FileNotFoundError:
            raise DataError(f"bench/gpu.sh: {out} holds no results") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"bench/gpu.sh: {self.path} holds no results: {error!r}") from None

    @classmethod
    def begin(cls, out: Path, machine: Mapping[str, Any]) -> "Results":
        """Open the results in a folder for this machine and code.

        What was measured on another GPU, with another torch or triton, or in other sizes is not
        mixed with them: it is put aside as `gpu-before.json`.
        """
        if (out / FILE).exists() and about(cls(out).machine) != about(machine):
            (out / FILE).replace(out / "gpu-before.json")
            print(f"{out / FILE}: of another machine, now gpu-before.json", file=sys.stderr)
        if not (out / FILE).exists():
            write(out / FILE, json.dumps({"machine": machine, "stages": {}}))
        found = cls(out)
        found.all["machine"] = found.machine = dict(machine)
        found.save()
        return found

    def save(self) -> None:
        """Write the file."""
        write(self.path, json.dumps(self.all, indent=1, allow_nan=False) + "\n")

    def rows(self, stage: str) -> dict[str, Row]:
        """Return the rows of a stage."""
        return self.stages.get(stage, {}).get("rows", {})

    def begin_stage(self, stage: str) -> dict[str, Any]:
        """Make the place of a stage, if it has none yet."""
        empty = {"seconds": 0.0, "finished": False, "why": "", "rows": {}}
        return self.stages.setdefault(stage, {**empty, "sources": self.machine["sources"]})

    def add(self, stage: str, name: str, row: Mapping[str, Any]) -> None:
        """Keep a row, on disk."""
        about = {"sources": self.machine["sources"], "date": now()}
        self.begin_stage(stage)["rows"][name] = {**row, **about}
        self.save()

    def drop(self, stage: str, name: str) -> None:
        """Remove a row, if it is there."""
        if self.rows(stage).pop(name, None) is not None:
            self.save()

    def end(self, stage: str, *, finished: bool, seconds: float = 0.0, why: str = "") -> None:
        """Note how a stage ended, and add the seconds that it took."""
        one = self.begin_stage(stage)
        one["seconds"] = round(one["seconds"] + seconds, 1)
        one |= {"finished": finished, "why": why, "sources": self.machine["sources"]}
        self.save()

    def forget(self, stage: str) -> None:
        """Drop what there is of a stage."""
        self.stages.pop(stage, None)
        self.save()

    def settled(self, stage: str, name: str) -> bool:
        """Return whether a row need not be measured: it is right, or failed with this code.

        What was refused is asked again: it may have been built meanwhile.
        """
        row = self.rows(stage).get(name)
        if row is None or "refused" in row:
            return False
        return not wrong(row) or row["sources"] == self.machine["sources"]

    def done(self, stage: str) -> bool:
        """Return whether a stage need not be run."""
        one = self.stages.get(stage)
        if one is None or not one["finished"]:
            return False
        bad = any(wrong(row) or "refused" in row for row in one["rows"].values())
        if one["sources"] == self.machine["sources"]:
            return stage != "build" or not bad
        return stage not in CHECKS and not bad

    def complaints(self, stage: str) -> Iterator[str]:
        """Yield the faults of a stage, a line each."""
        for name, row in self.rows(stage).items():
            yield from (f"{name}: {one}" for one in wrong(row))


def about(machine: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what rows must have in common to be compared."""
    versions = machine["versions"]
    return machine["gpu"], machine["sizes"], versions["torch"], versions["triton"]


def days(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the day on which rows were measured, or the first and the last one."""
    found = sorted(row["date"][:10] for row in rows)
    return " to ".join(dict.fromkeys((found[0], found[-1]))) if found else ""


def measured_with(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return the code that rows were measured with, and when: the digest of all sources.

    Of several the rows are counted. A commit would say less: what is checked out may be changed.
    """
    rows = list(rows)
    of = Counter(row["sources"] for row in rows)
    if len(of) == 1:
        return f"sources {next(iter(of))}, {days(rows)}"
    each = (
        f"{digest} ({count} rows, {days(row for row in rows if row['sources'] == digest)})"
        for digest, count in of.items()
    )
    return f"sources {', '.join(each)}"


def wrong(row: Mapping[str, Any]) -> list[str]:
    """Return the faults of a row."""
    return [*([row["failed"]] if "failed" in row else []), *row.get("wrong", ())]
