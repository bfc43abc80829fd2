"""Files that are either whole or not there: write to a temporary name, flush, rename."""

import hashlib
import io
import itertools
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from krrst_fast.errors import CheckpointError, ConfigError, DataError, KrrstError
from krrst_fast.runs.seal import (
    BLANK,
    KEY,
    WRONG,
    Sink,
    check_row,
    check_seal,
    row_line,
    seal,
    sealed_safetensors,
    warn_unsealed,
)

_NUMBERS = itertools.count()
_LIVE: set[str] = set()
"""What this process is writing now: absolute paths, without the ending `.tmp` or `.old`."""
_MAGIC = b"krrst_fast state, sha256 "
_HEAD = len(_MAGIC) + 64 + 1
"""Bytes of the first line of a saved state: the words above, and the digest of all that follows."""


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


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Save a dict of tensors and plain values; a reader sees the old file or the new one, whole.

    The first line holds a digest of the rest, which `load_state` compares.

    Raises:
        OSError: It could not be written, as on a full disk.
    """
    # Unbuffered: the file is closed without a last write that could fail a second time.
    with atomic_path(path) as temporary, temporary.open("wb", buffering=0) as file:
        sink = Sink(file)
        file.write(_MAGIC + 64 * b"0" + b"\n")
        try:
            torch.save(dict(state), sink)  # type: ignore[arg-type]
        except RuntimeError as error:
            # Torch closes its archive after Ctrl-C too, and finds it incomplete.
            if isinstance(error.__context__, KeyboardInterrupt):
                raise error.__context__ from None
            if sink.error is None:
                raise
            raise OSError(sink.error.errno, sink.error.strerror, str(path)) from None
        file.seek(len(_MAGIC))
        file.write(sink.digest.hexdigest().encode())


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Save a safetensors file atomically, with its checksum in the metadata.

    Raises:
        OSError: It could not be written, as on a full disk.
    """
    from safetensors.torch import save

    # Through memory: the library's own writer turns a full disk into an error of its own.
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with atomic_path(path) as temporary:
        temporary.write_bytes(sealed_safetensors(save(plain, dict(metadata))))


def load_torch(
    path: Path,
    *,
    what: str,
    failure: type[KrrstError],
    map_location: str | torch.device = "cpu",
    mmap: bool = False,
) -> Any:
    """Load what `torch.save` wrote. Nothing but tensors and plain values is unpickled.

    Args:
        path: The file.
        what: Kind of the file, for the message.
        failure: The error to raise.
        map_location: The device that its tensors come to.
        mmap: Map the tensors into memory, where the file allows it.

    Raises:
        KrrstError: Of type `failure`: the file is missing or damaged.
    """
    try:
        mapped = mmap and zipfile.is_zipfile(path)
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise failure(f"{path}: there is no such {what}") from None
    except Exception as error:  # a damaged file makes the unpickler raise nearly anything
        # Also an OSError, from a seek past the start; one that names the file is about opening it.
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise failure(f"{path}: not a readable {what} ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    """Return one line on why torch could not load a file, without its advice to run the code."""
    text = str(error).strip()
    if "weights_only" in text or "Weights only" in text:
        named = re.search(r"GLOBAL (\S+)", text)
        what = f" ({named[1]})" if named else ""
        return f"it is damaged, or holds more than tensors and plain values{what}"
    return text.partition("\n")[0] or type(error).__name__


def load_state(
    path: Path, *, map_location: str | torch.device = "cpu", sealed: bool = False
) -> dict[str, Any]:
    """Load what `save_state` wrote, or a dict that torch saved, which has no checksum.

    Args:
        path: The file.
        map_location: The device that its tensors come to.
        sealed: Warn if the file has no checksum, as those of earlier versions.

    Raises:
        CheckpointError: The file is missing, damaged, or holds something else.
    """
    what = "checkpoint"
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
            data = file.read() if head.startswith(_MAGIC) else b""
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such {what}") from None
    if head.startswith(_MAGIC):
        digest = hashlib.sha256(data).hexdigest()
        if head != _MAGIC + digest.encode() + b"\n":
            raise CheckpointError(f"{path}: not a readable {what} ({WRONG})")
        try:
            state = torch.load(io.BytesIO(data), map_location=map_location, weights_only=True)
        except Exception as error:
            reason = _reason(error)
            raise CheckpointError(f"{path}: not a readable {what} ({reason})") from error
    else:
        state = load_torch(path, what=what, failure=CheckpointError, map_location=map_location)
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}, not a checkpoint")
    if sealed and not head.startswith(_MAGIC):
        warn_unsealed(path, what)
    return state


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
    """Add one line to a log of JSON objects; drop a last line that is incomplete after a kill."""
    with path.open("ab+") as file:
        end = file.tell()
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write(row_line(row))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a log of JSON objects; skip a last line that is incomplete after a kill.

    Raises:
        DataError: An earlier line is not a JSON object, or is damaged.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise DataError(f"{path}: line {number} is not a JSON object")
        try:
            rows.append(check_row(row))
        except ValueError as error:
            raise DataError(f"{path}: line {number}: {error}, the file is damaged") from None
    return rows
