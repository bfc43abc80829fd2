"""asv's results as rows: what each suite measured at each shape, by whom, in which precision."""

import ast
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from krrst_fast.errors import DataError

ENVIRONMENT = "bench_environment.Environment.track_threads"
PARAMETERS = 3
"""Shape, backend, precision."""

Key = tuple[str, str, str, str]
"""Suite, shape, backend and precision, the last three as asv writes them."""
Values = dict[str, float | None]
"""By measurement; None failed, NaN was not run or is n/a."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """The results of one commit on one machine in one environment.

    Attributes:
        commit: its hash.
        date: of the commit, milliseconds since 1970.
        started: when the last of its benchmarks was started, likewise; 0 if asv did not say.
        machine: its name.
        environment: asv's name for it.
        versions: of what was installed, and the number of threads; empty if not recorded.
        rows: what was measured.
    """

    commit: str
    date: int
    started: int
    machine: str
    environment: str
    versions: Mapping[str, str] = field(default_factory=dict)
    rows: Mapping[Key, Values]


@dataclass(frozen=True, kw_only=True)
class Series:
    """All commits of one machine and environment, oldest first.

    Attributes:
        machine: what asv knows of it: cpu, ram, os, ...
        runs: at least one.
    """

    machine: Mapping[str, str]
    runs: Sequence[Run]

    @property
    def latest(self) -> Run:
        return self.runs[-1]

    def history(self, key: Key, measure: str) -> list[tuple[str, float]]:
        """(commit, value) of each commit that has one."""
        found = [(run.commit, run.rows.get(key, {}).get(measure)) for run in self.runs]
        return [(commit, value) for commit, value in found if value is not None and value == value]


def is_number(value: float | None) -> bool:
    """Whether it was measured."""
    return value is not None and not math.isnan(value)


def read(folder: Path) -> list[Series]:
    """What is in a results folder of asv; the series measured last comes first.

    Raises:
        DataError: there is no such folder, nothing in it, or a damaged file.
    """
    if not folder.is_dir():
        raise DataError(f"bench.report: {folder} is not a folder; asv run makes .asv/results")
    series = []
    for file in sorted(folder.glob("*/machine.json")):
        machine = {name: str(value) for name, value in _load(file).items() if name != "version"}
        paths = sorted(path for path in file.parent.glob("*.json") if path != file)
        runs = [_run(path, file.parent.name) for path in paths]
        for name in sorted({run.environment for run in runs}):
            own = [run for run in runs if run.environment == name]
            series.append(Series(machine=machine, runs=sorted(own, key=lambda run: run.date)))
    if not series:
        raise DataError(f"bench.report: {folder} holds no results; asv run records some")
    return sorted(series, key=lambda one: one.latest.started, reverse=True)


def _load(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"bench.report: {path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"bench.report: {path} must hold a JSON object")
    return found


def _run(path: Path, machine: str) -> Run:
    data = _load(path)
    try:
        columns = data["result_columns"]
        stored = {name: row for name, row in data["results"].items() if row is not None}
        tables = {name: dict(zip(columns, row)) for name, row in stored.items()}
        rows: dict[Key, Values] = {}
        for name, table in tables.items():
            suite, _, measure = name.rpartition(".")
            for key, value in _values(suite, table):
                rows.setdefault(key, {})[measure] = value
        return Run(
            commit=data["commit_hash"],
            date=int(data["date"]),
            started=max((table.get("started_at") or 0 for table in tables.values()), default=0),
            machine=machine,
            environment=data["env_name"],
            versions=_versions(tables.get(ENVIRONMENT, {})),
            rows=rows,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"bench.report: {path} is no result of asv: {error!r}") from error


def _values(suite: str, table: Mapping[str, Any]) -> Iterator[tuple[Key, float | None]]:
    """(key, value) of each row of a measurement; nothing of one with other parameters."""
    parameters = table.get("params") or []
    if len(parameters) != PARAMETERS:
        return
    keys = list(itertools.product(*parameters))
    # asv writes a lone null where every row failed.
    values = table["result"] or [None] * len(keys)
    for (shape, backend, precision), value in zip(keys, values, strict=True):
        yield (suite, shape, backend, precision), value


def _versions(table: Mapping[str, Any]) -> dict[str, str]:
    """What `bench_environment` put where asv keeps the version of a benchmark."""
    try:
        found = json.loads(table.get("version") or "{}")
    except ValueError:
        return {}
    threads = (table.get("result") or [None])[0]
    if threads is not None:
        found["threads"] = str(round(threads))
    return {name: str(value) for name, value in found.items()}


def shape_of(text: str) -> dict[str, Any]:
    """The sizes of a shape by name: "Shape(m=3, p=2)" is {"m": 3, "p": 2}."""
    call = ast.parse(text, mode="eval").body
    if not isinstance(call, ast.Call):
        return {"shape": text}
    return {word.arg or "": ast.literal_eval(word.value) for word in call.keywords}
