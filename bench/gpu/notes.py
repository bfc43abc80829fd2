"""The rows that a stage has so far, kept on disk: one that was ended goes on behind its last row.

What is being tried is noted before it is: a kernel that takes its process with it, or never comes
back, is left out when the stage goes on.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from krrst_fast.errors import DataError
from krrst_fast.files import read_json, write_json

Key = dict[str, Any]


class OutOfTime(Exception):
    """The time of the stage was up before its last row."""


class Notes:
    """Rows by name, what is being tried, and what is left out and why.

    Args:
        path: the file, which is there from the first row to the end of the stage.
        key: what the rows were measured on; those of another key are thrown away.
        deadline: of time.monotonic, after which no row is begun.
    """

    def __init__(self, path: Path, key: Key, deadline: float = float("inf")) -> None:
        self.path, self.key, self.deadline = path, key, deadline
        try:
            found = read_json(path)
        except DataError:
            found = {}
        found = found if found.get("key") == key else {}
        self.rows: dict[str, Any] = found.get("rows", {})
        self.broken: dict[str, str] = found.get("broken", {})
        self.trying: list[str] = found.get("trying", [])

    def save(self) -> None:
        told = {"key": self.key, "rows": self.rows, "broken": self.broken, "trying": self.trying}
        write_json(self.path, told)

    def row(self, name: str, make: Callable[[], Any]) -> None:
        """Add a row, unless it is there already.

        Raises:
            OutOfTime: there is no time left for it.
        """
        if name in self.rows:
            return
        if name in self.broken:
            self.rows[name] = {"failed": self.broken[name]}
            self.save()
            return
        if time.monotonic() > self.deadline:
            raise OutOfTime(f"the time was up after {len(self.rows)} rows, before {name}")
        with self.attempt(name):
            self.rows[name] = make()
        print(name, flush=True)

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Note that this is being tried. What raises is still being tried, on disk."""
        self.trying = [*self.trying, name]
        self.save()
        yield
        self.trying = self.trying[:-1]
        self.save()

    def blame(self, why: str) -> str | None:
        """Leave out what was being tried when the process ended; its name, if it had begun."""
        if not self.trying:
            return None
        name = self.trying[-1]
        self.broken[name], self.trying = why, []
        self.save()
        return name
