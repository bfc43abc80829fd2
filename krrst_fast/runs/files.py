"""Files that are either whole or not there: write to a temporary name, flush, rename."""

import itertools
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from krrst_fast.errors import ConfigError, DataError
from krrst_fast.runs.seal import (
    BLANK,
    KEY,
    check_row,
    check_seal,
    row_line,
    seal,
    warn_unsealed,
)

_NUMBERS = itertools.count()
_LIVE: set[str] = set()
"""What this process is writing now: absolute paths, without the ending `.tmp` or `.old`."""


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _stale(path: Path, ending: str) -> list[Path]:
    """Return the files that a killed process left for `path`, not for a path like `<path>.v2`."""
    name = re.compile(rf"\.{re.escape(path.name)}\.(\d+)(?:-\d+)?\.{ending}")
    found = []
    for entry in sorted(path.parent.iterdir()) if path.parent.is_dir() else ():
        if not (match := name.fullmatch(entry.name)) or _live_key(entry) in _LIVE:
            continue
        # This process's number may have been another's before, as in a container's every start.
        if match[1] == str(os.getpid()) or not _alive(match[1]):
            found.append(entry)
    return found


def _live_key(temporary: Path) -> str:
    return os.path.abspath(temporary.with_suffix(""))


def recover_folder(path: Path) -> None:
    """Move a folder back that was moved aside, and not yet replaced when its process was killed."""
    path = Path(os.path.abspath(path))
    if not path.exists() and (aside := _stale(path, "old")):
        os.rename(aside[-1], path)


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """Return an unused name beside `path`; remove the leftovers of killed processes."""
    recover_folder(path)
    for stale in (*_stale(path, "old"), *_stale(path, "tmp")):
        _remove(stale)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{next(_NUMBERS)}.tmp")
    key = _live_key(temporary)
    _LIVE.add(key)
    try:
        yield temporary
    finally:
        _remove(temporary)
        _LIVE.discard(key)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` when the block ends without an error."""
    with _temporary(path) as temporary:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)


@contextmanager
def atomic_folder(path: Path, *, overwrite: bool = False, marker: str = "") -> Iterator[Path]:
    """Yield a temporary folder that replaces `path` when the block ends without an error.

    An existing folder is replaced only as `refuse_existing` allows, and only once the new one is
    whole.

    Raises:
        ConfigError: `path` exists and may not be replaced.
    """
    path = Path(os.path.abspath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(path) as temporary:
        refuse_existing(path, overwrite=overwrite, marker=marker)
        temporary.mkdir()
        yield temporary
        for file in sorted(temporary.rglob("*")):
            _sync(file)
        _sync(temporary)
        if path.exists():
            _replace_folder(temporary, path)
        else:
            os.rename(temporary, path)
        _sync(path.parent)


def _replace_folder(new: Path, path: Path) -> None:
    """Put `new` in the place of the folder `path`, which stays if that fails."""
    old = new.with_suffix(".old")
    try:
        os.rename(path, old)
        os.rename(new, path)
    except BaseException:
        if old.exists() and not path.exists():
            os.rename(old, path)
        raise
    _remove(old)


def refuse_existing(path: Path, *, overwrite: bool = False, marker: str = "") -> None:
    """Raise ConfigError if `path` is a file, or a folder whose contents may not be replaced.

    With `overwrite` a folder may be replaced when it holds the file `marker`: so a folder that
    some other program filled is never emptied by a slip of the keyboard.
    """
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path}: the output is to be a folder, and a file of that name exists")
    if not path.exists() or not any(path.iterdir()):
        return
    if not overwrite:
        replaces = "; --overwrite replaces it" if marker and (path / marker).exists() else ""
        raise ConfigError(f"{path}: the output folder exists and is not empty{replaces}")
    if marker and not (path / marker).exists():
        raise ConfigError(f"{path}: not replaced, because it holds no {marker} of an earlier run")


def new_folder(path: Path, *, overwrite: bool = False) -> Path:
    """Make the output folder `path`; ConfigError if it holds anything and `overwrite` is false."""
    refuse_existing(path, overwrite=overwrite)
    path.mkdir(parents=True, exist_ok=True)
    return path


def write_text(path: Path, text: str) -> None:
    """Write `text` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, *, sealed: bool = False) -> None:
    """Write `value` as indented JSON, atomically; NaN and infinity are refused, being no JSON.

    Args:
        path: The file.
        value: JSON values.
        sealed: Add a checksum to an object, which `read_json` compares: for what people read and
            do not edit.
    """
    if not sealed:
        write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")
        return
    text = json.dumps({**value, KEY: BLANK}, indent=2, allow_nan=False) + "\n"
    write_text(path, seal(text.encode()).decode())


def read_json(path: Path, *, sealed: str = "") -> Any:
    """Read a JSON file; compare its checksum, where it has one, and leave it out.

    Args:
        path: The file.
        sealed: What the file is, in a warning if it has no checksum; "" needs none.

    Raises:
        DataError: It is missing, not JSON, or damaged.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    checked = check_seal(path, data, failure=DataError)
    try:
        value = json.loads(data.decode("utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not a JSON file ({error})") from None
    if checked and isinstance(value, dict):
        value.pop(KEY, None)
    elif sealed:
        warn_unsealed(path, sealed)
    return value


def append_jsonl(path: Path, row: Mapping[str, Any]) -> None:
    """Add one line to a log of JSON objects; drop a last line that is incomplete after a kill.

    Raises:
        DataError: The last line is damaged.
    """
    with path.open("ab+") as file:
        end = file.tell()
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                start = file.read().rfind(b"\n") + 1
                file.seek(start)
                if _is_whole(path, file.read()):
                    file.write(b"\n")
                else:
                    file.truncate(start)
        file.write(row_line(row))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a log of JSON objects; leave out, with a warning, a last line that a kill cut short.

    Raises:
        DataError: A line is not a JSON object, or is damaged.
    """
    if not path.exists():
        return []
    *lines, last = path.read_bytes().split(b"\n")
    rows = [_row(path, number, line) for number, line in enumerate(lines, 1)]
    if _is_whole(path, last):
        rows.append(_row(path, len(lines) + 1, last))
    elif last:
        warnings.warn(
            f"{path}: the last line, {len(last)} bytes, was cut short, as by a kill, and is left "
            f"out; {len(rows)} rows are whole",
            stacklevel=2,
        )
    return rows


def _is_whole(path: Path, line: bytes) -> bool:
    """Return whether a line without its end is a row; a beginning of one is not.

    Raises:
        DataError: Something else follows the row: the end of its line is damaged.
    """
    text = line.decode("utf-8", "replace")
    try:
        _, stop = json.JSONDecoder().raw_decode(text)
    except ValueError:
        return False
    if stop < len(text):
        raise DataError(f"{path}: the end of the last line is {text[stop:]!a:.20}, need a newline")
    return True


def _row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise DataError(f"{path}: line {number} is not a JSON object")
    try:
        return check_row(row)
    except ValueError as error:
        raise DataError(f"{path}: line {number}: {error}, the file is damaged") from None
