"""One stage that measures, in a process of its own: `python -m bench.gpu.stage NAME SETTINGS`."""

import json
import sys
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from bench.gpu.clock import Clock, DeviceLost, reason
from bench.gpu.notes import Key, Notes, OutOfTime

UNFINISHED, LOST = 75, 76
"""Exit codes: rows are left for the next call; the device is lost, and what was tried to blame."""


class Run(NamedTuple):
    """What a stage is told.

    Attributes:
        out: the folder of all results.
        device: "cuda", or "cpu" in a dry run.
        toy: sizes that take no time.
        images: a prepared store, if one was given.
        notes: where its rows go.
        clock: for the device.
    """

    out: Path
    device: str
    toy: bool
    images: Path | None
    notes: Notes
    clock: Clock

    def row(self, name: str, make: Callable[[], Any]) -> None:
        """Add a row to the notes; one that raises says why. The memory it took is free afterwards.

        Raises:
            OutOfTime, DeviceLost: this process can add no row.
        """
        self.notes.row(name, lambda: self._guarded(make))
        self.clock.free()

    def _guarded(self, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except DeviceLost:
            raise
        except Exception as error:
            self.clock.require_device(error)
            traceback.print_exc(file=sys.stdout)
            return {"failed": reason(error)}


def notes_path(out: Path, name: str) -> Path:
    """Where the rows of an unfinished stage are."""
    return out / f".{name}.rows.json"


def main(argv: list[str]) -> int:
    """Measure: the rows are in the notes, and in them what is "wrong" or has "failed"."""
    name, settings = argv[0], json.loads(argv[1])
    out = Path(settings["out"])
    key: Key = settings["key"]
    notes = Notes(notes_path(out, name), key, time.monotonic() + settings["seconds"])
    notes.trying = []
    device, toy = settings["device"], settings["toy"]
    images = Path(settings["images"]) if settings["images"] else None
    try:
        run = Run(out, device, toy, images, notes, Clock(device, notes, quick=toy))
        import_module(f"bench.gpu.{name}").measure(run)
    except OutOfTime as error:
        print(error)
        return UNFINISHED
    except DeviceLost as error:
        print(error)
        return LOST
    except Exception:
        traceback.print_exc(file=sys.stdout)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
