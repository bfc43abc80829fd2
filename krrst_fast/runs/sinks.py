"""Copies of the log of a run, for TensorBoard and Weights & Biases."""

import math
import os
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from krrst_fast.errors import ConfigError
from krrst_fast.runs.files import write_text

SinkName = Literal["tensorboard", "wandb"]
Row = Mapping[str, Any]

_SUFFIX = ".krrst"
"""Ends the names of our event files: those of others in the folder are left alone."""
_INIT_SECONDS, _FINISH_SECONDS = 20.0, 20.0
"""How long wandb may wait for a network, where WANDB_MODE asks for one."""


def require_sinks(names: Sequence[str]) -> None:
    """Refuse sinks whose package is not installed, without importing it.

    Raises:
        ConfigError: The message names the extra to install.
    """
    for name in names:
        # A folder ./wandb, which wandb leaves where it runs, is a package without origin to Python.
        if (spec := find_spec(name)) is None or spec.origin is None:
            raise ConfigError(
                f"sinks: {name} needs the package {name}: pip install 'krrst-fast[{name}]'"
            )


class _Sink(Protocol):
    """Where rows go."""

    def write(self, row: Row) -> None:
        """Take a row, whose step is larger than that of the last one."""

    def close(self, failed: bool) -> None:
        """Take no more rows."""


class Sinks:
    """The sinks of a run, to be used as a context manager; none of them can end the run.

    Each gets the rows of metrics.jsonl anew, then every row that is written: whatever a killed
    process had sent, a sink holds what metrics.jsonl holds, each step once. A sink that fails is
    left out from then on, with a warning.

    Args:
        names: Which ones.
        folder: The run folder: they write into a folder of their name in it.
        settings: The settings of the run, for the page of wandb.
        rows: The rows that the run has so far.
    """

    def __init__(
        self,
        names: Sequence[SinkName],
        folder: Path,
        *,
        settings: Mapping[str, Any],
        rows: Sequence[Row],
    ) -> None:
        self._open: dict[str, _Sink] = {}
        for name in names:
            self._guarded(name, partial(self._begin, name, folder, settings, rows))

    def _begin(
        self, name: SinkName, folder: Path, settings: Mapping[str, Any], rows: Sequence[Row]
    ) -> None:
        sink: _Sink
        if name == "tensorboard":
            sink = _TensorBoard(folder / name, rows)
        else:
            sink = _Wandb(folder, settings)
        self._open[name] = sink
        for row in rows:
            sink.write(row)

    def write(self, row: Row) -> None:
        """Send a row that metrics.jsonl has just got."""
        for name, sink in list(self._open.items()):
            self._guarded(name, partial(sink.write, row))

    def __enter__(self) -> "Sinks":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for name, sink in list(self._open.items()):
            self._guarded(name, partial(sink.close, kind is not None))
        self._open.clear()

    def _guarded(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # whatever their packages raise, the run goes on
            if (sink := self._open.pop(name, None)) is not None:
                with suppress(Exception):
                    sink.close(failed=True)
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            warnings.warn(
                f"{name} gets no more rows ({reason}); metrics.jsonl has them all, and the run "
                "goes on",
                stacklevel=4,
            )


def _scalars(row: Row) -> dict[str, float]:
    return {
        key: value
        for key, value in row.items()
        if key != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }


class _TensorBoard:
    """One event file, written row by row in this thread: a kill loses no row that was written.

    torch's SummaryWriter has a thread, whose buffer a kill loses and whose failure nobody sees.
    """

    def __init__(self, folder: Path, rows: Sequence[Row]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(exist_ok=True)
        earlier = list(folder.glob(f"events.out.tfevents.*{_SUFFIX}"))
        now = time.time()
        # TensorBoard reads files in the order of their names, and goes on after the last one.
        stamp = max([int(now), *(int(path.name.split(".")[3]) + 1 for path in earlier)])
        name = f"events.out.tfevents.{stamp:010d}{_SUFFIX}"
        # Computed seconds since the beginning of the run, also over interruptions.
        self._zero = now - (rows[-1]["seconds"] if rows else 0.0)
        for path in earlier:
            # Emptied at first: a TensorBoard that is reading it would not get over its end.
            if path.stat().st_size:
                os.truncate(path, 0)
            else:
                path.unlink()
        self._event = Event
        self._writer = RecordWriter((folder / name).open("wb"))
        self._put(Event(wall_time=self._zero, file_version="brain.Event:2"))
        # A TensorBoard that is running forgets what it had read of the files before.
        started = SessionLog(status=SessionLog.START)
        self._put(Event(wall_time=self._zero, step=0, session_log=started))

    def _put(self, event: Any) -> None:
        self._writer.write(event.SerializeToString())
        self._writer.flush()

    def write(self, row: Row) -> None:
        event = self._event(wall_time=self._zero + row["seconds"], step=row["step"])
        for key, value in _scalars(row).items():
            event.summary.value.add(tag=key, simple_value=value)
        self._put(event)

    def close(self, failed: bool) -> None:
        self._writer.close()


class _Wandb:
    """A run of Weights & Biases: offline, without any network, unless WANDB_MODE differs."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        mode = os.environ.get("WANDB_MODE") or "offline"
        if mode == "offline":
            # It would report its own errors and timings home.
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        number = _run_id(folder / "wandb")
        # Each of them holds the rows from the first one on, and so will the new one.
        for earlier in (folder / "wandb").glob(f"offline-run-*-{number}"):
            # The service of a killed process may still be writing its last lines there.
            shutil.rmtree(earlier, ignore_errors=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "krrst"),
            name=folder.resolve().name,
            id=number,
            dir=str(folder),
            resume="allow" if mode in ("online", "shared") else None,
            mode=mode,  # type: ignore[arg-type]
            config=dict(settings),
            # A run that the caller has under way is another one, and not ours to end.
            reinit="create_new",
            settings=wandb.Settings(
                console="off",
                disable_git=True,
                disable_code=True,
                finish_timeout=_FINISH_SECONDS,
                init_timeout=_INIT_SECONDS,
                login_timeout=_INIT_SECONDS,
                silent=True,
                x_disable_machine_info=True,
                x_disable_stats=True,
            ),
        )
        # What the server has of a run that goes on; it drops rows of earlier steps.
        self._first = self._run.starting_step

    def write(self, row: Row) -> None:
        if row["step"] >= self._first:
            values = {k: v for k, v in _scalars(row).items() if math.isfinite(v)}
            self._run.log(values, step=row["step"])

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _run_id(folder: Path) -> str:
    """Return the number of the run at wandb, which is drawn once and kept beside its files."""
    path = folder / "krrst-id"
    folder.mkdir(exist_ok=True)
    if not path.exists():
        write_text(path, uuid.uuid4().hex[:12])
    return path.read_text(encoding="utf-8")
