"""A large matrix on the disk that is computed once, in blocks, and taken up after a kill."""

import fcntl
import json
import os
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from krrst_fast.errors import NonFiniteError
from krrst_fast.runs.files import write_json
from krrst_fast.runs.progress import progress_bar

FORMAT_VERSION = 1
_PROGRESS, _LOCK = "rows.json", "lock"
_FILES = {torch.float32: "rows.f32", torch.float16: "rows.f16"}
_BLOCKS_BETWEEN_SAVES = 8
_READ = 1 << 24
_LONG = 600.0
"""Seconds above which it is said how long the rest will take."""


def computed_rows(
    folder: Path,
    shape: tuple[int, int],
    inputs: Mapping[str, str],
    compute: Callable[[Tensor], Tensor],
    *,
    block: int,
    what: str,
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
) -> Tensor:
    """Return a memory-mapped matrix, whose rows are computed where the folder lacks them.

    Blocks do not depend on where a killed process stopped, so that the result has the bits of one
    that was not. A second process waits for the first and then finds its rows.

    Args:
        folder: Holds the matrix, made if needed.
        shape: (N, D).
        inputs: What the rows depend on; rows of other inputs are computed again, with a warning.
        compute: Row numbers [n] -> rows [n, D].
        block: Rows in a call of `compute`.
        what: Names the rows in the bar and in messages.
        dtype: Of the matrix: float32 or float16.
        progress: Show a bar where there is a terminal.

    Raises:
        NonFiniteError: A row holds NaN or infinity.
        OSError: The folder cannot be written, as on a full disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / _LOCK):
        about = {"format_version": FORMAT_VERSION, "shape": list(shape), "inputs": dict(inputs)}
        if dtype != torch.float32:
            about["dtype"] = str(dtype)
        rows = _Rows(folder / _FILES[dtype], shape, dtype, what)
        done, crc = _taken_up(rows, about)
        if done < shape[0]:
            _compute(rows, about, compute, (done, crc), block, progress)
    numbers = np.float32 if dtype == torch.float32 else np.float16
    return torch.from_numpy(np.memmap(rows.path, numbers, mode="c", shape=shape))


def size_on_disk(folder: Path, dtype: torch.dtype) -> int:
    """Return the bytes of the rows that a folder has."""
    path = folder / _FILES[dtype]
    return path.stat().st_size if path.exists() else 0


@dataclass(frozen=True)
class _Rows:
    """The file of a matrix."""

    path: Path
    shape: tuple[int, int]
    dtype: torch.dtype
    what: str

    @property
    def progress(self) -> Path:
        """The file that says how many rows are there."""
        return self.path.parent / _PROGRESS

    def size(self, count: int) -> int:
        """Return the bytes of so many rows."""
        return count * self.shape[1] * self.dtype.itemsize


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    # The system drops the lock of a process that is killed.
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _taken_up(rows: _Rows, about: dict[str, Any]) -> tuple[int, int]:
    """Return how many rows are there and whole, and their CRC-32; 0 where they cannot be used."""
    path = rows.progress
    if not path.exists():
        return 0, 0
    reason = "damaged"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        done, crc = int(saved.pop("done")), int(saved.pop("crc32"))
        if saved == about:
            if _checksum(rows.path, rows.size(done)) == crc:
                return done, crc
        else:
            reason = "of other inputs"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    where = rows.path.parent
    warnings.warn(f"{where}: the {rows.what} there are {reason}; computed again", stacklevel=3)
    path.unlink()
    return 0, 0


def _checksum(path: Path, length: int) -> int | None:
    """Return the CRC-32 of the first bytes of a file; None if it is shorter."""
    crc = 0
    with path.open("rb") as file:
        while length:
            part = file.read(min(length, _READ))
            if not part:
                return None
            crc = zlib.crc32(part, crc)
            length -= len(part)
    return crc


def _compute(
    to: _Rows,
    about: dict[str, Any],
    compute: Callable[[Tensor], Tensor],
    taken_up: tuple[int, int],
    block: int,
    progress: bool,
) -> None:
    (count, width), (done, crc), what = to.shape, taken_up, to.what
    to.path.touch()
    bar = progress_bar(progress, total=count, initial=done, desc=what, unit="image")
    with bar, to.path.open("r+b", buffering=0) as file:
        file.truncate(to.size(done))
        file.seek(0, os.SEEK_END)
        unsaved = 0
        began, first, said = time.perf_counter(), done, False
        while done < count:
            index = torch.arange(done, min(done + block, count))
            rows = compute(index).detach().cpu().to(to.dtype)
            if rows.shape != (len(index), width):
                raise ValueError(
                    f"{what}: compute must give [{len(index)}, {width}], got {tuple(rows.shape)}"
                )
            if not torch.isfinite(rows).all():
                raise NonFiniteError(
                    f"{what}: rows {done} to {done + len(index) - 1} hold NaN or infinity"
                )
            data = memoryview(rows.contiguous().numpy().tobytes())
            crc = zlib.crc32(data, crc)
            while data:
                data = data[file.write(data) :]
            done += len(index)
            unsaved += 1
            if unsaved == _BLOCKS_BETWEEN_SAVES or done == count:
                os.fsync(file.fileno())
                write_json(to.progress, {**about, "done": done, "crc32": crc})
                unsaved = 0
            bar.update(len(index))
            left = (time.perf_counter() - began) / (done - first) * (count - done)
            if left > _LONG and not said and done >= first + 2 * block:
                said = True
                warnings.warn(
                    f"{what}: {count - done:,} of {count:,} rows are still to be computed: about "
                    f"{left / 60:.0f} minutes; a run that is stopped goes on from there",
                    stacklevel=3,
                )
