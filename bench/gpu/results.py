"""The file of all results: one row after the other, each on disk as soon as it is there.

A row carries a digest of the code it was measured with, so that repaired code throws nothing away.
"""

import json
import os
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from krrst_fast.errors import DataError

FILE = "gpu.json"
STAGES = {
    "build": "the package for this GPU, and every Triton kernel that the other stages launch",
    "ceilings": "a copy, products and factors by the libraries",
    "krr": "the KRR loss with its gradients against the released formulation",
    "step": "where the time of an outer step goes",
    "steps": "outer steps on images",
    "selftest": "every operator against float64",
    "tests": "pytest -m gpu",
    "parts": "which implementation of a part is fastest, by size",
    "sanitizer": "our kernels under compute-sanitizer: races, then wild reads and writes",
}
CHECKS = ("build", "selftest", "tests", "sanitizer")
"""Stages that say whether the code is right: of other code they say nothing."""

Row = dict[str, Any]


def write(path: Path, text: str) -> None:
    """Write a file that is whole or not there. (`krrst_fast.files` would import torch: seconds.)"""
    temporary = path.with_name(f".{path.name}.new")  # one process writes at a time
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def now() -> str:
    """The time, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class Results:
    """Rows by stage, and the machine they were made on.

    Args:
        out: the folder that holds the file.

    Raises:
        DataError: the file is not one of results.
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
        """Those in a folder, for this machine and the code that is here.

        Raises:
            DataError: they are of another GPU, other versions or other sizes.
        """
        if not (out / FILE).exists():
            write(out / FILE, json.dumps({"machine": machine, "stages": {}}))
        found = cls(out)
        mine, theirs = (
            {name: one.get(name) for name in ("gpu", "versions", "sizes")}
            for one in (machine, found.machine)
        )
        for name, value in mine.items():
            if theirs[name] != value:
                raise DataError(
                    f"bench/gpu.sh: {found.path} was measured with {name} {theirs[name]}, here it "
                    f"is {value}; name another folder by --out"
                )
        found.all["machine"] = found.machine = dict(machine)
        found.save()
        return found

    def save(self) -> None:
        """Write the file."""
        write(self.path, json.dumps(self.all, indent=1, allow_nan=False) + "\n")

    def rows(self, stage: str) -> dict[str, Row]:
        """The rows of a stage."""
        return self.stages.get(stage, {}).get("rows", {})

    def begin_stage(self, stage: str) -> dict[str, Any]:
        """Make the place of a stage, if it has none yet."""
        return self.stages.setdefault(stage, {"seconds": 0.0, "finished": False, "rows": {}})

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
        """Whether a row need not be measured: it is there, and right, or failed with this code."""
        row = self.rows(stage).get(name)
        return row is not None and (not wrong(row) or row["sources"] == self.machine["sources"])

    def done(self, stage: str) -> bool:
        """Whether a stage need not be run."""
        one = self.stages.get(stage)
        if one is None or not one["finished"]:
            return False
        same = one["sources"] == self.machine["sources"]
        return same or (stage not in CHECKS and not any(wrong(x) for x in one["rows"].values()))

    def complaints(self, stage: str) -> Iterator[str]:
        """What is wrong in a stage, a line each."""
        for name, row in self.rows(stage).items():
            yield from (f"{name}: {one}" for one in wrong(row))


def wrong(row: Mapping[str, Any]) -> list[str]:
    """What is wrong with a row. That memory did not suffice is a result."""
    failed = row.get("failed")
    found = [failed] if failed and failed != "out of memory" else []
    return [*found, *row.get("wrong", ())]
